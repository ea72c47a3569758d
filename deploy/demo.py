"""python -m deploy.demo: checkpoint → release → Triton → Milvus → search → a picture.

Each step is the public command or library that a user would call. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from deploy.rendered.catalog import write_rendered_catalog
from deploy.server import LATEST, Server, triton
from deploy.wheel import ROOT, SERVER_PYTHON
from retrieval_client import Hit, ProductSearch, Settings
from retrieval_client.picture import draw_results
from retrieval_client.push import Push, PushReport
from retrieval_client.rows import MAX_TITLE_CHARS
from retrieval_client.sources import Source, SourceRow
from retrieval_contract.errors import DeployError, ItemError, RetrievalError
from retrieval_contract.preprocess import text_from_bytes

BUILD = ROOT / "build"
CHECKPOINT = ROOT / "towers" / "weights" / "make"
REAL_CATALOG = ROOT.parent / "shared" / "data" / "fashion_products_small"
PRODUCTS = 5000
QUERIES = 6
RESULTS = 6
QUERY_WORDS = 5
"""Words of a title that stand in for a query where a catalog brings none."""
QUERY_CHARS = 60
"""Some languages put no blanks between words."""
REFUSED_SHOWN = 10

console = Console(stderr=True)


def build_release() -> Path:
    """Checkpoint → release, unless it is there; returns its folder."""
    _run("export", "repository", "--checkpoint", str(CHECKPOINT))
    return LATEST


def _run(module: str, *args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *args], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        raise DeployError(f"python -m {module} {' '.join(args)}: failed, see above")


def choose_catalog(given: Path | None) -> Path:
    """The caller's catalog, else the real one beside the checkout, else one that we draw."""
    if given is not None:
        return given
    if REAL_CATALOG.is_dir():
        return REAL_CATALOG
    return write_rendered_catalog(BUILD / "rendered_catalog")


def spread(total: int, count: int) -> list[int]:
    """`count` places (all of them, if there are fewer), evenly over `range(total)`."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def rows_at(source: Source, places: Collection[int]) -> Iterator[SourceRow]:
    """Those rows of a source, one after another: a row may weigh megabytes."""
    return (row for place, row in enumerate(source.rows()) if place in places)


def without_photos(source: Source, places: Collection[int]) -> Iterator[SourceRow]:
    """The same, light enough to keep all of them."""
    return (replace(row, image=b"", attributes={}) for row in rows_at(source, places))


def choose_queries(catalog: Path, rows: Sequence[SourceRow]) -> list[str]:
    """Queries of the catalog's own `queries.csv`, best with answers among `rows`, else titles."""
    asked = _records(catalog / "queries.csv", "query")
    judged = _records(catalog / "qrels.csv", "query_id", "id", "rel")
    there = {row.id for row in rows}
    answers = Counter(r["query_id"] for r in judged if r["id"] in there and r["rel"] == "2")
    answered = [r["query"] for r in asked if answers[r.get("query_id", "")] >= RESULTS]
    texts = answered or [r["query"] for r in asked] or [_first_words(row) for row in rows]
    texts = [text for text in dict.fromkeys(texts) if text]
    if not texts:
        raise DeployError(
            f"{catalog}: expected titles, or a queries.csv with a column query, to take queries "
            'from, got neither; say what to look for: --query "red shoes"'
        )
    return [texts[place] for place in spread(len(texts), QUERIES)]


def _first_words(row: SourceRow) -> str:
    """Of the title; empty where there is none that would make a good query."""
    try:
        title = text_from_bytes(row.title, MAX_TITLE_CHARS)
    except ItemError:
        return ""
    return " ".join(title.split()[:QUERY_WORDS])[:QUERY_CHARS]


