"""python -m benchmarks.index: what the index finds of an exact search, and what that costs.

On Milvus Lite and the server: the index is built and tuned with one half of the queries, its recall
measured with the other. Then the server against HNSW of faiss in this process, at the same recall,
on one thread, in interleaved rounds; and, with --kinds, other indexes at their least good effort.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import faiss
import numpy as np

from benchmarks.searches import per_second
from benchmarks.vectors import PATIENCE_S, Vectors, fill, places, settle
from retrieval_client import Collection, Settings
from retrieval_client.collection import Ask
from retrieval_client.index import KINDS, best_kind, build, graph, index_of, tune
from retrieval_client.recalls import Point, recall
from retrieval_client.records import VECTOR
from retrieval_contract.errors import CatalogError
from retrieval_contract.tensors import Array

HALF, DEPTH, TOGETHER = 200, 10, 64
RECALL = 0.98


def of_index(
    collection: Collection, tuning: Array, testing: Array, pid: int | None
) -> dict[str, Any]:
    """Tune with some queries, measure with others; latency and CPU as in `recalls.Point`."""
    try:
        tuned = asdict(tune(collection, tuning, target=RECALL))
    except CatalogError as exc:
        return {"index": str(index_of(collection)), "problem": str(exc)}
    plain = collection.tuned(tuned["params"])
    filtered = collection.tuned(tuned["filtered_params"])
    points = [
        *recall(plain, testing, shares=(1.0,), server_pid=pid).points,
        *recall(filtered, testing, shares=(0.1, 0.01, 0.001), server_pid=pid).points,
    ]
    return {**tuned, "recall": None, "measured": [asdict(point) for point in points]}


def timed_build(collection: Collection, kind: str) -> float:
    """Seconds."""
    began = time.perf_counter()
    wanted = KINDS[kind](collection.count())
    if index_of(collection) != wanted:
        build(collection, wanted)
    return time.perf_counter() - began


def hnsw_of_faiss(vectors: Array, queries: Array, wanted: float) -> tuple[Any, int, float]:
    """A graph like the server's, the least ef that finds as much, and what it finds."""
    params = graph().params
    index = faiss.IndexHNSWFlat(vectors.shape[1], params["M"], faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = params["efConstruction"]
    index.add(vectors)
    exact = np.sort(queries @ vectors.T, axis=1)[:, -DEPTH][:, None]
    found = 0.0
    for ef in graph().efforts:
        index.hnsw.efSearch = ef
        found = float((index.search(queries, DEPTH)[0] >= exact - 1e-5).mean())
        if found >= wanted:
            break
    return index, index.hnsw.efSearch, found


def against_faiss(
    collection: Collection, vectors: Array, queries: Array, rounds: int, seconds: float
) -> dict[str, Any]:
    """Searches a second on one thread: one at a time, ids only, and TOGETHER in a call."""
    faiss.omp_set_num_threads(1)
    of_server = recall(collection, queries[:HALF], shares=(1.0,)).points[0].recall_10
    index, ef, of_faiss = hnsw_of_faiss(vectors, queries[:HALF], of_server)
    client, params = collection.milvus.client, collection._search_params(Ask(DEPTH))

    def ids_only(vector: Array) -> object:
        return client.search(
            collection.name,
            list(vector),
            anns_field=VECTOR.name,
            limit=DEPTH,
            search_params=params,
            consistency_level="Bounded",
            timeout=PATIENCE_S,
        )

    ways: dict[str, tuple[Callable[[Array], object], int]] = {
        "faiss": (lambda vector: index.search(vector, DEPTH), 1),
        "server": (collection.search, 1),
        "server, ids only": (ids_only, 1),
        f"server, {TOGETHER} in a call": (collection.search, TOGETHER),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (search, each) in ways.items():
            rates[name].append(per_second(search, queries, 1, seconds, each))
    ratios = {
        name: statistics.median(b / a for a, b in zip(rates["faiss"], rates[name], strict=True))
        for name in ways
    }
    return {
        "recall": {"server": of_server, "faiss": of_faiss, "faiss_ef": ef},
        "per_s": {name: statistics.median(rate) for name, rate in rates.items()},
        "by_faiss": ratios,
    }


def say(name: str, found: dict[str, Any]) -> None:
    """A line a point."""
    print(name, {k: v for k, v in found.items() if k != "measured"}, flush=True)
    for point in found.get("measured", ()):
        print("   ", asdict(Point(**point)), flush=True)


def main() -> None:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--rows", type=int, default=50_000)
    top.add_argument("--kinds", nargs="*", default=[], choices=KINDS, help="others, to compare")
    top.add_argument("--backends", nargs="*", default=["lite", "server"])
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--seconds", type=float, default=2.0, help="of a round")
    top.add_argument("--milvus", default="", help="a server that runs; default: one is started")
    top.add_argument("--pid", type=int, help="its process")
    args = top.parse_args()
    vectors = Vectors.load(args.rows)
    tuning, testing = vectors.queries[:HALF], vectors.queries[HALF : 2 * HALF]
    said: dict[str, Any] = {"vectors": vectors.source, "rows": args.rows}
    with places(args.milvus, args.pid) as found:
        for name in args.backends:
            uri, pid = found[name]
            settings = Settings(
                milvus=uri,
                collection=f"bench{args.rows}",
                push_timeout_s=PATIENCE_S,
                timeout_s=60.0,
            )
            collection = fill(settings, vectors.stored)
            best = best_kind(collection.milvus, args.rows).kind
            for kind in (*(k for k in args.kinds if k != best), best):
                seconds = timed_build(collection, kind)
                settle(pid)
                of_kind = of_index(collection, tuning, testing, pid)
                said[f"{name} {kind}"] = {"build_s": seconds, **of_kind}
                say(f"{name} {kind}", said[f"{name} {kind}"])
            if name == "server" and "params" in said[f"{name} {best}"] and best != "FLAT":
                tuned = collection.tuned(said[f"{name} {best}"]["params"])
                queries = vectors.queries[HALF:]
                compared = against_faiss(tuned, vectors.stored, queries, args.rounds, args.seconds)
                said["against faiss"] = compared
                print(compared, flush=True)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
