"""retrieval push | search | status | probe | delete: the command line of the client library.

Exit codes: 0 all done, 1 an error (said on stderr), 3 some rows or ids were refused or unknown.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from retrieval_client.catalog import Catalog, Hit
from retrieval_client.encoder import Encoder
from retrieval_client.ledger import LINES, ledgers
from retrieval_client.picture import draw_results
from retrieval_client.push import Push, PushReport
from retrieval_client.search import ProductSearch
from retrieval_client.settings import Settings, traces_wanted
from retrieval_client.sources import Columns, Source
from retrieval_client.tracing import export_spans
from retrieval_contract.door import Lane
from retrieval_contract.errors import ItemError, RetrievalError
from retrieval_contract.probes import Probes

EXIT_ERROR, EXIT_REFUSED = 1, 3
console = Console(stderr=True)


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    top = argparse.ArgumentParser(
        prog="retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--triton", help="gRPC address, host:port (RETRIEVAL_TRITON)")
    shared.add_argument("--milvus", help="a .db path or a server's URI (RETRIEVAL_MILVUS)")
    shared.add_argument("--collection", help="alias of the collection (RETRIEVAL_COLLECTION)")
    shared.add_argument("--timeout-s", type=float, help="deadline of a call, in seconds")
    shared.add_argument("--json", action="store_true", help="one JSON object on stdout")
    commands = top.add_subparsers(dest="command", required=True)

    push = commands.add_parser("push", parents=[shared], help="encode a catalog and store it")
    push.add_argument(
        "source", type=Path, help=".parquet, .csv, .jsonl, or a folder (products.parquet or images)"
    )
    push.add_argument(
        "--rejects",
        type=Path,
        default=Path("rejects.jsonl"),
        help="where refused rows are listed; default: rejects.jsonl",
    )
    push.add_argument("--limit", type=int, help="only the first so many rows")
    push.add_argument("--retry-s", type=float, help="how long to wait for a server that is away")
    push.add_argument("--no-thumbnails", action="store_true", help="store no small photos")
    for role in ("id", "title", "image"):
        push.add_argument(f"--{role}-column", help=f"column that holds the {role}")
    push.set_defaults(run=run_push)

    search = commands.add_parser("search", parents=[shared], help="find products by text")
    search.add_argument("queries", nargs="+", metavar="QUERY")
    search.add_argument("--limit", type=int, default=10)
    search.add_argument("--explain", action="store_true", help="say where the time went")
    search.add_argument("--image-out", type=picture_path, help="write the results as a picture")
    search.set_defaults(run=run_search)

    status = commands.add_parser("status", parents=[shared], help="server, catalog, do they match")
    status.set_defaults(run=run_status)

    probe = commands.add_parser(
        "probe", parents=[shared], help="does the server give the vectors of its release"
    )
    probe.add_argument("release", type=Path, help="folder of the release that it should serve")
    probe.set_defaults(run=run_probe)

    delete = commands.add_parser("delete", parents=[shared], help="delete products by id")
    delete.add_argument("ids", nargs="+", metavar="ID")
    delete.set_defaults(run=run_delete)
    return top


def picture_path(text: str) -> Path:
    """A path whose suffix says a format that can be written."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"expected a .png, .jpg or .webp path, got {text}")
    return path


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `retrieval` command."""
    args = parser().parse_args(argv)
    # pymilvus logs a traceback for every error that it also raises; we say it once, readably.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    send_spans = export_spans() if traces_wanted() else None
    if traces_wanted() and not send_spans:
        console.print("no spans: expected OpenTelemetry, got none; install make-retrieval[trace]")
    try:
        settings = Settings.from_env().override(
            triton=args.triton,
            milvus=args.milvus,
            collection=args.collection,
            timeout_s=args.timeout_s,
            retry_s=getattr(args, "retry_s", None),
        )
        code = args.run(args, settings)
    except RetrievalError as exc:
        if args.json:
            print(json.dumps({"error": type(exc).__name__, "detail": str(exc)}))
        console.print(f"error: {exc}", style="red", markup=False, soft_wrap=True)
        code = EXIT_ERROR
    except OSError as exc:  # of files that the caller named: rejects, pictures
        console.print(f"error: {exc}", style="red", markup=False, soft_wrap=True)
        code = EXIT_ERROR
    except KeyboardInterrupt:
        console.print("stopped; what was stored stays, run it again to go on")
        code = EXIT_ERROR
    finally:
        if send_spans:
            send_spans()
    sys.exit(code)


def run_push(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval push`."""
    columns = Columns().given(id=args.id_column, title=args.title_column, image=args.image_column)
    source = Source(args.source, columns)
    rows = source.rows()
    if args.limit is not None:
        rows = (row for row, _ in zip(rows, range(args.limit), strict=False))
    expected = source.rows_expected
    if args.limit is not None and expected is not None:
        expected = min(expected, args.limit)
    started = time.monotonic()
    with (
        rejects_file(args.rejects) as rejects,
        Encoder(settings.override(traffic=Lane.BULK)) as encoder,
        Catalog(settings) as catalog,
        Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=args.json or not console.is_terminal,
        ) as bar,
    ):
        task = bar.add_task("products", total=expected)

        push = Push(settings, encoder, catalog, thumbnails=not args.no_thumbnails)
        report = push.run(
            rows,
            progress=lambda report: bar.update(task, completed=report.settled),
            on_reject=lambda reject: print(reject.to_json(), file=rejects, flush=True),
        )
        bar.update(task, total=report.read, completed=report.read)
        total = catalog.count()
    _say_push(args, report, total, time.monotonic() - started)
    return EXIT_REFUSED if report.rejects else 0


