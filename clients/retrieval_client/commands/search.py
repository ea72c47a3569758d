"""retrieval search: find products, and see where the time went."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retrieval_client.collection import Consistency
from retrieval_client.commands.shared import EXIT_REFUSED, console
from retrieval_client.finding import End, Hits
from retrieval_client.hybrid import VECTOR_ROUTE, WORDS_ROUTE
from retrieval_client.ledger import LINES, ledgers
from retrieval_client.options import OptionFields
from retrieval_client.picture import draw_results
from retrieval_client.query import Query
from retrieval_client.records import ATTRIBUTES, TITLE, Hit
from retrieval_client.search import ProductSearch
from retrieval_client.settings import Settings
from retrieval_contract.errors import ContractError, ItemError
from retrieval_contract.models import PRODUCT_ENCODER

SHORT = {
    End.ALL: "these are all that fulfil it",
    End.DEPTH: "no more were looked at; there may be others",
}


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Its flags."""
    search = commands.add_parser(
        "search", parents=[shared], help="find products by text, picture, or likeness"
    )
    search.add_argument("queries", nargs="*", metavar="QUERY")
    search.add_argument("--image", type=Path, help="what it looks like, with each text or alone")
    search.add_argument("--like", metavar="ID", default="", help="what is like this product")
    _add_options(search)
    search.add_argument("--explain", action="store_true", help="say where the time went")
    search.add_argument("--image-out", type=picture_path, help="write the results as a picture")
    search.add_argument(
        "--shadow", type=int, metavar="PERCENT", help="ask the candidate release as well"
    )
    search.set_defaults(run=run_search)


def _add_options(search: argparse.ArgumentParser) -> None:
    """Those of `options.Options`."""
    search.add_argument("--limit", type=int, default=10)
    place = search.add_mutually_exclusive_group()
    place.add_argument("--offset", type=int, default=0, help="leave out the first so many")
    place.add_argument("--page", type=int, help="1 is the first --limit products")
    search.add_argument("--where", default="", help="such as 'price < 20 and brand in {b}'")
    search.add_argument(
        "--param",
        type=parameter,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what {NAME} in --where is: JSON, else a text as it stands",
    )
    search.add_argument("--min-score", type=float, help="leave out what scores less")
    search.add_argument(
        "--fields", type=names, help='such as title,price; "attributes" is all of them'
    )
    search.add_argument("--group-by", default="", metavar="ATTRIBUTE", help="the best of each")
    search.add_argument("--hybrid", action="store_true", help="search words of titles as well")
    search.add_argument("--fresh", action="store_true", help="see all that is written up to now")


def options_of(args: argparse.Namespace) -> OptionFields:
    """What the flags say."""
    if args.page is not None and args.page < 1:
        raise ContractError(f"--page: expected 1 or more, got {args.page}")
    found = OptionFields(
        limit=args.limit,
        offset=args.offset if args.page is None else (args.page - 1) * args.limit,
        where=args.where,
        params=dict(args.param),
        min_score=args.min_score,
        group_by=args.group_by,
        hybrid=args.hybrid,
        consistency=Consistency.ALL if args.fresh else Consistency.ANY,
        thumbnails=bool(args.image_out),
    )
    if args.fields is not None:
        found["fields"] = args.fields
    return found


def queries_of(args: argparse.Namespace) -> list[tuple[str, Query]]:
    """What is looked for, each with how it is called."""
    image = args.image.read_bytes() if args.image else b""
    with_it = [f"image {args.image}"] * bool(args.image) + [f"like {args.like}"] * bool(args.like)
    texts = args.queries or [""] * bool(with_it)
    if not texts:
        raise ContractError("search: expected a text, --image or --like, got none; give one")
    return [
        (
            " + ".join([text] * bool(text or not with_it) + with_it),
            Query(text, image, args.like),
        )
        for text in texts
    ]


