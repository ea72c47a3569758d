"""python -m benchmarks.chaos: what may go wrong, done on purpose to real servers, and counted.

One row a promise, each on the real server under load; `--scale 0.02` does a fiftieth of everything.
The last line is one JSON object, {"rows": {name: counts}, "ok": whether all promises were kept}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from benchmarks import faults, ingest, ingest_faults, ingest_rates, overload
from benchmarks.fuzz import fuzz
from benchmarks.ingest_storage import storage
from benchmarks.promotions import every_promotion
from benchmarks.soak import soak
from benchmarks.workload import built_in_queries, queries_from_csv
from deploy.rendered.catalog import write_rendered_catalog
from deploy.server import LATEST, triton
from retrieval_contract.errors import RetrievalError

console = Console(stderr=True)
Counts = Mapping[str, Any]


@dataclass(frozen=True)
class House:
    """What every row gets: a release, things to ask for, where the server's log goes."""

    release: Path
    texts: Sequence[str]
    products: Sequence[tuple[str, bytes]]
    source: Path
    log: IO[str]


@dataclass(frozen=True)
class Row:
    """One promise: how much of it is done at scale 1, how, and which counts keep it."""

    size: int
    run: Callable[[House, int], Counts]
    kept: Callable[[Counts], bool]


def none_of(*names: str) -> Callable[[Counts], bool]:
    """These counts are 0, or empty."""
    return lambda counts: not any(counts[name] for name in names)


def some(name: str, kept: Callable[[Counts], bool]) -> Callable[[Counts], bool]:
    """As `kept`, and there is at least one of these: of nothing any promise is true."""
    return lambda counts: counts[name] > 0 and kept(counts)


def served(scenario: Callable[..., Counts]) -> Callable[[House, int], Counts]:
    """A scenario of `overload.py` on a server of its own."""

    def run(house: House, size: int) -> Counts:
        with triton(house.release, log=house.log) as server:
            more = [house.products] if scenario is overload.beside_bulk else []
            return scenario(server, house.texts, *more, size)

    return run


def scenario(run: Callable[..., Any]) -> Callable[[House, int], Counts]:
    """One of `faults.py` or `fuzz.py`."""
    return lambda house, size: asdict(run(house.release, size, log=house.log))


