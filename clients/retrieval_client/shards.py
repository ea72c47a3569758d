"""Encoded products on disk: Parquet shards that hold what a collection stores, and a manifest.

A shard's name says of which release it is, which part of the source, and a hash of the rows that it
was made from; it appears whole or not at all. The manifest lists the shards that belong together.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_client.records import (
    ATTRIBUTES,
    CONTENT_HASH,
    ID,
    ROW_HASH,
    THUMBNAIL,
    TITLE,
    VECTOR,
    ProductRow,
    stored_from_row,
)
from retrieval_client.rows import Candidate, Reject
from retrieval_contract import models
from retrieval_contract.errors import ReleaseMismatch, SourceError

FORMAT = 1
MANIFEST = "manifest.json"
REJECTS = ".rejects.jsonl"
UNFINISHED = ".part"
GROUP_ROWS = 1024
"""Rows of a row group: what a load holds at once."""
FIELDS = tuple(field for field in models.PRODUCTS.fields if not field.words_of)
"""All that is written; what Milvus makes itself is not."""
KINDS = {
    "VARCHAR": pa.string(),
    "INT64": pa.int64(),
    "JSON": pa.string(),
    "FLOAT_VECTOR": pa.list_(pa.float32()),
}
SCHEMA = pa.schema([pa.field(field.name, KINDS[field.kind], False) for field in FIELDS])
DESCRIBES = b"retrieval_shard"
"""The footer's key of what a shard says of itself."""


@dataclass(frozen=True)
class Shard:
    """One finished shard; `refused` counts rows of its part of the source by reason."""

    number: int
    name: str
    rows: int
    refused: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """Which shards belong together, and what they were made from."""

    release_id: str
    vector_dim: int
    source: str
    shard_rows: int
    thumbnails: bool
    shards: tuple[Shard, ...]
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Products in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def refused(self) -> int:
        """Rows of the source that are in none."""
        return sum(sum(shard.refused.values()) for shard in self.shards)

    def write(self, folder: Path) -> None:
        """In one step, in place of an earlier one."""
        with whole_file(folder, MANIFEST) as file:
            file.path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """SourceError when there is none, or one of another format."""
        path = folder / MANIFEST
        try:
            said = json.loads(path.read_text("utf-8"))
            if said["format"] != FORMAT:
                raise ValueError(f"format {said['format']}")
            shards = tuple(Shard(**shard) for shard in said.pop("shards"))
            return cls(**said, shards=shards)
        except FileNotFoundError as exc:
            raise SourceError(
                f"{path}: not there; `retrieval bulk encode` writes it when all shards are: run it "
                "again until it ends"
            ) from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise SourceError(
                f"{path}: expected a manifest of format {FORMAT}, got another ({exc}); encode anew"
            ) from exc


