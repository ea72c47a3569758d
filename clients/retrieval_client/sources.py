"""Catalog files → rows, streamed: Parquet, CSV, JSON lines, a data folder, a folder of images."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from retrieval_contract.errors import ItemError, Reason, SourceError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
READ_ROWS = 256
"""Rows held at once while reading Parquet; a row may carry a photo of megabytes."""
csv.field_size_limit(2**27)


@dataclass(frozen=True)
class Columns:
    """Column names that are tried, in order; the first that is there is taken."""

    id: tuple[str, ...] = ("id", "product_id", "sku", "asin")
    title: tuple[str, ...] = ("title", "name", "product_title")
    image: tuple[str, ...] = ("image", "jpeg", "photo", "image_path", "image_file")

    def given(self, **names: str | None) -> Columns:
        """The same with the names that a caller insists on."""
        return replace(self, **{role: (name,) for role, name in names.items() if name})


@dataclass(frozen=True)
class SourceRow:
    """One product as its source gives it; `problem` says why it could not be read."""

    id: str
    title: bytes = b""
    image: bytes = b""
    attributes: dict[str, Any] = field(default_factory=dict)
    problem: ItemError | None = None


@dataclass(frozen=True)
class Source:
    """A source that can be read again; `rows_expected` is None where only reading tells."""

    path: Path
    columns: Columns = Columns()

    @property
    def rows_expected(self) -> int | None:
        """From Parquet's footer, or the number of images in a folder."""
        table = self.path / "products.parquet" if self.path.is_dir() else self.path
        if table.suffix == ".parquet" and table.is_file():
            return int(_open_parquet(table).metadata.num_rows)
        return sum(1 for _ in _image_files(self.path)) if self.path.is_dir() else None

    def rows(self) -> Iterator[SourceRow]:
        """Every row, in order; SourceError when the source as a whole cannot be read."""
        path = self.path
        if not path.exists():
            raise SourceError(
                f"{path}: not found; expected a .parquet, .csv or .jsonl file, a "
                "folder with products.parquet, or a folder of images"
            )
        if path.is_dir():
            if (path / "products.parquet").is_file():
                return self._tabular(_data_folder(path), path)
            return _image_folder(path)
        readers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines}
        if path.suffix not in readers:
            raise SourceError(
                f"{path}: expected {', '.join(readers)} or a folder, got "
                f"'{path.suffix}'; convert it"
            )
        return self._tabular(readers[path.suffix](path), path.parent)

    def _tabular(self, records: Iterator[Mapping[str, Any]], folder: Path) -> Iterator[SourceRow]:
        for number, record in enumerate(records, start=1):
            if (problem := record.get(PROBLEM)) is not None:
                yield SourceRow(f"row {number}", problem=problem)
                continue
            yield self._row(record, number, folder)

    def _row(self, record: Mapping[str, Any], number: int, folder: Path) -> SourceRow:
        names = {
            role: next((c for c in wanted if c in record), None)
            for role, wanted in self.columns.__dict__.items()
        }
        if names["id"] is None:
            raise SourceError(
                f"{self.path}: expected an id column ({', '.join(self.columns.id)}), "
                f"got {sorted(record)}; name it with --id-column"
            )
        if names["title"] is None and names["image"] is None:
            raise SourceError(
                f"{self.path}: expected a title or image column, got {sorted(record)}; name them "
                "with --title-column and --image-column"
            )
        raw_id = record[names["id"]]
        product_id = "" if raw_id is None else str(raw_id)
        try:
            return SourceRow(
                product_id,
                _text_bytes(record.get(names["title"] or "")),
                _image_bytes(record.get(names["image"] or ""), folder),
                _attributes(record, set(names.values())),
            )
        except ItemError as exc:
            return SourceRow(product_id or f"row {number}", problem=exc)


PROBLEM = "\0problem"
"""Key of a record that could not be read; no file can hold a column of this name."""


def _open_parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except Exception as exc:
        raise SourceError(f"{path}: not a readable Parquet file ({exc})") from exc


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    for batch in _open_parquet(path).iter_batches(READ_ROWS):
        yield from batch.to_pylist()


def _data_folder(folder: Path) -> Iterator[Mapping[str, Any]]:
    """`products.parquet`, with the pictures of `images.parquet` (same rows, same order) if any."""
    images = folder / "images.parquet"
    if not images.is_file():
        yield from _parquet(folder / "products.parquet")
        return
    pairs = zip(_parquet(folder / "products.parquet"), _parquet(images), strict=True)
    try:
        for number, (product, image) in enumerate(pairs, start=1):
            if product.get("id") != image.get("id"):
                raise SourceError(
                    f"{folder}: row {number} is {product.get('id')!r} in products.parquet and "
                    f"{image.get('id')!r} in images.parquet; write both in one order"
                )
            yield {**image, **product}
    except ValueError as exc:
        raise SourceError(
            f"{folder}: products.parquet and images.parquet differ in length "
            "; write both from the same rows"
        ) from exc


def _csv(path: Path) -> Iterator[Mapping[str, Any]]:
    # Bytes that are not UTF-8 survive as surrogates, so that their row alone is refused.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for record in csv.DictReader(file):
            if None in record:  # where DictReader puts surplus values
                problem = "more values than the header has columns; quote commas"
                yield {PROBLEM: ItemError(Reason.BAD_ATTRIBUTES, problem)}
            else:
                yield record


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as exc:
                yield {PROBLEM: ItemError(Reason.BAD_ATTRIBUTES, f"not a JSON line ({exc})")}
                continue
            yield (
                record
                if isinstance(record, dict)
                else {
                    PROBLEM: ItemError(Reason.BAD_ATTRIBUTES, "expected a JSON object on the line")
                }
            )


def _image_files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES)


def _image_folder(folder: Path) -> Iterator[SourceRow]:
    """Every picture below `folder`, by its path as id; titles are missing."""
    empty = True
    for path in _image_files(folder):
        empty = False
        yield SourceRow(path.relative_to(folder).as_posix(), image=path.read_bytes())
    if empty:
        raise SourceError(
            f"{folder}: expected products.parquet or images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}), found neither"
        )


def _text_bytes(value: Any) -> bytes:
    """A title cell as bytes; surrogates go back to the bytes that they stood for."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return b""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")


def _image_bytes(value: Any, folder: Path) -> bytes:
    """An image cell: bytes, {"bytes": …} as the datasets library writes, or a path."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        return b""
    if isinstance(value, bytes):
        return value
    path = folder / str(value)
    try:
        return path.read_bytes()
    except (OSError, ValueError) as exc:
        raise ItemError(
            Reason.IMAGE_MISSING_FILE,
            f"{path}: cannot be read ({exc.__class__.__name__}); correct the path or "
            "leave the cell empty",
        ) from exc


def _attributes(record: Mapping[str, Any], taken: set[str | None]) -> dict[str, Any]:
    """The other columns as JSON values; bytes and empty cells are left out."""
    kept: dict[str, Any] = {}
    for name, value in record.items():
        if name in taken or value is None or value == "" or isinstance(value, bytes):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            continue
        plain = isinstance(value, str | int | float | bool | list | dict)
        kept[name] = value if plain else str(value)
    return kept
