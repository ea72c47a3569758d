"""Source and collections, compared row by row: what is not as the source says, and mending it.

A pass over every stored row. The hashes tell what a row was made from; a checksum tells whether it
is still what was written, since a damaged file gives others without a word. A sample is encoded
again. Rows that are not stored as the source says are encoded, too: what a server refuses only it
knows, and no collection can hold.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retrieval_client.book import Book
from retrieval_client.catalog import Catalog
from retrieval_client.collection import Collection
from retrieval_client.encoder import Encoded
from retrieval_client.feed import LOOK_UP_ROWS
from retrieval_client.fleet import Encoders
from retrieval_client.flow import REQUEST_ROWS
from retrieval_client.patience import Patient
from retrieval_client.records import (
    CHECKED,
    CONTENT_HASH,
    ID,
    NORM_TOLERANCE,
    ROW_HASH,
    VECTOR,
    id_filter,
    is_as_written,
)
from retrieval_client.rows import Candidate, batched, candidate_from_row, is_good_id
from retrieval_client.sources import SourceRow
from retrieval_contract.errors import ItemError
from retrieval_contract.tensors import Array

EXAMPLES = 20
LOWEST_COSINE = 0.999
"""Between a stored vector and the same product encoded again: batches differ in the last bits."""
TAKEN = 128
"""Rows that a server takes although they are not stored: after so many it is asked about no more,
for the collection is not what the source says, whatever the others are."""
KINDS = {
    "missing": "in the source, not stored",
    "surplus": "stored, not in the source",
    "stale": "stored as the source no longer says",
    "other_release": "a vector of another release",
    "duplicate": "stored twice under one id",
    "not_finite": "a vector with NaN or infinity",
    "norm": "a vector that is not of length 1",
    "damaged": "title, attributes, photo, bucket or vector are not what was written",
    "differs": "encoded again it gives another vector (of the sample)",
    "unseen": "counted, but not among the rows that Milvus shows; or stored meanwhile",
}
ROTTEN = ("other_release", "duplicate", "not_finite", "norm", "damaged", "differs")
"""Deleted before a repair, for their hashes may be right; what the source lacks is left to the
push, which asks before it deletes much."""


@dataclass
class Found:
    """One collection's rows by what is wrong with them, one of KINDS; the first ids of each."""

    collection: str
    release_id: str
    stored: int = 0
    sampled: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    examples: dict[str, list[str]] = field(default_factory=dict)
    rotten: list[str] = field(default_factory=list)
    """Ids of the source whose rows are one of ROTTEN."""

    def say(self, kind: str, product_id: str) -> None:
        """One more."""
        self.counts[kind] += 1
        if len(some := self.examples.setdefault(kind, [])) < EXAMPLES:
            some.append(product_id)
        if kind in ROTTEN:
            self.rotten.append(product_id)

    @property
    def clean(self) -> bool:
        """Whether every row is as the source says."""
        return not any(self.counts.values())


