"""How much of an exact search a collection's own search finds: over vectors of real queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from retrieval_client.records import VECTOR, Hit
from retrieval_contract.tensors import Array

TIE = 1e-4
"""Hits that score as the last exact one within this are as good: float sums differ in order."""


class Exact:
    """The best `depth` scores of every query, over rows that are shown a step at a time."""

    def __init__(self, queries: Array, depth: int) -> None:
        """`queries`: float32 (queries, vector_dim), unit norm."""
        self._queries, self._depth = queries, depth
        self._best = np.full((len(queries), depth), -np.inf, np.float32)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Rows with their vectors."""
        if not rows or not len(self._queries):
            return
        vectors = np.nan_to_num(np.asarray([row[VECTOR.name] for row in rows], np.float32))
        scores = np.concatenate([self._best, self._queries @ vectors.T], axis=1)
        self._best = -np.partition(-scores, self._depth - 1, axis=1)[:, : self._depth]

    def recall(self, found: Sequence[Sequence[Hit]]) -> float:
        """Share of the exact hits that were found, 1 where there is nothing to find."""
        wanted, got = 0, 0
        for best, hits in zip(self._best, found, strict=True):
            exact = best[np.isfinite(best)]
            wanted += len(exact)
            got += sum(bool(hit.score >= exact.min() - TIE) for hit in hits) if len(exact) else 0
        return got / wanted if wanted else 1.0
