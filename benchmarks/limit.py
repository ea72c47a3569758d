"""python -m benchmarks.limit: what serving costs over running the same towers in one's own process.

Alternating rounds on one core: preprocessing and graph here, over as many texts at a time as
there are callers (at most the best number), those of like length together; then the same through
gRPC, while this process asks from another core. Ratios are medians over rounds. The last line is
JSON:

    {"query": {"1": ratio, …}, "request": {"1": ratio, …}, "product": {"32": ratio, …}}

"query": so many threads that share one client, each with one text at a time; "request": so many
single-text requests in flight, which nobody merges; "product": requests of so many rows.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.cores import core_to_serve, on_core, pin
from benchmarks.inflight import Answered, keep_calling, keep_in_flight
from benchmarks.program import print_report
from benchmarks.workload import built_in_queries, queries_from_csv
from deploy.rendered.catalog import write_rendered_catalog
from deploy.server import LATEST, Server, triton
from deploy.stopping import cpu_seconds
from retrieval_client.sources import Source
from retrieval_contract import models
from retrieval_contract.graph import OnnxGraph
from retrieval_contract.preprocess import ProductPreprocessor, TextPreprocessor
from retrieval_contract.release import Release
from retrieval_contract.tensors import Ensemble, Model

IN_FLIGHT = (1, 4, 16, 64, 256)
ROWS = (1, 8, 32, 64)
PRODUCTS_IN_FLIGHT = 2
BATCHES = (16, 32, 64, 128)
"""Rows of one run in one's own process; the best of them is the limit."""
SAMPLE = 2048
PRODUCTS = 256

Row = tuple[bytes, ...]
console = Console(stderr=True)


Run = Callable[[Sequence[Row]], object]
"""Preprocess and encode some rows."""


@dataclass(frozen=True)
class Work:
    """One ensemble, rows for it, and the same work in this process."""

    ensemble: Ensemble
    rows: Sequence[Row]
    run: Run
    batch: int


@dataclass(frozen=True)
class Round:
    """Rows a second in this process and through the server, and what the latter took."""

    limit: float
    served: float
    answered: Answered
    client_cpu_s: float
    server_cpu_s: float


def graph_of(release: Path, model: Model, version: int) -> OnnxGraph:
    """As the local server runs it, on one thread."""
    folder = release / "model_repository" / model.name / str(version)
    return OnnxGraph(folder / models.ONNX_FILE, 1, Release.load(release).precision)


def query_work(
    folder: Path, release: Release, queries: Sequence[str], sizes: Sequence[int]
) -> Work:
    """Texts → vectors."""
    graph = graph_of(folder, models.QUERY_TOWER, release.version)
    preprocess = TextPreprocessor(
        tokenizer_of(folder, models.QUERY_TOKENIZER, release), release.query, required=True
    )

    def run(rows: Sequence[Row]) -> object:
        batch = preprocess([row[0] for row in rows])
        return graph({models.QUERY_IDS.name: batch.ids, models.QUERY_MASK.name: batch.mask})

    rows = query_rows(queries)
    return Work(models.QUERY_ENCODER, rows, run, best_batch(run, rows, sizes))


def product_work(folder: Path, release: Release, source: Path, sizes: Sequence[int]) -> Work:
    """Title and image file → vectors."""
    graph = graph_of(folder, models.PRODUCT_TOWER, release.version)
    preprocess = ProductPreprocessor(
        tokenizer_of(folder, models.PRODUCT_PREPROCESSOR, release), release.title, release.image
    )

    def run(rows: Sequence[Row]) -> object:
        titles, images = zip(*rows, strict=True)
        return graph(preprocess(titles, images).tensors)

    rows = product_rows(source)
    return Work(models.PRODUCT_ENCODER, rows, run, best_batch(run, rows, sizes))


def query_rows(queries: Sequence[str]) -> list[Row]:
    """A sample as `query_encoder` takes it."""
    return [(queries[at % len(queries)].encode(),) for at in range(SAMPLE)]


def product_rows(source: Path) -> list[Row]:
    """The first good products, as `product_encoder` takes them."""
    good = (row for row in Source(source).rows() if row.problem is None)
    return [(row.title, row.image) for row in itertools.islice(good, PRODUCTS)]


def tokenizer_of(folder: Path, model: Model, release: Release) -> str:
    path = folder / "model_repository" / model.name / str(release.version) / models.TOKENIZER_FILE
    return path.read_text("utf-8")


def best_batch(run: Run, rows: Sequence[Row], sizes: Sequence[int]) -> int:
    """The one of them that takes the least time a row, by medians of three."""
    return max(
        sizes,
        key=lambda size: statistics.median(limit_rate(run, rows, size, 0.3) for _ in range(3)),
    )


def limit_rate(run: Run, rows: Sequence[Row], batch: int, seconds: float) -> float:
    """Rows a second in this process, so many at a time."""
    drawn = shuffled(rows, 0)
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        run(list(itertools.islice(drawn, batch)))
        done += batch
    return done / took


Ask = Callable[[Iterator[Row], int], Answered]
"""Rows and a number (in flight, or rows of a request) → what came back."""


def one_round(
    work: Work, server: Server, core: int, ask: Ask, number: int, batch: int, s: float, seed: int
) -> Round:
    """First alone on the server's core, in batches of `batch`, then through the server."""
    with on_core(core):
        limit = limit_rate(work.run, work.rows, batch, s)
    cpu = time.process_time(), cpu_seconds(server.process.pid)
    answered = ask(shuffled(work.rows, seed), number)
    client = time.process_time() - cpu[0]
    return Round(
        limit, answered.rows_per_s, answered, client, cpu_seconds(server.process.pid) - cpu[1]
    )