def _records(path: Path, *columns: str) -> list[dict[str, str]]:
    """The lines of a CSV file that fill all these columns; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        records = csv.DictReader(file)
        return [r for r in records if all((r.get(name) or "").strip() for name in columns)]


def fill(search: ProductSearch, source: Source, places: Collection[int]) -> PushReport:
    """Push those rows with a progress bar, and say which were refused."""
    push = Push(search.settings, search.encoders, search.catalog)
    with Progress(console=console) as bar:
        task = bar.add_task("encode and store", total=len(places))
        report = push.run(
            rows_at(source, places),
            progress=lambda report: bar.update(task, completed=report.settled),
        )
    for reject in report.rejects[:REFUSED_SHOWN]:
        console.print(f"  refused {reject.id}: {reject.code}: {reject.detail}", markup=False)
    if (more := len(report.rejects) - REFUSED_SHOWN) > 0:
        console.print(f"  and {more} more")
    return report


def choose_rows(source: Source, products: int) -> frozenset[int]:
    """The places of at most so many rows, evenly over the whole source."""
    total = source.rows_expected
    if total is None:  # only reading tells
        total = sum(1 for _ in source.rows())
    if not total:
        raise DeployError(f"{source.path}: expected products, found none in it")
    return frozenset(spread(total, products))


def demo(
    server: Server, source: Source, places: frozenset[int], queries: list[str], out: Path
) -> dict[str, object]:
    """Fill a fresh catalog, search it, draw the page; returns the report's fields."""
    store = out / "catalog.db"
    shutil.rmtree(store, ignore_errors=True)
    with ProductSearch(Settings(triton=server.grpc_address, milvus=str(store))) as search:
        report = fill(search, source, places)
        stored = search.catalog.serving().count()
        if not stored or stored != report.stored:
            raise DeployError(
                f"{source.path}: of {report.read} rows {report.stored} were stored and "
                f"{len(report.rejects)} refused, and the catalog holds {stored}"
            )
        results = [search(query, limit=RESULTS, thumbnails=True) for query in queries]
        version = search.catalog.milvus.backend.version
    draw_results(queries, results, out / "results.png")
    say_results(queries, results)
    console.print(f"picture: {out / 'results.png'}", markup=False)
    return {
        "products": stored,
        "refused": len(report.rejects),
        "queries": len(queries),
        "release_id": server.release.release_id,
        "server": server.triton,
        "milvus": "lite" if "milvus_lite" in version else "server",
        "top1": [
            {
                "query": query,
                "id": hits[0].id,
                "title": hits[0].title,
                "score": round(hits[0].score, 3),
            }
            for query, hits in zip(queries, results, strict=True)
        ],
    }


def say_results(queries: Sequence[str], results: Sequence[Sequence[Hit]]) -> None:
    """The best hits of each query, a line each."""
    for query, hits in zip(queries, results, strict=True):
        console.print(f"{query}", style="bold", markup=False)
        for hit in hits[:3]:
            console.print(f"  {hit.score:.3f}  {hit.title or hit.id}", markup=False)


def count(text: str) -> int:
    """A whole number above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m deploy.demo", description=__doc__)
    top.add_argument("--catalog", type=Path, help="file or folder; default: real, else drawn")
    top.add_argument("--products", type=count, default=PRODUCTS, help="at most so many")
    top.add_argument("--query", action="append", default=[], help="instead of the catalog's own")
    top.add_argument("--release", type=Path, help="a built release folder; default: build ours")
    top.add_argument("--out", type=Path, default=BUILD / "demo", help="default: build/demo")
    top.add_argument("--server-python", type=Path, default=SERVER_PYTHON)
    return top


def run(args: argparse.Namespace) -> dict[str, object]:
    """Build what is missing, serve it, and show it; returns the report's fields."""
    started = time.monotonic()
    source = Source(choose_catalog(args.catalog))
    console.print(f"catalog: {source.path}", markup=False)
    places = choose_rows(source, args.products)
    queries = args.query or choose_queries(source.path, list(without_photos(source, places)))
    release = args.release or build_release()
    args.out.mkdir(parents=True, exist_ok=True)
    log_path = args.out / "triton.log"
    with (
        log_path.open("w") as log,
        triton(release, server_python=args.server_python, log=log) as server,
    ):
        console.print(f"{server.triton} at {server.grpc_address}, log: {log_path}", markup=False)
        report = demo(server, source, places, queries, args.out)
    return report | {"elapsed_s": round(time.monotonic() - started, 1)}


def main() -> None:
    """Command line."""
    args = parser().parse_args()
    # Leaves by an exception, so that the server is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        print(json.dumps(run(args)))
    except (RetrievalError, OSError) as exc:
        raise SystemExit(f"error: {exc}") from exc
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
