"""python -m towers.ablation --data DIR: what each part of MAKE earns, over seeds.

Every variant is trained on the same features, draws and budget; figures are paired by seed and
query. Finished runs are kept under `--work`, so that a run that was cut goes on. Prints a table,
writes it under `--out`, and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from towers.command import answer, at_least
from towers.evaluate import HEADLINE, KNOWN_ITEM, asked_about, evaluate
from towers.heads import Heads
from towers.learning.baselines import BASELINES, save_heads
from towers.learning.encoders import Encoders
from towers.learning.examples import Examples
from towers.learning.metrics import ratio_interval
from towers.learning.systems import BM25, System, TrainedHeads
from towers.learning.training import Recipe, run_name
from towers.learning.views import VIEWS
from towers.train import (
    Bars,
    Material,
    add_material_flags,
    prepare,
    rounded,
    start_towers,
    train_heads,
)

console = Console(stderr=True)

FULL = Recipe()
PLAIN = replace(FULL, keywords="none", prototypes=0.0)
CLEAN = replace(FULL, colour_cut=0.0, first_word=0.0, blank=0.0)
VARIANTS = {
    "make": FULL,
    "mean": replace(FULL, fusion="mean"),
    "without Keyword Enhancement": PLAIN,
    "without both": replace(PLAIN, fusion="mean"),
    "title-word keywords": replace(PLAIN, keywords="titles"),
    # What sees one modality alone gains nothing from learning without it, or with it spoiled
    # (docs/ablation.md).
    "title": replace(CLEAN, fusion="title", dropped=0.0),
    "image": replace(CLEAN, fusion="image", dropped=0.0),
    "concat": replace(FULL, fusion="concat"),
}
TERMS = {
    "masks without prototypes": replace(FULL, prototypes=0.0),
    "prototypes without masks": replace(FULL, keywords="none"),
    "masks that take out altogether": replace(FULL, held=0.0),
    "no general texts": replace(FULL, general=0.0),
    "no dropout": replace(FULL, dropout=0.0),
    "no missing modality": replace(FULL, dropped=0.0),
    "no colour words cut": replace(FULL, colour_cut=0.0),
    "nothing spoiled": CLEAN,
    "hard negatives": replace(FULL, neighbours=64),
}
COMPARED = (
    ("Modal Adaptation ÷ mean fusion", "make", "mean"),
    ("the same, no keywords in either", "without Keyword Enhancement", "without both"),
    ("Keyword Enhancement, attributes", "make", "without Keyword Enhancement"),
    ("Keyword Enhancement, title words", "title-word keywords", "without Keyword Enhancement"),
    ("MAKE ÷ BM25", "make", BM25.name),
    ("MAKE ÷ title alone", "make", "title"),
    ("MAKE ÷ image alone", "make", "image"),
    ("MAKE ÷ concatenation", "make", "concat"),
)
RECIPES = VARIANTS | TERMS
BLIND = 0.01
"""A system that finds less sees nothing of a slice, and nothing can be said as a ratio to it."""
Figured = dict[str, dict[str, dict[str, NDArray[np.float64]]]]
"""Variant → slice → figure → (seeds, queries)."""


_material: list[Material] = []


def _start(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    _material.append(prepare(args, start_towers(args.start), Bars()))


def _train(recipe: Recipe, folder: Path) -> None:
    train_heads(recipe, _material[0], lambda epoch, loss: None, folder)


def setting(text: str) -> tuple[str, float]:
    """`FIELD=NUMBER` of a Recipe; ArgumentTypeError names the fields that are numbers."""
    field, _, value = text.partition("=")
    numbers = {name: type(v) for name, v in asdict(FULL).items() if isinstance(v, int | float)}
    del numbers["seed"]
    try:
        return field, numbers[field](value)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"expected FIELD=NUMBER with one of {', '.join(numbers)}, got {text!r}"
        ) from None


def recipe_of(name: str, args: argparse.Namespace, seed: int = 0) -> Recipe:
    """A variant's recipe, with what `--set` changes in every one of them."""
    return replace(RECIPES[name], **dict(args.set), seed=seed)


def train_all(recipes: Iterable[Recipe], args: argparse.Namespace, examples: Examples) -> None:
    """Those that are not finished, `args.jobs` at a time with a thread each."""
    folder = args.work / "runs"
    todo = [
        r for r in dict.fromkeys(recipes) if finished(folder / run_name(r, examples), r) is None
    ]
    if not todo:
        return
    with Progress(console=console) as bar:
        task = bar.add_task("runs", total=len(todo))
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), _start, (args,)) as pool:
            for done in as_completed(pool.submit(_train, recipe, folder) for recipe in todo):
                done.result()
                bar.advance(task)


def finished(path: Path, recipe: Recipe) -> dict[str, Tensor] | None:
    """The weights of a run that came to its end."""
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state["heads"] if state["epoch"] == recipe.epochs else None


