"""retrieval index recall | tune: what the index finds of an exact search, and how hard it looks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retrieval_client.catalog import Catalog, Role
from retrieval_client.collection import Collection
from retrieval_client.commands.shared import console
from retrieval_client.curves import curves
from retrieval_client.fleet import Encoders
from retrieval_client.index import (
    FILTERED,
    KINDS,
    RECALL,
    best_kind,
    build,
    index_of,
    sample_titles,
    tune,
)
from retrieval_client.recalls import Recall, recall
from retrieval_client.settings import Settings
from retrieval_contract.errors import CollectionGone, SourceError
from retrieval_contract.tensors import Array

QUERIES = 200
BEST = "best"


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Their flags."""
    both = argparse.ArgumentParser(add_help=False, parents=[shared])
    both.add_argument(
        "--queries", type=Path, help="real searches, a text a line; default: titles of products"
    )
    both.add_argument("--count", type=int, default=QUERIES, help="queries; default: %(default)s")
    both.add_argument(
        "--role",
        choices=[role.name.lower() for role in Role if role is not Role.HELD],
        default=Role.SERVING.name.lower(),
        help="which collection; default: %(default)s",
    )
    index = commands.add_parser("index", help="what the index finds, and what that costs")
    actions = index.add_subparsers(dest="action", required=True)

    measured = actions.add_parser("recall", parents=[both], help="measure it; changes nothing")
    measured.add_argument("--plot", type=Path, help="write recall over latency as an .svg")
    measured.add_argument(
        "--server-pid", type=int, help="process of a Milvus server here, to see its CPU"
    )
    measured.set_defaults(run=run_recall)

    chosen = actions.add_parser("tune", parents=[both], help="choose, and store what searches use")
    chosen.add_argument("--recall", type=float, default=RECALL, help="recall@10 to be reached")
    chosen.add_argument(
        "--filtered", type=float, default=FILTERED, help="the same under filters of 10 %% and 1 %%"
    )
    chosen.add_argument(
        "--kind",
        choices=[BEST, *KINDS],
        help="build this index first (best: by size); meanwhile nothing can be searched there",
    )
    chosen.set_defaults(run=run_tune)


@contextmanager
def measurable(args: argparse.Namespace, settings: Settings) -> Iterator[tuple[Collection, Array]]:
    """The collection that the flags name, and vectors of queries (queries, vector_dim)."""
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        role = Role[args.role.upper()]
        if getattr(args, "kind", None):
            catalog.mend(role)
        collection = catalog.find(role)
        if not collection:
            raise CollectionGone(
                f"Milvus at {settings.milvus}: expected a {args.role} collection of "
                f"'{settings.collection}', got none; fill it with `retrieval push SOURCE`"
            )
        if args.queries:
            texts = [line for line in args.queries.read_text().splitlines() if line.strip()]
            texts = texts[: args.count]
        else:
            texts = sample_titles(collection, args.count)
        if not texts:
            raise SourceError(
                f"{args.queries or collection.name}: expected queries, got none; give --queries"
            )
        encoded = encoders.for_collection(collection.info).encode_queries(texts)
        good = [row for row, error in enumerate(encoded.errors) if error is None]
        if not good:
            raise SourceError(
                f"{args.queries or collection.name}: expected queries that can be encoded, got "
                f"{len(texts)} that cannot, the first since {encoded.errors[0]}; give others"
            )
        yield collection, encoded.vectors[good]


def say(line: str) -> None:
    """How far it is."""
    console.print(line, markup=False, highlight=False)


def run_recall(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval index recall`."""
    with measurable(args, settings) as (collection, queries):
        index = index_of(collection)
        found = recall(
            collection,
            queries,
            knob=index.knob,
            efforts=index.efforts,
            server_pid=args.server_pid,
            index=str(index),
            say=say,
        )
    if args.plot:
        args.plot.write_text(curves(found))
    print(found.to_json()) if args.json else Console().print(_table(found))
    return 0


def run_tune(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval index tune`."""
    with measurable(args, settings) as (collection, queries):
        if args.kind:
            rows = collection.count()
            best = args.kind == BEST
            wanted = best_kind(collection.milvus, rows) if best else KINDS[args.kind](rows)
            if index_of(collection) != wanted:
                build(collection, wanted)
        tuned = tune(collection, queries, target=args.recall, filtered=args.filtered, say=say)
    if args.json:
        print(json.dumps(asdict(tuned)))
    else:
        say(
            f"{tuned.collection}: {tuned.index}; searches use {dict(tuned.params)}, filtered ones "
            f"{dict(tuned.filtered_params)}"
        )
    return 0


def _table(found: Recall) -> Table:
    table = Table(title=f"{found.collection}, {found.rows} rows, {found.index}")
    names = ("filter", found.knob or "effort", "recall@10", "@100", "ms", "CPU here", "at Milvus")
    for name in names:
        table.add_column(name, justify="right")
    for point in found.points:
        theirs = "" if point.server_cpu_ms is None else f"{point.server_cpu_ms:.2f} ms"
        table.add_row(
            f"{point.share:.1%}",
            "" if point.effort is None else str(point.effort),
            f"{point.recall_10:.4f}",
            f"{point.recall_100:.4f}",
            f"{point.latency_ms:.2f}",
            f"{point.client_cpu_ms:.2f} ms",
            theirs,
        )
    return table
