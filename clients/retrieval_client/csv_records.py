"""CSV → records that a catalog may trust: what a stray quote or a cut has spoiled is refused."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from retrieval_contract.errors import ItemError, Reason, SourceError

csv.field_size_limit(2**24)
"""Characters of a cell, at most; more is a quote that nobody closed."""
SHOWN = 80


def csv_records(
    path: Path, file: IO[str]
) -> tuple[Sequence[str], Iterator[dict[str, str] | ItemError]]:
    """The header of a file (opened with `newline=""`), and a record or its problem for every row.

    Raises SourceError where the file cannot be read on: from a stray quote to the next one all rows
    would be one cell.
    """
    rows = _rows(path, file)
    header = next(rows, [])
    return header, (_record(header, values) for values in rows)


def with_numbers(
    record: dict[str, str] | ItemError, columns: Sequence[str]
) -> dict[str, Any] | ItemError:
    """A record whose texts in these columns are numbers; an empty cell stays one."""
    if isinstance(record, ItemError):
        return record
    return {**record, **{name: _number(name, record[name]) for name in columns}}


def _number(name: str, text: str) -> int | float | str | ItemError:
    for kind in (int, float) if "_" not in text else ():  # Python's own, of nobody else
        with suppress(ValueError):
            return kind(text)
    if not text.strip():
        return ""
    detail = f"{name}: expected a number such as 12.5, got {text[:SHOWN]}; correct the cell"
    return ItemError(Reason.BAD_ATTRIBUTES, detail)


def _rows(path: Path, file: IO[str]) -> Iterator[list[str]]:
    """The values of every row that has any."""
    reader = csv.reader(file, strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            raise SourceError(
                f"{path}: expected quotes in pairs, got a row from line {begin} on that has others "
                f"({exc}); close its quote, or write one that is meant twice, in a quoted cell"
            ) from exc
        if values:
            yield values


def _record(header: Sequence[str], values: Sequence[str]) -> dict[str, str] | ItemError:
    """What may be shifted or cut is refused; and its id not believed."""
    if len(values) != len(header):
        return ItemError(
            Reason.BAD_ATTRIBUTES,
            f"expected {len(header)} values, as the header has, got {len(values)}: "
            f"{','.join(values)[:SHOWN]}; quote commas, and leave cells empty, not out",
        )
    return dict(zip(header, values, strict=True))
