"""One collection while it is fed: what it holds, what of the source it lacks, what is written."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from retrieval_client.book import Book, Differences
from retrieval_client.collection import Collection
from retrieval_client.encoder import Encoder
from retrieval_client.patience import Patient
from retrieval_client.records import (
    CHECKED,
    CONTENT_HASH,
    ID,
    ROW_HASH,
    VECTOR,
    ProductRow,
    is_as_written,
)
from retrieval_client.rows import BATCH_BYTES, Candidate, thumbnail
from retrieval_contract.errors import TooMuchToDelete
from retrieval_contract.tensors import Array

WRITE_ROWS, WRITE_S = 1024, 2.0
"""What is encoded is written once there are so many rows, or so long after the last write: a kill
costs no more than that, however slow the encoder is."""
LOOK_UP_ROWS = 512
SEAL_ROWS = 5000
"""Milvus Lite compares a search with each row that is not sealed yet in Python, one by one."""
DELETE_SHARE = 0.2
"""A source that lacks more than this share of what is stored is more likely cut short."""
HASHES = [CONTENT_HASH.name, ROW_HASH.name]


@dataclass(frozen=True)
class Plan:
    """How a source is pushed. `sync` also deletes what it lacks, more than DELETE_SHARE of what is
    stored only when `certain`; `dry` writes and encodes nothing."""

    thumbnails: bool = True
    sync: bool = False
    certain: bool = False
    dry: bool = False


@dataclass
class Fed:
    """What happened to one collection; counts are rows. In a dry run: what would."""

    encoded: int = 0
    renewed: int = 0
    """Stored anew with the vector they had: only price, stock or the like changed."""
    stored: int = 0
    unchanged: int = 0
    deleted: int = 0
    refusal: str = ""
    """Of a dry run: why the run would delete nothing unless it is `certain`, and fail."""
    left: Differences | None = None
    """What the closing audit found; None where nothing was written."""


class Feed:
    """A collection, the encoder of its release, and the rows that wait for either."""

    def __init__(
        self,
        encoder: Encoder,
        collection: Collection,
        book: Book,
        plan: Plan,
        patiently: Patient,
        *,
        whole: bool = True,
        late: bool = False,
    ) -> None:
        """`whole`: read once all that the collection holds, instead of asking for ids; `late`: rows
        of the source had been read before the collection was there."""
        self.encoder, self.collection = encoder, collection
        self.late = late
        self.fed = Fed()
        self.pending: list[Candidate] = []
        """Waiting to be encoded."""
        self._ready: list[ProductRow] = []
        self._weight = self._unsealed = 0
        self._written = time.monotonic()
        self._book, self._plan, self._patiently, self._whole = book, plan, patiently, whole
        if whole:
            self._read_all()

    @property
    def release_id(self) -> str:
        """Of the vectors."""
        return self.collection.info.release_id

    def _read_all(self) -> None:
        """Into the book: what the collection holds."""

        def read() -> None:
            self._book.empty(self.release_id)
            for step in self.collection.every(HASHES):
                self._book.hold(self.release_id, map(hashes_of, step))

        self._patiently(read)

    def _look_up(self, ids: Sequence[str]) -> None:
        """Into the book: what it holds of these."""
        for start in range(0, len(ids), LOOK_UP_ROWS):
            some = ids[start : start + LOOK_UP_ROWS]
            found = self._patiently(partial(self.collection.of_ids, some, HASHES))
            self._book.hold(self.release_id, map(hashes_of, found.values()))

    def take(self, candidates: Sequence[Candidate]) -> int:
        """What must be encoded goes to `pending`; what only has new attributes is made ready.

        Returns how many rows are settled with that.
        """
        if not self._whole:
            self._look_up([candidate.id for candidate in candidates])
        encode, renew = [], []
        for candidate in candidates:
            stored = self._book.stored(self.release_id, candidate.id)
            if not stored or stored.content_hash != candidate.content_hash(self.release_id):
                encode.append(candidate)
            elif stored.row_hash != candidate.row_hash:
                renew.append(candidate)
            else:
                self.fed.unchanged += 1
        if self._plan.dry:
            self.fed.encoded += len(encode)
            self.fed.renewed += len(renew)
            return len(candidates)
        before = self.fed.stored
        self.pending += encode
        self.pending += self._renew(renew) if renew else []
        self.write_due()
        return len(candidates) - len(encode) - len(renew) + self.fed.stored - before

    def _renew(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Ready with the vectors that are stored; returned are those whose vector is not as it was
        written, or by now of other content: another push may have been there since we looked."""
        ids, again = [candidate.id for candidate in candidates], []
        fields = [CONTENT_HASH.name, *CHECKED]
        found = self._patiently(partial(self.collection.of_ids, ids, fields))
        for candidate in candidates:
            stored, content = found.get(candidate.id), candidate.content_hash(self.release_id)
            if stored and stored[CONTENT_HASH.name] == content and is_as_written(stored):
                vector = np.asarray(stored[VECTOR.name], np.float32)
                self.fed.renewed += 1
                self.make_ready(candidate, vector, self.thumbnail(candidate))
            else:
                again.append(candidate)
        return again

    def thumbnail(self, row: Candidate) -> bytes:
        """What is stored of a photo that can be read."""
        return thumbnail(row.image) if self._plan.thumbnails and row.image else b""

    def make_ready(self, row: Candidate, vector: Array, picture: bytes) -> int:
        """To be written, with others; returns how many rows were written now."""
        self._ready.append(
            ProductRow(
                row.id,
                row.title,
                row.content_hash(self.release_id),
                vector,
                row.attributes,
                picture,
                row.row_hash,
            )
        )
        self._weight += len(picture) + len(row.title) + len(json.dumps(row.attributes))
        full = len(self._ready) >= WRITE_ROWS or self._weight >= BATCH_BYTES
        return self.write() if full else 0

    def write(self) -> int:
        """Write what is ready; how many rows that was."""
        count = len(self._ready)
        self._patiently(lambda: self.collection.upsert(self._ready))
        self.fed.stored += count
        self._unsealed += count
        self._ready, self._weight, self._written = [], 0, time.monotonic()
        if self._unsealed >= SEAL_ROWS and self.collection.milvus.lite:
            self._patiently(self.collection.flush)
            self._unsealed = 0
        return count

    def write_due(self) -> int:
        """As `write`, where the last one was WRITE_S ago."""
        return self.write() if time.monotonic() - self._written >= WRITE_S else 0

    def finish(self) -> None:
        """Delete what the source lacks, where that is the plan; flush, and see for ourselves."""
        if self._plan.sync:
            self._delete_surplus()
        if not self._plan.dry and (self.fed.stored or self.fed.deleted):
            self._patiently(self.collection.flush)
            if not self.late:
                self.fed.left = self._audit()

    def check_surplus(self, nameless: int) -> None:
        """TooMuchToDelete when a source looks cut short, or has rows of which the id is unknown; a
        dry run says it instead."""
        refusal = self._refusal(nameless)
        if self._plan.dry:
            self.fed.refusal = refusal
        elif refusal:
            raise TooMuchToDelete(refusal)

    def _refusal(self, nameless: int) -> str:
        held = self._book.held(self.release_id)
        surplus = sum(1 for _ in self._book.surplus(self.release_id))
        if self._plan.certain or not surplus:
            return ""
        if nameless:
            return (
                f"{self.collection.name}: expected a source whose ids can be read, got {nameless} "
                f"rows without one, which may be any of the {surplus} that it seems to lack; "
                "nothing was deleted: correct those rows, or say --yes"
            )
        if surplus > DELETE_SHARE * held:
            return (
                f"{self.collection.name}: expected a source that lacks at most {DELETE_SHARE:.0%} "
                f"of the {held} rows stored, got one that lacks {surplus}; nothing was "
                "deleted: see that the source is whole, then say --yes"
            )
        return ""

    def _delete_surplus(self) -> None:
        surplus = list(self._book.surplus(self.release_id))
        if self._plan.dry:
            self.fed.deleted = len(surplus)
            return
        for start in range(0, len(surplus), LOOK_UP_ROWS):
            some = surplus[start : start + LOOK_UP_ROWS]
            self._patiently(partial(self.collection.delete, some))
            self.fed.deleted += len(some)

    def _audit(self) -> Differences:
        """The source against what the collection says now."""
        if self._whole:
            self._read_all()
            found = self._book.differences(self.release_id)
            return found if self._plan.sync else replace(found, surplus=0)
        self._book.empty(self.release_id)
        self._look_up(list(self._book.ids()))
        return replace(self._book.differences(self.release_id), surplus=0)


def hashes_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Id and HASHES of a stored row, as a Book holds them."""
    return row[ID.name], row[CONTENT_HASH.name], row[ROW_HASH.name]
