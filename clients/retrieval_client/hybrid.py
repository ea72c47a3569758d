"""Two routes to a product, its vector and the words of its title, fused into one list.

Fused in the client, so that every hit can say what each route has given it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from retrieval_client.collection import MAX_RESULTS
from retrieval_client.records import Hit, Route
from retrieval_contract.errors import ContractError

VECTOR_ROUTE, WORDS_ROUTE = "vector", "words"

WORDS_WEIGHT = 0.4
"""By SCORES; what the judged queries of four catalogs choose (`python -m benchmarks.hybrid`)."""


class Fusion(StrEnum):
    """How ranks or scores of two routes add up."""

    RRF = "rrf"
    """Reciprocal ranks, 1 / (k + rank) (Cormack et al., SIGIR 2009)."""
    SCORES = "scores"
    """Scores between 0 (the last of a route's list) and 1 (its first)."""


@dataclass(frozen=True)
class Hybrid:
    """How the first `depth` hits of each route become one list.

    `words`: weight of the words' route, 0 to 1; the vector's has the rest. `k`: of RRF. A hit that
    a route does not have among its first gets nothing from it. A score is 1 where a product is the
    first of both.
    """

    fusion: Fusion = Fusion.SCORES
    words: float = WORDS_WEIGHT
    k: int = 60
    depth: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.words <= 1:
            raise ContractError(f"words: expected a weight from 0 to 1, got {self.words}")
        if self.k < 0 or not 1 <= self.depth <= MAX_RESULTS:
            raise ContractError(
                f"expected k of 0 or more and a depth of 1 to {MAX_RESULTS}, got {self.k} and "
                f"{self.depth}"
            )

    def fuse(self, by_vector: Sequence[Hit], by_words: Sequence[Hit]) -> list[Hit]:
        """All that either route has, best first; of equal ones the better by vector."""
        routes = (
            (VECTOR_ROUTE, 1 - self.words, by_vector),
            (WORDS_ROUTE, self.words, by_words),
        )
        hits: dict[str, Hit] = {}
        found: dict[str, list[Route]] = {}
        for name, weight, of_route in routes:
            for rank, (hit, value) in enumerate(zip(of_route, self.values(of_route), strict=True)):
                hits.setdefault(hit.id, hit)
                route = Route(name, rank + 1, hit.score, weight * value)
                found.setdefault(hit.id, []).append(route)
        fused = [_fused(hits[product_id], routes) for product_id, routes in found.items()]
        return sorted(fused, key=lambda hit: -hit.score)

    def values(self, hits: Sequence[Hit]) -> list[float]:
        """What each hit of one route is worth there, 0 to 1."""
        if self.fusion is Fusion.RRF:
            return [(self.k + 1) / (self.k + rank) for rank in range(1, len(hits) + 1)]
        if not hits:
            return []
        first, last = hits[0].score, hits[-1].score
        return [(hit.score - last) / (first - last) if first > last else 1.0 for hit in hits]


def _fused(hit: Hit, routes: Sequence[Route]) -> Hit:
    """The shares add up to 1, or are all 0."""
    score = sum(route.share for route in routes)
    shared = (replace(route, share=route.share / score if score else 0.0) for route in routes)
    return replace(hit, score=score, routes=tuple(shared))
