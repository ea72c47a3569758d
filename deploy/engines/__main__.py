"""python -m deploy.engines check: compile a release's FP16 graphs for GPUs that are not here.

Needs `tensorrt_rtx`, and no GPU. Ends with one line of JSON; exit code 1 when an engine cannot be
built, is not in half precision, or leaves an attention unfused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from deploy.engines.builder import find_runtime
from deploy.engines.check import ARCHITECTURES, Checked, check_engines
from deploy.local import LATEST
from retrieval_contract import models
from retrieval_contract.errors import RetrievalError

console = Console(stderr=True)


def show(checked: list[Checked], runtime: str) -> None:
    """One row an engine."""
    table = Table(title=f"engines by {runtime}")
    for name in ("tower", "SM", "layers", "attention fused", "half", "activation MB", "MB"):
        table.add_column(name, justify="left" if name == "tower" else "right")
    for one in checked:
        said = one.as_json()
        fused = f"{said['fused_attention']} of {said['attention_layers']}"
        shown = ("sm", "layers", "half_share", "activation_mb", "mb")
        sm, layers, half, activation, size = (str(said[name]) for name in shown)
        table.add_row(one.tower, sm, layers, fused, half, activation, size)
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m deploy.engines", description=__doc__)
    check = parser.add_subparsers(dest="command", required=True).add_parser("check")
    check.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    check.add_argument("--sm", action="append", help=f"default: {' '.join(ARCHITECTURES)}")
    args = parser.parse_args()
    architectures = args.sm or ARCHITECTURES
    try:
        runtime = find_runtime(["tensorrt_rtx"])
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("engines", total=len(models.TOWERS) * len(architectures))
            checked = check_engines(
                args.release, runtime, architectures, lambda one: bar.advance(task)
            )
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
    show(checked, f"{runtime.name} {runtime.version}")
    print(json.dumps({"engines": [one.as_json() for one in checked], "ok": True}))


if __name__ == "__main__":
    main()
