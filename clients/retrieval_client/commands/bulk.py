"""retrieval bulk encode | load: the first load of a large catalog, in two steps."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from retrieval_client.bulk import SHARD_ROWS, Run, encode, in_processes, recipe_for, serially
from retrieval_client.bulk_load import Load
from retrieval_client.bulk_ray import LOCAL, on_ray
from retrieval_client.catalog import Catalog
from retrieval_client.commands.push import add_source, progress_bar, source_of
from retrieval_client.commands.shared import EXIT_REFUSED, console
from retrieval_client.settings import Settings
from retrieval_contract.errors import RetrievalError


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Their flags."""
    bulk = commands.add_parser("bulk", help="the first load of a large catalog: shards, then rows")
    steps = bulk.add_subparsers(dest="step", required=True)
    make = steps.add_parser("encode", parents=[shared], help="a source into Parquet shards")
    add_source(make)
    make.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="their folder")
    make.add_argument(
        "--shard-rows",
        type=int,
        default=SHARD_ROWS,
        help=f"rows of the source a shard; default: {SHARD_ROWS}",
    )
    make.add_argument("--workers", type=int, default=1, help="shards made at a time; default: 1")
    make.add_argument(
        "--ray", metavar="ADDRESS", help=f"on this Ray cluster; {LOCAL}: on one of its own, here"
    )
    make.add_argument("--release", default="", help="which one, where several are served")
    make.add_argument("--retry-s", type=float, help="how long to wait for a server that is away")
    make.set_defaults(run=run_encode)

    load = steps.add_parser("load", parents=[shared], help="Parquet shards into the catalog")
    load.add_argument("shards", type=Path, help="folder that `bulk encode` wrote")
    load.add_argument("--retry-s", type=float, help="how long to wait for a server that is away")
    load.set_defaults(run=run_load)


def run_encode(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval bulk encode`: 3 where rows were refused."""
    for name in ("shard_rows", "workers"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise RetrievalError(f"--{flag}: expected 1 or more, got {getattr(args, name)}")
    recipe = recipe_for(
        source_of(args),
        args.out,
        settings,
        args.release,
        shard_rows=args.shard_rows,
        thumbnails=not args.no_thumbnails,
    )
    started = time.monotonic()
    with progress_bar(quiet=args.json) as bar:
        task = bar.add_task("products", total=recipe.source.rows_expected)
        manifest = encode(
            recipe,
            _way(args),
            lambda shard: bar.advance(task, shard.rows + sum(shard.refused.values())),
        )
    if args.json:
        said = {
            "release_id": manifest.release_id,
            "shards": len(manifest.shards),
            "rows": manifest.rows,
            "rejected": manifest.refused,
            "elapsed_s": round(time.monotonic() - started, 3),
        }
        print(json.dumps(said))
    else:
        console.print(
            f"{manifest.rows} products in {len(manifest.shards)} shards, {manifest.refused} "
            f"refused; next: retrieval bulk load {args.out}",
            markup=False,
            highlight=False,
        )
        if manifest.refused:
            console.print(f"all refused rows: {args.out}/*.rejects.jsonl", markup=False)
    return EXIT_REFUSED if manifest.refused else 0


def _way(args: argparse.Namespace) -> Run:
    if args.ray:
        return on_ray(args.ray, args.workers)
    return in_processes(args.workers) if args.workers > 1 else serially


def run_load(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval bulk load`."""
    load = Load(settings, args.shards)
    started = time.monotonic()
    with Catalog(settings) as catalog, progress_bar(quiet=args.json) as bar:
        task = bar.add_task("products", total=load.manifest.rows)
        loaded = load.run(catalog, lambda shard: bar.advance(task, shard.rows))
    if args.json:
        said = {
            "collection": loaded.collection,
            "stored": loaded.stored,
            "unchanged": loaded.unchanged,
            "shards_skipped": loaded.skipped,
            "elapsed_s": round(time.monotonic() - started, 3),
        }
        print(json.dumps(said))
    else:
        console.print(
            f"{loaded.stored} stored, {loaded.unchanged} unchanged; {loaded.collection} holds "
            "what the shards say",
            markup=False,
            highlight=False,
        )
    return 0
