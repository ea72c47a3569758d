"""python -m towers.ablation --data DIR: what each part of MAKE earns, over seeds.

Every variant is trained on the same features, draws and budget; figures are paired by seed and
query. Finished runs are kept under `--work`, so that a run that was cut goes on. Prints a table,
writes it under `--out`, and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from retrieval_contract.errors import RetrievalError
from towers.evaluate import HEADLINE, KNOWN_ITEM, evaluate
from towers.heads import Heads
from towers.learning.baselines import BASELINES, save_heads
from towers.learning.catalog import read_data
from towers.learning.encoders import Encoders
from towers.learning.metrics import ratio_interval
from towers.learning.split import sides_of
from towers.learning.systems import TrainedHeads
from towers.learning.training import Recipe
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
VARIANTS = {
    "make": FULL,
    "without Modal Adaptation": replace(FULL, fusion="mean"),
    "without Keyword Enhancement": PLAIN,
    "without both": replace(PLAIN, fusion="mean"),
    "title-word keywords": replace(PLAIN, keywords="titles"),
    "title": replace(FULL, fusion="title"),
    "image": replace(FULL, fusion="image"),
    "mean": replace(FULL, fusion="mean"),
    "concat": replace(FULL, fusion="concat"),
}
TERMS = {
    "masks without prototypes": replace(FULL, prototypes=0.0),
    "prototypes without masks": replace(FULL, keywords="none"),
    "heads of twice the width": replace(FULL, head_width=768),
    "dropout": replace(FULL, dropout=0.2),
    "dropout, mean": replace(FULL, fusion="mean", dropout=0.2),
    "g0": replace(FULL, general=0.0, dropout=0.2),
    "g0 mean": replace(FULL, general=0.0, dropout=0.2, fusion="mean"),
    "w5": replace(FULL, head_width=512, dropout=0.2, general=0.3),
    "w5 mean": replace(FULL, head_width=512, dropout=0.2, general=0.3, fusion="mean"),
    "no general texts": replace(FULL, general=0.0),
    "no colour words cut": replace(FULL, colour_cut=0.0),
    "half of colour words cut": replace(FULL, colour_cut=0.5),
    "nothing spoiled": replace(FULL, colour_cut=0.0, first_word=0.0, blank=0.0),
    "no modality dropped": replace(FULL, dropped=0.0),
    "hard negatives": replace(FULL, neighbours=64),
    "hard negatives, no keywords": replace(PLAIN, neighbours=64),
}

COMPARED = (
    ("Modal Adaptation ÷ mean fusion", "make", "without Modal Adaptation"),
    ("the same, no keywords in either", "without Keyword Enhancement", "without both"),
    ("Keyword Enhancement, attributes", "make", "without Keyword Enhancement"),
    ("Keyword Enhancement, title words", "title-word keywords", "without Keyword Enhancement"),
    ("MAKE ÷ title alone", "make", "title"),
    ("MAKE ÷ image alone", "make", "image"),
    ("MAKE ÷ concatenation", "make", "concat"),
)
PerQuery = NDArray[np.float64]
"""(seeds, queries)"""


def run_of(work: Path, recipe: Recipe) -> Path:
    """Where the heads of this recipe are kept."""
    usual = asdict(Recipe())
    unusual = {name: value for name, value in asdict(recipe).items() if value != usual[name]}
    digest = hashlib.sha256(json.dumps(unusual, sort_keys=True).encode()).hexdigest()
    return work / "heads" / f"{digest[:24]}.pt"


_material: list[Material] = []


def _start(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    _material.append(prepare(args, Bars()))


def _train(recipe: Recipe, path: Path) -> None:
    heads, _ = train_heads(recipe, _material[0], lambda epoch, loss: None)
    unfinished = path.with_suffix(".unfinished")
    torch.save(heads.state_dict(), unfinished)
    unfinished.replace(path)


def train_all(recipes: Iterable[Recipe], args: argparse.Namespace) -> None:
    """Those that are not there yet, `args.jobs` at a time with a thread each."""
    (args.work / "heads").mkdir(parents=True, exist_ok=True)
    todo = [r for r in dict.fromkeys(recipes) if not run_of(args.work, r).is_file()]
    if not todo:
        return
    with Progress(console=console) as bar:
        task = bar.add_task("runs", total=len(todo))
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), _start, (args,)) as pool:
            for done in as_completed(pool.submit(_train, r, run_of(args.work, r)) for r in todo):
                done.result()
                bar.advance(task)


def figures(
    names: Iterable[str], args: argparse.Namespace
) -> dict[str, dict[str, dict[str, PerQuery]]]:
    """Variant → slice → figure → (seeds, queries)."""
    data = read_data(args.data)
    data = data.select(sides_of(data)[args.side])
    encoders = Encoders(start_towers(args.start), args.work / "features")
    variants = VARIANTS | TERMS
    systems = []
    for name in names:
        for seed in range(args.seeds):
            recipe = replace(variants[name], seed=seed)
            heads = load_run(run_of(args.work, recipe), recipe, encoders)
            systems.append(TrainedHeads(f"{name}|{seed}", heads, encoders, encoders.queries))
    found = evaluate(data, systems, args.slice or list(VIEWS))
    slices = next(iter(found.values()))
    return {
        name: {
            part: {
                figure: np.stack([found[f"{name}|{s}"][part][figure] for s in range(args.seeds)])
                for figure in of_figures
            }
            for part, of_figures in slices.items()
        }
        for name in names
    }


def load_run(path: Path, recipe: Recipe, encoders: Encoders) -> Heads:
    """The heads that an earlier run of this recipe kept."""
    of = encoders.towers.heads
    width, features = of.title_head.width, of.image_head.features
    heads = Heads(recipe.fusion, width, features, recipe.head_width, recipe.vector_dim)
    heads.load_state_dict(torch.load(path, weights_only=True))
    return heads.eval()


def table_of(found: dict[str, dict[str, dict[str, PerQuery]]]) -> str:
    """Markdown: every variant's headline by slice, then what was compared, with intervals."""
    slices = list(next(iter(found.values())))
    lines = ["| nDCG@10 | " + " | ".join(slices) + " | known item hit@10 |"]
    lines.append("|---" * (len(slices) + 2) + "|")
    for name, by_slice in found.items():
        cells = [_spread(by_slice[part][HEADLINE]) for part in slices]
        known = _spread(by_slice["all"][KNOWN_ITEM]) if KNOWN_ITEM in by_slice["all"] else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {known} |")
    lines += ["", "| change of nDCG@10 | " + " | ".join(slices) + " |"]
    lines.append("|---" * (len(slices) + 1) + "|")
    for what, ours, theirs in COMPARED:
        if ours in found and theirs in found:
            cells = [str_of(found, ours, theirs, part) for part in slices]
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    for name in TERMS:
        if name in found and "make" in found:
            cells = [str_of(found, name, "make", part) for part in slices]
            lines.append(f"| {name} ÷ MAKE | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def str_of(
    found: dict[str, dict[str, dict[str, PerQuery]]], ours: str, theirs: str, part: str
) -> str:
    """Ratio of means less one, in percent, with its interval over queries (seeds averaged)."""
    ratio = ratio_interval(found[ours][part][HEADLINE], found[theirs][part][HEADLINE])
    percent = [100 * (value - 1) for value in (ratio.value, ratio.low, ratio.high)]
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*percent)


