"""Rankings → figures with intervals, through ir_measures (pytrec_eval).

nDCG uses gains of 2^grade − 1 (Burges et al., ICML 2005), given to trec_eval as grades because
its own gain is the grade itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ir_measures
import numpy as np
from ir_measures import RR, P, Qrel, R, ScoredDoc, nDCG
from numpy.typing import NDArray

from towers.learning.catalog import Query

DEPTH = 100
RESAMPLES = 2000
MEASURES = {
    "ndcg@10": nDCG @ 10,
    "recall@100": R @ 100,
    "mrr": RR,
    "precision@10": P @ 10,
    "pool_ndcg@10": nDCG(judged_only=True) @ 10,
}

Scores = NDArray[np.float32]
Figures = dict[str, NDArray[np.float64]]
"""A figure's name → its value for each query, in their order."""


def figures_of(queries: Sequence[Query], ids: Sequence[str], scores: Scores) -> Figures:
    """Every figure of every query; `scores`: float32 (queries, products).

    Capped recall is hits@10 / min(10, R): plain recall cannot reach 1 where R > 10. The pool's
    nDCG ranks only what was judged, and is left out where everything else is irrelevant.
    """
    judged = any(query.judged for query in queries)
    measures = {n: m for n, m in MEASURES.items() if judged or not n.startswith("pool")}
    qrels, run = [], []
    column = {product_id: at for at, product_id in enumerate(ids)}
    for query, row in zip(queries, scores, strict=True):
        grades = dict.fromkeys(query.judged, 0) | query.grades
        qrels += [Qrel(query.id, i, 2**grade - 1) for i, grade in grades.items()]
        kept = set(np.argpartition(-row, min(DEPTH, len(row) - 1))[:DEPTH].tolist())
        kept |= {column[i] for i in query.judged if i in column}
        run += [ScoredDoc(query.id, ids[at], float(row[at])) for at in kept]
    place = {query.id: at for at, query in enumerate(queries)}
    found: Figures = {name: np.zeros(len(queries)) for name in measures}
    names = {str(measure): name for name, measure in measures.items()}
    for value in ir_measures.iter_calc(list(measures.values()), qrels, run):
        found[names[str(value.measure)]][place[value.query_id]] = value.value
    relevant = np.array([len(query.grades) for query in queries])
    found["capped_recall@10"] = found.pop("precision@10") * 10 / np.minimum(10, relevant)
    return found


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap interval over queries."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean_interval(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """Mean over queries; `values` (queries,)."""
    means = values[_resamples(len(values), seed)].mean(1)
    return _interval(float(values.mean()), means)


def ratio_interval(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], seed: int = 0
) -> Interval:
    """Mean of ours ÷ mean of theirs, paired: both on the same resampled queries.

    Rows are seeds when the arrays are (seeds, queries), and are resampled as well: an interval
    over queries alone would leave out what another training would give (the pigeonhole bootstrap,
    Owen, Annals of Applied Statistics 2007).
    """
    a, b = np.atleast_2d(ours), np.atleast_2d(theirs)
    rows, seeds = _resamples(a.shape[1], seed), _resamples(len(a), seed + 1)
    drawn = np.stack([(seeds == at).mean(1) for at in range(len(a))], axis=1)
    means = [np.take_along_axis(drawn @ values, rows, 1).mean(1) for values in (a, b)]
    ratios = means[0] / np.maximum(means[1], 1e-9)
    return _interval(float(a.mean() / max(b.mean(), 1e-9)), ratios)


def _resamples(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def _interval(value: float, samples: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def means_of(figures: Figures) -> Mapping[str, float]:
    """Rounded means."""
    return {name: round(float(values.mean()), 4) for name, values in figures.items()}