@dataclass
class AuditReport:
    """What an audit found. `refused`: rows of the source that no collection can hold."""

    read: int = 0
    refused: int = 0
    found: list[Found] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Of every live collection."""
        return all(found.clean for found in self.found)


class Audit:
    """Compares one source with every live collection; only `mend` changes anything."""

    def __init__(self, catalog: Catalog, *, thumbnails: bool = True) -> None:
        self.catalog = catalog
        self._thumbnails = thumbnails

    def run(
        self,
        rows: Iterable[SourceRow],
        encoders: Encoders | None = None,
        *,
        sample: int = 0,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> AuditReport:
        """Reads each collection once and the source once.

        With `encoders`, `sample` products, chosen at random, are encoded again, and what a server
        refuses is not missing; without them it is.
        """
        report, chosen = AuditReport(), Reservoir(sample if encoders else 0)
        live = list(self.catalog.live().values())
        with Book() as book:
            report.found = [self._look(collection, book) for collection in live]
            refusals = [Refusals(c, encoders, book) for c in live] if encoders else []
            for candidates in batched(self._said(rows, report, book), LOOK_UP_ROWS):
                for candidate in candidates:
                    chosen.offer(candidate)
                report.refused += len({i for each in refusals for i in each.among(candidates)})
                progress(report.read)
            for collection, found in zip(live, report.found, strict=True):
                for product_id, kind in book.wrong(found.release_id):
                    found.say(kind, product_id)
                for product_id in book.surplus(found.release_id):
                    found.say("surplus", product_id)
                if encoders:
                    encode_again(collection, encoders, chosen.items, found)
                found.rotten = [i for i in found.rotten if book.says(i)]
        return report

    def mend(self, report: AuditReport) -> None:
        """Delete what is rotten; a push with `sync` does the rest."""
        live = {collection.name: collection for collection in self.catalog.live().values()}
        for found in report.found:
            if collection := live.get(found.collection):  # else it was cleared away meanwhile
                for start in range(0, len(found.rotten), LOOK_UP_ROWS):
                    collection.delete(found.rotten[start : start + LOOK_UP_ROWS])

    def _said(
        self, rows: Iterable[SourceRow], report: AuditReport, book: Book
    ) -> Iterator[Candidate]:
        for row in rows:
            report.read += 1
            try:
                candidate = candidate_from_row(row, self._thumbnails)
            except ItemError:
                report.refused += 1
                if is_good_id(row.id):
                    book.refuse(row.id)
                continue
            if book.say(candidate):
                yield candidate
            else:
                report.refused += 1

    def _look(self, collection: Collection, book: Book) -> Found:
        """Into the book: what it holds; found is what is wrong with that by itself."""
        info = collection.info
        found = Found(info.name, info.release_id)
        for step in collection.every([CONTENT_HASH.name, ROW_HASH.name, *CHECKED]):
            found.stored += len(step)
            for row in step:
                if book.stored(info.release_id, row[ID.name]):
                    found.say("duplicate", row[ID.name])
                hashes = (row[ID.name], row[CONTENT_HASH.name], row[ROW_HASH.name])
                book.hold(info.release_id, [hashes])
            look_inside(step, found)
        if (unseen := collection.count() - found.stored) > 0:
            for product_id, more in doubled(collection).items():
                found.say("duplicate", product_id)
                unseen -= more
            found.counts["unseen"] = max(unseen, 0)
        return found


class Refusals:
    """Rows that a collection lacks because the server of its release refuses them.

    Until TAKEN were none of these.
    """

    def __init__(self, collection: Collection, encoders: Encoders, book: Book) -> None:
        """`book`: where all that the collection holds stands already."""
        self._collection, self._encoders, self._book = collection, encoders, book
        self._taken = 0

    def among(self, candidates: Sequence[Candidate]) -> list[str]:
        """The ids of those among rows that the source says; the book no longer misses them."""
        refused: list[str] = []
        for some in batched(filter(self._is_unlike, candidates), REQUEST_ROWS):
            if self._taken >= TAKEN:
                break
            encoded = patiently_encoded(self._collection, self._encoders, some)
            bad = [c.id for c, error in zip(some, encoded.errors, strict=True) if error]
            for product_id in bad:
                self._book.take_back(self._collection.info.release_id, product_id)
            self._taken += len(some) - len(bad)
            refused += bad
        return refused

    def _is_unlike(self, candidate: Candidate) -> bool:
        """Whether a push would encode it, and what is stored might stay if that is refused."""
        release_id = self._collection.info.release_id
        stored = self._book.stored(release_id, candidate.id)
        if stored is None:
            return True
        of_ours = stored.content_hash.startswith(f"{release_id}:")
        return of_ours and stored.content_hash != candidate.content_hash(release_id)


def doubled(collection: Collection) -> dict[str, int]:
    """Ids that are stored more than once, and how many more than the one that a pass shows."""
    found: dict[str, int] = {}
    for step in collection.every([]):
        ids = [row[ID.name] for row in step]
        todo = [ids[at : at + LOOK_UP_ROWS] for at in range(0, len(ids), LOOK_UP_ROWS)]
        while todo:
            some = todo.pop()
            if (more := collection.count(id_filter(some)) - len(some)) <= 0:
                continue
            if len(some) == 1:
                found[some[0]] = more
            else:
                middle = len(some) // 2
                todo += [some[:middle], some[middle:]]
    return found


class Reservoir:
    """So many items of a stream, each with the same chance (Vitter 1985, algorithm R)."""

    def __init__(self, size: int) -> None:
        self.items: list[Candidate] = []
        self._size, self._offered = size, 0
        self._random = random.Random(0)

    def offer(self, item: Candidate) -> None:
        """The next item of the stream."""
        self._offered += 1
        if len(self.items) < self._size:
            self.items.append(item)
        elif (place := self._random.randrange(self._offered)) < self._size:
            self.items[place] = item


def look_inside(rows: list[dict[str, Any]], found: Found) -> None:
    """Some stored rows, for themselves: each is said to have the first of its faults."""
    if not rows:
        return
    vectors = np.asarray([row[VECTOR.name] for row in rows], np.float32)
    finite: Array = np.asarray(np.isfinite(vectors).all(axis=1))
    norms = np.linalg.norm(np.nan_to_num(vectors, posinf=0, neginf=0), axis=1)
    for row, is_finite, norm in zip(rows, finite, norms, strict=True):
        if not is_finite:
            found.say("not_finite", row[ID.name])
        elif abs(norm - 1) > NORM_TOLERANCE:
            found.say("norm", row[ID.name])
        elif not is_as_written(row):
            found.say("damaged", row[ID.name])


def patiently_encoded(
    collection: Collection, encoders: Encoders, products: Sequence[Candidate]
) -> Encoded:
    """As a push would: beside one, and beside searches, the server is busy."""
    patience_s = collection.milvus.write_timeout_s

    def encode() -> Encoded:
        encoder = encoders.for_collection(collection.info)
        titles, images = [c.title for c in products], [c.image for c in products]
        return encoder.encode_products(titles, images, timeout_s=patience_s)

    return Patient(patience_s)(encode)


def encode_again(
    collection: Collection, encoders: Encoders, sample: list[Candidate], found: Found
) -> None:
    """Products of the source against their stored vectors, those that are stored as it says."""
    fields = [CONTENT_HASH.name, VECTOR.name]
    for start in range(0, len(sample), 32):
        some = sample[start : start + 32]
        stored: Mapping[str, dict[str, Any]] = collection.of_ids([c.id for c in some], fields)
        some = [
            c
            for c in some
            if stored.get(c.id, {}).get(CONTENT_HASH.name)
            == c.content_hash(collection.info.release_id)
        ]
        if not some:
            continue
        encoded = patiently_encoded(collection, encoders, some)
        for candidate, vector, error in zip(some, encoded.vectors, encoded.errors, strict=True):
            found.sampled += 1
            cosine = float(np.dot(vector, stored[candidate.id][VECTOR.name]))
            if error is None and not cosine >= LOWEST_COSINE:
                found.say("differs", candidate.id)