def _spread(values: PerQuery) -> str:
    """Mean, and the standard deviation over seeds."""
    means = values.mean(1)
    spread = f" ± {means.std(ddof=1):.3f}" if len(means) > 1 else ""
    return f"{means.mean():.3f}{spread}"


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m towers.ablation", description=__doc__)
    add_material_flags(top)
    top.add_argument("--seeds", type=int, default=3)
    top.add_argument("--side", choices=["dev", "test"], default="test")
    top.add_argument("--variant", action="append", choices=[*VARIANTS, *TERMS])
    top.add_argument("--slice", choices=list(VIEWS), action="append", help="default: every one")
    top.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    top.add_argument("--out", type=Path, default=Path("build/ablation.md"))
    top.add_argument("--baselines", type=Path, help="a folder to write the baselines' heads to")
    return top


def run(args: argparse.Namespace) -> dict[str, object]:
    """Train what is missing, compare, write."""
    names = args.variant or [*VARIANTS, *TERMS]
    variants = VARIANTS | TERMS
    recipes = [replace(variants[name], seed=seed) for name in names for seed in range(args.seeds)]
    train_all(recipes, args)
    found = figures(names, args)
    table = table_of(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(table, "utf-8")
    console.print(table, markup=False, soft_wrap=True)
    if args.baselines:
        encoders = Encoders(start_towers(args.start))
        for name in BASELINES:
            heads = load_run(run_of(args.work, VARIANTS[name]), VARIANTS[name], encoders)
            save_heads(rounded(heads), args.baselines, name)
    return {
        name: {
            part: {figure: round(float(v.mean()), 4) for figure, v in of_figures.items()}
            for part, of_figures in by_slice.items()
        }
        for name, by_slice in found.items()
    }


def main() -> None:
    """Command line."""
    args = parser().parse_args()
    try:
        print(json.dumps(run(args)))
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc


if __name__ == "__main__":
    main()
