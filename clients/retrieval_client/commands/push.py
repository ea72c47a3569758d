"""retrieval push: the catalog becomes what a source says."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from retrieval_client.catalog import Catalog
from retrieval_client.commands.shared import EXIT_REFUSED, console, rejects_file
from retrieval_client.feed import Fed, Plan
from retrieval_client.fleet import Encoders
from retrieval_client.push import Push, PushReport
from retrieval_client.settings import Settings
from retrieval_client.sources import Columns, Source
from retrieval_contract.door import Lane
from retrieval_contract.errors import SourceError


def add_source(command: argparse.ArgumentParser) -> None:
    """A source, and which of its columns is which."""
    command.add_argument(
        "source",
        type=Path,
        help=".parquet, .csv, .jsonl, a folder (products.parquet or images), or - for JSON lines "
        "on stdin",
    )
    add_columns(command)
    command.add_argument("--no-thumbnails", action="store_true", help="store no small photos")


def add_columns(command: argparse.ArgumentParser) -> None:
    """Which column of the source is which."""
    for role in ("id", "title", "image"):
        command.add_argument(f"--{role}-column", help=f"column that holds the {role}")
    command.add_argument(
        "--number",
        action="append",
        default=[],
        metavar="COLUMN",
        help="a column of numbers in a CSV file, where all are texts; price, say",
    )


def source_of(args: argparse.Namespace) -> Source:
    """The source that the flags name."""
    columns = Columns().given(id=args.id_column, title=args.title_column, image=args.image_column)
    return Source(args.source, columns, tuple(args.number))


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Its flags."""
    push = commands.add_parser("push", parents=[shared], help="encode a catalog and store it")
    add_source(push)
    push.add_argument(
        "--rejects",
        type=Path,
        default=Path("rejects.jsonl"),
        help="where refused rows are listed; default: rejects.jsonl",
    )
    push.add_argument("--limit", type=int, help="only the first so many rows")
    push.add_argument("--retry-s", type=float, help="how long to wait for a server that is away")
    push.add_argument("--dry-run", action="store_true", help="say what would happen, do nothing")
    push.add_argument("--sync", action="store_true", help="delete what the source does not have")
    push.add_argument("--yes", action="store_true", help="with --sync: however much that is")
    push.set_defaults(run=run_push)


class Rate(ProgressColumn):
    """Rows a second, of late."""

    def render(self, task: Task) -> Text:
        """Such as "512/s"."""
        return Text(f"{task.speed:.0f}/s" if task.speed else "")


def run_push(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval push`."""
    if args.sync and args.limit is not None:
        raise SourceError("--sync: expected the whole source, got --limit; leave out one of them")
    source = source_of(args)
    rows, expected = source.rows(), source.rows_expected
    if args.limit is not None:
        rows = (row for row, _ in zip(rows, range(args.limit), strict=False))
        expected = min(expected, args.limit) if expected is not None else None
    plan = Plan(
        thumbnails=not args.no_thumbnails, sync=args.sync, certain=args.yes, dry=args.dry_run
    )
    started = time.monotonic()
    with (
        rejects_file(None if args.dry_run else args.rejects) as rejects,
        Encoders(settings.override(traffic=Lane.BULK)) as encoders,
        Catalog(settings) as catalog,
        progress_bar(quiet=args.json) as bar,
    ):
        task = bar.add_task("products", total=expected)
        report = Push(settings, encoders, catalog, plan).run(
            rows,
            progress=lambda report: bar.update(task, completed=report.done),
            on_reject=lambda reject: print(reject.to_json(), file=rejects, flush=True),
            rows_expected=expected,
        )
        bar.update(task, total=report.read, completed=report.read)
        total = 0 if args.dry_run and not catalog.find() else catalog.serving().count()
    _say(args, report, total, time.monotonic() - started)
    return EXIT_REFUSED if report.refused else 0


def progress_bar(quiet: bool) -> Progress:
    """How far, how fast, how long still."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )


def _say(args: argparse.Namespace, report: PushReport, total: int, elapsed_s: float) -> None:
    refused = report.refused.total()
    refusals = [fed.refusal for fed in report.fed.values() if fed.refusal]
    if args.json:
        said = {
            "read": report.read,
            "encoded": report.encoded,
            "renewed": report.renewed,
            "stored": report.stored,
            "unchanged": report.unchanged,
            "deleted": report.deleted,
            "rejected": refused,
            "reasons": report.refused,
            "in_catalog": total,
            "elapsed_s": round(elapsed_s, 3),
        }
        if args.dry_run:
            said |= {"dry_run": True, "would_be_refused": refusals}
        print(json.dumps(said))
        return
    for release_id, fed in report.fed.items():
        of = f"release {release_id}: " if len(report.fed) > 1 else ""
        console.print(of + _said(fed, args.dry_run), highlight=False)
    for refusal in refusals:
        line = f"would be refused without --yes: {refusal}"
        console.print(line, style="red", markup=False, soft_wrap=True)
    rest = "nothing was written" if args.dry_run else f"the catalog holds {total}"
    console.print(f"{refused} refused; {rest}")
    for reject in report.rejects[:10]:
        line = f"  {reject.id}: {reject.code}: {reject.detail}"
        console.print(line, markup=False, highlight=False)
    if refused and not args.dry_run:
        console.print(f"all refused rows: {args.rejects}", markup=False)


def _said(fed: Fed, dry: bool) -> str:
    if dry:
        return (
            f"would encode {fed.encoded}, renew {fed.renewed} without encoding, "
            f"delete {fed.deleted}; {fed.unchanged} are as they should be"
        )
    return (
        f"{fed.stored} stored, {fed.renewed} of them without encoding; {fed.deleted} deleted; "
        f"{fed.unchanged} unchanged"
    )
