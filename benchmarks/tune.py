"""python -m benchmarks.tune: which copies, threads and delays suit this machine.

Starts the real server with each setting of a small grid, anew in every round, and asks it for
queries (so many callers of one client) and then for products (so many requests of eight). Prints
throughput against p99, writes a picture, and the settings with the most throughput within
--p99-ms and --product-p99-ms as a profile for `python -m deploy.local --profile FILE`. The last
line is JSON:

    {"query": {"points": [{"setting": …, "rows_per_s": …, "p99_ms": …, …}], "best": …},
     "product": …, "profile": "build/tune/profile.toml"}
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.__main__ import positive
from benchmarks.frontier import Point, best_under, frontier, page, svg
from benchmarks.inflight import Answered, keep_calling, keep_in_flight
from benchmarks.limit import PRODUCTS, Row, shuffled
from benchmarks.program import print_report
from benchmarks.workload import Workload, built_in_queries, queries_from_csv
from deploy.query_cache import add_cache_flag
from deploy.rendered.catalog import write_rendered_catalog
from deploy.server import LATEST, Server, triton
from deploy.tuning import DEFAULT, LEAST, Profile
from retrieval_client.sources import Source
from retrieval_contract import models
from retrieval_contract.errors import RetrievalError
from retrieval_contract.models import PRODUCT_PREPROCESSOR, PRODUCT_TOWER, QUERY_ENCODER

KINDS = {
    "query": [QUERY_ENCODER.name],
    "product": [PRODUCT_PREPROCESSOR.name, PRODUCT_TOWER.name],
}
"""The models whose knobs decide each, on the `local` target."""
CALLERS, REQUESTS, ROWS = (4, 16, 64), (1, 4), 8
console = Console(stderr=True)

Setting = Mapping[str, int]
"""Values by `model.knob`."""


@dataclass(frozen=True)
class Load:
    """What is asked, how hard, and for how long at a time."""

    queries: Sequence[str]
    products: Sequence[Row]
    in_flight: Mapping[str, Sequence[int]]
    seconds: Mapping[str, float]

    def ask(self, server: Server, kind: str, in_flight: int, seed: int) -> Answered:
        """One measurement."""
        seconds = self.seconds[kind]
        if kind == "query":
            drawn = Workload(self.queries, seed=seed).stream(in_flight)
            return keep_calling(server, ((q.encode(),) for q in drawn), in_flight, seconds)
        rows = shuffled(self.products, seed)
        return keep_in_flight(server, models.PRODUCT_ENCODER, rows, in_flight, ROWS, seconds)


def default_grid(cores: int) -> list[str]:
    """What may matter with so many cores."""
    more = sorted({1, max(1, cores // 2), cores})
    return [
        f"{QUERY_ENCODER.name}.instances=1,{min(2, cores)}",
        f"{QUERY_ENCODER.name}.delay_us=0,1000",
        f"{PRODUCT_PREPROCESSOR.name}.instances={','.join(map(str, more))}",
        f"{PRODUCT_TOWER.name}.threads={','.join(map(str, more))}",
    ]


def settings_of(grid: Sequence[str], kind: str) -> list[Setting]:
    """Every combination of the knobs of one kind; RetrievalError for a knob that is none."""
    axes: dict[str, list[int]] = {}
    known = [f"{m}.{k}" for names in KINDS.values() for m in names for k in DEFAULT.models[m]]
    for text in grid:
        key, _, values = text.partition("=")
        if key not in known:
            raise RetrievalError(f"--grid {text}: expected one of {', '.join(known)}")
        model, _, knob = key.partition(".")
        found = sorted({int(v) if v.isdigit() else -1 for v in values.split(",")})
        if found[0] < LEAST[knob]:
            raise RetrievalError(
                f"--grid {text}: expected whole numbers from {LEAST[knob]}, such as {key}=1,2"
            )
        if model in KINDS[kind]:
            axes[key] = found
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def profile_with(settings: Sequence[Setting], cache_mb: int) -> Profile:
    """The default, with some knobs set."""
    chosen = {model: dict(knobs) for model, knobs in DEFAULT.models.items()}
    for key, value in itertools.chain.from_iterable(s.items() for s in settings):
        model, _, knob = key.partition(".")
        chosen[model][knob] = value
    return Profile(chosen, cache_mb)


def named(setting: Setting) -> str:
    """For tables."""
    return ", ".join(f"{key}={value}" for key, value in setting.items()) or "as it is"


def measure(
    args: argparse.Namespace, settings: Mapping[str, Sequence[Setting]], load: Load
) -> dict[str, list[Point]]:
    """Each server has one setting of each kind, which do not meet: one is asked at a time."""
    found: dict[tuple[str, int, int], list[Answered]] = {}
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    servers = range(max(map(len, settings.values())))
    with (out / "server.log").open("w", encoding="utf-8") as log:
        turns = [(r, n) for r in range(args.rounds) for n in (servers if r % 2 else servers[::-1])]
        for turn, number in track(turns, "tuning", console=console, transient=True):
            chosen = [each[number % len(each)] for each in settings.values()]
            profile = profile_with(chosen, args.query_cache_mb or 0)
            with triton(args.release, log=log, profile=profile) as server:
                for kind, at in measurements(settings, load, number):
                    answered = load.ask(server, kind, at, seed=turn)
                    found.setdefault((kind, number, at), []).append(answered)
    points: dict[str, list[Point]] = {kind: [] for kind in settings}
    for (kind, number, at), rounds in sorted(found.items()):
        rate = statistics.median(a.rows_per_s for a in rounds)
        p99 = statistics.median(a.percentile_ms(99) for a in rounds)
        failed = sum(a.failed for a in rounds)
        name = named(settings[kind][number])
        points[kind].append(Point(name, at, round(rate, 1), round(p99, 2), failed))
    return points


def measurements(
    settings: Mapping[str, Sequence[Setting]], load: Load, number: int
) -> Iterator[tuple[str, int]]:
    """What to ask server `number`: a kind with fewer settings is not measured twice."""
    for kind, each in settings.items():
        if number < len(each):
            yield from ((kind, at) for at in load.in_flight[kind])


def show(kind: str, points: Sequence[Point], best: Point | None) -> None:
    """Every point; the frontier is marked, and the best."""
    table = Table(title=f"{kind}: medians; * no other is better in both, → taken")
    for name in ("", "setting", "in flight", "rows/s", "p99 ms", "failed"):
        table.add_column(name, justify="left" if name in ("", "setting") else "right")
    kept = frontier(points)
    for point in sorted(points, key=lambda p: p.p99_ms):
        mark = "→" if point is best else "*" if point in kept else ""
        figures = f"{point.rows_per_s:.0f}", f"{point.p99_ms:.1f}", str(point.failed)
        table.add_row(mark, point.setting, str(point.in_flight), *figures)
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--p99-ms", type=positive, default=50.0, help="of queries; default: 50")
    top.add_argument("--product-p99-ms", type=positive, default=2000.0, help="default: 2000")
    top.add_argument("--grid", nargs="+", metavar="MODEL.KNOB=N,…", help="default: by the cores")
    top.add_argument("--callers", type=int, nargs="+", default=CALLERS, help=f"{CALLERS}")
    top.add_argument("--requests", type=int, nargs="+", default=REQUESTS, help=f"{REQUESTS}")
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--seconds", type=positive, default=1.5, help="of one measurement")
    top.add_argument("--product-seconds", type=positive, default=4.0)
    top.add_argument("--queries", type=Path, help="CSV with a column `query`, or its folder")
    top.add_argument("--products", type=Path, help="a source; default: a catalog that is drawn")
    top.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    top.add_argument("--out", type=Path, default=Path("build/tune"), help="default: build/tune")
    add_cache_flag(top)
    return top


def run(args: argparse.Namespace) -> dict[str, object]:
    """Measure, show, write; returns the report. RetrievalError when a limit cannot be kept."""
    grid = args.grid or default_grid(len(os.sched_getaffinity(0)))
    settings = {kind: settings_of(grid, kind) for kind in KINDS}
    source = args.products or write_rendered_catalog(Path("build/rendered_catalog"))
    good = (row for row in Source(source).rows() if row.problem is None)
    load = Load(
        queries_from_csv(args.queries) if args.queries else built_in_queries(),
        [(row.title, row.image) for row in itertools.islice(good, PRODUCTS)],
        {"query": args.callers, "product": args.requests},
        {"query": args.seconds, "product": args.product_seconds},
    )
    points = measure(args, settings, load)
    limits = {"query": args.p99_ms, "product": args.product_p99_ms}
    best = {kind: best_under(points[kind], limits[kind]) for kind in KINDS}
    pictures = []
    for kind in KINDS:
        show(kind, points[kind], best[kind])
        pictures.append(svg(points[kind], limits[kind], kind))
    (args.out / "frontier.html").write_text(page(pictures), "utf-8")
    chosen = []
    for kind, point in best.items():
        if point is None:
            least = min(p.p99_ms for p in points[kind])
            raise RetrievalError(
                f"{kind}: expected a p99 of at most {limits[kind]:g} ms, the least is {least:g}; "
                "allow more, or ask with fewer in flight"
            )
        chosen.append(next(s for s in settings[kind] if named(s) == point.setting))
    profile = args.out / "profile.toml"
    profile.write_text(profile_with(chosen, args.query_cache_mb or 0).text(), "utf-8")
    console.print(f"python -m deploy.local --profile {profile}", markup=False, soft_wrap=True)
    report: dict[str, object] = {
        kind: {"points": [asdict(p) for p in points[kind]], "best": asdict(point)}
        for kind, point in best.items()
        if point
    }
    return report | {"profile": str(profile)}


def main() -> None:
    """Command line."""
    print_report(run, parser().parse_args())


if __name__ == "__main__":
    main()
