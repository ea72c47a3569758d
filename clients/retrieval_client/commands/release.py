"""retrieval release build | verify | promote | rollback | status | gc | abort: another model behind
the same searches. `docs/operations.md` walks through it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retrieval_client.catalog import Catalog, Role
from retrieval_client.changes import PICTURE_FILE, REPORT_FILE
from retrieval_client.collection import Collection
from retrieval_client.commands.push import add_columns, add_source, progress_bar, source_of
from retrieval_client.commands.shared import EXIT_REFUSED, console, rejects_file
from retrieval_client.feed import Plan
from retrieval_client.fleet import Encoders
from retrieval_client.judged import Asked
from retrieval_client.releases import Releases, Standing, apart, unfinished
from retrieval_client.settings import Settings
from retrieval_client.verify import NDCG_LOSS, Verification, Verify, Wanted
from retrieval_contract.door import Lane
from retrieval_contract.errors import CatalogError, SourceError
from retrieval_contract.probes import Probes

REPORT = Path("build/verification")


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Its flags."""
    release = commands.add_parser("release", help="build, verify, promote, roll back a release")
    steps = release.add_subparsers(dest="step", required=True)

    build = steps.add_parser("build", parents=[shared], help="fill the collection of a new release")
    add_source(build)
    build.add_argument("--release", help="its id; default: the one served release without a role")
    build.add_argument("--rejects", type=Path, default=Path("rejects.jsonl"))
    build.add_argument("--retry-s", type=float, help="how long to wait for a server that is away")
    build.set_defaults(run=run_build)

    verify = steps.add_parser(
        "verify", parents=[shared], help="is the candidate fit to be searched"
    )
    verify.add_argument("--source", type=Path, help="what it should hold, as for push")
    add_columns(verify)
    verify.add_argument("--no-thumbnails", action="store_true", help="as it was pushed")
    verify.add_argument("--probes", type=Path, help="folder of the release, for its golden vectors")
    verify.add_argument("--queries", type=Path, help="CSV with `query`; default: titles")
    verify.add_argument("--qrels", type=Path, help="CSV with `query_id`, `id`, `rel`")
    verify.add_argument("--data", type=Path, help="a folder with queries.csv and qrels.csv")
    verify.add_argument("--ndcg-loss", type=float, default=NDCG_LOSS, help=f"{NDCG_LOSS}")
    verify.add_argument("--min-overlap", type=float, default=0.0, help="of the first ten; 0")
    verify.add_argument("--report", type=Path, help=f"folder; default: {REPORT}/<release>")
    verify.set_defaults(run=run_verify)

    promote = steps.add_parser("promote", parents=[shared], help="searches see the candidate")
    promote.add_argument("--yes", action="store_true", help="though it is not verified")
    promote.set_defaults(run=run_promote)
    rollback = steps.add_parser("rollback", parents=[shared], help="searches see the previous one")
    rollback.set_defaults(run=run_rollback)
    status = steps.add_parser("status", parents=[shared], help="which release is what")
    status.set_defaults(run=run_status)
    gc = steps.add_parser("gc", parents=[shared], help="drop what no role needs")
    gc.add_argument("--yes", action="store_true", help="the previous release as well")
    gc.set_defaults(run=run_gc)
    abort = steps.add_parser("abort", parents=[shared], help="drop the candidate")
    abort.set_defaults(run=run_abort)


@contextmanager
def releases(settings: Settings) -> Iterator[Releases]:
    """Connected, as one who can wait."""
    settings = settings.override(traffic=Lane.BULK)
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        yield Releases(settings, encoders, catalog)


