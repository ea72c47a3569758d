"""retrieval status | probe | delete: small looks and small changes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retrieval_client.catalog import Catalog, Role
from retrieval_client.commands.shared import EXIT_ERROR, EXIT_REFUSED, console
from retrieval_client.encoder import Encoder
from retrieval_client.fleet import Encoders
from retrieval_client.settings import Settings
from retrieval_contract.errors import RetrievalError
from retrieval_contract.probes import Probes


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Their flags."""
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


def run_status(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval status`: 0 only when a search would work."""
    found: dict[str, Any] = {"triton": settings.triton, "milvus": settings.milvus}
    problems = []
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        served = {}
        try:
            served = encoders.served()
            for release_id in served:  # readiness does not tell, nor memory; an inference does
                encoders.of(release_id).encode_queries(["status"], fresh=True)
            found |= {
                "server": encoders.of(next(iter(served))).server_version(),
                "serves": ", ".join(served),
                "vector_dim": ", ".join(str(each.vector_dim) for each in served.values()),
            }
        except RetrievalError as exc:
            problems.append(str(exc))
        try:
            if catalog.milvus.exists:
                found["milvus_version"] = catalog.milvus.backend.version
            for role, collection in catalog.live().items():
                of = role.name.lower()
                found |= {
                    "collection" if role is Role.SERVING else of: collection.name,
                    "holds" if role is Role.SERVING else f"{of} holds": collection.info.release_id,
                    "products" if role is Role.SERVING else f"{of} products": collection.count(),
                }
                if served:
                    encoders.for_collection(collection.info)
            if served:
                catalog.serving()
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
            f"release {probes.release_id} at {settings.triton}: {count} probes, lowest cosine "
            f"{lowest:.6f}",
            markup=False,
        )
    return 0


def run_delete(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval delete`: from every live collection."""
    deleted: set[str] = set()
    with Catalog(settings) as catalog:
        serving = catalog.serving()
        for collection in catalog.live().values():
            deleted |= set(collection.delete(args.ids))
        total = serving.count()
    unknown = sorted(set(args.ids) - deleted)
    if args.json:
        print(json.dumps({"deleted": sorted(deleted), "unknown": unknown, "in_catalog": total}))
    else:
        console.print(f"{len(deleted)} deleted; the catalog holds {total}")
        for product_id in unknown:
            console.print(f"  not there: {product_id}", markup=False, highlight=False)
    return EXIT_REFUSED if unknown else 0
