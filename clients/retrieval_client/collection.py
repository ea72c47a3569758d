"""One collection: the products of one release, written, read and searched.

Only features that Milvus Lite and every server since 2.3 share are used, but where `capabilities`
says otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_client.deadline import Deadline
from retrieval_client.milvus import Milvus
from retrieval_contract import models
from retrieval_contract.errors import CatalogError, ContractError, ItemError, Reason
from retrieval_contract.models import Field
from retrieval_contract.tensors import Array

ID, TITLE, CONTENT_HASH, ROW_HASH, BUCKET, ATTRIBUTES, THUMBNAIL, VECTOR, WORDS = (
    models.PRODUCTS.fields
)
NORM_TOLERANCE = 1e-3
MAX_RESULTS = 16384
PASS_ROWS, PASS_BYTES = 8192, 32_000_000
"""A step of a pass over all rows; a step costs Milvus Lite a look at every row."""
SEARCH_PARAMS, FILTERED_PARAMS = "search_params", "filtered_params"
"""The properties of a collection that say how its index is searched, without and with a condition:
JSON, see `index.tune`."""
LOADS = 4
"""Attempts to load: Milvus Lite may still be writing the file of an index that it reads."""


@dataclass(frozen=True)
class ProductRow:
    """One row to store; `vector` is float32 (vector_dim,), unit norm; `thumbnail` a JPEG."""

    id: str
    title: str
    content_hash: str
    vector: Array
    attributes: Mapping[str, Any] = field(default_factory=dict)
    thumbnail: bytes = b""
    row_hash: str = ""


@dataclass(frozen=True)
class Hit:
    """One found product; `score` is the cosine, -1 to 1."""

    id: str
    score: float
    title: str
    attributes: dict[str, Any]
    thumbnail: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Ask:
    """What is asked of each vector; equal ones may be asked together.

    `condition` is in Milvus's language (`where.Where.expression`).
    """

    limit: int = 10
    condition: str = ""
    thumbnails: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= MAX_RESULTS:
            raise ContractError(f"limit: expected 1 to {MAX_RESULTS}, got {self.limit}")


@dataclass(frozen=True)
class CollectionInfo:
    """A collection as it describes itself."""

    name: str
    release_id: str
    vector_dim: int
    properties: Mapping[str, str] = field(default_factory=dict, compare=False)


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
        stored = [
            {
                ID.name: row.id,
                TITLE.name: row.title,
                CONTENT_HASH.name: row.content_hash,
                ROW_HASH.name: row.row_hash,
                BUCKET.name: bucket_of(row.id),
                ATTRIBUTES.name: dict(row.attributes),
                THUMBNAIL.name: base64.b64encode(row.thumbnail).decode(),
                VECTOR.name: row.vector,
            }
            for row in rows
        ]
        with self.milvus.errors(f"upsert {len(rows)} rows"):
            self.milvus.client.upsert(self.name, stored, timeout=self.milvus.write_timeout_s)

    def flush(self) -> None:
        """Seal what was written: on Lite it becomes durable and searches become fast."""
        with self.milvus.errors("flush"):
            self.milvus.client.flush(self.name, timeout=self.milvus.write_timeout_s)
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
            except CatalogError:
                if not self.milvus.lite or attempt == LOADS or deadline.passed:
                    raise
                time.sleep(0.05 * attempt)
                if attempt == LOADS - 1:
                    self._forget_indexes()

    def _forget_indexes(self) -> None:
        """A kill while Lite wrote an index leaves half a file; from the rows it makes another."""
        for path in Path(self.milvus.uri, "collections", self.name).rglob("*.idx"):
            with suppress(OSError):
                path.unlink()

    # ── reading ──────────────────────────────────────────────────────────────────────────
    def query(self, condition: str, fields: list[str]) -> list[dict[str, Any]]:
        """Rows under a condition, as they are now."""
        with self.milvus.errors(f"query {self.name}"):
            return list(
                self.milvus.client.query(
                    self.name,
                    filter=condition,
                    output_fields=fields,
                    consistency_level="Strong",
                    timeout=self.milvus.write_timeout_s,
                )
            )

    def of_ids(self, ids: Sequence[str], fields: list[str]) -> dict[str, dict[str, Any]]:
        """Those of the ids that are there, by id."""
        found = self.query(id_filter(ids), [ID.name, *fields]) if ids else []
        return {row[ID.name]: row for row in found}

    def every(self, fields: list[str], condition: str = "") -> Iterator[list[dict[str, Any]]]:
        """A pass over all rows (under a condition), some thousand at a time."""
        weight = 4 * self.info.vector_dim if VECTOR.name in fields else 256
        rows = min(PASS_ROWS, PASS_BYTES // weight)
        with self.milvus.errors(f"read {self.name}"):
            steps = self.milvus.client.query_iterator(
                self.name,
                batch_size=rows,
                filter=condition,
                output_fields=[ID.name, *fields],
                consistency_level="Strong",
                timeout=self.milvus.write_timeout_s,
            )
        try:
            while True:
                with self.milvus.errors(f"read {self.name}"):
                    batch = steps.next()
                if not batch:
                    return
                yield list(batch)
        finally:
            steps.close()

    def count(self) -> int:
        """Rows that are there now, deletions and replacements taken into account."""
        (row,) = self.query("", ["count(*)"])
        return int(row["count(*)"])

    def search(
        self, vectors: Array, ask: Ask | None = None, deadline: Deadline | None = None
    ) -> list[list[Hit]]:
        """The nearest products of each vector, float32 (queries, vector_dim), best first."""
        ask, deadline = ask or Ask(), deadline or Deadline(self.milvus.timeout_s)
        fields = [TITLE.name, ATTRIBUTES.name] + [THUMBNAIL.name] * ask.thumbnails
        with self.milvus.errors(f"search {self.name}", deadline):
            found = self.milvus.client.search(
                self.name,
                list(np.ascontiguousarray(vectors, np.float32)),
                anns_field=VECTOR.name,
                search_params=self._search_params(ask),
                limit=ask.limit,
                filter=ask.condition,
                output_fields=fields,
                consistency_level="Bounded",
                timeout=deadline.left_s,
            )
        return [[hit_from_milvus(hit) for hit in hits] for hits in found]

    def _search_params(self, ask: Ask) -> dict[str, Any]:
        """A search of a graph must look at no fewer rows (`ef`) than it shall return."""
        params = self._params[bool(ask.condition)]
        if params.get("ef", ask.limit) < ask.limit:
            params = {**params, "ef": ask.limit}
        return {"params": params} if params else {}


def field_parameters(declared: Field, vector_dim: int) -> dict[str, int | bool]:
    """Milvus's parameters of a declared field."""
    if declared.size:
        return {"dim": vector_dim}
    return {"max_length": declared.max_bytes} if declared.max_bytes else {}


