"""python -m benchmarks.searches: what it is worth that concurrent searches travel as one call.

64 threads, one search at a time each, through `Searches` and through `Collection.search`, in
interleaved rounds with the most that Milvus gives: two threads, each with calls as large as ours
that nobody has to gather. Then one thread, alternating between the two, all that a `ProductSearch`
does for a caller whose vector is ready, and pymilvus itself. Times are of this machine, ratios are
the result. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.vectors import PATIENCE_S, Vectors, fill, places, settle
from retrieval_client import Collection, ProductSearch, Settings
from retrieval_client.collection import FILTERED_PARAMS, SEARCH_PARAMS, Ask, CollectionInfo
from retrieval_client.deadline import Deadline
from retrieval_client.encoder import Encoded
from retrieval_client.handshake import Served
from retrieval_client.records import ATTRIBUTES, TITLE, VECTOR
from retrieval_client.searches import TOGETHER, Searches
from retrieval_contract.tensors import Array

THREADS, TIMEOUT_S, LIMIT = 64, 60.0, 10
Search = Callable[[Array], object]
MEANINGS = {
    "alone_per_s": f"{THREADS} threads, searches/s each alone",
    "together_per_s": f"{THREADS} threads, searches/s together",
    "together_by_alone": "together ÷ each alone",
    "together_by_gathered": "together ÷ two threads with calls as large",
    "gathered_by_alone": "these ÷ each alone",
    "lone_ms": "one thread, ms of a call that cannot be shared",
    "lone_together_by_alone": "one thread, time of a call that might be shared ÷ one that cannot",
    "call_by_pymilvus_per_s": "one thread, calls/s ÷ pymilvus with a ready vector",
    "call_overhead_us": "one thread, µs of a call besides pymilvus's",
    "client_by_pymilvus_per_s": "one thread, searches/s of this client ÷ pymilvus, a ready vector",
    "client_overhead_us": "one thread, µs of this client besides pymilvus's",
}


@dataclass(frozen=True)
class Ways:
    """Four ways to search one collection for vectors (1, dim)."""

    alone: Search
    together: Search
    client: Search
    pymilvus: Search


class ReadyVectors:
    """In place of Encoders, and of an encoder: a text is a vector, in a character a byte."""

    def for_collection(self, info: CollectionInfo, deadline: object = None) -> ReadyVectors:
        """The encoder of what a collection holds."""
        self._served = Served(info.release_id, info.vector_dim)
        return self

    def encode_queries(self, queries: Sequence[str], *, timeout_s: float) -> Encoded:
        """As Encoder's."""
        said = b"".join(query.encode("latin-1") for query in queries)
        vectors = np.frombuffer(said, np.float32).reshape(len(queries), -1)
        return Encoded(vectors, [None] * len(queries), self._served)

    def close(self) -> None:
        """Nothing is open."""


def ways(client_search: ProductSearch) -> Ways:
    """Equal questions; what comes back is read, since pymilvus decodes late."""
    collection = client_search.catalog.serving()
    searches, ask, client = Searches(), Ask(LIMIT), collection.milvus.client
    client_search.encoders = ReadyVectors()  # type: ignore[assignment]

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
        client=lambda vector: client_search(vector.tobytes().decode("latin-1"), limit=LIMIT),
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
    """Median milliseconds of one search at a time, all ways in turn."""
    took: dict[str, list[float]] = {name: [] for name in vars(found)}
    for n in range(count):
        names = list(took)
        turn = n % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            getattr(found, name)(queries[n % len(queries)][None])
            took[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(times) for name, times in took.items()}


def tune(collection: Collection, params: Mapping[str, int]) -> None:
    """For every client, as `retrieval index tune` does it."""
    told = dict.fromkeys((SEARCH_PARAMS, FILTERED_PARAMS), json.dumps(params))
    collection.milvus.client.alter_collection_properties(collection.name, told)


def measured(
    client_search: ProductSearch, queries: Array, rounds: int, seconds: float
) -> dict[str, float]:
    """Medians over rounds, by MEANINGS."""
    found = ways(client_search)
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

    ms = lone(found, queries, 40 if client_search.catalog.milvus.lite else 600)
    return {
        "alone_per_s": statistics.median(rates["alone"]),
        "together_per_s": statistics.median(rates["together"]),
        "together_by_alone": by("together", "alone"),
        "together_by_gathered": by("together", "gathered"),
        "gathered_by_alone": by("gathered", "alone"),
        "lone_ms": ms["alone"],
        "lone_together_by_alone": ms["together"] / ms["alone"],
        "call_by_pymilvus_per_s": ms["pymilvus"] / ms["alone"],
        "call_overhead_us": (ms["alone"] - ms["pymilvus"]) * 1e3,
        "client_by_pymilvus_per_s": ms["pymilvus"] / ms["client"],
        "client_overhead_us": (ms["client"] - ms["pymilvus"]) * 1e3,
    }


def show(said: Mapping[str, Mapping[str, float]]) -> None:
    """A column for each Milvus."""
    table = Table("", *said)
    for name, meaning in MEANINGS.items():
        table.add_row(meaning, *(f"{figures[name]:.3g}" for figures in said.values()))
    Console(width=110).print(table)


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
    said: dict[str, dict[str, float]] = {}
    with places(args.milvus) as found:
        for name, (uri, pid) in found.items():
            settings = Settings(
                milvus=uri,
                collection=f"bench{args.rows}",
                push_timeout_s=PATIENCE_S,
                timeout_s=TIMEOUT_S,
            )
            tune(fill(settings, vectors.stored), {"ef": args.ef})
            settle(pid)
            with ProductSearch(settings) as search:
                said[name] = measured(search, vectors.queries, args.rounds, args.seconds)
    show(said)
    about = {"vectors": vectors.source, "rows": args.rows, "threads": THREADS}
    print(json.dumps(about | said))


if __name__ == "__main__":
    main()
