"""A source → Parquet shards: the first load of a catalog that one machine cannot push.

Shards are the unit of work. Whoever makes one reads its part of the source itself, so that work can
go to processes (`in_processes`) or machines (`bulk_ray`); a killed worker costs the shard that it
had in hand. What is there already, made from the same rows, is not made again.
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from retrieval_client.encoder import Encoder
from retrieval_client.fleet import Encoders
from retrieval_client.flow import REQUEST_ROWS, Flow
from retrieval_client.patience import Patient
from retrieval_client.records import ProductRow
from retrieval_client.rows import (
    BATCH_BYTES,
    Candidate,
    Reject,
    batched,
    candidate_from_row,
    thumbnail,
)
from retrieval_client.settings import Settings
from retrieval_client.shards import (
    GROUP_ROWS,
    MANIFEST,
    REJECTS,
    UNFINISHED,
    MadeFrom,
    Manifest,
    Shard,
    ShardWriter,
    describe_shard,
    shard_name,
    shards_there,
    whole_file,
)
from retrieval_client.sources import STDIN, Source, SourceRow
from retrieval_contract.door import Lane
from retrieval_contract.errors import ItemError, Reason, ReleaseMismatch, RetrievalError
from retrieval_contract.tensors import Array

SHARD_ROWS = 10_000
"""What a kill may cost."""
REPEATED = "an earlier row of this source has this id; give each product its own"


@dataclass(frozen=True)
class Recipe:
    """All that a worker must know; every machine sees `source` and `folder` under these paths."""

    source: Source
    folder: Path
    settings: Settings
    release_id: str
    vector_dim: int
    shard_rows: int = SHARD_ROWS
    thumbnails: bool = True


@dataclass(frozen=True)
class Slice:
    """Rows `start` + 1 to `stop` of a source; `repeats`: those whose id a good row before has."""

    number: int
    start: int
    stop: int
    repeats: tuple[int, ...] = ()


Run = Callable[[Recipe, list[Slice]], Iterator[Shard]]
"""A way to make all shards, in any order."""


def recipe_for(
    source: Source,
    folder: Path,
    settings: Settings,
    release_id: str = "",
    *,
    shard_rows: int = SHARD_ROWS,
    thumbnails: bool = True,
) -> Recipe:
    """For a release that is served, the only one unless it is named.

    Raises ReleaseMismatch where there are several, or another one, or shards of another one.
    """
    with Encoders(settings) as encoders:
        served = Patient(settings.retry_s)(encoders.served)
    wanted = release_id or next(iter(served))
    if wanted not in served or (len(served) > 1 and not release_id):
        raise ReleaseMismatch(
            f"Triton at {settings.triton}: expected {wanted if release_id else 'one release'}, got "
            f"{', '.join(sorted(served))}; name one of these (--release), or serve it (--triton)"
        )
    if (folder / MANIFEST).exists() and (there := Manifest.read(folder).release_id) != wanted:
        raise ReleaseMismatch(
            f"{folder}: expected shards of release {wanted}, got some of {there}; give a folder "
            "of its own"
        )
    dim = served[wanted].vector_dim
    bulk = settings.override(traffic=Lane.BULK)
    if source.path != STDIN:  # workers may stand in another folder
        source, folder = replace(source, path=source.path.absolute()), folder.absolute()
    return Recipe(source, folder, bulk, wanted, dim, shard_rows, thumbnails)


def encode(
    recipe: Recipe, run: Run | None = None, progress: Callable[[Shard], None] = lambda shard: None
) -> Manifest:
    """Make the shards that are not there yet, and the manifest.

    Killed anywhere it goes on with the next run. An earlier manifest and its shards stay until the
    new one is there; then shards that it does not name are deleted.
    """
    recipe.folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for shard in (run or serially)(recipe, slices_of(recipe)):
        progress(shard)
        shards.append(shard)
    manifest = Manifest(
        recipe.release_id,
        recipe.vector_dim,
        str(recipe.source.path),
        recipe.shard_rows,
        recipe.thumbnails,
        tuple(sorted(shards, key=lambda shard: shard.number)),
    )
    manifest.write(recipe.folder)
    named = {shard.name for shard in shards}
    for path in recipe.folder.glob(f"{recipe.release_id}-*"):
        if path.name.removesuffix(REJECTS) not in named:
            path.unlink()
    for path in recipe.folder.glob(f".*{UNFINISHED}"):  # of workers that were killed
        path.unlink()
    return manifest


def slices_of(recipe: Recipe) -> list[Slice]:
    """The source, cut into parts; 8 bytes of memory for each of its rows."""
    size = recipe.shard_rows
    rows, repeats = repeated_rows(recipe)
    by_slice: dict[int, list[int]] = {}
    for number in repeats:
        by_slice.setdefault((number - 1) // size, []).append(number)
    return [
        Slice(n, start, min(start + size, rows), tuple(by_slice.get(n, ())))
        for n, start in enumerate(range(0, rows, size))
    ]


def repeated_rows(recipe: Recipe) -> tuple[int, list[int]]:
    """How many rows there are, and the numbers of those whose id a good row before them has.

    One pass over the ids; a second one, and a look at whole rows, only where some occur twice.
    """
    hashes, last = array("q"), 0
    for number, product_id in recipe.source.ids():
        last = number
        if product_id:
            hashes.append(hash(product_id))
    if not last:
        return 0, []
    ordered = np.sort(np.frombuffer(hashes, np.int64))
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not twice:
        return last, []
    suspects: dict[int, set[int]] = {}
    for number, product_id in recipe.source.ids():
        if product_id and hash(product_id) in twice:
            suspects.setdefault((number - 1) // SHARD_ROWS, set()).add(number)
    seen: set[str] = set()
    repeats = []
    for some, numbers in sorted(suspects.items()):
        for row in recipe.source.rows(some * SHARD_ROWS, max(numbers)):
            if row.number not in numbers or not _is_good(row, recipe.thumbnails):
                continue
            if row.id in seen:
                repeats.append(row.number)
            seen.add(row.id)
    return last, repeats


def _is_good(row: SourceRow, thumbnails: bool) -> bool:
    try:
        candidate_from_row(row, thumbnails)
    except ItemError:
        return False
    return True


class Answered(NamedTuple):
    """One row that came back: `vector` float32 (vector_dim,), `picture` a thumbnail or empty."""

    row: Candidate
    vector: Array
    picture: bytes
    error: ItemError | None


class Maker:
    """Makes shards, one after another, over one connection; opened on first use."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._encoders = Encoders(recipe.settings)
        self._patiently = Patient(recipe.settings.retry_s)
        self._flow = Flow(self._patiently, recipe.settings.push_timeout_s)

    def __enter__(self) -> Maker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._encoders.close()

    def __call__(self, part: Slice) -> Shard:
        """The finished shard, made now unless one of the same rows is there."""
        recipe = self.recipe
        if there := shards_there(recipe.folder, recipe.release_id, part.number):
            made_from = MadeFrom()
            for _ in self._checked(part, made_from, []):
                pass
            name = shard_name(recipe.release_id, part.number, made_from.digest)
            if recipe.folder / name in there:
                return describe_shard(recipe.folder / name)
        return self._make(part)

    def _make(self, part: Slice) -> Shard:
        recipe, made_from, rejects = self.recipe, MadeFrom(), list[Reject]()
        with whole_file(recipe.folder) as file:
            with ShardWriter(file.path) as shard:
                for rows in grouped(self._encoded(part, made_from, rejects)):
                    shard.write(rows)
                refused = Counter(reject.code for reject in rejects)
                shard.describe(part.number, refused)
            file.name = shard_name(recipe.release_id, part.number, made_from.digest)
            # Before the shard: where a shard is, its rejects are.
            if rejects:
                with whole_file(recipe.folder, file.name + REJECTS) as listed:
                    lines = sorted(reject.to_json() + "\n" for reject in rejects)
                    listed.path.write_text("".join(lines), encoding="ascii")
        return Shard(part.number, file.name, shard.rows, dict(refused))

    def _checked(
        self, part: Slice, made_from: MadeFrom, rejects: list[Reject]
    ) -> Iterator[Candidate]:
        for row in self.recipe.source.rows(part.start, part.stop):
            try:
                candidate = candidate_from_row(row, self.recipe.thumbnails)
                if row.number in part.repeats:
                    raise ItemError(Reason.DUPLICATE_ID, REPEATED)
            except ItemError as exc:
                rejects.append(Reject.of(row.name, exc))
                made_from.bad(rejects[-1])
            else:
                made_from.good(candidate)
                yield candidate

    def _encoded(
        self, part: Slice, made_from: MadeFrom, rejects: list[Reject]
    ) -> Iterator[ProductRow]:
        release_id = self.recipe.release_id
        encoder = self._patiently(lambda: self._encoders.of(release_id))
        requests = batched(self._checked(part, made_from, rejects), REQUEST_ROWS)
        answers = self._flow.in_order(requests, lambda rows: self._ask(encoder, rows))
        with closing(answers):
            for answer in answers:
                for row, vector, picture, error in answer:
                    if error:
                        rejects.append(Reject.of(row.id, error))
                        continue
                    yield ProductRow(
                        row.id,
                        row.title,
                        row.content_hash(release_id),
                        vector,
                        row.attributes,
                        picture,
                        row.row_hash,
                    )

    def _ask(self, encoder: Encoder, rows: list[Candidate]) -> list[Answered]:
        encoded = self._flow.encode(encoder, self.recipe.release_id, rows)
        wanted = self.recipe.thumbnails
        return [
            Answered(row, vector, thumbnail(row.image) if wanted and row.image else b"", None)
            if error is None
            else Answered(row, vector, b"", error)
            for row, vector, error in zip(rows, encoded.vectors, encoded.errors, strict=True)
        ]


