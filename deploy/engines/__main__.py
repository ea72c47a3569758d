"""python -m deploy.engines check|prepare: engines of a release, compiled or made ready to serve.

check    compiles for GPUs that are not here; needs tensorrt_rtx, and no GPU
prepare  engines for the GPU that is here, from a cache or built into it, and a release folder
         that holds them; last line: which folder to serve, and on which target

Each ends with one line of JSON; exit code 1 when an engine cannot be built, is not in half
precision, or leaves an attention unfused.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from deploy.engines.builder import SERVED, Runtime, find_runtime
from deploy.engines.check import ARCHITECTURES, Checked, check_engines
from deploy.engines.ready import Missing, Ready, build_beside, gpu_at_hand, prepare
from deploy.wheel import ROOT
from retrieval_contract import models
from retrieval_contract.errors import EngineError, RetrievalError
from retrieval_contract.models import Target

LATEST = ROOT / "build" / "releases" / "latest"


def show(checked: list[Checked], runtime: str) -> None:
    """One row an engine; below, why one is refused."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    table = Table(title=f"engines by {runtime}")
    for name in ("tower", "SM", "layers", "attention fused", "half", "activation MB", "MB"):
        table.add_column(name, justify="left" if name == "tower" else "right")
    for one in checked:
        said = one.as_json()
        fused = f"{said['fused_attention']} of {said['attention_layers']}"
        shown = ("layers", "half_share", "activation_mb", "mb")
        layers, half, activation, size = (str(said[name]) for name in shown)
        cells = (layers, fused, half, activation, size) if one.engine else ("refused",)
        table.add_row(one.tower, str(said["sm"]), *cells, style=None if one.engine else "red")
    console.print(table)
    for one in checked:
        if one.error:
            console.print(f"{one.tower}, {one.architecture}: {one.error}", markup=False)


def run_check(args: argparse.Namespace) -> dict[str, object]:
    """Both towers, every architecture."""
    from rich.console import Console
    from rich.progress import Progress

    runtime, architectures = find_runtime(["tensorrt_rtx"]), args.sm or ARCHITECTURES
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("engines", total=len(models.TOWERS) * len(architectures))
        checked = check_engines(args.release, runtime, architectures, lambda one: bar.advance(task))
    show(checked, f"{runtime.name} {runtime.version}")
    return {"engines": [one.as_json() for one in checked], "ok": all(c.engine for c in checked)}


def run_prepare(args: argparse.Namespace) -> dict[str, object]:
    """What to serve. Ctrl-C ends it at once: TensorRT swallows an exception in its callbacks."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return dict(find_ready(args.release, args.cache, Missing(args.missing)).as_json())


def find_ready(release: Path, cache: Path, missing: Missing) -> Ready:
    """For the GPU and the TensorRT of this machine; progress in plain lines, for a log."""
    runtime: Runtime | None = None
    try:
        runtime = find_runtime(SERVED)
    except EngineError as exc:
        print(exc, file=sys.stderr)
    gpu = gpu_at_hand()
    ready = prepare(release, cache, runtime, gpu, missing, tell)
    if ready.target is Target.CPU and runtime and gpu:
        build_beside(release, cache)
    print(f"serve {ready.release} on {ready.target} {ready.why}".rstrip(), file=sys.stderr)
    return ready


def add_missing_flag(command: argparse.ArgumentParser) -> None:
    """What to do without an engine; see Missing."""
    command.add_argument(
        "--missing",
        choices=list(Missing),
        default=Missing.WAIT,
        help="without an engine for this GPU: build it first; serve on the processor and build "
        "beside; do not start",
    )


def tell(phase: str, done: int, total: int) -> None:
    """A line at the start and at the end of a phase."""
    if done in (0, total):
        print(f"{phase}: {done} of {total}", file=sys.stderr)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.engines",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("check", run_check), ("prepare", run_prepare)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--release", type=Path, default=LATEST, help="default: latest")
        if name == "check":
            command.add_argument("--sm", action="append", help=f"default: {ARCHITECTURES}")
            continue
        command.add_argument("--cache", type=Path, default=ROOT / "build" / "engines")
        add_missing_flag(command)
    args = parser.parse_args()
    try:
        report = args.run(args)
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
    print(json.dumps(report))
    if report.get("ok") is False:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
