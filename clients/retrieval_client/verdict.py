"""What was found of a candidate, and of which rows: kept with its collection, so that it is asked
where it matters and cannot outlive what it speaks of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from retrieval_client.collection import Collection
from retrieval_client.records import CONTENT_HASH, ID, ROW_HASH

PROPERTY = "verdict"
"""Of the collection. Milvus keeps properties; Milvus Lite drops descriptions."""
BITS = 128


@dataclass(frozen=True)
class State:
    """Which rows a collection holds: how many, and a digest of ids and hashes in any order."""

    rows: int
    digest: str


class Digest:
    """A State of rows that come in any order: the sum of their hashes."""

    def __init__(self) -> None:
        self._rows = self._sum = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Rows as `Collection.every` gives them, with both hashes."""
        for row in rows:
            said = json.dumps([row[ID.name], row[CONTENT_HASH.name], row[ROW_HASH.name]])
            one = hashlib.blake2b(said.encode(), digest_size=BITS // 8).digest()
            self._sum = (self._sum + int.from_bytes(one, "big")) % 2**BITS
        self._rows += len(rows)

    @property
    def state(self) -> State:
        """Of what was added."""
        return State(self._rows, f"{self._sum:0{BITS // 4}x}")


def state_of(collection: Collection) -> State:
    """By a pass over its hashes."""
    digest = Digest()
    for rows in collection.every([CONTENT_HASH.name, ROW_HASH.name]):
        digest.add(rows)
    return digest.state


@dataclass(frozen=True)
class Verdict:
    """When a candidate was verified (UTC), against which release, as what, and what failed.

    `state` is of its rows, `serving` of those that it was compared with.
    """

    at: str
    against: str
    state: State
    serving: State
    failed: tuple[str, ...]

    @classmethod
    def of(cls, collection: Collection) -> Verdict | None:
        """The last one, as the collection was found; None if there was none that can be read."""
        try:
            said = json.loads(collection.info.properties.get(PROPERTY, ""))
            states = {name: State(**said[name]) for name in ("state", "serving")}
            return cls(**said | states | {"failed": tuple(said["failed"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def record(self, collection: Collection) -> None:
        """Keep it with the collection."""
        milvus = collection.milvus
        with milvus.errors(f"record the verdict on {collection.name}"):
            milvus.client.alter_collection_properties(
                collection.name,
                {PROPERTY: json.dumps(asdict(self))},
                timeout=milvus.write_timeout_s,
            )
