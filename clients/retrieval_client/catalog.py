"""The product catalog in Milvus: one collection a release, and aliases that say what each is for.

`products` is what searches see. While a release is built, `products_candidate` is its collection;
after it was promoted, `products_previous` is what can be gone back to. All that are there are
*live*: whatever is written reaches each of them.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from types import TracebackType
from typing import Any

from pymilvus import DataType, Function, FunctionType, MilvusClient

from retrieval_client.capabilities import Feature
from retrieval_client.collection import Collection, CollectionInfo, damaged
from retrieval_client.deadline import Deadline
from retrieval_client.index import Index, flat, graph, inherited
from retrieval_client.milvus import Milvus
from retrieval_client.records import ID, VECTOR, WORDS, field_parameters
from retrieval_client.settings import Settings
from retrieval_contract import models
from retrieval_contract.errors import CatalogError, CollectionGone, ReleaseMismatch
from retrieval_contract.release import RELEASE_PARAMETER

INFO_TTL_S = 5.0
"""How long a search trusts what the alias pointed to; its answers are of one release all the same.

A collection that was cleared away meanwhile is noticed at once."""

LOOKS = 3
"""At an alias that moves while it is looked at."""


class Role(StrEnum):
    """What a collection is for; the end of its alias."""

    SERVING = ""
    CANDIDATE = "_candidate"
    PREVIOUS = "_previous"
    HELD = "_held"
    """What served, while a rollback beside a candidate gives it another role."""


class Catalog:
    """A connection to one catalog. Connects on first use; every call has a deadline.

    Raises CatalogUnavailable when nobody answers, CollectionGone where there is nothing yet,
    ReleaseMismatch when the collection holds vectors of another release, CatalogError for the rest.
    """

    def __init__(self, settings: Settings) -> None:
        self.milvus = Milvus(settings)
        self.alias = settings.collection
        self._known: dict[Role, tuple[float, Collection | None]] = {}
        self._lock, self._looking = threading.Lock(), threading.Lock()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Milvus Lite holds its lock until the process ends."""
        self.milvus.close()

    def find(
        self,
        role: Role = Role.SERVING,
        *,
        max_age_s: float = 0.0,
        deadline: Deadline | None = None,
    ) -> Collection | None:
        """The collection of a role, ready to be read; None where there is none."""
        known = self._known.get(role)
        if known and time.monotonic() - known[0] < max_age_s:
            return known[1]
        # Of many who find it old one looks, and the others go on with what is known.
        looks = self._looking.acquire(blocking=False)
        if known and max_age_s and not looks:
            return known[1]
        try:
            asked = time.monotonic()
            collection = self._look(self.alias + role, deadline or Deadline(self.milvus.timeout_s))
            with self._lock:
                self._known[role] = (asked, collection)
            return collection
        finally:
            if looks:
                self._looking.release()

    def forget(self) -> None:
        """Ask anew what the aliases point to."""
        with self._lock:
            self._known.clear()

    def _look(self, alias: str, deadline: Deadline, *, ready: bool = True) -> Collection | None:
        if not self.milvus.exists:
            return None
        look = self._behind if ready else self._described
        for _ in range(LOOKS):
            with suppress(CollectionGone):  # dropped between two questions: what is there now?
                return self.milvus.within(
                    deadline, f"look at {alias}", lambda: look(alias, deadline)
                )
        return None  # an alias of a collection that is no more, as old servers keep them

    def _behind(self, alias: str, deadline: Deadline) -> Collection | None:
        collection = self._described(alias, deadline)
        if collection and collection.info.release_id:  # else somebody else's, not ours to load
            collection.load(deadline)
        return collection

    def _described(self, alias: str, deadline: Deadline) -> Collection | None:
        found = self._description(alias, deadline)
        if found is None:
            return None
        properties = found.get("properties", {})
        info = CollectionInfo(
            found["collection_name"],
            properties.get(RELEASE_PARAMETER, ""),
            _vector_dim(found),
            properties,
            has_words=any(f["name"] == WORDS.name for f in found["fields"]),
        )
        return Collection(self.milvus, info)

    def _description(self, alias: str, deadline: Deadline) -> dict[str, Any] | None:
        client = self.milvus.client
        try:
            with self.milvus.errors(f"look at {alias}", deadline):
                if not client.has_collection(alias, timeout=deadline.left_s):
                    return None
                return dict(client.describe_collection(alias, timeout=deadline.left_s))
        except CatalogError as exc:
            if self.milvus.lite and type(exc) is CatalogError:
                raise damaged(exc) from exc
            raise

    def serving(
        self, deadline: Deadline | None = None, *, max_age_s: float = INFO_TTL_S
    ) -> Collection:
        """What searches see; CollectionGone where nothing was pushed yet."""
        found = self.find(max_age_s=max_age_s, deadline=deadline)
        if found is None:
            raise CollectionGone(
                f"Milvus at {self.milvus.uri}: no collection '{self.alias}' there; fill it with "
                "`retrieval push SOURCE`"
            )
        return found

    def live(self, *, max_age_s: float = 0.0) -> dict[Role, Collection]:
        """All that a write must reach, each once.

        Looked at until two looks agree: a collection that a promotion moves from one role to
        another while the roles are asked for one by one would else be seen in neither.
        """
        found, before = self.roles(max_age_s=max_age_s), None
        while (names := {role: each.name for role, each in found.items()}) != before:
            found, before = self.roles(max_age_s=max_age_s), names
        first = {name: role for role, name in reversed(names.items())}
        return {role: each for role, each in found.items() if first[each.name] is role}

    def roles(self, *, max_age_s: float = 0.0) -> dict[Role, Collection]:
        """What each role means now; a collection has two while it is promoted."""
        found = {role: self.find(role, max_age_s=max_age_s) for role in Role}
        return {role: collection for role, collection in found.items() if collection}

    def named(self) -> dict[Role, Collection]:
        """As `roles`, but nothing is loaded: so one that cannot be, for want of an index, hinders
        nobody."""
        patience_s = self.milvus.write_timeout_s
        found = {r: self._look(self.alias + r, Deadline(patience_s), ready=False) for r in Role}
        return {role: collection for role, collection in found.items() if collection}

    def built(self) -> dict[str, str]:
        """Every collection of this catalog, with a role or without, and its release."""
        if not self.milvus.exists:
            return {}
        of_ours = re.compile(re.escape(models.PRODUCTS.name("", self.alias)) + "([0-9a-f]{16})")
        with self.milvus.errors("list the collections"):
            names = self.milvus.client.list_collections(timeout=self.milvus.write_timeout_s)
        return {name: match[1] for name in sorted(names) if (match := of_ours.fullmatch(name))}

    def of_name(self, name: str) -> Collection | None:
        """A collection without a role, by its own name; None if there is none."""
        with suppress(CollectionGone):
            self._finish(name)  # its maker may have died, and without an index it is not loaded
        return self._look(name, Deadline(self.milvus.write_timeout_s))

    def aliases_of(self, name: str) -> list[str]:
        """Every alias of a collection, of whatever catalog."""
        with self.milvus.errors(f"list the aliases of {name}"):
            said = self.milvus.client.list_aliases(name, timeout=self.milvus.write_timeout_s)
        return list(said["aliases"])

    def prepare(self, release_id: str, vector_dim: int, role: Role = Role.SERVING) -> Collection:
        """The collection of a role, made if there is none; ReleaseMismatch if it is another's."""
        collection = self.find(role)
        if collection is None:
            collection = self._create(release_id, vector_dim, role)
        info = collection.info
        if info.release_id != release_id or info.vector_dim != vector_dim:
            raise ReleaseMismatch(
                f"Milvus at {self.milvus.uri}, {info.name}: holds vectors of release "
                f"{info.release_id or 'unknown'} ({info.vector_dim} dims), expected release "
                f"{release_id} ({vector_dim} dims); serve the collection's release, or "
                "push into another catalog (--milvus or --collection)"
            )
        return collection

    def _create(self, release_id: str, vector_dim: int, role: Role) -> Collection:
        self.milvus.make()
        name = models.PRODUCTS.name(release_id, self.alias)
        client, patience_s = self.milvus.client, self.milvus.write_timeout_s
        tuning = inherited(self._index, self.find())
        with self.milvus.errors(f"create {name}"):
            if not client.has_collection(name, timeout=patience_s):
                client.create_collection(
                    name,
                    schema=_schema(
                        client, vector_dim, Feature.BM25 in self.milvus.backend.features
                    ),
                    timeout=patience_s,
                    properties={RELEASE_PARAMETER: release_id, **tuning},
                )
        self._finish(name)
        self.forget()
        if (found := self.find(role)) is None:  # or another push was first, maybe of other vectors
            self.point(name, role)
            found = self.find(role)
        assert found
        return found

    def mend(self, role: Role) -> None:
        """Give its collection an index where `index.build` was cut short, and left none."""
        if not self.milvus.exists:
            return
        found = self._description(self.alias + role, Deadline(self.milvus.write_timeout_s))
        if found and RELEASE_PARAMETER in found.get("properties", {}):
            self._finish(found["collection_name"])

    def _finish(self, name: str) -> None:
        """The indexes that a collection lacks: an earlier step may have died before they were."""
        client, patience_s = self.milvus.client, self.milvus.write_timeout_s
        with self.milvus.errors(f"index {name}"):
            found = client.describe_collection(name, timeout=patience_s)
            lacking = {f["name"] for f in found["fields"]}
            lacking -= set(client.list_indexes(name, timeout=patience_s))
            for index in self._indexes:
                if index["field_name"] in lacking:
                    params = client.prepare_index_params()
                    params.add_index(**index)
                    client.create_index(name, params, timeout=patience_s)

    @property
    def _index(self) -> Index:
        """Of the vectors of a new collection."""
        return graph() if Feature.HNSW in self.milvus.backend.features else flat()

    @property
    def _indexes(self) -> list[dict[str, Any]]:
        """Of all fields that have one, if the collection has the field."""
        vectors = self._index
        wanted: list[dict[str, Any]] = [
            {
                "field_name": VECTOR.name,
                "index_type": vectors.kind,
                "metric_type": models.PRODUCTS.metric,
                "params": dict(vectors.params),
            }
        ]
        wanted += [
            {"field_name": f.name, "index_type": "SPARSE_INVERTED_INDEX", "metric_type": "BM25"}
            for f in models.PRODUCTS.fields
            if f.words_of
        ]
        return wanted

    def point(self, name: str, role: Role) -> None:
        """Let the role's alias mean this collection from now on, in one step."""
        alias, patience_s = self.alias + role, self.milvus.write_timeout_s
        client = self.milvus.client
        with self.milvus.errors(f"alias {alias}"):  # there is no "create or alter"
            there = client.has_collection(alias, timeout=patience_s)
        likely, other = client.alter_alias, client.create_alias
        if not there:  # or it is of a collection that is no more, as old servers keep them
            likely, other = other, likely
        try:
            with self.milvus.errors(f"alias {alias}"):
                likely(name, alias, timeout=patience_s)
        except CatalogError:
            with self.milvus.errors(f"alias {alias}"):
                other(name, alias, timeout=patience_s)
        self.forget()

    def unpoint(self, role: Role) -> None:
        """No collection has the role any more."""
        with self.milvus.errors(f"drop alias {self.alias + role}"):
            self.milvus.client.drop_alias(self.alias + role, timeout=self.milvus.write_timeout_s)
        self.forget()

    def drop(self, collection: Collection | str) -> None:
        """Delete a collection (or of a name) and its rows; its aliases must be gone."""
        name = collection if isinstance(collection, str) else collection.name
        with self.milvus.errors(f"drop {name}"):
            self.milvus.client.drop_collection(name, timeout=self.milvus.write_timeout_s)
        self.forget()


def _schema(client: MilvusClient, vector_dim: int, words: bool) -> Any:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    texts = {f.words_of for f in models.PRODUCTS.fields if words}
    for declared in models.PRODUCTS.fields:
        if declared.words_of and not words:
            continue
        schema.add_field(
            declared.name,
            getattr(DataType, declared.kind),
            is_primary=declared is ID,
            **field_parameters(declared, vector_dim),
            **({"enable_analyzer": True} if declared.name in texts else {}),
        )
        if declared.words_of:
            schema.add_function(
                Function(declared.name, FunctionType.BM25, [declared.words_of], [declared.name])
            )
    return schema


def _vector_dim(description: Mapping[str, Any]) -> int:
    dims = [f["params"].get("dim") for f in description["fields"] if f["name"] == VECTOR.name]
    return int(dims[0]) if dims and dims[0] else 0