def kills(run: Callable[..., ingest.Kills], most: int) -> Row:
    """A row of `ingest.py`, with as much of its source as of its `most` kills."""

    def killed(house: House, size: int) -> Counts:
        products = max(FEWEST_PRODUCTS, ingest.PRODUCTS * size // most)
        return asdict(run(house.release, house.source, size, products, house.log))

    return Row(most, killed, some("checks", none_of(*ingest.WRONG, "failed_runs")))


FEWEST_PRODUCTS = 40
ROWS: dict[str, Row] = {
    "stub_kills": Row(
        100, scenario(faults.stub_kills), some("answered", none_of("wrong", "late_failures"))
    ),
    "server_kills": Row(
        20, scenario(faults.server_kills), some("answered", none_of("wrong", "late_failures"))
    ),
    "rolling_restarts": Row(
        10, scenario(faults.rolling_restart), some("answered", none_of("wrong", "failed"))
    ),
    "fuzz": Row(10_000, scenario(fuzz), some("answered", none_of("crashes", "wrong", "failed"))),
    "overload": Row(
        60,
        served(overload.overload),
        lambda counts: counts["goodput"] >= 0.9 and none_of("unanswered", "hanging")(counts),
    ),
    "stalls": Row(5000, served(overload.stalls), some("trials", none_of("stalled", "failed"))),
    "bulk": Row(
        60,
        served(overload.beside_bulk),
        some("pushed", lambda counts: not counts["failed"] and counts["p99_ratio"] <= 3),
    ),
    "promotions": Row(
        5000,
        lambda house, size: every_promotion(size, house.log),
        some("promotions", none_of("errors", "mixed")),
    ),
    "soak": Row(
        1200,
        lambda house, size: soak(
            house.release, house.texts, house.products, size, size / 4, house.log
        ),
        some("products", some("answered", none_of("grew", "failed", "ended"))),
    ),
    "push_kills_lite": kills(ingest.push_kills_lite, 200),
    "push_kills_server": kills(ingest.push_kills_server, 40),
    "milvus_kills": kills(ingest.milvus_kills, 20),
    "second_push": Row(
        ingest_rates.MANY,
        lambda house, size: ingest_rates.second_push(house.release, house.source, size, house.log),
        some("encoded", lambda c: c["time_ratio"] <= 0.05 and not c["encoded_again"]),
    ),
    "push_rate": Row(
        ingest_rates.RATE_ROWS,
        lambda house, size: ingest_rates.push_rate(house.release, house.source, size, house.log),
        lambda counts: counts["ratio"] >= 0.9,
    ),
    "million_rows": Row(
        ingest_rates.MILLION,
        lambda house, size: ingest_rates.million_rows(size, house.log),
        lambda counts: counts["grew_mb"] <= 300 and counts["there"] == counts["rows"],
    ),
    "outages": Row(
        30,
        lambda house, size: ingest_faults.outages(house.release, house.source, size, log=house.log),
        some("answered", none_of("wrong", "hanging")),
    ),
    "hostile": Row(
        300,
        lambda house, size: ingest_faults.hostile_everywhere(size, house.log),
        some("stored", none_of("read", "missed", "harmed")),
    ),
    "storage": Row(
        3000,
        lambda house, size: asdict(storage(size)),
        some("trials", none_of("lost", "unclear", "unseen")),
    ),
}


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    top.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    top.add_argument("--queries", type=Path, help="CSV with a column `query`, or its folder")
    top.add_argument("--products", type=Path, help="a source; default: a catalog that is drawn")
    top.add_argument("--row", action="append", choices=list(ROWS), help="default: all")
    top.add_argument("--scale", type=float, default=1.0, help="of the trials and seconds")
    top.add_argument("--log", type=Path, default=Path("build/chaos.log"), help="of the servers")
    return top


def run(args: argparse.Namespace) -> dict[str, Counts]:
    """The rows, one after the other; one that raises counts as broken and says why."""
    texts = queries_from_csv(args.queries) if args.queries else built_in_queries()
    source = args.products or write_rendered_catalog(Path("build/rendered_catalog"))
    found: dict[str, Counts] = {}
    with args.log.open("w", encoding="utf-8") as log:
        house = House(args.release, texts, overload.products_of(source), source, log)
        for name in args.row or ROWS:
            row, start = ROWS[name], time.monotonic()
            try:
                counts = row.run(house, max(1, round(row.size * args.scale)))
                found[name] = {**counts, "kept": row.kept(counts)}
            except Exception as exc:  # of a command or a process, too: the others are still done
                traceback.print_exc(file=log)
                found[name] = {"error": f"{type(exc).__name__}: {exc}", "kept": False}
            console.print(f"{name}: {time.monotonic() - start:.0f} s, {found[name]}", markup=False)
    return found


def show(found: Mapping[str, Counts]) -> None:
    """One line a row."""
    table = Table(title="chaos")
    for column in ("row", "kept", "counts"):
        table.add_column(column)
    for name, counts in found.items():
        said = ", ".join(
            f"{k} {v}" for k, v in counts.items() if k != "kept" and isinstance(v, int | float)
        )
        table.add_row(name, "yes" if counts["kept"] else "NO", said)
    console.print(table)


def main() -> None:
    """Command line; exit code 1 when a promise was not kept."""
    args = parser().parse_args()
    try:
        found = run(args)
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
    show(found)
    ok = all(counts["kept"] for counts in found.values())
    print(json.dumps({"rows": found, "ok": ok}, allow_nan=False))
    sys.exit(not ok)


if __name__ == "__main__":
    main()
