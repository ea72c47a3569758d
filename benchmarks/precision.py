"""python -m benchmarks.precision FP32_RELEASE BF16_RELEASE: what a precision is worth here.

Both releases of one checkpoint are served, by two servers on one core, and asked in turn from
another: queries by so many callers of one client, products in requests of so many rows. Ratios are
medians over rounds. The last line is JSON:

    {"query": {"64": ratio, …}, "product": {"32": ratio, …}}

What bf16 costs in recall is said by `python -m export parity`.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.cores import core_to_serve, pin
from benchmarks.limit import (
    Ask,
    Row,
    add_round_flags,
    asked_of,
    batches,
    callers,
    product_rows,
    query_rows,
    shuffled,
)
from benchmarks.program import print_report
from deploy.server import triton

IN_FLIGHT, ROWS = (1, 16, 64), (1, 32)
Rates = dict[int, list[tuple[float, float]]]
"""By number: rows a second of the first release and of the second, a pair a round."""
console = Console(stderr=True)


def measure(asks: Sequence[Ask], rows: Sequence[Row], numbers: Sequence[int], rounds: int) -> Rates:
    """Both, in turn; every number once a round."""
    found: Rates = {number: [] for number in numbers}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("rounds", total=rounds * len(numbers))
        for seed in range(rounds):
            for number in numbers:
                before, after = (ask(shuffled(rows, seed), number).rows_per_s for ask in asks)
                found[number].append((before, after))
                bar.advance(task)
    return found


def ratios_of(found: Rates) -> dict[str, float]:
    """The second over the first."""
    return {
        str(number): round(statistics.median(after / before for before, after in pairs), 3)
        for number, pairs in found.items()
    }


def show(name: str, found: Rates) -> None:
    """One row a number."""
    table = Table(title=f"{name}: the second release ÷ the first, rows a second")
    for column in ("", "median", "lowest", "highest"):
        table.add_column(column, justify="right")
    for number, pairs in found.items():
        ratios = [after / before for before, after in pairs]
        cells = (statistics.median(ratios), min(ratios), max(ratios))
        table.add_row(str(number), *(f"{cell:.2f}" for cell in cells))
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    top.add_argument("release", type=Path, nargs=2, help="folders")
    add_round_flags(top, IN_FLIGHT, ROWS)
    return top


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Serve both, ask; returns the report."""
    queries, source = asked_of(args)
    core = core_to_serve()
    with ExitStack() as held:
        log = held.enter_context((Path("build") / "precision.log").open("w", encoding="utf-8"))
        servers = [held.enter_context(triton(folder, log=log)) for folder in args.release]
        for server in servers:
            pin(server.process.pid, [core])
        asked = [callers(server, args.seconds) for server in servers]
        pushed = [batches(server, args.product_seconds) for server in servers]
        found = {
            "query": measure(asked, query_rows(queries), args.in_flight or IN_FLIGHT, args.rounds),
            "product": measure(pushed, product_rows(source), args.rows or ROWS, args.rounds),
        }
    for name, rates in found.items():
        show(name, rates)
    return {name: ratios_of(rates) for name, rates in found.items()}


def main() -> None:
    """Command line."""
    os.environ["TOKENIZERS_PARALLELISM"] = "0"  # one core is one core
    print_report(run, parser().parse_args())


if __name__ == "__main__":
    main()
