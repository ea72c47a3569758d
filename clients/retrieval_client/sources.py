"""Catalog files → rows, streamed: Parquet, CSV, JSON lines, a data folder, a folder of images."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

from retrieval_client.csv_records import csv_records, with_numbers
from retrieval_client.parquet_records import Record, open_parquet, parquet_records
from retrieval_contract.errors import ItemError, Reason, SourceError
from retrieval_contract.preprocess import MAX_IMAGE_BYTES

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
STDIN = Path("-")
SETTLED = 1000
"""Of so many lines at most the columns of JSON lines are settled."""

Read = Record | ItemError
"""A record, or why it could not be read."""


@dataclass(frozen=True)
class Columns:
    """Column names that are tried, in order; the first that is there is taken."""

    id: tuple[str, ...] = ("id", "product_id", "sku", "asin")
    title: tuple[str, ...] = ("title", "name", "product_title")
    image: tuple[str, ...] = ("image", "jpeg", "photo", "image_path", "image_file")
    insisted: frozenset[str] = frozenset()
    """Roles whose column the caller named: it must be there."""

    def given(self, **names: str | None) -> Columns:
        """The same with the names that a caller insists on."""
        named = {role: (name,) for role, name in names.items() if name}
        return replace(self, **named, insisted=frozenset(named))

    def find(self, there: Sequence[str]) -> dict[str, str]:
        """Role → column, of those that are there."""
        found = {}
        for role in ("id", "title", "image"):
            column = next((name for name in getattr(self, role) if name in there), None)
            if column is not None:
                found[role] = column
        return found

    def find_in_header(self, path: Path, header: Sequence[str]) -> dict[str, str]:
        """As `find`; SourceError when a file with this header cannot be a catalog."""
        found = self.find(header)
        missing = {"id", *self.insisted} - set(found)
        if not {"title", "image"} & set(found):
            missing |= {"title"}
        if missing:
            role = min(missing)
            raise SourceError(
                f"{path}: expected a column for the {role} ({', '.join(getattr(self, role))}), "
                f"got {sorted(header)}; name it with --{role}-column"
            )
        return found


@dataclass(frozen=True)
class SourceRow:
    """One product as its source gives it; `problem` says why it could not be read."""

    id: str
    title: bytes = b""
    image: bytes = b""
    attributes: dict[str, Any] = field(default_factory=dict)
    problem: ItemError | None = None
    number: int = 0

    @property
    def name(self) -> str:
        """The id, or which row it was."""
        return self.id or f"row {self.number}"


@dataclass(frozen=True)
class Part:
    """Rows numbered `start` + 1 to `stop`; of `ids_only` nothing but the id is wanted."""

    start: int = 0
    stop: int | None = None
    ids_only: bool = False

    def only(self, columns: Mapping[str, str]) -> list[str] | None:
        """The columns to read; None: all."""
        return [columns["id"]] if self.ids_only and "id" in columns else None

    def wanted(self, columns: Mapping[str, str]) -> Mapping[str, str]:
        """Of the columns of a source."""
        if not self.ids_only:
            return columns
        return {role: name for role, name in columns.items() if role == "id"}


@dataclass(frozen=True)
class Source:
    """A source that can be read again; `rows_expected` is None where only reading tells.

    `numbers`: columns of a CSV file, whose cells are texts, that hold numbers.
    """

    path: Path
    columns: Columns = Columns()
    numbers: tuple[str, ...] = ()

    @property
    def rows_expected(self) -> int | None:
        """From Parquet's footer, or the number of images in a folder."""
        table = self.path / "products.parquet" if self.path.is_dir() else self.path
        if table.suffix == ".parquet" and table.is_file():
            return int(open_parquet(table).metadata.num_rows)
        return sum(1 for _ in _image_files(self.path)) if self.path.is_dir() else None

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[SourceRow]:
        """Every row, in order, or those numbered `start` + 1 to `stop` alone.

        Raises SourceError when the source as a whole cannot be read. A part of Parquet is read
        from the row group that it begins in, of other files from their beginning.
        """
        return self._read(Part(start, stop))

    def ids(self) -> Iterator[tuple[int, str]]:
        """The number of every row and its id, "" where it has none; no picture is read."""
        if self.path == STDIN:
            raise SourceError("expected a source that can be read twice, got stdin; give a file")
        return ((row.number, row.id) for row in self._read(Part(ids_only=True)))

    def _read(self, part: Part) -> Iterator[SourceRow]:
        path = self.path
        if self.numbers and path.suffix != ".csv":
            raise SourceError(
                f"{path}: expected a .csv file with --number, as others say what a number is; "
                "leave it out"
            )
        if path == STDIN:
            return self._json_lines(sys.stdin.buffer, Path(), part)
        if not path.exists():
            raise SourceError(
                f"{path}: not found; expected a .parquet, .csv or .jsonl file, a "
                "folder with products.parquet, a folder of images, or - for JSON lines on stdin"
            )
        if path.is_dir():
            if (path / "products.parquet").is_file():
                return self._data_folder(part)
            return _image_folder(path, part)
        readers = {".parquet": self._parquet, ".csv": self._csv, ".jsonl": self._jsonl}
        if path.suffix not in readers:
            raise SourceError(
                f"{path}: expected {', '.join(readers)} or a folder, got "
                f"'{path.suffix}'; convert it"
            )
        return readers[path.suffix](part)

    def _parquet(self, part: Part) -> Iterator[SourceRow]:
        file = open_parquet(self.path)
        columns = self.columns.find_in_header(self.path, file.schema_arrow.names)
        only = part.only(columns)
        records = parquet_records(self.path, file, part.start, part.stop, only)
        return _rows(records, columns, self.path.parent, part)

    def _data_folder(self, part: Part) -> Iterator[SourceRow]:
        """`products.parquet`, with the pictures of `images.parquet` (same rows, same order)."""
        products, images = self.path / "products.parquet", self.path / "images.parquet"
        file = open_parquet(products)
        header = file.schema_arrow.names
        more = open_parquet(images) if images.is_file() else None
        columns = self.columns.find_in_header(
            products, [*header, *more.schema_arrow.names] if more else header
        )
        only = part.only(self.columns.find(header))
        records = parquet_records(products, file, part.start, part.stop, only)
        if more and not part.ids_only:
            if file.metadata.num_rows != more.metadata.num_rows:
                raise SourceError(
                    f"{self.path}: products.parquet and images.parquet differ in length; write "
                    "both from the same rows"
                )
            pictures = parquet_records(images, more, part.start, part.stop)
            records = self._paired(header, records, more.schema_arrow.names, pictures, part)
        return _rows(records, columns, self.path, part)

    def _paired(
        self,
        header: list[str],
        records: Iterator[Record],
        more: list[str],
        pictures: Iterator[Record],
        part: Part,
    ) -> Iterator[Record]:
        ours, theirs = (self.columns.find(names).get("id") for names in (header, more))
        if not ours or not theirs:
            raise SourceError(
                f"{self.path}: expected an id column ({', '.join(self.columns.id)}) in "
                f"products.parquet and images.parquet, got {header} and {more}"
            )
        for number, (one, other) in enumerate(zip(records, pictures, strict=True), part.start + 1):
            if one[ours] != other[theirs]:
                raise SourceError(
                    f"{self.path}: row {number} is {one[ours]!r} in products.parquet and "
                    f"{other[theirs]!r} in images.parquet; write both in one order"
                )
            yield {**other, **one}

    def _csv(self, part: Part) -> Iterator[SourceRow]:
        # Bytes that are not UTF-8 survive as surrogates, so that their row alone is refused.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header, records = csv_records(self.path, file)
            columns = self.columns.find_in_header(self.path, header)
            if lacking := set(self.numbers) - set(header):
                raise SourceError(
                    f"{self.path}: expected columns {sorted(lacking)}, as --number says, got "
                    f"{sorted(header)}"
                )
            records = islice(records, part.start, part.stop)
            numbered = (with_numbers(record, self.numbers) for record in records)
            yield from _rows(numbered, columns, self.path.parent, part)

    def _jsonl(self, part: Part) -> Iterator[SourceRow]:
        with self.path.open("rb") as file:
            yield from self._json_lines(file, self.path.parent, part)

    def _json_lines(self, lines: Iterable[bytes], folder: Path, part: Part) -> Iterator[SourceRow]:
        """Lines have no header, and may leave out what is null: the first line that has a column
        for a role, of SETTLED lines, settles it; another column is then an attribute."""
        settled: dict[str, str] = {}
        lines = self._insisted(iter(lines)) if self.columns.insisted else lines
        for number, line in islice(enumerate(lines, start=1), part.stop):
            skipped = number <= part.start
            if (skipped and number > SETTLED) or not line.strip():
                continue
            record = _json_object(line)
            there = () if isinstance(record, ItemError) else tuple(record)
            columns = self.columns.find(there) | settled
            if number <= SETTLED:
                settled = columns
            if not skipped:
                yield _row(record, part.wanted(columns), number, folder)

    def _insisted(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        """The same lines; SourceError where the first SETTLED lack a column that was named."""
        first: list[bytes] = []
        there: set[str] = set()
        while not self.columns.insisted <= set(self.columns.find(tuple(there))):
            line = next(lines, b"") if len(first) < SETTLED else b""
            if not line and there:
                self.columns.find_in_header(self.path, tuple(there))  # raises
            if not line:
                break
            first.append(line)
            record = _json_object(line)
            there |= set() if isinstance(record, ItemError) else set(record)
        return chain(first, lines)


def _json_object(line: bytes) -> Read:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as exc:
        return ItemError(Reason.BAD_ATTRIBUTES, f"not a JSON line ({exc})")
    if isinstance(record, dict):
        return record
    return ItemError(Reason.BAD_ATTRIBUTES, "expected a JSON object on the line")


def _rows(
    records: Iterator[Read], columns: Mapping[str, str], folder: Path, part: Part
) -> Iterator[SourceRow]:
    for number, record in enumerate(records, part.start + 1):
        yield _row(record, part.wanted(columns), number, folder)


def _row(record: Read, columns: Mapping[str, str], number: int, folder: Path) -> SourceRow:
    """One record → one row; whatever is wrong with it becomes its `problem`."""
    product_id = ""
    try:
        if isinstance(record, ItemError):
            raise record
        product_id = _id(_read(record.get(columns.get("id", ""))))
        for value in record.values():
            _read(value)
        return SourceRow(
            product_id,
            _text_bytes(record.get(columns.get("title", ""))),
            _image_bytes(record.get(columns.get("image", "")), folder),
            _attributes(record, set(columns.values())),
            number=number,
        )
    except ItemError as exc:
        return SourceRow(product_id, problem=exc, number=number)


def _read(value: Any) -> Any:
    """A value of a record; raises what it is where it could not be read."""
    if isinstance(value, ItemError):
        raise value
    return value


def _image_files(folder: Path) -> Iterator[Path]:
    """In an order that stays; of a million files the names of one folder are held at a time."""

    def unreadable(exc: OSError) -> NoReturn:
        raise SourceError(
            f"{exc.filename}: expected a folder that can be read, got one that cannot "
            f"({exc.strerror}); change that, or move it away"
        ) from exc

    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        names.sort()
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(place, name)


def _image_folder(folder: Path, part: Part) -> Iterator[SourceRow]:
    """Every picture below `folder`, by its path as id; titles are missing."""
    files = _image_files(folder)
    if (first := next(files, None)) is None:
        raise SourceError(
            f"{folder}: expected products.parquet or images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}), found neither"
        )
    columns = part.wanted({"id": "id", "image": "image"})
    paths = islice(chain([first], files), part.start, part.stop)
    for number, path in enumerate(paths, part.start + 1):
        name = path.relative_to(folder).as_posix()
        yield _row({"id": name, "image": name}, columns, number, folder)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _id(value: Any) -> str:
    """An id cell as text; "" where there is none."""
    if _is_missing(value):
        return ""
    raw = _text_bytes(value)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        shown = raw.decode("utf-8", "backslashreplace")
        raise ItemError(Reason.BAD_ID, f"expected UTF-8, got {shown}; convert it") from exc


def _text_bytes(value: Any) -> bytes:
    """A title cell as bytes; surrogates go back to the bytes that they stood for."""
    if _is_missing(value):
        return b""
    if isinstance(value, bytes):
        return value
    try:
        return str(value).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON's "\ud800": not what an escape stands for, so not UTF-8
        return str(value).encode("utf-8", "surrogatepass")


def _image_bytes(value: Any, folder: Path) -> bytes:
    """An image cell: bytes, {"bytes": …} as the datasets library writes, or a path."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if _is_missing(value):
        return b""
    if isinstance(value, bytes):
        return value
    path = folder / str(value)
    try:
        if not path.is_file():  # also keeps pipes and devices from being read
            raise FileNotFoundError
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            detail = f"expected at most {MAX_IMAGE_BYTES} bytes, got {size}; shrink it"
            raise ItemError(Reason.IMAGE_TOO_LARGE, detail)
        return path.read_bytes()
    except (OSError, ValueError) as exc:
        raise ItemError(
            Reason.IMAGE_MISSING_FILE,
            f"{path}: no file that can be read ({exc.__class__.__name__}); correct the path or "
            "leave the cell empty",
        ) from exc


def _attributes(record: Record, taken: set[str]) -> dict[str, Any]:
    """The other columns as JSON values; bytes and empty cells are left out."""
    kept: dict[str, Any] = {}
    for name, value in record.items():
        if name in taken or isinstance(value, bytes) or _is_missing(value):
            continue
        plain = isinstance(value, str | int | float | bool | list | dict)
        kept[name] = value if plain else str(value)
    return kept
