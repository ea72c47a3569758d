"""By what a graph in half precision is judged: its vectors, or what a search finds with them.

Both run `onnx.reference`, which rounds every tensor, unlike ONNX Runtime on a processor, where
casts are fused away and overflows hide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from export.ladder import Search, by_inputs, encoded, samples_of
from export.parity import cases, cosines_of, few, reference
from export.rungs import MOST_QUERIES, Asked, sampled, torch_encode
from retrieval_contract import models
from retrieval_contract.tensors import Array, Model
from towers.two_towers import TwoTowers

Feed = dict[str, Array]
Judge = Callable[[onnx.ModelProto], float]
"""A graph → how far it is off, ≥ 0; infinite where it gives no finite vectors."""


@dataclass(frozen=True)
class Judging:
    """What is compared, how much of it may be lost, and the judge of one tower's FP32 graph."""

    name: str
    bound: float
    judge: Callable[[Model, onnx.ModelProto], Judge]


def by_parity(towers: TwoTowers) -> Judging:
    """1 − the lowest cosine with the FP32 graph's vectors, on the parity cases."""

    def judge(model: Model, graph: onnx.ModelProto) -> Judge:
        (feed,) = few(cases(model, towers))
        return parity_judge(graph, feed)

    return Judging("1 − cosine", 5e-4, judge)


def parity_judge(model: onnx.ModelProto, feed: Feed) -> Judge:
    """How far a graph's vectors are from those of the FP32 `model` on the same rows."""
    expected = reference(model)(feed).astype(np.float64)

    def off(graph: onnx.ModelProto) -> float:
        got = reference(graph)(feed).astype(np.float64)
        return max(0.0, float(1 - cosines_of(got, expected).min())) if _finite(got) else np.inf

    return off


def by_recall(towers: TwoTowers, asked: Asked) -> Judging:
    """Recall@10 lost against torch, a mean over judged queries, where one tower's vectors are the
    graph's. Cheap for queries; for products the reference takes seconds a product and graph.

    Raises SourceError where the data has no judged queries.
    """
    products = sampled(asked)
    queries = products.queries[:MOST_QUERIES]
    samples = samples_of(towers.spec, [query.text for query in queries], products)
    search = Search(queries, products.ids)
    whole = {
        model.name: encoded(by_inputs(torch_encode(towers, model)), samples[model.name])
        for model in models.TOWERS
    }

    def recall(vectors: dict[str, Array]) -> float:
        sides = vectors[models.QUERY_TOWER.name], vectors[models.PRODUCT_TOWER.name]
        return float(search.figures(*sides)["recall@10"].mean())

    def judge(model: Model, graph: onnx.ModelProto) -> Judge:
        def off(half: onnx.ModelProto) -> float:
            got = encoded(by_inputs(reference(half)), samples[model.name])
            if not _finite(got):
                return np.inf
            return max(0.0, recall(whole) - recall(whole | {model.name: got}))

        return off

    return Judging("Recall@10 lost", 5e-3, judge)


def _finite(vectors: Array) -> bool:
    return bool(np.isfinite(vectors).all())
