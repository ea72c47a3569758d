"""The product catalog in Milvus: one collection a release, behind one alias.

Only features that Milvus Lite and every server since 2.3 share are used.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient

from retrieval_client.connect import milvus_client
from retrieval_client.deadline import Deadline
from retrieval_client.settings import Settings
from retrieval_client.translate import milvus_errors
from retrieval_contract import models
from retrieval_contract.errors import (
    CatalogError,
    CatalogUnavailable,
    ContractError,
    ItemError,
    Reason,
    ReleaseMismatch,
)
from retrieval_contract.models import Field
from retrieval_contract.release import RELEASE_PARAMETER
from retrieval_contract.tensors import Array

ID, TITLE, CONTENT_HASH, ATTRIBUTES, THUMBNAIL, VECTOR = models.PRODUCTS.fields
INFO_TTL_S = 5.0
"""How long a search trusts what the alias pointed to."""
NORM_TOLERANCE = 1e-3
MAX_RESULTS = 16384


@dataclass(frozen=True)
class ProductRow:
    """One row to store; `vector` is float32 (vector_dim,), unit norm; `thumbnail` a JPEG."""

    id: str
    title: str
    content_hash: str
    vector: Array
    attributes: Mapping[str, Any] = field(default_factory=dict)
    thumbnail: bytes = b""


@dataclass(frozen=True)
class Hit:
    """One found product; `score` is the cosine, -1 to 1."""

    id: str
    score: float
    title: str
    attributes: dict[str, Any]
    thumbnail: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class CollectionInfo:
    """The collection behind the alias, as it says itself."""

    name: str
    release_id: str
    vector_dim: int


class Catalog:
    """A connection to one catalog. Connects on first use; every call has a deadline.

    Writing starts with `prepare`, which binds this object to one release's collection: if the
    alias moves meanwhile, what was encoded for a release still goes to its own collection.

    Raises CatalogUnavailable when nobody answers, ReleaseMismatch when the collection holds
    vectors of another release, CatalogError for the rest.
    """

    def __init__(self, settings: Settings) -> None:
        self.uri = settings.milvus
        self.alias = settings.collection
        self.timeout_s = settings.timeout_s
        self.write_timeout_s = settings.push_timeout_s
        self._settings = settings
        self._info: tuple[float, CollectionInfo] | None = None
        self._bound: CollectionInfo | None = None

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Milvus Lite holds its lock until the process ends."""
        if "_client" in self.__dict__:
            self._client.close()
            del self._client

    @cached_property
    def _client(self) -> MilvusClient:
        lite = self.uri.endswith(".db")
        with milvus_errors(self.uri, "connect"):
            try:
                return milvus_client(self._settings)
            except Exception as exc:
                if lite:  # one message of pymilvus covers every cause
                    raise CatalogUnavailable(
                        f"Milvus Lite at {self.uri}: cannot be opened ({exc}); another process "
                        "may hold it, or the path is not a catalog: close that process, or give "
                        "another path (--milvus)"
                    ) from exc
                raise

    def server_version(self) -> str:
        """Such as "milvus_lite-3.2.2" or "v2.6.0"."""
        with milvus_errors(self.uri, "version"):
            version: str = self._client.get_server_version(timeout=self.timeout_s)
            return version

    @property
    def exists(self) -> bool:
        """False where a Milvus Lite store is not there yet: only `prepare` makes one."""
        return not self.uri.endswith(".db") or Path(self.uri).exists()

    def info(
        self, *, max_age_s: float = 0.0, deadline: Deadline | None = None
    ) -> CollectionInfo | None:
        """The collection behind the alias; None when there is none yet."""
        if self._info and time.monotonic() - self._info[0] < max_age_s:
            return self._info[1]
        self._info = None
        if not self.exists:
            return None
        deadline = deadline or Deadline(self.write_timeout_s)
        with milvus_errors(self.uri, f"describe {self.alias}"):
            if not self._client.has_collection(self.alias, timeout=deadline.left_s):
                return None
            found = self._client.describe_collection(self.alias, timeout=deadline.left_s)
        release_id = found.get("properties", {}).get(RELEASE_PARAMETER, "")
        info = CollectionInfo(found["collection_name"], release_id, self._vector_dim(found))
        # An open store has loaded nothing; searching it then is error 101.
        with milvus_errors(self.uri, f"load {info.name}"):
            self._client.load_collection(info.name, timeout=deadline.left_s)
        self._info = (time.monotonic(), info)
        return info

    def check(
        self, release_id: str, vector_dim: int, deadline: Deadline | None = None
    ) -> CollectionInfo:
        """The collection to search; ReleaseMismatch unless it is of this release and size."""
        info = self._current(deadline)
        if info.release_id != release_id or info.vector_dim != vector_dim:
            raise ReleaseMismatch(
                f"Milvus at {self.uri}, {info.name}: holds vectors of release "
                f"{info.release_id or 'unknown'} ({info.vector_dim} dims), the server encodes "
                f"release {release_id} ({vector_dim} dims); serve the collection's release, or "
                "push into another catalog (--milvus or --collection)"
            )
        return info

    def prepare(self, release_id: str, vector_dim: int) -> CollectionInfo:
        """The collection to push into, made if there is none. Otherwise as `check`."""
        if self.info() is None:
            self._create(release_id, vector_dim)
        self._bound = self.check(release_id, vector_dim)
        return self._bound

    def stored_hashes(self, ids: Sequence[str]) -> dict[str, str]:
        """Content hashes of those of the ids that are stored."""
        found = self._query(id_filter(ids), [ID.name, CONTENT_HASH.name])
        return {row[ID.name]: row[CONTENT_HASH.name] for row in found}

    def upsert(self, rows: Sequence[ProductRow]) -> None:
        """Store rows, replacing those of equal id. Ids within one call must differ."""
        if self._bound is None:
            raise CatalogError("upsert: call `prepare` first, with the release of the vectors")
        if not rows:
            return
        vectors = np.stack([row.vector for row in rows])
        check_vectors([row.id for row in rows], vectors, self._bound.vector_dim)
        stored = [
            {
                ID.name: row.id,
                TITLE.name: row.title,
                CONTENT_HASH.name: row.content_hash,
                ATTRIBUTES.name: dict(row.attributes),
                THUMBNAIL.name: base64.b64encode(row.thumbnail).decode(),
                VECTOR.name: row.vector,
            }
            for row in rows
        ]
        with milvus_errors(self.uri, f"upsert {len(rows)} rows"):
            self._client.upsert(self._bound.name, stored, timeout=self.write_timeout_s)

    def flush(self) -> None:
        """Seal what was written: on Lite it becomes durable and searches become fast."""
        with milvus_errors(self.uri, "flush"):
            self._client.flush(self._target().name, timeout=self.write_timeout_s)
        self.info()

    def search(
        self,
        vectors: Array,
        *,
        limit: int = 10,
        thumbnails: bool = False,
        collection: CollectionInfo | None = None,
        deadline: Deadline | None = None,
    ) -> list[list[Hit]]:
        """The `limit` nearest products of each vector, float32 (queries, vector_dim).

        `collection` is what `check` returned; without it, the one behind the alias now.
        """
        if not 1 <= limit <= MAX_RESULTS:
            raise ContractError(f"limit: expected 1 to {MAX_RESULTS}, got {limit}")
        deadline = deadline or Deadline(self.timeout_s)
        info = collection or self._current(deadline)
        fields = [TITLE.name, ATTRIBUTES.name] + [THUMBNAIL.name] * thumbnails
        with milvus_errors(self.uri, f"search {info.name}"):
            found = self._client.search(
                info.name,
                list(np.ascontiguousarray(vectors, np.float32)),
                anns_field=VECTOR.name,
                limit=limit,
                output_fields=fields,
                consistency_level="Bounded",
                timeout=deadline.left_s,
            )
        return [[hit_from_milvus(hit) for hit in hits] for hits in found]

    def delete(self, ids: Sequence[str]) -> list[str]:
        """Delete by id; returns those that were there."""
        there = sorted(self.stored_hashes(ids))
        if there:
            with milvus_errors(self.uri, f"delete {len(there)} rows"):
                self._client.delete(
                    self._target().name, filter=id_filter(there), timeout=self.write_timeout_s
                )
        return there

    def count(self) -> int:
        """Rows that are there now, deletions and replacements taken into account."""
        (row,) = self._query("", ["count(*)"])
        return int(row["count(*)"])

    def _query(self, condition: str, fields: list[str]) -> list[dict[str, Any]]:
        info = self._target()
        with milvus_errors(self.uri, f"query {info.name}"):
            return list(
                self._client.query(
                    info.name,
                    filter=condition,
                    output_fields=fields,
                    consistency_level="Strong",
                    timeout=self.write_timeout_s,
                )
            )

    def _target(self) -> CollectionInfo:
        """What this object was prepared for, else the collection behind the alias."""
        return self._bound or self._current()

    def _current(self, deadline: Deadline | None = None) -> CollectionInfo:
        info = self.info(max_age_s=INFO_TTL_S, deadline=deadline)
        if info is None:
            raise CatalogError(
                f"Milvus at {self.uri}: no collection '{self.alias}' there; fill it with "
                "`retrieval push SOURCE`"
            )
        return info

    def _create(self, release_id: str, vector_dim: int) -> None:
        if self.uri.endswith(".db"):
            Path(self.uri).parent.mkdir(parents=True, exist_ok=True)
        name = models.PRODUCTS.name(release_id, self.alias)
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        for declared in models.PRODUCTS.fields:
            schema.add_field(
                declared.name,
                getattr(DataType, declared.kind),
                is_primary=declared is ID,
                **field_parameters(declared, vector_dim),
            )
        index = self._client.prepare_index_params()
        index.add_index(VECTOR.name, index_type="FLAT", metric_type=models.PRODUCTS.metric)
        with milvus_errors(self.uri, f"create {name}"):
            if not self._client.has_collection(name, timeout=self.timeout_s):
                self._client.create_collection(
                    name,
                    schema=schema,
                    timeout=self.write_timeout_s,
                    properties={RELEASE_PARAMETER: release_id},
                )
            # Each step is asked for by itself: an earlier `prepare` may have died between them.
            if not self._client.list_indexes(name, timeout=self.timeout_s):
                self._client.create_index(name, index, timeout=self.write_timeout_s)
            self._client.create_alias(name, self.alias, timeout=self.timeout_s)

    def _vector_dim(self, description: Mapping[str, Any]) -> int:
        dims = [f["params"].get("dim") for f in description["fields"] if f["name"] == VECTOR.name]
        return int(dims[0]) if dims and dims[0] else 0


def field_parameters(declared: Field, vector_dim: int) -> dict[str, int]:
    """Milvus's parameters of a declared field."""
    if declared.size:
        return {"dim": vector_dim}
    return {"max_length": declared.max_bytes} if declared.max_bytes else {}


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
