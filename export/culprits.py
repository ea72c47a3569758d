"""Which nodes break a tower in half precision: found by bisection, with the evidence.

Nodes are put into half precision in their order. The first with which the graph goes past the
bound is a culprit: it becomes an island, and the search goes on behind it until the rest may be
half. What is bounded, parity or recall, is in `judges.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator
from rich.console import Console

from export.half import FULL, LARGEST, islands_of, to_half, typed
from export.judges import Feed, Judge, Judging
from export.onnx_from_towers import onnx_from_towers
from export.parity import cases, few
from export.surgery import operate
from retrieval_contract import models
from retrieval_contract.errors import ExportError
from towers.two_towers import TwoTowers

Told = Callable[[int, int], None]
MOST = 64
ISLANDS_FILE = "islands.json"


@dataclass(frozen=True)
class Culprit:
    """One node, and how far off the graph is without and with it in half precision."""

    name: str
    op: str
    before: float
    after: float
    largest: float
    """The largest absolute value that it reads or gives, in FP32."""

    @property
    def why(self) -> str:
        """For people."""
        if self.largest > LARGEST:
            return f"overflows: reaches {self.largest:.3g}, half precision ends at {LARGEST:.0f}"
        return f"values up to {self.largest:.3g}: rounding, or a sum inside the node overflows"

    def as_json(self) -> dict[str, object]:
        """For the island file; no finite vectors at all is null, which JSON has a word for."""
        after = self.after if np.isfinite(self.after) else None
        return asdict(self) | {"after": after, "why": self.why}


def write_culprits(
    towers: TwoTowers, judging: Judging, rule: bool, out: Path, console: Console
) -> dict[str, object]:
    """Search both towers; writes `islands.json` under `out`, with evidence.

    `rule`: begin with the islands that export takes anyway, else with none.
    """
    report: dict[str, list[dict[str, object]]] = {}
    for model in models.TOWERS:
        graph = operate(onnx_from_towers(towers, model), model, towers.release())
        (feed,) = few(cases(model, towers))
        with console.status(model.name) as status:
            found = find_culprits(
                graph,
                judging.judge(model, graph),
                judging.bound,
                feed,
                islands_of(typed(graph)) if rule else (),
                lambda names, tried, name=model.name, status=status: status.update(
                    f"{name}: {names} culprits, {tried} graphs tried"
                ),
            )
        for culprit in found:
            console.print(
                f"{model.name}: {culprit.name} ({culprit.op}) {culprit.before:.1e} → "
                f"{culprit.after:.1e}; {culprit.why}",
                markup=False,
            )
        console.print(
            f"{model.name}: {len(found)} culprits past {judging.name} = {judging.bound:.0e}"
        )
        report[model.name] = [culprit.as_json() for culprit in found]
    out.mkdir(parents=True, exist_ok=True)
    path = out / ISLANDS_FILE
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    judged = {"judged by": judging.name, "bound": judging.bound}
    return {"islands": str(path), **judged, "culprits": report}


def read_islands(path: Path) -> dict[str, list[str]]:
    """Nodes by tower, from a file of `write_culprits`; ExportError for anything else."""
    try:
        found = json.loads(path.read_text("utf-8"))
        return {
            model.name: [culprit["name"] for culprit in found[model.name]]
            for model in models.TOWERS
        }
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ExportError(
            f"{path}: expected an island file ({type(exc).__name__}: {exc}); write one with "
            "`python -m export culprits`"
        ) from exc


def find_culprits(
    model: onnx.ModelProto,
    judge: Judge,
    bound: float,
    feed: Feed,
    islands: Sequence[str] = (),
    told: Told = lambda found, trials: None,
) -> list[Culprit]:
    """Nodes to add to `islands` so that the rest in half precision stays within `bound`.

    `told(culprits so far, graphs tried)`. Raises ExportError when even FP32 is past the bound,
    and when more than MOST nodes would be needed.
    """
    order = [node.name for node in typed(model).toposort().nodes]
    ops = {node.name: node.op for node in typed(model).nodes}
    found: list[Culprit] = []
    tried: dict[tuple[int, int], float] = {}

    def off(count: int) -> float:
        """With the first `count` nodes in half precision, but for islands and culprits."""
        key = len(found), count
        if key not in tried:
            full = {*islands, *(c.name for c in found), *order[count:]}
            try:
                tried[key] = judge(gs.export_onnx(to_half(typed(model), full)))
            except ExportError:  # a constant that half precision cannot hold
                tried[key] = float("inf")
            told(len(found), len(tried))
        return tried[key]

    if off(0) > bound:
        raise ExportError(
            f"FP32 itself is off by {off(0):.1e}, expected at most {bound:.1e}; raise --bound"
        )
    largest = _largest_values(model, feed)
    while off(len(order)) > bound:
        if len(found) == MOST:
            raise ExportError(
                f"expected at most {MOST} culprits, got more: {bound:.1e} asks for FP32; raise "
                "--bound"
            )
        good, bad = 0, len(order)  # everything up to `good` is harmless, up to `bad` is not
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if off(middle) > bound else (middle, bad)
        name = order[good]
        found.append(Culprit(name, ops[name], off(good), off(bad), largest.get(name, 0.0)))
    return found


def _largest_values(model: onnx.ModelProto, feed: Feed) -> dict[str, float]:
    """Of every node: the largest absolute value among its floating inputs and outputs, in FP32."""
    graph = typed(model)
    ends = {
        node.name: [
            tensor.name
            for tensor in (*node.inputs, *node.outputs)
            if isinstance(tensor, gs.Variable) and tensor.dtype == FULL and tensor.inputs
        ]
        for node in graph.nodes
    }
    asked = sorted({name for names in ends.values() for name in names})
    values = ReferenceEvaluator(_telling(model, asked)).run(asked, dict(feed))
    largest = {
        name: float(np.abs(value).max(initial=0.0))
        for name, value in zip(asked, values, strict=True)
    }
    return {name: max(map(largest.__getitem__, names), default=0.0) for name, names in ends.items()}


def _telling(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The same model with inner tensors as outputs."""
    told = onnx.ModelProto()
    told.CopyFrom(model)
    there = {value.name for value in told.graph.output}
    told.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in there)
    return told