def parameter(text: str) -> tuple[str, Any]:
    """`name=value`; the value is JSON where it can be read as that."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected name=value, got {text}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def names(text: str) -> tuple[str, ...]:
    """Of fields, with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def picture_path(text: str) -> Path:
    """A path whose suffix says a format that can be written."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"expected a .png, .jpg or .webp path, got {text}")
    return path


def run_search(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval search`: good queries are answered, bad ones said."""
    ledger: dict[str, float] = {}
    options = options_of(args)
    called, asked = zip(*queries_of(args), strict=True)
    with ProductSearch(settings, explain=args.explain) as search:
        if args.explain:
            found, ledger = explained(search, asked, options)
        else:
            found = search.many(asked, **options)
        shadow = search.shadow.report(wait_s=settings.timeout_s) if settings.shadow else None
    answers = list(zip(called, found, strict=True))
    good = [(query, hits) for query, hits in answers if not isinstance(hits, ItemError)]
    if args.image_out and good:
        draw_results([query for query, _ in good], [hits for _, hits in good], args.image_out)
    if args.json:
        said = [_answer_json(query, hits) for query, hits in answers]
        more: dict[str, Any] = {"ledger_ms": ledger} if args.explain else {}
        more |= {"shadow": asdict(shadow)} if shadow else {}
        print(json.dumps({"searches": said, **more} if more else said))
    else:
        for query, hits in answers:
            if isinstance(hits, ItemError):
                console.print(f"{query!r}: {hits}", style="red", markup=False)
            else:
                Console().print(_hit_table(query, hits, args))
                if hits.end is not End.LIMIT:
                    console.print(SHORT[hits.end], markup=False)
        if args.image_out and good:
            console.print(f"picture: {args.image_out}", markup=False)
        if args.explain:
            Console().print(_ledger_table(ledger))
        if shadow:
            said_of_it = ", ".join(f"{name} {value}" for name, value in asdict(shadow).items())
            console.print(f"candidate: {said_of_it}", markup=False, highlight=False)
    return 0 if len(good) == len(asked) else EXIT_REFUSED


def explained(
    search: ProductSearch, queries: Sequence[Query], options: OptionFields
) -> tuple[list[Hits | ItemError], dict[str, float]]:
    """The answers, and the milliseconds of each line and of the total.

    Connected, and asked once, before: a first search pays for what later ones do not.
    """
    search.connect()
    search.many(queries, **options)
    before = search.encoder.statistics()
    found, timed = search.timed(queries, **options)
    products = sum(request.ensemble is PRODUCT_ENCODER for request in timed.requests)
    texts = len(timed.requests) - products
    counted = search.encoder.statistics_since(before, texts, products)
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


def _hit_table(query: str, hits: Hits, args: argparse.Namespace) -> Table:
    table = Table(title=escape(query), title_justify="left")
    routes = (VECTOR_ROUTE, WORDS_ROUTE) if args.hybrid else ()
    shown = [name for name in args.fields or () if name != TITLE.name]
    shown += [args.group_by] * bool(args.group_by and args.group_by not in shown)
    for name in ("#", "score", *routes):
        table.add_column(name, justify="right")
    for name in ("id", "title", *shown):
        table.add_column(escape(name))
    for rank, hit in enumerate(hits, start=1):
        attributes = [
            hit.attributes if name == ATTRIBUTES.name else hit.attributes.get(name, "")
            for name in shown
        ]
        table.add_row(
            str(rank),
            f"{hit.score:.3f}",
            *(_route_cell(hit, name) for name in routes),
            *(escape(str(text)) for text in (hit.id, hit.title, *attributes)),
        )
    return table


def _route_cell(hit: Hit, name: str) -> str:
    """Its share and rank there, such as "62 % (#3)"."""
    of_name = (route for route in hit.routes if route.name == name)
    return next((f"{route.share:.0%} (#{route.rank})" for route in of_name), "")


def _answer_json(query: str, hits: Hits | ItemError) -> dict[str, Any]:
    if isinstance(hits, ItemError):
        return {"query": query, "error": str(hits)}
    return {"query": query, "hits": [_hit_json(hit) for hit in hits], "end": hits.end}


def _hit_json(hit: Hit) -> dict[str, Any]:
    left_out = {"thumbnail"} if hit.routes else {"thumbnail", "routes"}
    return {k: v for k, v in asdict(hit).items() if k not in left_out}
