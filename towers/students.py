"""python -m towers.students --data DIR: how much search a smaller query encoder costs.

Teaches a query encoder of each number of layers by the same trained heads, and compares them with
the whole one: quality on the held-out side and on other catalogs, and time on one thread, in
alternating rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console

from retrieval_contract.preprocess import TextPreprocessor
from towers.command import answer, at_least
from towers.evaluate import HEADLINE, KNOWN_ITEM, asked_about, evaluate
from towers.learning.catalog import read_data
from towers.learning.encoders import Encoders
from towers.learning.student import Lesson
from towers.learning.systems import TrainedHeads
from towers.learning.training import Recipe
from towers.make import Make
from towers.train import (
    Bars,
    add_material_flags,
    prepare,
    start_towers,
    teach,
    train_heads,
    with_heads,
)

ROUNDS, CALLS, BATCH = 15, 5, 64
SLICES = ("all", "unseen_combination", "colour_not_in_title")
console = Console(stderr=True)


@torch.inference_mode()
def times_of(models: dict[int, Make], texts: list[str]) -> dict[int, float]:
    """Layers → median seconds of encoding all texts in one batch, on one thread."""
    torch.set_num_threads(1)
    side = next(iter(models.values())).spec.query
    batch = TextPreprocessor(side.tokenizer_json, side.spec, required=True)(
        [text.encode() for text in texts]
    )
    ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
    seen: dict[int, list[float]] = {layers: [] for layers in models}
    for _ in range(ROUNDS):
        for layers, towers in models.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                towers.encode_query(ids, mask)
            seen[layers].append(time.perf_counter() - start)
    return {layers: statistics.median(values) for layers, values in seen.items()}


def run(args: argparse.Namespace) -> dict[str, object]:
    """Teach, compare, write."""
    bars = Bars()
    with bars.progress:
        material = prepare(args, start_towers(args.start), bars)
        recipe = Recipe()
        told = bars.steps("heads", recipe.epochs)
        heads, scale = train_heads(recipe, material, told, args.work / "runs")
        whole = with_heads(material.towers, heads, recipe)
        models = {len(whole.query_text.bert.encoder.layer): whole}
        for layers in sorted(args.layers or (2, 3), reverse=True):
            lesson = Lesson(layers, args.rounds, scale=scale)
            models[layers] = teach(whole, material, lesson, bars, args.work / "runs")
    data = asked_about(args.data, args.side, [args.start] if args.start else [])
    products = Encoders(whole, args.work / "features")
    systems = []
    for layers, towers in models.items():
        asked = Encoders(towers).queries
        systems.append(TrainedHeads(str(layers), towers.heads, products, asked))
    found = evaluate(data, systems, list(SLICES))
    elsewhere = {f.name: evaluate(read_data(f), systems, ["all"]) for f in args.also}
    texts = [query.text for query in data.queries][:BATCH]
    alone, together = times_of(models, texts[:1]), times_of(models, texts)
    report: dict[str, dict[str, float]] = {}
    most = max(models)
    for layers in models:
        of = found[str(layers)]
        report[str(layers)] = {part: float(of[part][HEADLINE].mean()) for part in SLICES}
        report[str(layers)][KNOWN_ITEM] = float(of["all"][KNOWN_ITEM].mean())
        for other, there in elsewhere.items():
            report[str(layers)][other] = float(there[str(layers)]["all"][HEADLINE].mean())
        report[str(layers)]["speed, 1 query"] = alone[most] / alone[layers]
        report[str(layers)][f"speed, {len(texts)} queries"] = together[most] / together[layers]
    columns = list(report[str(most)])
    lines = ["| layers | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in report.items():
        cells = [f"{values[column]:.3f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(table, "utf-8")
    console.print(table, markup=False, soft_wrap=True)
    return {name: {k: round(v, 4) for k, v in values.items()} for name, values in report.items()}


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m towers.students", description=__doc__)
    add_material_flags(top)
    top.add_argument("--layers", type=at_least(1), action="append", help="default: 2 and 3")
    top.add_argument("--rounds", type=at_least(1), default=Lesson.rounds)
    top.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="data folders that are searched as well, whole",
    )
    top.add_argument("--side", choices=["dev", "test"], default="test")
    top.add_argument("--out", type=Path, default=Path("build/students.md"))
    return top


def main() -> None:
    """Command line."""
    answer(run, parser())


if __name__ == "__main__":
    main()
