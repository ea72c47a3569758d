"""A catalog of stand-ins, on a real Milvus: what a push did to it, and what it then holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from benchmarks.stand_in import StandIns
from retrieval_client import Catalog, Collection, Settings
from retrieval_client.catalog import Role
from retrieval_client.feed import LOOK_UP_ROWS, Plan
from retrieval_client.push import Push, PushReport
from retrieval_client.shards import FIELDS
from retrieval_client.sources import SourceRow
from tests.conftest import photo

RELEASE, OTHER = "a" * 16, "b" * 16
PHOTO = photo()


def row(at: int, title: str = "", **attributes: object) -> SourceRow:
    """One with a photo in three."""
    image = PHOTO if at % 3 == 0 else b""
    return SourceRow(f"p{at}", (title or f"product {at}").encode(), image, attributes)


class Shop:
    """One catalog, stand-ins of both releases, and pushes into it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = replace(settings, retry_s=2.0)
        self.encoders = StandIns(RELEASE)
        self.catalog = Catalog(self.settings)

    def push(self, rows: Iterable[SourceRow], plan: Plan | None = None, **more: Any) -> PushReport:
        """What it did."""
        push = Push(self.settings, self.encoders, self.catalog, plan)
        return push.run(rows, **more)

    @property
    def collection(self) -> Collection:
        """Which is served."""
        return self.catalog.serving(max_age_s=0)

    def rows(self, collection: Collection | None = None) -> dict[str, dict[str, Any]]:
        """All that is stored."""
        fields = ["title", "attributes", "content_hash", "row_hash", "vector", "thumbnail"]
        steps = (collection or self.collection).every(fields)
        return {row["id"]: row for step in steps for row in step}

    def empty(self) -> Shop:
        """A collection costs the server seconds to make: tests share one."""
        ids = list(self.rows())
        for start in range(0, len(ids), LOOK_UP_ROWS):
            self.collection.delete(ids[start : start + LOOK_UP_ROWS])
        self.encoders = StandIns(RELEASE)
        return self


def damage(collection: Collection, product_id: str, **changed: Any) -> None:
    """As a damaged file would have it: fields are not what was written."""
    fields = [field.name for field in FIELDS]
    row = collection.of_ids([product_id], fields)[product_id]
    collection.milvus.client.upsert(collection.name, [row | changed])


class candidate:
    """While the block runs, a second release is built beside the one that is served."""

    def __init__(self, shop: Shop, role: Role = Role.CANDIDATE) -> None:
        self.shop, self.role = shop, role

    def __enter__(self) -> Collection:
        self.shop.encoders.by_release |= StandIns(OTHER, vector_dim=12).by_release
        self.made = self.shop.catalog.prepare(OTHER, 12, self.role)
        return self.made

    def __exit__(self, *exc: object) -> None:
        self.shop.catalog.unpoint(self.role)
        self.shop.catalog.drop(self.made)
