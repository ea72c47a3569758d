"""retrieval audit: is what is stored what the source says?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retrieval_client.audit import KINDS, Audit, AuditReport
from retrieval_client.catalog import Catalog
from retrieval_client.commands.push import add_source, progress_bar, source_of
from retrieval_client.commands.shared import EXIT_ERROR, EXIT_REFUSED, console
from retrieval_client.feed import Plan
from retrieval_client.fleet import Encoders
from retrieval_client.push import Push
from retrieval_client.settings import Settings
from retrieval_client.sources import STDIN
from retrieval_contract.door import Lane


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Its flags."""
    audit = commands.add_parser(
        "audit", parents=[shared], help="compare the catalog with a source, row by row"
    )
    add_source(audit)
    audit.add_argument(
        "--sample", type=int, default=100, help="products that are encoded again; default: 100"
    )
    audit.add_argument("--repair", action="store_true", help="make it what the source says")
    audit.add_argument("--yes", action="store_true", help="with --repair: delete however much")
    audit.set_defaults(run=run_audit)


def run_audit(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval audit`: 0 when all is as it should be, or was made so."""
    if args.repair and args.source == STDIN:
        console.print("error: --repair reads the source twice: give a file or folder", style="red")
        return EXIT_ERROR
    thumbnails = not args.no_thumbnails
    settings = settings.override(traffic=Lane.BULK)
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        catalog.serving()  # an empty catalog is an error, and not a clean one
        audit = Audit(catalog, thumbnails=thumbnails)

        def look() -> AuditReport:
            with progress_bar(quiet=args.json) as bar:
                task = bar.add_task("compared", total=source_of(args).rows_expected)
                return audit.run(
                    source_of(args).rows(),
                    encoders,
                    sample=args.sample,
                    progress=lambda rows: bar.update(task, completed=rows),
                )

        report = before = look()
        if args.repair and not report.clean:
            audit.mend(report)
            plan = Plan(thumbnails=thumbnails, sync=True, certain=args.yes)
            Push(settings, encoders, catalog, plan).run(source_of(args).rows())
            report = look()
    if args.json:
        said: dict[str, Any] = {
            "clean": report.clean,
            "read": report.read,
            "refused": report.refused,
        }
        said["collections"] = [_json(found) for found in report.found]
        if report is not before:
            said["before"] = [_json(found) for found in before.found]
        print(json.dumps(said))
    else:
        _show(before, report)
    return 0 if report.clean else EXIT_REFUSED


def _json(found: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(found).items() if name != "rotten"}


def _show(before: AuditReport, report: AuditReport) -> None:
    for was, now in zip(before.found, report.found, strict=True):
        table = Table(title=f"{now.collection}: {now.stored} rows", title_justify="left")
        columns = ("rows", "what", "such as") if was is now else ("was", "is", "what", "such as")
        for column in columns:
            table.add_column(column, justify="right" if column in ("rows", "was", "is") else "left")
        for kind, meaning in KINDS.items():
            counts = [was.counts[kind]] if was is now else [was.counts[kind], now.counts[kind]]
            if any(counts):
                such_as = escape(", ".join(was.examples.get(kind, [])[:3]))
                table.add_row(*map(str, counts), meaning, such_as)
        Console().print(table if table.row_count else f"{now.collection}: {now.stored} rows, good")
    console.print(
        f"{report.read} rows in the source, {report.refused} of them cannot be stored; "
        + ("all is as it says" if report.clean else "`--repair` makes it what the source says")
    )
