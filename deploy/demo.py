"""python -m deploy.demo: checkpoint → release → Triton → Milvus → search → a picture.

Each step is the public command or library that a user would call. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import track

from deploy.local import LATEST, ROOT, SERVER_PYTHON, Server, triton
from deploy.rendered.catalog import write_rendered_catalog
from retrieval_client import Hit, ProductSearch, Settings
from retrieval_client.picture import draw_results
from retrieval_client.push import Push, PushReport
from retrieval_client.sources import Source, SourceRow
from retrieval_contract.errors import DeployError, RetrievalError

BUILD = ROOT / "build"
DEMO = BUILD / "demo"
CHECKPOINT = BUILD / "checkpoints" / "make"
REAL_CATALOG = ROOT.parent / "shared" / "data" / "fashion_products_small"
PRODUCTS = 5000
QUERIES = 6
RESULTS = 6
QUERY_WORDS = 5
"""Words of a title that stand in for a query where a catalog brings none."""

console = Console(stderr=True)


def build_release() -> None:
    """Weights → checkpoint → release, unless they are there."""
    if not (CHECKPOINT / "model.safetensors").is_file():
        _run("towers.pretrained", "--out", str(CHECKPOINT))
    _run("export", "repository", "--checkpoint", str(CHECKPOINT))


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


def spread_rows(source: Source, products: int) -> Iterator[SourceRow]:
    """At most `products` rows, taken evenly over the whole source where its length is known."""
    step = max(1, (source.rows_expected or 0) // products)
    return islice(source.rows(), 0, step * products, step)


def choose_queries(catalog: Path, rows: Sequence[SourceRow]) -> list[str]:
    """Queries of the catalog's own `queries.csv` that have answers among `rows`, else titles."""
    if not (catalog / "queries.csv").is_file():
        titles = [row.title.decode("utf-8", "replace") for row in rows if row.title]
        return [" ".join(t.split()[:QUERY_WORDS]) for t in _spread(titles, QUERIES)]
    queries = {row["query_id"]: row["query"] for row in _records(catalog / "queries.csv")}
    if (catalog / "qrels.csv").is_file():
        there = {row.id for row in rows}
        answers = Counter(
            row["query_id"]
            for row in _records(catalog / "qrels.csv")
            if row["id"] in there and row["rel"] == "2"
        )
        answered = [queries[query] for query in queries if answers[query] >= RESULTS]
        return _spread(answered or list(queries.values()), QUERIES)
    return _spread(list(queries.values()), QUERIES)


def _records(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _spread(items: Sequence[str], count: int) -> list[str]:
    step = max(1, len(items) // count)
    return list(dict.fromkeys(items[::step]))[:count]


def fill(search: ProductSearch, settings: Settings, rows: Sequence[SourceRow]) -> PushReport:
    """Push with a progress bar."""
    push = Push(settings, search.encoder, search.catalog)
    bar = track(rows, "encode and store", console=console)
    report = push.run(bar)
    for reject in report.rejects:
        console.print(f"  refused {reject.id}: {reject.code}: {reject.detail}", markup=False)
    return report


def demo(server: Server, catalog: Path, products: int, queries: list[str]) -> dict[str, object]:
    """Fill a fresh catalog, search it, draw the page; returns the report's fields."""
    store = DEMO / "catalog.db"
    shutil.rmtree(store, ignore_errors=True)
    settings = Settings(triton=server.grpc_address, milvus=str(store))
    rows = list(spread_rows(Source(catalog), products))
    queries = queries or choose_queries(catalog, rows)
    with ProductSearch(settings) as search:
        report = fill(search, settings, rows)
        results = [search(query, limit=RESULTS, thumbnails=True) for query in queries]
        stored = search.catalog.count()
        version = search.catalog.server_version()
    if stored != report.stored or not all(results):
        raise DeployError(
            f"demo: {report.stored} products were stored, the catalog holds {stored} "
            f"and the queries found {[len(hits) for hits in results]}"
        )
    draw_results(queries, results, DEMO / "results.png")
    say_results(queries, results)
    return {
        "products": stored,
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
    console.print(f"picture: {DEMO / 'results.png'}", markup=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m deploy.demo", description=__doc__)
    parser.add_argument("--catalog", type=Path, help="file or folder; default: real, else drawn")
    parser.add_argument("--products", type=int, default=PRODUCTS, help="at most so many")
    parser.add_argument("--query", action="append", default=[], help="instead of the catalog's own")
    parser.add_argument("--server-python", type=Path, default=SERVER_PYTHON)
    args = parser.parse_args()
    started = time.monotonic()
    DEMO.mkdir(parents=True, exist_ok=True)
    try:
        build_release()
        catalog = choose_catalog(args.catalog)
        console.print(f"catalog: {catalog}", markup=False)
        with (
            (DEMO / "triton.log").open("w") as log,
            triton(LATEST, server_python=args.server_python, log=log) as server,
        ):
            console.print(f"{server.triton} at {server.grpc_address}, log: {DEMO / 'triton.log'}")
            report = demo(server, catalog, args.products, args.query)
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
    print(json.dumps(report | {"elapsed_s": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