def shuffled(rows: Sequence[Row], seed: int) -> Iterator[Row]:
    """Without end, in a new order each time."""
    rng = np.random.default_rng(seed)
    while True:
        for at in rng.permutation(len(rows)).tolist():
            yield rows[at]


def measure(
    name: str,
    work: Work,
    server: Server,
    core: int,
    ask: Ask,
    numbers: Sequence[int],
    args: argparse.Namespace,
) -> dict[int, list[Round]]:
    """Every number once a round."""
    found: dict[int, list[Round]] = {number: [] for number in numbers}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(name, total=args.rounds * len(numbers))
        for seed in range(args.rounds):
            for number in numbers:
                batch = work.batch if work.ensemble is models.PRODUCT_ENCODER else number
                batch = min(batch, work.batch)
                found[number].append(
                    one_round(work, server, core, ask, number, batch, args.seconds, seed)
                )
                bar.advance(task)
    show(name, found)
    return found


def show(name: str, found: dict[int, list[Round]]) -> None:
    """One row a number."""
    table = Table(title=f"{name}: served ÷ in one's own process; CPU seconds for 1,000 rows")
    for column in ("", "rows/s", "÷ limit", "lowest", "highest", "client CPU", "server CPU"):
        table.add_column(column, justify="right")
    for column in ("p50 ms", "p99 ms", "failed"):
        table.add_column(column, justify="right")
    for number, done in found.items():
        ratios = [r.served / r.limit for r in done]
        cells = [
            f"{statistics.median(r.served for r in done):.0f}",
            *(f"{x:.3f}" for x in (statistics.median(ratios), min(ratios), max(ratios))),
            f"{statistics.median(r.client_cpu_s * 1e3 / r.answered.all_rows for r in done):.3f}",
            f"{statistics.median(r.server_cpu_s * 1e3 / r.answered.all_rows for r in done):.3f}",
        ]
        for percent in (50, 99):
            cells.append(
                f"{statistics.median(r.answered.percentile_ms(percent) for r in done):.1f}"
            )
        table.add_row(str(number), *cells, str(sum(r.answered.failed for r in done)))
    console.print(table)


def ratios_of(found: dict[int, list[Round]]) -> dict[str, float]:
    """Medians."""
    return {
        str(number): round(statistics.median(r.served / r.limit for r in done), 3)
        for number, done in found.items()
    }


def add_round_flags(
    top: argparse.ArgumentParser, in_flight: Sequence[int], rows: Sequence[int]
) -> None:
    """What is asked and for how long, of programs that compare two in alternating rounds."""
    top.add_argument("--queries", type=Path, help="CSV with a column `query`, or its folder")
    top.add_argument("--products", type=Path, help="a source; default: a catalog that is drawn")
    for name, numbers, what in (
        ("--in-flight", in_flight, "texts"),
        ("--rows", rows, "products of a request"),
    ):
        top.add_argument(name, type=int, action="append", help=f"{what}; default: {tuple(numbers)}")
    top.add_argument("--rounds", type=int, default=5)
    top.add_argument("--seconds", type=float, default=2.0, help="of each half of a round")
    top.add_argument("--product-seconds", type=float, default=10.0, help="the same, for products")


def asked_of(args: argparse.Namespace) -> tuple[Sequence[str], Path]:
    """Queries, and a source of products."""
    queries = queries_from_csv(args.queries) if args.queries else built_in_queries()
    return queries, args.products or write_rendered_catalog(Path("build/rendered_catalog"))


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.limit", description=__doc__)
    top.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    add_round_flags(top, IN_FLIGHT, ROWS)
    top.add_argument(
        "--batch", type=int, action="append", help=f"rows of a run here; default: best of {BATCHES}"
    )
    top.add_argument("--only", choices=["query", "request", "product"], action="append")
    return top


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Serve on one core, ask from another; returns the report."""
    queries, source = asked_of(args)
    release = Release.load(args.release)
    core = core_to_serve()
    with on_core(core):
        sizes = args.batch or BATCHES
        asked = query_work(args.release, release, queries, sizes)
        pushed = product_work(args.release, release, source, sizes)
    log_path = Path("build") / "limit.log"
    with log_path.open("w", encoding="utf-8") as log, triton(args.release, log=log) as server:
        pin(server.process.pid, [core])
        asks: dict[str, tuple[Work, Ask, Sequence[int]]] = {
            "query": (asked, callers(server, args.seconds), args.in_flight or IN_FLIGHT),
            "request": (asked, requests(server, args.seconds), args.in_flight or IN_FLIGHT),
            "product": (pushed, batches(server, args.product_seconds), args.rows or ROWS),
        }
        found = {
            name: measure(name, work, server, core, ask, numbers, args)
            for name, (work, ask, numbers) in asks.items()
            if name in (args.only or asks)
        }
    return {name: ratios_of(rounds) for name, rounds in found.items()}


def callers(server: Server, seconds: float) -> Ask:
    """So many threads of one client."""
    return lambda rows, count: keep_calling(server, rows, count, seconds)


def requests(server: Server, seconds: float) -> Ask:
    """So many single-text requests."""
    return lambda rows, count: keep_in_flight(server, models.QUERY_ENCODER, rows, count, 1, seconds)


def batches(server: Server, seconds: float) -> Ask:
    """Requests of so many products, two at a time: one is decoded while one is encoded."""
    return lambda rows, each: keep_in_flight(
        server, models.PRODUCT_ENCODER, rows, PRODUCTS_IN_FLIGHT, each, seconds
    )


def main() -> None:
    """Command line."""
    os.environ["TOKENIZERS_PARALLELISM"] = "0"  # one core is one core
    print_report(run, parser().parse_args())


if __name__ == "__main__":
    main()