@contextmanager
def rejects_file(path: Path) -> Iterator[IO[str]]:
    """Opened before the first row, so that nothing refused can be lost; gone if nothing was."""
    with path.open("w", encoding="ascii") as file:
        try:
            yield file
        finally:
            if not file.tell():
                path.unlink()


def _say_push(args: argparse.Namespace, report: PushReport, total: int, elapsed_s: float) -> None:
    refused = Counter(reject.code for reject in report.rejects)
    if args.json:
        print(
            json.dumps(
                {
                    "read": report.read,
                    "stored": report.stored,
                    "unchanged": report.unchanged,
                    "rejected": len(report.rejects),
                    "reasons": refused,
                    "in_catalog": total,
                    "elapsed_s": round(elapsed_s, 3),
                }
            )
        )
        return
    console.print(
        f"{report.stored} stored, {report.unchanged} unchanged, "
        f"{len(report.rejects)} refused; the catalog holds {total}"
    )
    for reject in report.rejects[:10]:
        line = f"  {reject.id}: {reject.code}: {reject.detail}"
        console.print(line, markup=False, highlight=False)
    if report.rejects:
        console.print(f"all refused rows: {args.rejects}", markup=False)


def run_search(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval search`: good queries are answered, bad ones said."""
    ledger: dict[str, float] = {}
    with ProductSearch(settings, explain=args.explain) as search:
        if args.explain:
            found, ledger = explained(search, args)
        else:
            found = search.many(args.queries, limit=args.limit, thumbnails=bool(args.image_out))
    answers = list(zip(args.queries, found, strict=True))
    good = {query: hits for query, hits in answers if not isinstance(hits, ItemError)}
    if args.image_out and good:
        draw_results(list(good), list(good.values()), args.image_out)
    if args.json:
        said = [
            {"query": query, "error": str(hits)}
            if isinstance(hits, ItemError)
            else {"query": query, "hits": [_hit_json(hit) for hit in hits]}
            for query, hits in answers
        ]
        print(json.dumps({"searches": said, "ledger_ms": ledger} if args.explain else said))
    else:
        for query, hits in answers:
            if isinstance(hits, ItemError):
                console.print(f"{query!r}: {hits}", style="red", markup=False)
            else:
                Console().print(_hit_table(query, hits))
        if args.image_out and good:
            console.print(f"picture: {args.image_out}", markup=False)
        if args.explain:
            Console().print(_ledger_table(ledger))
    return 0 if len(good) == len(set(args.queries)) else EXIT_REFUSED


def explained(
    search: ProductSearch, args: argparse.Namespace
) -> tuple[list[list[Hit] | ItemError], dict[str, float]]:
    """The answers, and the milliseconds of each line and of the total.

    Connected, and asked once, before: a first search pays for what later ones do not.
    """
    search.connect()
    search.many(args.queries, limit=args.limit)
    before = search.encoder.statistics()
    found, timed = search.timed(args.queries, limit=args.limit, thumbnails=bool(args.image_out))
    counted = search.encoder.statistics_since(before, len(timed.requests))
    (lines,) = ledgers([timed], counted)
    lines["total"] = timed.laps["search"]
    return found, {line: round(seconds * 1e3, 3) for line, seconds in lines.items()}


def _ledger_table(ledger: dict[str, float]) -> Table:
    table = Table(title="where the time of a further search went", title_justify="left")
    for name in ("line", "ms", "share", "is"):
        table.add_column(name, justify="right" if name in ("ms", "share") else "left")
    for line, ms in ledger.items():
        share = ms / ledger["total"]
        table.add_row(line, f"{ms:.2f}", f"{share:.0%}", LINES.get(line, "measured around all"))
    return table


def _hit_table(query: str, hits: list[Hit]) -> Table:
    table = Table(title=escape(query), title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    table.add_column("id")
    table.add_column("title")
    for rank, hit in enumerate(hits, start=1):
        table.add_row(str(rank), f"{hit.score:.3f}", escape(hit.id), escape(hit.title))
    return table


def _hit_json(hit: Hit) -> dict[str, Any]:
    return {k: v for k, v in asdict(hit).items() if k != "thumbnail"}


def run_status(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval status`: 0 only when a search would work."""
    found: dict[str, Any] = {"triton": settings.triton, "milvus": settings.milvus}
    problems = []
    with Encoder(settings) as encoder, Catalog(settings) as catalog:
        served = None
        try:
            served = encoder.served()
            encoder.encode_queries(["status"])  # readiness does not tell; an inference does
            found |= {
                "server": encoder.server_version(),
                "serves": served.release_id,
                "vector_dim": served.vector_dim,
            }
        except RetrievalError as exc:
            problems.append(str(exc))
        try:
            if catalog.exists:
                found["milvus_version"] = catalog.server_version()
            if (info := catalog.info()) is not None:
                found |= {
                    "collection": info.name,
                    "holds": info.release_id,
                    "products": catalog.count(),
                }
            if served is not None:
                catalog.check(served.release_id, served.vector_dim)
        except RetrievalError as exc:
            problems.append(str(exc))
    found["problems"] = problems
    if args.json:
        print(json.dumps(found))
    else:
        table = Table(show_header=False)
        for name, value in found.items():
            if name != "problems":
                table.add_row(name, str(value))
        Console().print(table)
        for problem in problems:
            console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)
    return EXIT_ERROR if problems else 0


def run_probe(args: argparse.Namespace, settings: Settings) -> int:
    """Golden probes: compare, and say how close."""
    probes = Probes.load(args.release)
    with Encoder(settings) as encoder:
        lowest = encoder.probe(probes)
    count = len(probes.queries) + len(probes.titles)
    if args.json:
        print(json.dumps({"release_id": probes.release_id, "probes": count, "cosine": lowest}))
    else:
        console.print(
            f"release {probes.release_id}: {count} probes, lowest cosine {lowest:.6f}",
            markup=False,
        )
    return 0


def run_delete(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval delete`."""
    with Catalog(settings) as catalog:
        deleted = catalog.delete(args.ids)
        total = catalog.count()
    unknown = sorted(set(args.ids) - set(deleted))
    if args.json:
        print(json.dumps({"deleted": deleted, "unknown": unknown, "in_catalog": total}))
    else:
        console.print(f"{len(deleted)} deleted; the catalog holds {total}")
        for product_id in unknown:
            console.print(f"  not there: {product_id}", markup=False, highlight=False)
    return EXIT_REFUSED if unknown else 0


if __name__ == "__main__":
    main()
