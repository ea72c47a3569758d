"""The parity ladder: from torch to what is served, one rung a step, down to what search finds.

Every rung encodes the same real texts and pictures. Its vectors are compared with torch's in
FP32, and take their place on one side of a search: what a rung costs in recall shows there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from export.parity import Budget, Encode, cosines_of
from retrieval_contract import models
from retrieval_contract.errors import ExportError
from retrieval_contract.preprocess import ProductPreprocessor, TextPreprocessor
from retrieval_contract.release import TextSpec
from retrieval_contract.tensors import Array, Model
from towers.learning.catalog import ProductData, Query
from towers.learning.metrics import Figures, Interval, figures_of, mean_interval
from towers.two_towers import TowersSpec

TOP = 10
BATCH = 32
ALONE = 5
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Sample:
    """Rows of one tower: as callers send them, as the tower gets them, and torch's vectors.

    `text`: how the tower wants its tokens.
    """

    raw: Mapping[str, Sequence[bytes]]
    inputs: Mapping[str, Array]
    vectors: Array
    text: TextSpec

    def part(self, rows: Sequence[int]) -> Sample:
        """Some rows, padded to the longest of them where the tower takes any length."""
        raw = {name: [column[row] for row in rows] for name, column in self.raw.items()}
        inputs = {name: array[list(rows)] for name, array in self.inputs.items()}
        if self.text.pad_to == "longest":
            inputs = trimmed(inputs)
        vectors = self.vectors[list(rows)] if len(self.vectors) else self.vectors
        return replace(self, raw=raw, inputs=inputs, vectors=vectors)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class Rung:
    """One step of one tower; `rows`: how many it is tried on, where it is too slow for all.

    `opt_in`: nobody is served by it who did not ask for it, so its faults are told and do not fail
    the ladder.
    """

    name: str
    tower: Model
    budget: Budget
    encode: Callable[[Sample], Array]
    rows: int | None = None
    opt_in: bool = False


def by_inputs(encode: Encode) -> Callable[[Sample], Array]:
    """A runtime that takes a tower's tensors."""
    return lambda sample: encode(sample.inputs)


@dataclass(frozen=True)
class Search:
    """Queries with their judgements, and products' ids, in the order of the samples' rows."""

    queries: Sequence[Query]
    ids: Sequence[str]

    def figures(self, queries: Array, products: Array) -> Figures:
        """Of every query, with these vectors; Recall@10 beside the rest."""
        found = figures_of(self.queries, self.ids, queries @ products.T)
        relevant = np.array([len(query.grades) for query in self.queries])
        found["recall@10"] = found["capped_recall@10"] * np.minimum(TOP, relevant) / relevant
        return found


@dataclass(frozen=True)
class Found:
    """What a rung turned out to be; intervals are 95 %, over queries.

    `broken`: rows whose vector is not finite, and then nothing else is known.
    """

    rung: Rung
    rows: int
    max_abs: float = np.nan
    cosines: tuple[float, float, float] = (np.nan, np.nan, np.nan)
    """The lowest, the first percentile, the median."""
    invariance: float = np.nan
    broken: int = 0
    overlap: float = 1.0
    queries: int = 0
    recall: Interval | None = None
    ndcg: Interval | None = None

    @property
    def faults(self) -> list[str]:
        """What is past its budget."""
        budget, faults = self.rung.budget, []
        if self.broken:
            return [
                f"{self.broken} of {self.rows} vectors are not finite; find the nodes with "
                "`python -m export culprits`"
            ]
        if not self.cosines[0] >= budget.cosine:
            faults.append(f"cosine {self.cosines[0]:.6f}, expected at least {budget.cosine:.6f}")
        if not self.max_abs <= budget.max_abs:
            faults.append(f"max abs {self.max_abs:.1e}, expected at most {budget.max_abs:.0e}")
        if not self.invariance <= budget.invariance:
            faults.append(
                f"a row alone and in company differ by {self.invariance:.1e}, expected at most "
                f"{budget.invariance:.0e}"
            )
        if self.recall and not (abs(self.recall.value) <= self.tolerated):
            faults.append(
                f"Recall@10 changes by {self.recall.value:+.4f}, expected at most ±{budget.recall}"
            )
        return faults

    @property
    def tolerated(self) -> float:
        """The largest change of recall that is no fault: the budget, and one query's worth where
        that is more and the interval holds zero, since so few queries cannot tell it from none."""
        budget, recall = self.rung.budget.recall, self.recall
        may_be_none = recall and recall.low <= 0 <= recall.high
        return max(budget, 1 / self.queries) if may_be_none else budget

    def as_json(self) -> dict[str, object]:
        """One entry of the report."""
        lowest, first, median = (_number(value, 7) for value in self.cosines)
        recall, ndcg = self.recall, self.ndcg
        return {
            "rung": self.rung.name,
            "tower": self.rung.tower.name,
            "rows": self.rows,
            "max_abs": _number(self.max_abs),
            "cosine_p0": lowest,
            "cosine_p1": first,
            "cosine_p50": median,
            "alone_or_in_company": _number(self.invariance),
            "opt_in": self.rung.opt_in,
            "faults": self.faults,
            "top10_overlap": round(self.overlap, 4) if recall else None,
            "recall@10_delta": round(recall.value, 5) if recall else None,
            "interval": [round(recall.low, 5), round(recall.high, 5)] if recall else None,
            "ndcg@10_delta": round(ndcg.value, 5) if ndcg else None,
            "ndcg@10_interval": [round(ndcg.low, 5), round(ndcg.high, 5)] if ndcg else None,
        }


