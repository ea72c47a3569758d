"""The parity ladder: from torch to what is served, one rung a step, down to what search finds.

Every rung encodes the same real texts and pictures. Its vectors are compared with torch's in
FP32, and put in their place on one side of a search: whatever a rung costs in recall shows there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.parity import Budget, Encode
from retrieval_contract.errors import ExportError
from retrieval_contract.tensors import Array, Model
from towers.learning.catalog import Query
from towers.learning.metrics import Figures, Interval, figures_of, mean_interval

TOP = 10


@dataclass(frozen=True)
class Rung:
    """One step of one tower."""

    name: str
    tower: Model
    budget: Budget
    encode: Encode
    rows: int | None = None
    """How many rows it is tried on, where it is too slow for all."""


@dataclass(frozen=True)
class Sample:
    """Served inputs of one tower, and what torch makes of them in FP32."""

    inputs: Mapping[str, Array]
    vectors: Array


@dataclass(frozen=True)
class Search:
    """Queries with their judgements, and the ids of the products, in the order of the samples."""

    queries: Sequence[Query]
    ids: Sequence[str]

    def figures(self, queries: Array, products: Array) -> Figures:
        """Of every query, with these vectors."""
        found = figures_of(self.queries, self.ids, queries @ products.T)
        relevant = np.array([len(query.grades) for query in self.queries])
        # What capped recall divides by min(10, R), recall divides by R.
        found["recall@10"] = found["capped_recall@10"] * np.minimum(TOP, relevant) / relevant
        return found


@dataclass(frozen=True)
class Found:
    """What a rung turned out to be; intervals are 95 %, over queries."""

    rung: Rung
    rows: int
    max_abs: float
    cosine_p0: float
    cosine_p1: float
    cosine_p50: float
    invariance: float
    overlap: float | None = None
    recall: Interval | None = None
    ndcg: Interval | None = None

    @property
    def faults(self) -> list[str]:
        """What is past its budget."""
        budget, faults = self.rung.budget, []
        if not self.cosine_p0 >= budget.cosine:
            faults.append(f"cosine {self.cosine_p0:.6f}, at least {budget.cosine:.6f}")
        if not self.max_abs <= budget.max_abs:
            faults.append(f"max abs {self.max_abs:.1e}, at most {budget.max_abs:.0e}")
        if not self.invariance <= budget.invariance:
            faults.append(
                f"a row alone and in company differ by {self.invariance:.1e}, "
                f"at most {budget.invariance:.0e}"
            )
        if self.recall and not abs(self.recall.value) <= budget.recall:
            faults.append(
                f"Recall@10 changes by {self.recall.value:+.4f}, at most ±{budget.recall}"
            )
        return faults

    def as_json(self) -> dict[str, object]:
        """One entry of the report."""
        said: dict[str, object] = {
            "rung": self.rung.name,
            "tower": self.rung.tower.name,
            "rows": self.rows,
            "max_abs": self.max_abs,
            "cosine_p0": round(self.cosine_p0, 7),
            "cosine_p1": round(self.cosine_p1, 7),
            "cosine_p50": round(self.cosine_p50, 7),
            "alone_vs_company": self.invariance,
            "faults": self.faults,
        }
        if self.recall and self.ndcg:
            said |= {
                "top10_overlap": round(self.overlap or 0.0, 4),
                "recall@10_delta": round(self.recall.value, 5),
                "interval": [round(self.recall.low, 5), round(self.recall.high, 5)],
                "ndcg@10_delta": round(self.ndcg.value, 5),
                "ndcg@10_interval": [round(self.ndcg.low, 5), round(self.ndcg.high, 5)],
            }
        return said


def climb(
    rung: Rung, samples: Mapping[str, Sample], search: Search | None, query_tower: str
) -> Found:
    """Try one rung; `samples` by tower, `search` over the rows of both.

    A rung that is tried on a part of the rows says nothing about search.
    """
    sample = samples[rung.tower.name]
    rows = min(rung.rows or len(sample.vectors), len(sample.vectors))
    inputs = {name: array[:rows] for name, array in sample.inputs.items()}
    got = rung.encode(inputs)
    if got.shape != sample.vectors[:rows].shape or not np.isfinite(got).all():
        raise ExportError(
            f"{rung.name}, {rung.tower.name}: expected finite vectors "
            f"{sample.vectors[:rows].shape}, got {got.shape} with "
            f"{int(np.size(got) - np.isfinite(got).sum())} that are not"
        )
    expected = sample.vectors[:rows]
    cosines = cosines_of(got, expected)
    found = Found(
        rung,
        rows,
        float(np.abs(got - expected).max()),
        *(float(np.percentile(cosines, p)) for p in (0, 1, 50)),
        invariance=alone_against_company(rung.encode, inputs, got),
    )
    if search is None or rows < len(sample.vectors):
        return found
    other = next(s for name, s in samples.items() if name != rung.tower.name).vectors
    ours = (got, other) if rung.tower.name == query_tower else (other, got)
    theirs = (expected, other) if rung.tower.name == query_tower else (other, expected)
    after, before = search.figures(*ours), search.figures(*theirs)
    return Found(
        **{name: getattr(found, name) for name in found.__dataclass_fields__}
        | {
            "overlap": overlap_of(ours[0] @ ours[1].T, theirs[0] @ theirs[1].T),
            "recall": mean_interval(after["recall@10"] - before["recall@10"]),
            "ndcg": mean_interval(after["ndcg@10"] - before["ndcg@10"]),
        }
    )


def cosines_of(got: Array, expected: Array) -> Array:
    """Row by row; 1 where both are zero (a refused row), 0 where only one is."""
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    both_zero = ~got.any(1) & ~expected.any(1)
    cosines: Array = np.where(both_zero, 1.0, (got * expected).sum(1) / np.maximum(norms, 1e-30))
    return cosines


def overlap_of(ours: Array, theirs: Array) -> float:
    """Of the ten best products of each query, the share that stays; scores (queries, products)."""
    best = [np.argsort(-scores, axis=1, kind="stable")[:, :TOP] for scores in (ours, theirs)]
    shares = [
        len(set(a) & set(b)) / len(a) for a, b in zip(*map(np.ndarray.tolist, best), strict=True)
    ]
    return float(np.mean(shares))


def alone_against_company(encode: Encode, inputs: Mapping[str, Array], together: Array) -> float:
    """Largest difference when a row is encoded alone, cut to its own length."""
    worst = 0.0
    for row in np.linspace(0, len(together) - 1, 3).astype(int):
        alone = trimmed({name: array[row : row + 1] for name, array in inputs.items()})
        worst = max(worst, float(np.abs(encode(alone)[0] - together[row]).max()))
    return worst


def trimmed(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Token axes as long as the longest row; at least 2, the least that the graph is made for."""
    lengths = {
        name.removesuffix("_mask"): max(2, int(array.sum(1).max()))
        for name, array in inputs.items()
        if name.endswith("_mask")
    }
    return {
        name: array[:, : lengths[name.rsplit("_", 1)[0]]]
        if name.rsplit("_", 1)[0] in lengths and name.endswith(("_ids", "_mask"))
        else array
        for name, array in inputs.items()
    }