class MadeFrom:
    """The hash in a shard's name: over its rows as they are stored or refused, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(f"{FORMAT}".encode(), digest_size=16)

    def good(self, row: Candidate) -> None:
        """A row that goes to the server."""
        self._add(row.id, row.row_hash)

    def bad(self, reject: Reject) -> None:
        """A row that was refused before."""
        self._add(reject.id, reject.code)

    def _add(self, *parts: str) -> None:
        self._hash.update(json.dumps(parts).encode() + b"\n")

    @property
    def digest(self) -> str:
        """32 hex digits."""
        return self._hash.hexdigest()


def shard_name(release_id: str, number: int, made_from: str) -> str:
    """Without a folder."""
    return f"{release_id}-{number:06}-{made_from}.parquet"


def shards_there(folder: Path, release_id: str, number: int) -> list[Path]:
    """Whatever the part of this number was made from."""
    return sorted(folder.glob(shard_name(release_id, number, "*")))


@dataclass
class Unfinished:
    """A file that is being written at `path`; it appears as `name`."""

    path: Path
    name: str


@contextmanager
def whole_file(folder: Path, name: str = "") -> Iterator[Unfinished]:
    """A file that appears under its name when the block ends well, and is gone otherwise.

    On disk before it gets its name: no crash leaves half a file under it. The block may say the
    name as late as at its end.
    """
    file = Unfinished(folder / f".{uuid4().hex}{UNFINISHED}", name)
    try:
        yield file
        _sync(file.path)
        file.path.rename(folder / file.name)
        _sync(folder)
    finally:
        file.path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ShardWriter:
    """Rows into the row groups of one file that is not finished."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(
            path, SCHEMA, compression="zstd", write_page_checksum=True, store_schema=False
        )
        self.rows = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, rows: Sequence[ProductRow]) -> None:
        """One row group."""
        columns: dict[str, list[Any]] = {field.name: [] for field in FIELDS}
        for row in rows:
            for name, value in stored_from_row(row).items():
                columns[name].append(value)
        attributes = columns[ATTRIBUTES.name]
        columns[ATTRIBUTES.name] = [json.dumps(each, ensure_ascii=False) for each in attributes]
        self._writer.write_table(pa.table(columns, SCHEMA))
        self.rows += len(rows)

    def describe(self, number: int, refused: Mapping[str, int]) -> None:
        """In the footer: what the shard says of itself."""
        said = json.dumps({"number": number, "refused": refused})
        self._writer.add_key_value_metadata({DESCRIBES.decode(): said})


def describe_shard(path: Path) -> Shard:
    """From its footer; SourceError where it is no shard."""
    try:
        with open_shard(path) as file:
            metadata = file.metadata
            said = json.loads(metadata.metadata[DESCRIBES])
        return Shard(said["number"], path.name, metadata.num_rows, said["refused"])
    except SourceError:
        raise
    except Exception as exc:
        raise _broken(path, exc) from exc


def open_shard(path: Path) -> Any:
    """For reading, with the checksums of its pages compared; SourceError where it is no shard."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
    except Exception as exc:
        raise _broken(path, exc) from exc
    if file.schema_arrow.names != SCHEMA.names:
        raise SourceError(
            f"{path}: expected the fields {SCHEMA.names}, got {file.schema_arrow.names}; it was "
            "written by another version: encode anew"
        )
    return file


def hashes_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """Id, content hash and row hash of every row; nothing else is read."""
    names = [ID.name, CONTENT_HASH.name, ROW_HASH.name]
    for batch in _batches(path, names):
        yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)


def rows_of(path: Path, vector_dim: int) -> Iterator[list[ProductRow]]:
    """The rows, GROUP_ROWS at a time at most; `vector` float32 (vector_dim,)."""
    for batch in _batches(path, SCHEMA.names):
        numbers = batch.column(VECTOR.name).flatten().to_numpy()
        if len(numbers) != batch.num_rows * vector_dim:
            raise ReleaseMismatch(
                f"{path}: expected vectors of {vector_dim} numbers, got others; encode anew"
            )
        vectors = numbers.reshape(-1, vector_dim)
        names = (name for name in SCHEMA.names if name != VECTOR.name)
        rows = pa.RecordBatch.from_pydict({n: batch.column(n) for n in names}).to_pylist()
        yield [
            ProductRow(
                row[ID.name],
                row[TITLE.name],
                row[CONTENT_HASH.name],
                np.array(vector, np.float32),
                json.loads(row[ATTRIBUTES.name]),
                base64.b64decode(row[THUMBNAIL.name]),
                row[ROW_HASH.name],
            )
            for row, vector in zip(rows, vectors, strict=True)
        ]


def _batches(path: Path, names: list[str]) -> Iterator[Any]:
    with open_shard(path) as file:
        try:  # a group at a time: a batch over several may be more than Milvus takes
            for group in range(file.num_row_groups):
                yield from file.iter_batches(
                    GROUP_ROWS, row_groups=[group], columns=names, use_threads=False
                )
        except (OSError, pa.ArrowException) as exc:
            raise _broken(path, exc) from exc


def _broken(path: Path, exc: Exception) -> SourceError:
    return SourceError(
        f"{path}: not a whole shard ({exc}); delete it and run `retrieval bulk encode` again"
    )