def heads_of(recipe: Recipe, args: argparse.Namespace, material: Material) -> Heads:
    """The heads that a finished run of this recipe kept."""
    of = material.towers.heads
    width, features = of.title_head.width, of.image_head.features
    heads = Heads(recipe.fusion, width, features, recipe.head_width, recipe.vector_dim)
    weights = finished(args.work / "runs" / run_name(recipe, material.examples), recipe)
    assert weights is not None
    heads.load_state_dict(weights)
    return heads.eval()


def figures(names: Sequence[str], args: argparse.Namespace, material: Material) -> Figured:
    """What each variant's runs find on the side that they are compared on."""
    data = asked_about(args.data, args.side, [args.start] if args.start else [])
    encoders = Encoders(material.towers, args.work / "features")
    systems: list[System] = []
    runs: dict[str, list[str]] = {}  # one name a seed
    for name in names:
        if name not in RECIPES:
            systems.append(BM25())
            runs[name] = [name] * args.seeds
            continue
        runs[name] = [f"{name}|{seed}" for seed in range(args.seeds)]
        for seed, of_seed in enumerate(runs[name]):
            heads = heads_of(recipe_of(name, args, seed), args, material)
            systems.append(TrainedHeads(of_seed, heads, encoders, encoders.queries))
    found = evaluate(data, systems, args.slice or list(VIEWS))
    return {
        name: {
            part: {
                figure: np.stack([found[of_seed][part][figure] for of_seed in runs[name]])
                for figure in of_figures
            }
            for part, of_figures in next(iter(found.values())).items()
        }
        for name in names
    }


def table_of(found: Figured) -> str:
    """Markdown: every variant's headline by slice, then what was compared, with intervals."""
    slices = list(next(iter(found.values())))
    lines = ["| nDCG@10 | " + " | ".join(slices) + " | known item hit@10 |"]
    lines.append("|---" * (len(slices) + 2) + "|")
    for name, by_slice in found.items():
        cells = [_spread(by_slice[part][HEADLINE]) for part in slices]
        all_found = by_slice.get("all", {})
        known = _spread(all_found[KNOWN_ITEM]) if KNOWN_ITEM in all_found else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {known} |")
    lines += ["", "| change of nDCG@10 | " + " | ".join(slices) + " |"]
    lines.append("|---" * (len(slices) + 1) + "|")
    for what, ours, theirs in COMPARED:
        if ours in found and theirs in found:
            cells = [change_of(found, ours, theirs, part) for part in slices]
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    for name in TERMS:
        if name in found and "make" in found:
            cells = [change_of(found, name, "make", part) for part in slices]
            lines.append(f"| {name} ÷ MAKE | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def change_of(found: Figured, ours: str, theirs: str, part: str) -> str:
    """Ratio of means less one, in percent, with its interval over seeds and queries."""
    if found[theirs][part][HEADLINE].mean() < BLIND:
        return "(blind there)"
    ratio = ratio_interval(found[ours][part][HEADLINE], found[theirs][part][HEADLINE])
    percent = [100 * (value - 1) for value in (ratio.value, ratio.low, ratio.high)]
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*percent)


def _spread(values: NDArray[np.float64]) -> str:
    """Mean, and the standard deviation over seeds."""
    means = values.mean(1)
    spread = f" ± {means.std(ddof=1):.3f}" if len(means) > 1 else ""
    return f"{means.mean():.3f}{spread}"


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m towers.ablation", description=__doc__)
    add_material_flags(top)
    top.add_argument("--seeds", type=at_least(1), default=3)
    top.add_argument("--side", choices=["dev", "test"], default="test")
    top.add_argument("--variant", action="append", choices=[*RECIPES, BM25.name])
    top.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="FIELD=NUMBER",
        help="another value of the recipe for all variants, as blank=0: try on --side dev",
    )
    top.add_argument("--slice", choices=list(VIEWS), action="append", help="default: every one")
    top.add_argument("--jobs", type=at_least(1), default=os.cpu_count() or 1, help="runs at a time")
    top.add_argument("--out", type=Path, default=Path("build/ablation.md"))
    top.add_argument("--baselines", type=Path, help="a folder to write the baselines' heads to")
    return top


def run(args: argparse.Namespace) -> dict[str, object]:
    """Train what is missing, compare, write."""
    names = args.variant or [*RECIPES, BM25.name]
    trained = [name for name in names if name in RECIPES]
    bars = Bars()
    with bars.progress:
        material = prepare(args, start_towers(args.start), bars)
    recipes = [recipe_of(name, args, seed) for name in trained for seed in range(args.seeds)]
    train_all(recipes, args, material.examples)
    found = figures(names, args, material)
    table = table_of(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(table, "utf-8")
    console.print(table, markup=False, soft_wrap=True)
    if args.baselines:
        for name in BASELINES:
            save_heads(
                rounded(heads_of(recipe_of(name, args), args, material)), args.baselines, name
            )
    return {
        name: {
            part: {figure: round(float(v.mean()), 4) for figure, v in of_figures.items()}
            for part, of_figures in by_slice.items()
        }
        for name, by_slice in found.items()
    }


def main() -> None:
    """Command line."""
    answer(run, parser())


if __name__ == "__main__":
    main()
