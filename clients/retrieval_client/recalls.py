"""What an index finds of an exact search, and what that costs: measured, not believed.

The exact search is ours: one pass over the rows, in bounded memory, under the same condition.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_client.collection import Ask, Collection
from retrieval_client.records import BUCKET, ID, VECTOR, Hit
from retrieval_contract.models import BUCKETS
from retrieval_contract.tensors import Array

DEPTHS = (10, 100)
SHARES = (1.0, 0.1, 0.01, 0.001)
"""Of the rows that pass the filter."""
TOGETHER = 32
"""Queries in one call where only what they find matters."""
TIMED = 30
"""Queries that are timed, one at a time."""
TIE = 1e-5
"""A hit that scores so near the last exact one is as good: catalogs hold equal products."""
CONFIDENT = 1.645


def condition_of(share: float) -> str:
    """Milvus's condition that this share of all rows passes, whatever they are."""
    return "" if share >= 1 else f"{BUCKET.name} < {round(share * BUCKETS)}"


class Exact:
    """The best rows of each query: `ids` and `scores`, best first; fewer where fewer were shown."""

    def __init__(self, queries: Array, depth: int) -> None:
        """`queries`: float32 (queries, vector_dim), unit norm, as all stored vectors are."""
        self._queries, self._depth = queries, depth
        self.ids = np.empty((len(queries), 0), object)
        self.scores = np.empty((len(queries), 0), np.float32)

    @classmethod
    def search(
        cls, collection: Collection, queries: Array, depth: int, condition: str = ""
    ) -> Exact:
        """By a pass over all rows under a condition, some thousand at a time."""
        exact = cls(queries, depth)
        for rows in collection.every([VECTOR.name], condition):
            exact.add(rows)
        return exact

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Further rows, with ids and vectors."""
        if not rows:
            return
        vectors = np.nan_to_num(np.asarray([row[VECTOR.name] for row in rows], np.float32))
        names = np.array([row[ID.name] for row in rows], object)
        scores = np.concatenate([self.scores, self._queries @ vectors.T], axis=1)
        names = np.broadcast_to(names, (len(self._queries), len(names)))
        ids = np.concatenate([self.ids, names], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._depth]
        self.ids = np.take_along_axis(ids, best, axis=1)
        self.scores = np.take_along_axis(scores, best, axis=1)

    def recall(self, found: Sequence[Sequence[Hit]], depth: int) -> Array:
        """Float64 (queries,): share of the best `depth` that were found; 1 where no row passes."""
        each = []
        for ids, scores, hits in zip(self.ids, self.scores, found, strict=True):
            best, last = set(ids[:depth]), float(scores[:depth].min(initial=np.inf))
            seen = {hit.id: hit.score for hit in hits[:depth]}
            got = sum(hit in best or abs(score - last) < TIE for hit, score in seen.items())
            each.append(got / len(best) if best else 1.0)
        return np.array(each)


def found_at(
    collection: Collection, queries: Array, exact: Exact, depth: int, share: float
) -> Array:
    """recall@depth of a collection's own search, under the filter that a share of rows passes.

    Float64 (queries,).
    """
    ask = Ask(depth, condition_of(share))
    steps = range(0, len(queries), TOGETHER)
    found = [hits for n in steps for hits in collection.search(queries[n : n + TOGETHER], ask)]
    return exact.recall(found, depth)


def at_least(recalls: Array) -> float:
    """What the mean over all such queries is at least, with 95 % confidence, by these (queries,).

    The one-sided interval of the normal distribution, mean − 1.645 · s / √n.
    """
    if len(recalls) < 2:
        return float(recalls.mean())
    return float(recalls.mean() - CONFIDENT * recalls.std(ddof=1) / np.sqrt(len(recalls)))


@dataclass(frozen=True)
class Point:
    """One effort under one filter. CPU is of this process (all there is, where that is Milvus Lite)
    and of the server's, None where it is not known; per query, one at a time."""

    effort: int | None
    share: float
    recall_10: float
    recall_100: float
    latency_ms: float
    client_cpu_ms: float
    server_cpu_ms: float | None


@dataclass(frozen=True)
class Recall:
    """What an index finds, and what it costs; `knob` is what `effort` is to Milvus, "ef" say."""

    collection: str
    index: str
    knob: str
    rows: int
    queries: int
    points: Sequence[Point]

    def of(self, share: float = 1.0) -> list[Point]:
        """Under one filter, the smallest effort first."""
        return [point for point in self.points if point.share == share]

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self))


def recall(
    collection: Collection,
    queries: Array,
    *,
    knob: str = "",
    efforts: Sequence[int] = (),
    shares: Sequence[float] = SHARES,
    server_pid: int | None = None,
    index: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Recall:
    """recall@10 and @100 over efforts and filters; no `efforts`: as searches are made now.

    `queries`: float32 (queries, vector_dim), unit norm; vectors of real searches where there are
    some, since those of products are found more easily. `say` hears how far it is.
    """
    points = []
    for share in shares:
        exact = Exact.search(collection, queries, max(DEPTHS), condition_of(share))
        for effort in efforts or (None,):
            searched = collection if effort is None else collection.tuned({knob: effort})
            points.append(_point(searched, queries, exact, effort, share, server_pid))
            say(f"{share:.1%} of the rows, {knob} {effort}: recall@10 {points[-1].recall_10:.4f}")
    return Recall(collection.name, index, knob, collection.count(), len(queries), points)


def _point(
    collection: Collection,
    queries: Array,
    exact: Exact,
    effort: int | None,
    share: float,
    server_pid: int | None,
) -> Point:
    of_10, of_100 = (
        float(found_at(collection, queries, exact, depth, share).mean()) for depth in DEPTHS
    )
    ask, took = Ask(DEPTHS[0], condition_of(share)), []
    client, server = time.process_time(), cpu_seconds(server_pid)
    for query in queries[np.arange(TIMED) % len(queries)]:
        began = time.perf_counter()
        collection.search(query[None], ask)
        took.append(time.perf_counter() - began)
    client, after = time.process_time() - client, cpu_seconds(server_pid)
    theirs = None if server is None or after is None else (after - server) / TIMED * 1e3
    latency_ms = float(np.median(took)) * 1e3
    return Point(effort, share, of_10, of_100, latency_ms, client / TIMED * 1e3, theirs)


def cpu_seconds(pid: int | None) -> float | None:
    """What a process of this machine has used so far; None where there is none to look at."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
