"""Where the time of a search goes: lines that add up to what was measured.

Times come from three clocks: the client's own; what the model's process says of its run (`Took`,
only where tokenizer and tower are one model); and Triton's statistics, which count over all
requests between two looks. Of a lone request the latter are exact, of many in flight a mean.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retrieval_contract import models
from retrieval_contract.tensors import Ensemble
from retrieval_contract.took import Took

LINES = {
    "coalesce": "waiting for a request, which callers share",
    "build": "texts, or pictures, to a request",
    "wire": "gRPC there and back, with what Triton does besides",
    "queue": "waiting in the server",
    "tokenize": "texts to token ids, pictures to pixels",
    "tower": "these to vectors",
    "steps": "what Triton does not tell apart of an ensemble: its Python steps compute here",
    "handover": "Triton to the model's process and back, merging and cutting batches",
    "decode": "reply to arrays",
    "milvus": "vectors to hits",
    "unexplained": "what no line has",
}
"""Each line of a ledger, in order, and what it is; they are seconds that add up to the total."""


@dataclass(frozen=True)
class RequestTimes:
    """One request as its sender saw it, in seconds; `took` where the model said it."""

    ensemble: Ensemble
    build_s: float
    call_s: float
    decode_s: float
    took: Took | None


def took_from_reply(reply: Any) -> Took | None:
    """The timings in a reply to a request that asked for them; None where there are none."""
    for output, contents in zip(reply.outputs, reply.raw_output_contents, strict=False):
        if output.name == models.TIMINGS.name:
            row = np.frombuffer(contents, models.TIMINGS.dtype.numpy)[: len(Took._fields)]
            return Took(*row.tolist())
    return None


@dataclass(frozen=True)
class Statistics:
    """Triton's sums over good requests, in seconds, by model; subtract two to have those between.

    `compute_s` ends when the model's answer is there, or, of a Python model, when it has let the
    request in (`door.py`): it answers later, and of an ensemble that time is in `whole_s` alone,
    from when Triton had the request until it was answered. Its end, and the output that Triton
    counts after a model's answer, overlap a little with the client's having the reply. An
    ensemble's own queue is never read: Triton sums other things there.
    """

    requests: Mapping[str, int]
    queue_s: Mapping[str, float]
    compute_s: Mapping[str, float]
    whole_s: Mapping[str, float]

    @classmethod
    def from_reply(cls, reply: Any) -> Statistics:
        """Of a ModelStatisticsResponse; of several versions the one that was asked."""
        found: dict[str, Any] = {}
        for model in reply.model_stats:
            if model.inference_stats.success.count or model.name not in found:
                found[model.name] = model.inference_stats
        return cls(
            {name: s.success.count for name, s in found.items()},
            {name: s.queue.ns / 1e9 for name, s in found.items()},
            {name: (s.compute_input.ns + s.compute_infer.ns) / 1e9 for name, s in found.items()},
            {name: s.success.ns / 1e9 for name, s in found.items()},
        )

    def __sub__(self, before: Statistics) -> Statistics:
        def since(now: Mapping[str, float], then: Mapping[str, float]) -> dict[str, float]:
            return {name: value - then.get(name, 0.0) for name, value in now.items()}

        return Statistics(
            {name: n - before.requests.get(name, 0) for name, n in self.requests.items()},
            since(self.queue_s, before.queue_s),
            since(self.compute_s, before.compute_s),
            since(self.whole_s, before.whole_s),
        )

    def mean(self, sums: Mapping[str, float], model: str) -> float:
        """Per request of that model; 0 when it had none."""
        count = self.requests.get(model, 0)
        return sums.get(model, 0.0) / count if count else 0.0


@dataclass
class Laps:
    """Seconds by name; a `tracing.Span` that keeps them."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took


@dataclass(frozen=True)
class Timed:
    """One search: its laps by name (`search`, `encode`, `milvus`), and the requests it was in."""

    laps: Mapping[str, float]
    requests: Sequence[RequestTimes]


@dataclass(frozen=True)
class _Means:
    """What only Triton's statistics tell, per request of an ensemble, in seconds."""

    queue_s: float
    tokenize_s: float
    tower_s: float
    steps_s: float
    handover_s: float


def requests_of(searches: Sequence[Timed]) -> list[RequestTimes]:
    """The requests of all, each once."""
    return list({id(r): r for search in searches for r in search.requests}.values())


def ledgers(searches: Sequence[Timed], server: Statistics) -> list[dict[str, float]]:
    """Of each search the seconds by line of LINES; `server`: what Triton counted meanwhile.

    Where several searches shared a request each of them waited for the whole of it.
    """
    told: dict[Ensemble, list[Took]] = {}
    for request in requests_of(searches):
        of_one = told.setdefault(request.ensemble, [])
        if request.took:
            of_one.append(request.took)
    means = {ensemble: _means(server, ensemble, tooks) for ensemble, tooks in told.items()}
    return [_ledger(search, means) for search in searches]


def _means(server: Statistics, ensemble: Ensemble, told: Sequence[Took]) -> _Means:
    name = ensemble.name
    if told:  # one process: what Triton has beyond the process's own time is the way there and back
        model_s = sum(took.model_s for took in told) / len(told)
        around_s = max(0.0, server.mean(server.compute_s, name) - model_s)
        return _Means(server.mean(server.queue_s, name), 0.0, 0.0, 0.0, around_s)
    queue_s = sum(server.mean(server.queue_s, step.name) for step in ensemble.steps)
    tokenize_s, tower_s = (server.mean(server.compute_s, step.name) for step in ensemble.steps)
    rest_s = server.mean(server.whole_s, name) - queue_s - tokenize_s - tower_s
    return _Means(queue_s, tokenize_s, tower_s, max(0.0, rest_s), 0.0)


def _ledger(search: Timed, of: Mapping[Ensemble, _Means]) -> dict[str, float]:
    lines = dict.fromkeys(LINES, 0.0)
    for request in search.requests:
        took, means = request.took or Took(), of[request.ensemble]
        steps_s = took.wait_s + took.tokenize_s + took.tower_s
        server = {
            "queue": means.queue_s + took.wait_s,
            "tokenize": means.tokenize_s + took.tokenize_s,
            "tower": means.tower_s + took.tower_s,
            "handover": means.handover_s + took.model_s - steps_s,
        }
        # A mean, and Triton's count may end after the reply has come: no more than there was.
        server["steps"] = max(0.0, min(means.steps_s, request.call_s - sum(server.values())))
        spent = server | {
            "build": request.build_s,
            "wire": request.call_s - sum(server.values()),
            "decode": request.decode_s,
        }
        for line, seconds in spent.items():
            lines[line] += seconds
    asked_s = sum(r.build_s + r.call_s + r.decode_s for r in search.requests)
    lines["coalesce"] = search.laps["encode"] - asked_s
    lines["milvus"] = search.laps.get("milvus", 0.0)
    lines["unexplained"] = search.laps["search"] - sum(lines.values())
    return lines
