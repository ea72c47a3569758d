"""python -m benchmarks.ledger: where the time of a search goes, one at a time and many in flight.

Against a server and a catalog of its own; the vectors in the catalog are random, as an exact index
takes the same time over any. In flight: so many threads that share one ProductSearch. The lines of
each search add up to what was measured around it (`retrieval_client/ledger.py`); shares are of the
means. The last line is JSON:

    {"1": {"total": {"median_ms": …, "mean_ms": …, "share": 1.0}, "wire": {…}, …}, "16": {…}}
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.program import print_report
from benchmarks.workload import Workload, built_in_queries, queries_from_csv
from deploy.server import LATEST, triton
from retrieval_client import Catalog, ProductRow, ProductSearch, Settings
from retrieval_client.ledger import LINES, Timed, ledgers, requests_of
from retrieval_contract.errors import RetrievalError
from retrieval_contract.release import Release

IN_FLIGHT = (1, 16)
WARM = 32
TOTAL = "total"
Figures = dict[str, dict[str, float]]
console = Console(stderr=True)


def fill(settings: Settings, release: Release, products: int) -> None:
    """Random unit vectors under the release's name."""
    vectors = np.random.default_rng(0).standard_normal((products, release.vector_dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [
        ProductRow(str(at), f"product {at}", str(at), vector.astype(np.float32))
        for at, vector in enumerate(vectors)
    ]
    with Catalog(settings) as catalog:
        collection = catalog.prepare(release.release_id, release.vector_dim)
        collection.upsert(rows)
        collection.flush()


def searched(
    search: ProductSearch, queries: Iterator[str], callers: int, count: int
) -> list[Timed]:
    """`count` searches in all, by so many threads; the first error is raised when all are over."""
    found: list[Timed] = []
    failed: list[RetrievalError] = []
    asked, lock = itertools.count(), threading.Lock()

    def call() -> None:
        while next(asked) < count and not failed:
            with lock:
                query = next(queries)
            try:
                found.append(search.timed([query])[1])
            except RetrievalError as exc:
                failed.append(exc)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def measure(search: ProductSearch, queries: Iterator[str], callers: int, count: int) -> Figures:
    """Median, mean and share of each line, after a warm-up; times in milliseconds."""
    searched(search, queries, callers, max(WARM, callers))
    before = search.encoder.statistics()
    timed = searched(search, queries, callers, count)
    counted = search.encoder.statistics_since(before, len(requests_of(timed)))
    lines = ledgers(timed, counted)
    totals = [one.laps["search"] for one in timed]
    columns = {TOTAL: totals} | {name: [one[name] for one in lines] for name in LINES}
    whole = statistics.mean(totals)
    return {
        name: {
            "median_ms": round(statistics.median(seconds) * 1e3, 4),
            "mean_ms": round(statistics.mean(seconds) * 1e3, 4),
            "share": round(statistics.mean(seconds) / whole, 4),
        }
        for name, seconds in columns.items()
    }


def show(figures: Figures, callers: int, count: int) -> None:
    """As a table."""
    table = Table(title=f"{count} searches, {callers} in flight", title_justify="left")
    for name in ("line", "median ms", "mean ms", "share", "is"):
        table.add_column(name, justify="left" if name in ("line", "is") else "right")
    for name, found in figures.items():
        cells = [f"{found['median_ms']:.3f}", f"{found['mean_ms']:.3f}", f"{found['share']:.1%}"]
        table.add_row(name, *cells, LINES.get(name, "measured around the search"))
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__)
    top.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    top.add_argument("--queries", type=Path, help="CSV with a column `query`, or its folder")
    top.add_argument("--in-flight", type=int, action="append", help=f"default: {IN_FLIGHT}")
    top.add_argument("--count", type=int, default=400, help="searches of each; default: 400")
    top.add_argument("--products", type=int, default=1000, help="in the catalog; default: 1000")
    return top


def run(args: argparse.Namespace) -> dict[str, Figures]:
    """Serve, fill, search; returns the report."""
    queries = queries_from_csv(args.queries) if args.queries else built_in_queries()
    asked = Workload(queries).stream(0)
    report: dict[str, Figures] = {}
    log_path = Path("build") / "ledger.log"
    with (
        tempfile.TemporaryDirectory() as place,
        log_path.open("w", encoding="utf-8") as log,
        triton(args.release, log=log) as server,
    ):
        settings = Settings(triton=server.grpc_address, milvus=f"{place}/catalog.db")
        fill(settings, server.release, args.products)
        with ProductSearch(settings, explain=True) as search:
            for callers in args.in_flight or IN_FLIGHT:
                report[str(callers)] = measure(search, asked, callers, args.count)
                show(report[str(callers)], callers, args.count)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    print_report(run, parser().parse_args(argv))


if __name__ == "__main__":
    main()
