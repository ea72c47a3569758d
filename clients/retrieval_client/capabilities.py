"""What each Milvus can do, by what it says of itself; a test holds this table against real ones.

Asked before a call is made: what some Milvus cannot do it may accept, and answer wrongly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from retrieval_contract.errors import CatalogError, Unsupported


class Feature(StrEnum):
    """What not every Milvus has, of that which this library uses."""

    BM25 = "words of titles (BM25)"
    HNSW = "an index over graphs (HNSW) that gains something"


SINCE: dict[Feature, tuple[int, int] | None] = {
    Feature.BM25: (2, 5),
    Feature.HNSW: (0, 0),
}
"""The first version of the server that has it."""

LITE: frozenset[Feature] = frozenset({Feature.BM25})
"""What Milvus Lite has. Its HNSW loses filtered hits, and is no faster than an exact search."""


@dataclass(frozen=True)
class Backend:
    """One Milvus: its version as it says it, and what follows."""

    version: str
    features: frozenset[Feature]

    @classmethod
    def of(cls, version: str) -> Backend:
        """From `milvus_lite-3.2.2`, `v2.3.5`, `v2.3.5-lite` (the server's wheel) or `2.6.1-dev`."""
        if version.startswith("milvus_lite"):
            return cls(version, LITE)
        if not (match := re.match(r"v?(\d+)\.(\d+)", version)):
            raise CatalogError(
                f"Milvus: expected a version such as v2.6.0, got {version!r}; give another address"
            )
        number = (int(match[1]), int(match[2]))
        return cls(version, frozenset(f for f, since in SINCE.items() if since and number >= since))

    def need(self, feature: Feature) -> None:
        """Unsupported unless it has the feature."""
        if feature not in self.features:
            since = SINCE[feature]
            servers = f"a server since {since[0]}.{since[1]}" if since else "no server"
            servers = "every server" if since == (0, 0) else servers
            lite = "Milvus Lite, " if feature in LITE else ""
            raise Unsupported(
                f"expected a Milvus with {feature}, got {self.version}; {lite}{servers} has it"
            )
