"""retrieval search: find products, and see where the time went."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retrieval_client.collection import Hit
from retrieval_client.commands.shared import EXIT_REFUSED, console
from retrieval_client.ledger import LINES, ledgers
from retrieval_client.picture import draw_results
from retrieval_client.search import ProductSearch
from retrieval_client.settings import Settings
from retrieval_contract.errors import ItemError


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Its flags."""
    search = commands.add_parser("search", parents=[shared], help="find products by text")
    search.add_argument("queries", nargs="+", metavar="QUERY")
    search.add_argument("--limit", type=int, default=10)
    search.add_argument("--explain", action="store_true", help="say where the time went")
    search.add_argument("--image-out", type=picture_path, help="write the results as a picture")
    search.add_argument(
        "--shadow", type=int, metavar="PERCENT", help="ask the candidate release as well"
    )
    search.set_defaults(run=run_search)


def picture_path(text: str) -> Path:
    """A path whose suffix says a format that can be written."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"expected a .png, .jpg or .webp path, got {text}")
    return path


def run_search(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval search`: good queries are answered, bad ones said."""
    ledger: dict[str, float] = {}
    with ProductSearch(settings, explain=args.explain) as search:
        if args.explain:
            found, ledger = explained(search, args)
        else:
            found = search.many(args.queries, limit=args.limit, thumbnails=bool(args.image_out))
        shadow = search.shadow.report(wait_s=settings.timeout_s) if settings.shadow else None
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
        more: dict[str, Any] = {"ledger_ms": ledger} if args.explain else {}
        more |= {"shadow": asdict(shadow)} if shadow else {}
        print(json.dumps({"searches": said, **more} if more else said))
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
        if shadow:
            said_of_it = ", ".join(f"{name} {value}" for name, value in asdict(shadow).items())
            console.print(f"candidate: {said_of_it}", markup=False, highlight=False)
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
