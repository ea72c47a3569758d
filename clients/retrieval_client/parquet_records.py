"""The records of Parquet files, streamed; what cannot be read costs its own row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_contract.errors import ItemError, Reason, SourceError

READ_ROWS = 64
"""Rows held at once; a row may carry a photo of megabytes."""
READ_BYTES = 2**20
"""Read ahead in a column: without it all of a row group would be held."""

Record = Mapping[str, Any]


def open_parquet(path: Path) -> Any:
    """The file; SourceError where it is none."""
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)
    except Exception as exc:
        raise SourceError(f"{path}: not a readable Parquet file ({exc})") from exc


def parquet_records(
    path: Path, file: Any, start: int, stop: int | None, only: list[str] | None = None
) -> Iterator[Record]:
    """Records `start` to `stop` of an open file, of these columns or all of them.

    A value that Python cannot hold is an ItemError in its record. Raises SourceError where the
    file is damaged behind its footer.
    """
    groups, skipped, at = [], 0, 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if at + rows <= start:
            skipped = at + rows
        elif stop is None or at < stop:
            groups.append(group)
        at += rows
    batches = file.iter_batches(READ_ROWS, row_groups=groups, columns=only)
    end = None if stop is None else stop - skipped
    return islice(_values(path, batches), start - skipped, end)


def _values(path: Path, batches: Iterator[Any]) -> Iterator[Record]:
    try:
        for batch in batches:
            try:
                yield from batch.to_pylist()
            except (ValueError, OverflowError):  # text that is not UTF-8, dates of no year
                yield from (_by_cells(batch, row) for row in range(batch.num_rows))
    except (pa.ArrowException, OSError) as exc:
        raise SourceError(
            f"{path}: expected a Parquet file, got one that is damaged ({exc}); write it anew"
        ) from exc


def _by_cells(batch: Any, row: int) -> Record:
    return {name: _cell(name, batch.column(name)[row]) for name in batch.schema.names}


def _cell(name: str, cell: Any) -> Any:
    """Text that is not UTF-8 as its bytes, so that its row is refused for that."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as exc:
        if isinstance(exc, UnicodeDecodeError) and hasattr(cell, "as_buffer"):
            return cell.as_buffer().to_pybytes()
        return ItemError(Reason.BAD_ATTRIBUTES, f"{name}: cannot be read ({exc})")
