"""CSV → records that a catalog may trust: what a stray quote or a cut has spoiled is refused."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

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
    header, _ = next(rows, ([], True))
    return header, (_record(header, *row) for row in rows)


def _rows(path: Path, file: IO[str]) -> Iterator[tuple[list[str], bool]]:
    """The values of every row, and whether its line has an end."""
    has_end = True

    def lines() -> Iterator[str]:
        nonlocal has_end
        for line in file:
            has_end = line.endswith(("\n", "\r"))
            yield line

    reader = csv.reader(lines(), strict=True)
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
            yield values, has_end


def _record(
    header: Sequence[str], values: Sequence[str], has_end: bool
) -> dict[str, str] | ItemError:
    """What may be shifted or cut is refused; and its id not believed."""
    said = ",".join(values)
    if len(values) != len(header):
        return ItemError(
            Reason.BAD_ATTRIBUTES,
            f"expected {len(header)} values, as the header has, got {len(values)}: {said[:SHOWN]}; "
            "quote commas, and leave cells empty, not out",
        )
    if not has_end:
        return ItemError(
            Reason.BAD_ATTRIBUTES,
            f"expected a line break at the end of the file, got {said[-SHOWN:]}: was it cut short? "
            "if it is whole, end its last line",
        )
    return dict(zip(header, values, strict=True))
