"""python -m export onnx|repository|parity|culprits|configs: checkpoint → what servers load.

onnx        --checkpoint DIR [--out DIR]      both towers as ONNX, FP32 and FP16, parity enforced
repository  --checkpoint DIR [--out DIR]      a whole release under build/releases/<id>
parity      --checkpoint DIR --data DIR       from torch to what is served, down to recall
culprits    --checkpoint DIR                  nodes that break a tower in half precision
configs                                       remake the committed configs (reference sizes)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from deploy.engines.folders import writable
from export.config_from_contract import UNRELEASED
from export.culprits import read_islands, write_culprits
from export.judges import by_parity, by_recall
from export.publish import SOURCES, publish, release_of, write_configs, write_onnx
from export.rungs import Asked, climb_all
from retrieval_contract.errors import RetrievalError
from retrieval_contract.release import Precision, Release
from towers.checkpoint import load_towers
from towers.make import MakeConfig, spec_from_config


def reference_release() -> Release:
    """The default MAKE's sizes without weights: what the committed configs show."""
    spec = spec_from_config(MakeConfig(), vocabulary=30522, tokenizer_json="")
    return Release(
        spec.family,
        spec.vector_dim,
        spec.vocabulary,
        spec.query.spec,
        spec.title.spec,
        spec.image,
        hashes={},
    )


def at_least_one(text: str) -> int:
    """A count, as a flag gives it."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(
        prog="python -m export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name, out in (
        ("onnx", "build/onnx"),
        ("repository", "build/releases"),
        ("parity", "build/parity"),
        ("culprits", "build/culprits"),
    ):
        command = commands.add_parser(name)
        command.add_argument("--checkpoint", required=True, help="folder, or a hub name (CLIP)")
        command.add_argument("--out", type=Path, default=Path(out), help=f"default: {out}")
        if name != "culprits":
            command.add_argument(
                "--islands", type=Path, help="more nodes to leave in FP32: a file of `culprits`"
            )
        if name in ("onnx", "repository"):
            command.add_argument(
                "--precision",
                choices=[*map(str, Precision)],
                default=str(Precision.FP32),
                help="on a processor; bf16: by OpenVINO, not for GPUs; default: fp32",
            )
        if name in ("parity", "culprits"):
            most = 1000 if name == "parity" else 64
            help_text = f"of the data; default: {most}"
            command.add_argument("--products", type=at_least_one, default=most, help=help_text)
        if name == "parity":
            command.add_argument("--data", type=Path, required=True, help="a data folder")
            command.add_argument(
                "--served",
                default=os.environ.get("RETRIEVAL_TRITON"),
                help="a server of this checkpoint, as the last rung; default: RETRIEVAL_TRITON",
            )
        if name == "culprits":
            command.add_argument(
                "--data", type=Path, help="a judged folder: by Recall@10, and not by 1 − cosine"
            )
            command.add_argument(
                "--bound", type=float, help="default: 5e-4 of 1 − cosine, or 5e-3 of Recall@10"
            )
            command.add_argument(
                "--rule", action="store_true", help="begin with the islands that export takes"
            )
    commands.add_parser("configs")
    return top


def main() -> None:
    """Command line; the last line of output is JSON."""
    args = parser().parse_args()
    try:
        report = run(args, Console(stderr=True))
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
    print(json.dumps(report))
    if report.get("ok") is False:
        raise SystemExit(1)


def run(args: argparse.Namespace, console: Console) -> dict[str, object]:
    """Do one command and say what came of it."""
    if args.command == "configs":
        write_configs(SOURCES, reference_release(), UNRELEASED)
        return {"configs": str(SOURCES)}
    writable(args.out, "--out")
    islands = read_islands(args.islands) if getattr(args, "islands", None) else {}
    towers = load_towers(args.checkpoint)
    if args.command == "parity":
        asked = Asked(args.checkpoint, args.data, args.products, args.served, islands)
        return climb_all(towers, asked, args.out, console)
    if args.command == "culprits":
        judging = by_parity(towers)
        if args.data:
            judging = by_recall(towers, Asked(args.checkpoint, args.data, args.products, None))
        if args.bound is not None:
            judging = replace(judging, bound=args.bound)
        return write_culprits(towers, judging, args.rule, args.out, console)
    release_id = release_of(towers, args.precision, islands).release_id
    if args.command == "onnx":
        graphs = write_onnx(towers, args.out, console, islands, args.precision)
        return {"release_id": release_id, "out": str(args.out), "graphs": graphs}
    command = ["python", "-m", "export", *sys.argv[1:]]
    home = publish(towers, args.out, console, islands, args.precision, command)
    return {"release_id": release_id, "release": str(home)}


if __name__ == "__main__":
    main()
