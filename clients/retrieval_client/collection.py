"""One collection: the products of one release, written, read and searched.

Only features that Milvus Lite and every server since 2.3 share are used, but where `capabilities`
says otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_client.capabilities import Feature
from retrieval_client.deadline import Deadline
from retrieval_client.milvus import Milvus
from retrieval_client.records import (
    ATTRIBUTES,
    BUCKET,
    ID,
    THUMBNAIL,
    TITLE,
    VECTOR,
    WORDS,
    Hit,
    ProductRow,
    check_vectors,
    hit_from_milvus,
    id_filter,
    quoted,
    stored_from_row,
)
from retrieval_client.translate import MILVUS_NO_INDEX
from retrieval_contract import models
from retrieval_contract.errors import (
    CatalogError,
    CatalogUnavailable,
    CollectionGone,
    ContractError,
    Unsupported,
)
from retrieval_contract.tensors import Array

MAX_RESULTS = 16384
RESULTS, THUMBNAIL_RESULTS = 8192, 512
"""Of one call, at most: the whole answer is in memory, here and there. Thumbnails weigh."""
PASS_ROWS, PASS_BYTES = 16_000, 32_000_000
"""A step of a pass over all rows; a step costs Milvus Lite a look at every row."""
WEIGHED, PHOTO_BYTES = 64, 6000
"""Rows that are looked at to say what one weighs; a photo, though those rows may have none."""
SEARCH_PARAMS, FILTERED_PARAMS = "search_params", "filtered_params"
"""The properties of a collection that say how its index is searched, without and with a condition:
JSON, see `index.tune`."""
LOADS = 4
"""Attempts to load: Milvus Lite may still be writing the file of an index that it reads."""


def check_limit(limit: int) -> None:
    """ContractError for what no Milvus gives."""
    if not 1 <= limit <= MAX_RESULTS:
        raise ContractError(f"limit: expected 1 to {MAX_RESULTS}, got {limit}")


class Consistency(StrEnum):
    """Which writes a search must have seen. On Milvus Lite it always has seen all."""

    ANY = "Bounded"
    """All but those of the last moments (some 0.2 s): the fastest."""
    OWN = "Session"
    """And those of this process: as fast, but just after a write it waits for it."""
    ALL = "Strong"
    """And those of everybody, up to now: each search waits for a server's clock, some 0.2 s."""