def _number(value: float, digits: int | None = None) -> float | None:
    """None where it is not finite: JSON has no word for that."""
    if not np.isfinite(value):
        return None
    return value if digits is None else round(value, digits)


def samples_of(
    spec: TowersSpec, queries: Sequence[str], products: ProductData
) -> dict[str, Sample]:
    """Both towers' rows, prepared as the server does it; no vectors yet."""
    text = TextPreprocessor(spec.query.tokenizer_json, spec.query.spec, required=True)
    product = ProductPreprocessor(spec.title.tokenizer_json, spec.title.spec, spec.image)
    asked = [query.encode() for query in queries]
    titles = [title.encode() for title in products.titles]
    batch = text(asked)
    none = np.zeros((0, spec.vector_dim), np.float32)
    return {
        models.QUERY_TOWER.name: Sample(
            {models.QUERY.name: asked},
            {models.QUERY_IDS.name: batch.ids, models.QUERY_MASK.name: batch.mask},
            none,
            spec.query.spec,
        ),
        models.PRODUCT_TOWER.name: Sample(
            {models.TITLE.name: titles, models.IMAGE.name: products.images},
            product(titles, products.images).tensors,
            none,
            spec.title.spec,
        ),
    }


def encoded(
    encode: Callable[[Sample], Array], sample: Sample, advance: Advance = lambda rows: None
) -> Array:
    """Vectors of all rows, in batches."""
    parts = []
    for start in range(0, len(sample), BATCH):
        part = sample.part(range(start, min(start + BATCH, len(sample))))
        parts.append(encode(part))
        advance(len(part))
    return np.concatenate(parts)


def climb(
    rung: Rung,
    samples: Mapping[str, Sample],
    search: Search | None,
    advance: Advance = lambda rows: None,
) -> Found:
    """Try one rung; `samples` by tower, with torch's vectors.

    A rung that is tried on some rows only says nothing about search. Raises ExportError for
    vectors of another shape.
    """
    whole = samples[rung.tower.name]
    sample = whole.part(range(min(rung.rows or len(whole), len(whole))))
    got = encoded(rung.encode, sample, advance)
    if got.shape != sample.vectors.shape:
        raise ExportError(
            f"{rung.name}, {rung.tower.name}: expected vectors {sample.vectors.shape}, got "
            f"{got.shape}; build the release of this checkpoint again: `make release`"
        )
    if broken := int((~np.isfinite(got)).any(1).sum()):
        return Found(rung, len(sample), broken=broken)
    cosines = np.percentile(cosines_of(got, sample.vectors), (0, 1, 50))
    alone = np.linspace(0, len(sample) - 1, min(ALONE, len(sample))).astype(int).tolist()
    found = Found(
        rung,
        len(sample),
        float(np.abs(got - sample.vectors).max()),
        (float(cosines[0]), float(cosines[1]), float(cosines[2])),
        float(np.max([np.abs(rung.encode(sample.part([row]))[0] - got[row]) for row in alone])),
    )
    if search is None or len(sample) < len(whole):
        return found
    before = {name: one.vectors for name, one in samples.items()}
    after = before | {rung.tower.name: got}
    sides = (models.QUERY_TOWER.name, models.PRODUCT_TOWER.name)
    ours, theirs = ([vectors[side] for side in sides] for vectors in (after, before))
    now, then = search.figures(*ours), search.figures(*theirs)
    return replace(
        found,
        overlap=overlap_of(ours[0] @ ours[1].T, theirs[0] @ theirs[1].T),
        queries=len(search.queries),
        recall=mean_interval(now["recall@10"] - then["recall@10"]),
        ndcg=mean_interval(now["ndcg@10"] - then["ndcg@10"]),
    )


def overlap_of(ours: Array, theirs: Array) -> float:
    """Of the ten best products of each query, the share that stays; scores (queries, products)."""
    best = [np.argsort(-scores, axis=1, kind="stable")[:, :TOP] for scores in (ours, theirs)]
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(*best, strict=True)]))


def trimmed(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Token axes cut to the longest row; two at least, the fewest that graphs are traced for."""
    kept = dict(inputs)
    for name, mask in inputs.items():
        if name.endswith("_mask"):
            longest = max(2, int(mask.sum(1).max()))
            ids = f"{name.removesuffix('_mask')}_ids"
            kept |= {name: mask[:, :longest], ids: inputs[ids][:, :longest]}
    return kept
