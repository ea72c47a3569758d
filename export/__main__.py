"""python -m export onnx|repository|configs: checkpoint → what servers load.

onnx        --checkpoint DIR --out DIR        both towers as ONNX, parity enforced
repository  --checkpoint DIR [--out DIR]      a whole release under build/releases/<id>
configs                                       remake the committed configs (reference sizes)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from export.config_from_contract import UNRELEASED
from export.publish import SOURCES, publish, write_configs, write_onnx
from retrieval_contract.errors import RetrievalError
from retrieval_contract.release import Release
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


def main() -> None:
    """Command line; the last line of output is JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, out in (("onnx", "build/onnx"), ("repository", "build/releases")):
        command = commands.add_parser(name)
        command.add_argument("--checkpoint", required=True, help="folder, or a hub name (CLIP)")
        command.add_argument("--out", type=Path, default=Path(out), help=f"default: {out}")
    commands.add_parser("configs")
    args = parser.parse_args()
    console = Console(stderr=True)
    try:
        print(json.dumps(run(args, console)))
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc


def run(args: argparse.Namespace, console: Console) -> dict[str, object]:
    """Do one command and say what came of it."""
    if args.command == "configs":
        write_configs(SOURCES, reference_release(), UNRELEASED)
        return {"configs": str(SOURCES)}
    towers = load_towers(args.checkpoint)
    release_id = towers.release().release_id
    if args.command == "onnx":
        graphs = write_onnx(towers, args.out, console)
        return {"release_id": release_id, "out": str(args.out), "graphs": graphs}
    home = publish(towers, args.out, console)
    return {"release_id": release_id, "release": str(home)}


if __name__ == "__main__":
    main()