def bucket_of(product_id: str) -> int:
    """The same for the same id, everywhere; evenly spread."""
    digest = hashlib.blake2b(product_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % models.BUCKETS


def check_id(product_id: str) -> None:
    """ItemError unless the id can be stored and found again on every Milvus."""
    size = len(product_id.encode("utf-8", "surrogatepass"))
    if not product_id or not product_id.isprintable():
        raise ItemError(Reason.BAD_ID, "expected a non-empty id without control characters")
    if size > ID.max_bytes:
        raise ItemError(Reason.BAD_ID, f"expected at most {ID.max_bytes} bytes, got {size}")


def id_filter(ids: Sequence[str]) -> str:
    """A filter for ids, quoted here: pymilvus pastes ids into filters as they are.

    JSON quoting without \\u escapes is read alike by Milvus Lite and the server.
    """
    return f"{ID.name} in [{', '.join(json.dumps(i, ensure_ascii=False) for i in ids)}]"


def check_vectors(ids: Sequence[str], vectors: Array, dim: int) -> None:
    """ContractError naming the first row that is not a finite unit vector of `dim` numbers.

    Milvus Lite stores NaN and any norm without a word.
    """
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ContractError(
            f"vectors: expected (rows, {dim}), got {vectors.shape}; encode with "
            "the release of the collection"
        )
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < NORM_TOLERANCE))  # NaN is wrong, too
    if len(wrong):
        raise ContractError(
            f"{ids[wrong[0]]}: expected a unit vector, got norm {norms[wrong[0]]:.4g}"
        )


def hit_from_milvus(hit: Mapping[str, Any]) -> Hit:
    """One search result."""
    entity = hit["entity"]
    return Hit(
        id=hit[ID.name] if ID.name in hit else entity[ID.name],
        score=float(hit["distance"]),
        title=entity[TITLE.name],
        attributes=dict(entity.get(ATTRIBUTES.name) or {}),
        thumbnail=base64.b64decode(entity.get(THUMBNAIL.name) or ""),
    )