def grouped(rows: Iterable[ProductRow]) -> Iterator[list[ProductRow]]:
    """Lists that end at GROUP_ROWS or BATCH_BYTES, whichever comes first."""
    group: list[ProductRow] = []
    weight = 0
    for row in rows:
        group.append(row)
        weight += len(row.thumbnail) + len(row.title) + len(json.dumps(row.attributes))
        if len(group) >= GROUP_ROWS or weight >= BATCH_BYTES:
            yield group
            group, weight = [], 0
    if group:
        yield group


def serially(recipe: Recipe, parts: list[Slice]) -> Iterator[Shard]:
    """In this process."""
    with Maker(recipe) as maker:
        yield from map(maker, parts)


def in_processes(workers: int) -> Run:
    """In so many processes of this machine; one that is killed ends the run."""

    def run(recipe: Recipe, parts: list[Slice]) -> Iterator[Shard]:
        spawn = get_context("spawn")  # gRPC does not survive a fork
        pool = ProcessPoolExecutor(workers, spawn, initializer=_start, initargs=(recipe,))
        try:
            yield from pool.map(_make_one, parts)
        except BrokenProcessPool as exc:
            raise RetrievalError(
                "bulk encode: a worker was killed (out of memory?); finished shards stay: run it "
                "again, or with fewer workers"
            ) from exc
        finally:
            pool.shutdown(cancel_futures=True)

    return run


_maker: list[Maker] = []
"""Of a worker process: the one that it was started with."""


def _start(recipe: Recipe) -> None:
    _maker.append(Maker(recipe))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent
    parent.join()  # it was killed: else it would have ended us
    os._exit(1)


def _make_one(part: Slice) -> Shard:
    return _maker[0](part)