@dataclass(frozen=True)
class Ask:
    """What is asked of each vector; equal ones may be asked together.

    `condition` is in Milvus's language (`where.Where.expression`); `fields` are what a hit has
    besides its id and score, and `thumbnails` one more.
    """

    limit: int = 10
    condition: str = ""
    thumbnails: bool = False
    fields: tuple[str, ...] = (TITLE.name, ATTRIBUTES.name)
    consistency: Consistency = Consistency.ANY

    def __post_init__(self) -> None:
        check_limit(self.limit)

    @property
    def at_once(self) -> int:
        """Vectors of one call, at most."""
        return max(1, (THUMBNAIL_RESULTS if self.thumbnails else RESULTS) // self.limit)


@dataclass(frozen=True)
class CollectionInfo:
    """A collection as it describes itself."""

    name: str
    release_id: str
    vector_dim: int
    properties: Mapping[str, str] = field(default_factory=dict, compare=False)
    has_words: bool = field(default=False, compare=False)


def _in_buckets(low: int, high: int) -> str:
    """A condition for a range of buckets; the first and the last have what lies outside, too: a
    damaged row."""
    first, last = low <= 0, high >= models.BUCKETS
    if first and last:
        return f'{ID.name} != ""'
    least, most = f"{BUCKET.name} >= {low}", f"{BUCKET.name} < {high}"
    return most if first else least if last else f"{least} and {most}"


def damaged(error: CatalogError) -> CatalogError:
    """Of Milvus Lite, which could not read what it wrote: with what to do."""
    return CatalogError(
        f"{error}; move a file that is damaged away, and push again: only what it held is encoded "
        "anew"
    )


class Collection:
    """Rows of one physical collection, whatever any alias does meanwhile."""

    def __init__(self, milvus: Milvus, info: CollectionInfo) -> None:
        self.milvus, self.info = milvus, info
        self._params: dict[bool, dict[str, int]] = {
            filtered: json.loads(info.properties.get(name, "{}"))
            for filtered, name in ((False, SEARCH_PARAMS), (True, FILTERED_PARAMS))
        }

    @property
    def name(self) -> str:
        """As Milvus calls it."""
        return self.info.name

    def tuned(self, params: Mapping[str, int]) -> Collection:
        """The same, searched with other parameters of its index."""
        said = dict.fromkeys((SEARCH_PARAMS, FILTERED_PARAMS), json.dumps(params))
        properties = {**self.info.properties, **said}
        return Collection(self.milvus, replace(self.info, properties=properties))

    # ── writing ──────────────────────────────────────────────────────────────────────────
    def upsert(self, rows: Sequence[ProductRow]) -> None:
        """Store rows, replacing those of equal id. Ids within one call must differ."""
        if not rows:
            return
        vectors = np.stack([row.vector for row in rows])
        check_vectors([row.id for row in rows], vectors, self.info.vector_dim)
        stored = [stored_from_row(row) for row in rows]
        with self.milvus.errors(f"upsert {len(rows)} rows"):
            self.milvus.client.upsert(self.name, stored, timeout=self.milvus.write_timeout_s)

    def flush(self) -> None:
        """Seal what was written: on Lite it becomes durable and searches become fast."""
        try:
            with self.milvus.errors("flush"):
                self.milvus.client.flush(self.name, timeout=self.milvus.write_timeout_s)
        except CatalogError as exc:
            raise self._recovering(exc) from exc
        self.load()

    def delete(self, ids: Sequence[str]) -> list[str]:
        """Delete by id; returns those that were there."""
        there = sorted(row[ID.name] for row in self.query(id_filter(ids), [ID.name]))
        if there:
            with self.milvus.errors(f"delete {len(there)} rows"):
                self.milvus.client.delete(
                    self.name, filter=id_filter(there), timeout=self.milvus.write_timeout_s
                )
        return there

    def load(self, deadline: Deadline | None = None) -> None:
        """Make it searchable: an open store has loaded nothing, and says 101 to a search."""
        deadline = deadline or Deadline(self.milvus.write_timeout_s)
        for attempt in range(1, LOADS + 1):
            try:
                with self.milvus.errors(f"load {self.name}"):
                    self.milvus.client.load_collection(self.name, timeout=deadline.left_s)
                return
            except CatalogError as exc:
                if not self.milvus.lite or deadline.passed:
                    raise self._recovering(exc) from exc
                if attempt == LOADS:
                    raise damaged(exc) from exc
                time.sleep(0.05 * attempt)
                if attempt == LOADS - 1:
                    self._forget_indexes()

    def _recovering(self, error: CatalogError) -> CatalogError:
        """A flush or load has nothing that could be wrong with it: where the collection is there,
        what fails is a server that starts, or recovers, which it says in many ways."""
        if self.milvus.lite or isinstance(error, CatalogUnavailable | CollectionGone):
            return error
        step = "wait until it has recovered, and see its log"
        if getattr(error.__cause__, "code", None) == MILVUS_NO_INDEX:
            step = "`retrieval index tune --kind` is at work there, or was cut short: run it again"
        return CatalogUnavailable(f"{error}; {step}")

    def _forget_indexes(self) -> None:
        """A kill while Lite wrote an index leaves half a file; from the rows it makes another."""
        for path in Path(self.milvus.uri, "collections", self.name).rglob("*.idx"):
            with suppress(OSError):
                path.unlink()

    # ── reading ──────────────────────────────────────────────────────────────────────────
    def query(
        self,
        condition: str,
        fields: list[str],
        consistency: Consistency = Consistency.ALL,
        deadline: Deadline | None = None,
        limit: int | None = None,
    ) -> list[dict[str, Any]]:
        """Rows under a condition, as they are now; at most `limit`. A search gives its deadline."""

        def ask_milvus() -> list[dict[str, Any]]:
            return list(
                self.milvus.client.query(
                    self.name,
                    filter=condition,
                    output_fields=fields,
                    consistency_level=consistency.value,
                    timeout=deadline.left_s if deadline else self.milvus.write_timeout_s,
                    **({"limit": limit} if limit else {}),
                )
            )

        what = f"query {self.name}"
        if deadline:
            return self.milvus.within(deadline, what, ask_milvus)
        with self.milvus.errors(what):
            return ask_milvus()

    def of_ids(
        self,
        ids: Sequence[str],
        fields: list[str],
        consistency: Consistency = Consistency.ALL,
        deadline: Deadline | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Those of the ids that are there, by id."""
        if not ids:
            return {}
        found = self.query(id_filter(ids), [ID.name, *fields], consistency, deadline)
        return {row[ID.name]: row for row in found}

    def every(self, fields: list[str], condition: str = "") -> Iterator[list[dict[str, Any]]]:
        """A pass over all rows (under a condition), some thousand at a time, in no order.

        By ranges of buckets, and of ids where one bucket holds too many: pymilvus's own iterator
        pastes the id where it stands into its next filter as it is, so that a quote in an id ends
        the pass or bends it.
        """
        rows = min(PASS_ROWS, PASS_BYTES // self._weight(fields))
        whole = f"({condition}) and " if condition else ""
        most = min(MAX_RESULTS, 2 * rows)
        step = max(1, models.BUCKETS * rows // max(self.count(condition), 1))
        todo = [(at, at + step, "") for at in range(0, models.BUCKETS, step)][::-1]
        while todo:
            low, high, of_ids = todo.pop()
            part = f"{whole}{_in_buckets(low, high)}{of_ids}"
            batch = self.query(part, [ID.name, *fields], limit=most)
            if len(batch) < most:
                yield batch
            elif high - low > 1:  # it grew meanwhile
                middle = (low + high) // 2
                todo += [(middle, high, ""), (low, middle, "")]
            else:
                ids = sorted(row[ID.name] for row in batch)
                if (split := ids[most // 2]) == ids[0]:
                    raise CatalogError(
                        f"{self.name}: expected an id to be stored once, got {split!r} {most} "
                        "times and more; delete it and push again"
                    )
                there = f"{ID.name} < {quoted(split)}"
                todo += [(low, high, f"{of_ids} and {way}") for way in (f"not ({there})", there)]

    def _weight(self, fields: Sequence[str]) -> int:
        """Bytes of a row, about; of what may be of any size some are looked at."""
        weight = 4 * self.info.vector_dim if VECTOR.name in fields else 256
        least = {ATTRIBUTES.name: 0, THUMBNAIL.name: PHOTO_BYTES}
        if names := [name for name in least if name in fields]:
            some = self.query("", names, limit=WEIGHED)
            for name in names:
                seen = sum(len(json.dumps(row[name])) for row in some) // WEIGHED
                weight += max(seen, least[name])
        return weight

    def count(self, condition: str = "") -> int:
        """Rows that are there now, deletions and replacements taken into account."""
        (row,) = self.query(condition, ["count(*)"])
        return int(row["count(*)"])

    def search(
        self, vectors: Array, ask: Ask | None = None, deadline: Deadline | None = None
    ) -> list[list[Hit]]:
        """The nearest products of each vector, float32 (queries, vector_dim), best first."""
        # pymilvus packs Python's numbers twice as fast as NumPy's.
        data = np.asarray(vectors, np.float32).tolist()
        return self._search(VECTOR.name, data, ask or Ask(), deadline)

    def need_words(self, deadline: Deadline) -> None:
        """Unsupported where titles cannot be searched by their words."""
        self.milvus.backend_by(deadline).need(Feature.BM25)
        if not self.info.has_words:
            raise Unsupported(
                f"{self.name}: expected the field `{WORDS.name}`, which its Milvus did not have "
                "when it was filled; fill a new collection"
            )

    def search_words(
        self, texts: Sequence[str], ask: Ask | None = None, deadline: Deadline | None = None
    ) -> list[list[Hit]]:
        """The products whose titles have words of each text, by BM25, best first.

        Raises Unsupported where the Milvus has no BM25, or had none when the collection was made.
        """
        deadline = deadline or Deadline(self.milvus.timeout_s)
        self.need_words(deadline)
        found = self._search(WORDS.name, list(texts), ask or Ask(), deadline)
        # Milvus Lite calls it a distance: less is better; and may add products that have no word.
        return [[replace(hit, score=abs(hit.score)) for hit in hits if hit.score] for hits in found]

    def _search(
        self, field: str, data: list[Any], ask: Ask, deadline: Deadline | None
    ) -> list[list[Hit]]:
        deadline = deadline or Deadline(self.milvus.timeout_s)
        fields = [*ask.fields] + [THUMBNAIL.name] * ask.thumbnails

        def ask_milvus(some: list[Any]) -> Any:
            return self.milvus.client.search(
                self.name,
                some,
                anns_field=field,
                search_params=self._search_params(ask) if field == VECTOR.name else {},
                limit=ask.limit,
                filter=ask.condition,
                output_fields=fields or [ID.name],  # none at all: every field, on Milvus Lite
                consistency_level=ask.consistency.value,
                timeout=deadline.left_s,
            )

        found: list[list[Hit]] = []
        for start in range(0, len(data), ask.at_once):
            call = partial(ask_milvus, data[start : start + ask.at_once])
            answer = self.milvus.within(deadline, f"search {self.name}", call)
            found += [[hit_from_milvus(hit) for hit in hits] for hits in answer]
        return found

    def _search_params(self, ask: Ask) -> dict[str, Any]:
        """A search of a graph must look at no fewer rows (`ef`) than it shall return."""
        params = self._params[bool(ask.condition)]
        if params.get("ef", ask.limit) < ask.limit:
            params = {**params, "ef": ask.limit}
        return {"params": params} if params else {}