def run_build(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval release build`."""
    source = source_of(args)
    with (
        rejects_file(args.rejects) as rejects,
        releases(settings) as ours,
        progress_bar(quiet=args.json) as bar,
    ):
        candidate = ours.prepare(args.release)
        task = bar.add_task("products", total=source.rows_expected)
        report = ours.build(
            source.rows(),
            candidate.info.release_id,
            Plan(thumbnails=not args.no_thumbnails),
            lambda report: bar.update(task, completed=report.done),
            lambda reject: print(reject.to_json(), file=rejects, flush=True),
            rows_expected=source.rows_expected,
        )
        rows = candidate.count()
    refused = report.refused.total()
    said = {"release_id": candidate.info.release_id, "rows": rows, "rejected": refused}
    fed = {release: fed.stored for release, fed in report.fed.items()}
    _say(
        args,
        said | {"stored": fed},
        f"candidate {candidate.info.release_id}: {fed[candidate.info.release_id]} stored, it holds "
        f"{rows}; {refused} refused; next: retrieval release verify",
    )
    return EXIT_REFUSED if refused else 0


def run_verify(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval release verify`: 0 when every check passed."""
    wanted = Wanted(
        source=source_of(args).rows() if args.source else None,
        thumbnails=not args.no_thumbnails,
        probes=Probes.load(args.probes) if args.probes else None,
        asked=_asked(args),
        ndcg_loss=args.ndcg_loss,
        lowest_overlap=args.min_overlap,
    )
    with releases(settings) as ours:
        verify = Verify(ours.settings, ours.encoders, ours.catalog)
        report = args.report or REPORT / verify.candidate.info.release_id
        found = verify.run(wanted, report)
    if args.json:
        print(json.dumps(found.to_json()))
    else:
        _show(found)
        console.print(f"report: {report / REPORT_FILE}, {report / PICTURE_FILE}", markup=False)
    return 0 if found.passed else EXIT_REFUSED


def _asked(args: argparse.Namespace) -> Asked | None:
    if args.qrels and not args.queries:
        raise SourceError("--qrels: expected --queries beside it, got none; give both, or --data")
    if args.queries:
        return Asked.read(args.queries, args.qrels)
    return Asked.of_folder(args.data) if args.data else None


def _show(found: Verification) -> None:
    title = f"release {found.release} against {found.against}, which serves"
    table = Table("check", "expected", "got", "", title=title, title_justify="left")
    for check in found.checks:
        said = map(escape, (check.name, check.expected, check.got))
        table.add_row(*said, "good" if check.passed else "BAD")
    Console().print(table)
    for change in found.changes[:3]:
        text = f"  changes most: {change.query!r}, {change.overlap:.0%} of the answers stay"
        console.print(text, markup=False, highlight=False)


def run_promote(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval release promote`."""
    with releases(settings) as ours:
        return _serves(args, ours.promote(certain=args.yes))


def run_rollback(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval release rollback`."""
    with releases(settings) as ours:
        before = ours.roles()[Role.SERVING]
        now = ours.rollback()
        if not args.json:  # at once: to compare takes its time
            _serves(args, now)
        differs: Counter[str] | None = None
        try:
            before.load()
            differs = apart(now, before)
        except CatalogError as exc:  # maybe the very reason for going back
            console.print(f"what served before cannot be compared: {exc}", markup=False)
    if args.json:
        return _serves(args, now, differs=differs)
    if differs:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(differs.items()))
        console.print(f"of what served before, {counts}: push the source again", highlight=False)
    return 0


def _serves(
    args: argparse.Namespace, collection: Collection, **more: Mapping[str, int] | None
) -> int:
    info = collection.info
    text = f"release {info.release_id} serves; searches everywhere see it within seconds"
    return _say(args, {"serving": info.release_id, "collection": info.name} | more, text)


def run_abort(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval release abort`."""
    with releases(settings) as ours:
        gone = ours.abort()
    return _say(args, {"aborted": gone.info.release_id}, f"{gone.name}: no candidate any more")


def run_gc(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval release gc`."""
    with releases(settings) as ours:
        cleared = ours.gc(certain=args.yes)
    lines = [f"dropped {name}" for name in cleared.dropped] or ["nothing was dropped"]
    lines += [f"{name}: {why}" for name, why in cleared.left.items()]
    return _say(args, asdict(cleared), "\n".join(lines))


def run_status(args: argparse.Namespace, settings: Settings) -> int:
    """`retrieval release status`."""
    with releases(settings) as ours:
        found = ours.status()
    notes = unfinished(found)
    if args.json:
        said = [asdict(each) | {"roles": [r.name.lower() for r in each.roles]} for each in found]
        print(json.dumps({"releases": said, "notes": notes}))
        return 0
    table = Table("release", "role", "rows", "verified", "served by")
    for each in found:
        roles = ", ".join(role.name.lower() for role in each.roles) or "none"
        by = each.served_by or "nobody"
        rows = "cannot be read" if each.rows is None else str(each.rows)
        table.add_row(each.release_id, roles, rows, _verified(each), by)
    Console().print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    return 0


def _verified(standing: Standing) -> str:
    verdict = standing.verdict
    if verdict is None:
        return "no"
    what = f"failed: {', '.join(verdict.failed)}" if verdict.failed else "passed"
    changed = "" if verdict.state.rows == standing.rows else f", then of {verdict.state.rows} rows"
    return f"{what} at {verdict.at}{changed}"


def _say(args: argparse.Namespace, said: dict[str, Any], text: str) -> int:
    if args.json:
        print(json.dumps(said))
    else:
        console.print(text, markup=False, highlight=False)
    return 0
