"""python -m benchmarks.cache_plan [QUERIES]: how much memory a cache of queries is worth.

Plays a log of queries (a CSV file with a column `query`, its rows in order, repeats and all) or the
built-in stream through a cache of each size that forgets what was asked for least recently, as
Triton's does, and says how many are hits. Then one size is checked on the real server with the
same queries, and the rate of hits is compared with that of the same texts past the cache, 16 in
flight. The last line is JSON:

    {"entry_bytes": …, "hit_rate": {"1": rate, …},
     "check": {"size_mb": …, "predicted": rate, "measured": rate, "hits_per_s": …, …}}
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from tritonclient.grpc import InferenceServerClient

from benchmarks.inflight import keep_in_flight
from benchmarks.program import print_report
from benchmarks.workload import QUERY_COLUMN, Workload, built_in_queries, queries_from_csv
from deploy.query_cache import MEBIBYTE, RISK
from deploy.server import LATEST, Server, triton
from deploy.tuning import Profile
from retrieval_client.encoder import UNCACHED, Encoder
from retrieval_client.settings import Settings
from retrieval_client.spelling import query_bytes
from retrieval_contract import models
from retrieval_contract.errors import RetrievalError
from retrieval_contract.release import Release

ENTRY_BYTES = 144
"""What Triton 2.51 keeps of an answer beside its vector, and no text; a test measures it."""
SIZES_MB = (1, 2, 4, 8, 16, 32, 64)
REQUESTS = 20_000
IN_FLIGHT = 16
ROUNDS, ROUND_S = 5, 0.5
VARIANTS = 40
"""Of each built-in query, so that a small cache cannot hold them all."""
console = Console(stderr=True)


@dataclass(frozen=True)
class Check:
    """Hit rates from an empty cache on; medians of answers a second, from memory and past it."""

    size_mb: int
    predicted: float
    measured: float
    hits_per_s: float
    uncached_per_s: float
    ratio: float


def entry_bytes(release: Release) -> int:
    """Memory that one remembered answer takes."""
    return 4 * release.vector_dim + ENTRY_BYTES


def hit_rate(keys: Sequence[bytes], entries: int) -> float:
    """Share of hits of a cache of so many entries, empty at first."""
    held: OrderedDict[bytes, None] = OrderedDict()
    hits = 0
    for key in keys:
        if key in held:
            hits += 1
            held.move_to_end(key)
            continue
        held[key] = None
        if len(held) > entries:
            held.popitem(last=False)
    return hits / len(keys) if keys else 0.0


def stream_of(args: argparse.Namespace) -> list[str]:
    """The log; with --zipf or without a log, draws from the texts in proportion to 1/rank^s."""
    if args.log and args.zipf is None:
        queries_from_csv(args.log)  # says what is wrong with the file
        file = args.log / "queries.csv" if args.log.is_dir() else args.log
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [row[QUERY_COLUMN] or "" for row in csv.DictReader(lines)]
        return rows[: args.requests]
    texts = queries_from_csv(args.log) if args.log else variants()
    work = Workload(texts, exponent=1.0 if args.zipf is None else args.zipf, seed=args.seed)
    return list(itertools.islice(work.stream(0), args.requests))


def variants() -> list[str]:
    """The built-in queries, each in several sizes."""
    return [f"{q} size {n}" for q in built_in_queries() for n in range(1, VARIANTS + 1)]


def lookups(server: Server) -> tuple[int, int]:
    """Hits and misses so far: Triton's metrics count them for the whole cache alone."""
    with InferenceServerClient(server.grpc_address) as client:
        stats = client.get_inference_statistics(models.QUERY_CACHED).model_stats[0].inference_stats
    return stats.cache_hit.count, stats.cache_miss.count


def check(release: Path, size_mb: int, stream: Sequence[str], predicted: float) -> Check:
    """The same on the real server, by its own client."""
    log = Path("build") / "cache_plan.log"
    log.parent.mkdir(exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as lines,
        triton(release, log=lines, profile=Profile(query_cache_mb=size_mb)) as server,
        Encoder(Settings(triton=server.grpc_address)) as encoder,
        ThreadPoolExecutor(IN_FLIGHT // 2) as pool,
    ):
        encoder.served()
        asked = pool.map(lambda text: encoder.encode_queries([text]).errors, stream)
        for _ in track(asked, "asking the server", len(stream), console=console, transient=True):
            pass
        hits, misses = lookups(server)
        known = [(query_bytes(text),) for text in dict.fromkeys(stream[-100:])]
        pairs = [
            [
                keep_in_flight(
                    server, ensemble, itertools.cycle(known), IN_FLIGHT, 1, ROUND_S
                ).rows_per_s
                for ensemble in (models.QUERY_ENCODER, UNCACHED)
            ]
            for _ in range(ROUNDS)
        ]
    ratio = statistics.median(hit / max(past, 1e-9) for hit, past in pairs)
    fast, slow = (statistics.median(side) for side in zip(*pairs, strict=True))
    measured = hits / max(1, hits + misses)
    return Check(
        size_mb, round(predicted, 4), round(measured, 4), round(fast), round(slow), round(ratio, 2)
    )


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.cache_plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Before you switch it on: {RISK}.",
    )
    top.add_argument("log", type=Path, nargs="?", help="CSV with a column `query`, or its folder")
    top.add_argument("--zipf", type=float, help="draw from the log's texts, 1/rank to this power")
    top.add_argument("--requests", type=int, default=REQUESTS, help=f"at most; {REQUESTS}")
    top.add_argument("--seed", type=int, default=0, help="of the draws")
    top.add_argument(
        "--size-mb", type=int, nargs="+", default=SIZES_MB, help=f"default: {SIZES_MB}"
    )
    top.add_argument("--check-mb", type=int, help="default: the least size; 0 = no check")
    top.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    return top


def run(args: argparse.Namespace) -> dict[str, object]:
    """Predict, check, show; returns the report."""
    stream, each = stream_of(args), entry_bytes(Release.load(args.release))
    keys = [query_bytes(text) for text in stream]
    sizes = sorted({*args.size_mb, *([args.check_mb] if args.check_mb else [])})
    if sizes[0] < 1:
        raise RetrievalError(f"--size-mb: expected MiB from 1, got {sizes[0]}; give a larger one")
    rates = {size: hit_rate(keys, size * MEBIBYTE // each) for size in sizes}
    size = sizes[0] if args.check_mb is None else args.check_mb
    checked = check(args.release, size, stream, rates[size]) if size else None
    distinct = len(set(keys))
    table = Table(title=f"{len(keys)} queries, {distinct} of them distinct; {each} B an answer")
    for column in ("MiB", "answers held", "hits, predicted", "hits, measured"):
        table.add_column(column, justify="right")
    for size, rate in rates.items():
        measured = f"{checked.measured:.1%}" if checked and checked.size_mb == size else ""
        table.add_row(str(size), str(size * MEBIBYTE // each), f"{rate:.1%}", measured)
    console.print(table)
    if checked:
        console.print(
            f"{IN_FLIGHT} in flight: {checked.hits_per_s:.0f} hits a second, "
            f"{checked.uncached_per_s:.0f} past the cache: {checked.ratio:.1f} times as many"
        )
    return {
        "entry_bytes": each,
        "queries": len(keys),
        "distinct": distinct,
        "hit_rate": {str(size): round(rate, 4) for size, rate in rates.items()},
        "check": asdict(checked) if checked else None,
    }


def main() -> None:
    """Command line."""
    print_report(run, parser().parse_args())


if __name__ == "__main__":
    main()
