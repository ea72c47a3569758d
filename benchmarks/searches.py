"""python -m benchmarks.searches: what it is worth that concurrent searches travel as one call.

64 threads, one search at a time each, through `Searches` and through `Collection.search`, in
interleaved rounds with the most that Milvus gives: two threads, each with calls as large as ours
that nobody has to gather. Then one thread, alternating between the two and pymilvus itself. Times
are of this machine, ratios are the result. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.vectors import PATIENCE_S, Vectors, fill, places, settle
from retrieval_client import Collection, Settings
from retrieval_client.collection import Ask
from retrieval_client.deadline import Deadline
from retrieval_client.records import ATTRIBUTES, TITLE, VECTOR
from retrieval_client.searches import TOGETHER, Searches
from retrieval_contract.tensors import Array

THREADS, TIMEOUT_S, LIMIT = 64, 60.0, 10
Search = Callable[[Array], object]


@dataclass(frozen=True)
class Ways:
    """Three ways to search one collection for vectors (1, dim)."""

    alone: Search
    together: Search
    pymilvus: Search


def ways(collection: Collection) -> Ways:
    """Equal questions; what comes back is read, since pymilvus decodes late."""
    searches, ask, client = Searches(), Ask(LIMIT), collection.milvus.client

    def raw(vector: Array) -> object:
        found = client.search(
            collection.name,
            list(vector),
            anns_field=VECTOR.name,
            search_params=collection._search_params(ask),
            limit=LIMIT,
            output_fields=[TITLE.name, ATTRIBUTES.name],
            consistency_level="Bounded",
            timeout=TIMEOUT_S,
        )
        return [
            (hit["id"], hit["distance"], hit["entity"][TITLE.name], hit["entity"][ATTRIBUTES.name])
            for hit in found[0]
        ]

    return Ways(
        alone=lambda vector: collection.search(vector, ask, Deadline(TIMEOUT_S)),
        together=lambda vector: searches(collection, vector, ask, Deadline(TIMEOUT_S)),
        pymilvus=raw,
    )


def per_second(
    search: Search, queries: Array, threads: int, seconds: float, each: int = 1
) -> float:
    """Vectors searched for in a second by so many threads, `each` in a call."""
    counts, end = [0] * threads, time.perf_counter() + seconds

    def work(n: int) -> None:
        for at in itertools.count(n * 31):
            if time.perf_counter() > end:
                return
            start = at * each % (len(queries) - each + 1)
            search(queries[start : start + each])
            counts[n] += each

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - began)


def lone(found: Ways, queries: Array, count: int) -> dict[str, float]:
    """Median milliseconds of one search at a time, the three ways in turn."""
    took: dict[str, list[float]] = {name: [] for name in vars(found)}
    for n in range(count):
        names = list(took)
        for name in names[n % 3 :] + names[: n % 3]:
            began = time.perf_counter()
            getattr(found, name)(queries[n % len(queries)][None])
            took[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(times) for name, times in took.items()}


def measured(
    collection: Collection, queries: Array, rounds: int, seconds: float
) -> dict[str, float]:
    """Medians over rounds."""
    found = ways(collection)
    for search in vars(found).values():
        per_second(search, queries, 4, 0.5)
    rates: dict[str, list[float]] = {"alone": [], "together": [], "gathered": []}
    for _ in range(rounds):
        for name in ("alone", "together"):
            rates[name].append(per_second(getattr(found, name), queries, THREADS, seconds))
        rates["gathered"].append(per_second(found.alone, queries, 2, seconds, TOGETHER))

    def by(ours: str, theirs: str) -> float:
        pairs = zip(rates[ours], rates[theirs], strict=True)
        return statistics.median(a / b for a, b in pairs)

    ms = lone(found, queries, 40 if collection.milvus.lite else 600)
    return {
        "alone_per_s": statistics.median(rates["alone"]),
        "together_per_s": statistics.median(rates["together"]),
        "together_by_alone": by("together", "alone"),
        "together_by_gathered": by("together", "gathered"),
        "gathered_by_alone": by("gathered", "alone"),
        "lone_ms": ms["alone"],
        "lone_together_by_alone": ms["together"] / ms["alone"],
        "lone_client_by_pymilvus_per_s": ms["pymilvus"] / ms["alone"],
        "client_overhead_us": (ms["alone"] - ms["pymilvus"]) * 1e3,
    }


def main() -> None:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--rows", type=int, default=50_000)
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--seconds", type=float, default=3.0, help="of a round")
    top.add_argument("--ef", type=int, default=64, help="of the server's graph; as `tune` finds it")
    top.add_argument("--milvus", default="", help="a server that runs; default: one is started")
    args = top.parse_args()
    vectors = Vectors.load(args.rows)
    said: dict[str, object] = {"vectors": vectors.source, "rows": args.rows, "threads": THREADS}
    with places(args.milvus) as found:
        for name, (uri, pid) in found.items():
            settings = Settings(
                milvus=uri,
                collection=f"bench{args.rows}",
                push_timeout_s=PATIENCE_S,
                timeout_s=TIMEOUT_S,
            )
            collection = fill(settings, vectors.stored).tuned({"ef": args.ef})
            settle(pid)
            said[name] = measured(collection, vectors.queries, args.rounds, args.seconds)
            print(name, said[name], flush=True)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
