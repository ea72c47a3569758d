"""python -m towers.evaluate --data DIR [--data DIR …]: how well each system searches, by slice.

Tables on screen, a page of ranked photos under `--out`, and the figures as JSON in the last line:
{"<data folder>": {"<system>": {"<slice>": {"ndcg@10": x, "capped_recall@10": x, …}}}}.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from retrieval_contract.errors import SourceError
from towers.checkpoint import SHIPPED, file_hash, load_towers, training_of
from towers.command import answer
from towers.learning.baselines import BASELINES, baselines
from towers.learning.catalog import ProductData, Query, read_data
from towers.learning.metrics import (
    Figures,
    figures_of,
    mean_interval,
    means_of,
    ratio_interval,
)
from towers.learning.page import write_page
from towers.learning.split import sides_of
from towers.learning.systems import System, systems_of
from towers.learning.trained import new_rows
from towers.learning.views import VIEWS

HEADLINE, POOL = "ndcg@10", "pool_ndcg@10"
KNOWN_ITEM = "known_item_hit@10"
KNOWN_QUERIES, KNOWN_WORDS = 1000, 3
SAMPLES, SHOWN = 12, 8
OTHERS = ("bm25", "pretrained", *BASELINES)
NEEDED = "they need pictures, a column of colours, or queries by three attributes"
console = Console(stderr=True)

Found = dict[str, dict[str, Figures]]
"""System → slice → figures of every query."""


def known_items(data: ProductData, seed: int = 0) -> list[Query]:
    """Queries of three shuffled words of one title; every product of that title is right."""
    rng = random.Random(seed)
    by_title: dict[str, list[str]] = {}
    for product_id, title in zip(data.ids, data.titles, strict=True):
        by_title.setdefault(title, []).append(product_id)
    long = sorted(title for title in by_title if len(title.split()) >= KNOWN_WORDS)
    chosen = rng.sample(long, min(KNOWN_QUERIES, len(long)))
    return [
        Query(
            f"known {number}",
            " ".join(rng.sample(title.lower().split(), KNOWN_WORDS)),
            dict.fromkeys(by_title[title], 1),
        )
        for number, title in enumerate(chosen)
    ]


def evaluate(data: ProductData, systems: Sequence[System], views: Sequence[str]) -> Found:
    """Every figure of every system on every slice that this data has."""
    slices = {name: found for name in views if (found := VIEWS[name](data)) and found.queries}
    found: Found = {system.name: {} for system in systems}
    with Progress(console=console, transient=True) as bar:
        for system in systems:
            total = sum(len(view) for view in slices.values())
            task = bar.add_task(f"{data.name}, {system.name}", total=total)
            for name, view in slices.items():
                known = known_items(data) if name == "all" else []
                asked = [*view.queries, *known]
                scores = system.scores(
                    view, [q.text for q in asked], lambda rows, task=task: bar.advance(task, rows)
                )
                count = len(view.queries)
                figures = figures_of(view.queries, view.ids, scores[:count])
                if known:
                    hits = figures_of(known, view.ids, scores[count:])["capped_recall@10"]
                    figures[KNOWN_ITEM] = (hits > 0).astype(float)
                found[system.name][name] = figures
    return found


def say(data: ProductData, found: Found) -> None:
    """One table: the headline of every system and slice, and what the last one is to the others."""
    last = list(found)[-1]
    slices = list(found[last])
    table = Table(title=f"{data.name}: {HEADLINE}, 95 % interval; (÷) {last} to it, paired")
    table.add_column("system")
    for name in slices:
        table.add_column(f"{name}\n{len(found[last][name][HEADLINE])} queries", justify="right")
    for system, by_slice in found.items():
        cells = []
        for name in slices:
            cell = str(mean_interval(by_slice[name][HEADLINE]))
            if system != last:
                ratio = ratio_interval(found[last][name][HEADLINE], by_slice[name][HEADLINE])
                cell += f"\n÷ {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            cells.append(cell)
        table.add_row(system, *cells)
    console.print(table)


def as_json(found: Found) -> dict[str, Any]:
    """Means by system and slice, with the headline's interval; the last one ÷ each, and less each
    on the whole catalog and in the judged pool, paired."""
    report: dict[str, Any] = {}
    last = list(found)[-1]
    for system, by_slice in found.items():
        report[system] = {}
        for name, figures in by_slice.items():
            interval = mean_interval(figures[HEADLINE])
            report[system][name] = of_slice = {
                **means_of(figures),
                f"{HEADLINE}_interval": [round(interval.low, 4), round(interval.high, 4)],
                "queries": len(figures[HEADLINE]),
            }
            if system != last and figures[HEADLINE].any():
                ratio = ratio_interval(found[last][name][HEADLINE], figures[HEADLINE])
                of_slice[f"{last}_to_it"] = round(ratio.value, 4)
                of_slice[f"{last}_to_it_interval"] = [round(ratio.low, 4), round(ratio.high, 4)]
                for figure in {HEADLINE, POOL} & set(figures):
                    less = mean_interval(found[last][name][figure] - figures[figure])
                    said = [round(value, 4) for value in (less.value, less.low, less.high)]
                    of_slice[f"{last}_less_it_{figure}"] = said
    return report


def best_baseline(found: Found, ours: str) -> str:
    """Of the others, the one with the best headline on the whole catalog."""
    others = [name for name in found if name != ours]
    return max(others, key=lambda name: float(np.mean(found[name]["all"][HEADLINE])))


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m towers.evaluate", description=__doc__)
    top.add_argument("--data", type=Path, action="append", required=True, help="a data folder")
    top.add_argument("--checkpoint", default=str(SHIPPED), help="folder or hub name")
    top.add_argument(
        "--side",
        choices=["train", "dev", "test", "new", "all"],
        help="default: test for the folder that the checkpoint was trained on; for others new, all "
        "products whose title and picture it was not trained on",
    )
    top.add_argument("--slice", choices=list(VIEWS), action="append", help="default: every one")
    top.add_argument(
        "--beside", choices=OTHERS, action="append", help="what to compare with; default: all"
    )
    top.add_argument("--out", type=Path, default=Path("build/evaluation"))
    return top


def side_of(folder: Path, *checkpoints: str | Path) -> str:
    """test, where one of these, or what it started from, was trained on the folder; else new."""
    asked = file_hash(folder / "products.parquet")
    for checkpoint in checkpoints:
        trained = training_of(checkpoint)
        while trained:
            if trained["products_sha256"] == asked and trained["side"] == "train":
                return "test"
            trained = trained.get("start")
    return "new"


def part_of(data: ProductData, side: str, checkpoints: Sequence[str | Path]) -> ProductData:
    """The products on a side of the data; new is what none of the checkpoints was trained on.

    Nor are products that one of them was trained on ever of a held-out side, whatever the split
    says: what a checkpoint started from may have been trained on everything.
    """
    if side == "all":
        return data
    rows = [*range(len(data))] if side == "new" else sides_of(data)[side]
    if side == "train":
        return data.select(rows)
    new = {*new_rows(data, checkpoints)}
    return data.select([row for row in rows if row in new])


def asked_about(folder: Path, asked: str | None, checkpoints: Sequence[str | Path]) -> ProductData:
    """The products to find, and what is judged of them; says which they are."""
    data = read_data(folder)
    if not data.queries:
        raise SourceError(
            f"{folder}: expected queries.csv with judgements, found none; add it, or leave out "
            "this folder"
        )
    side = asked or side_of(folder, *checkpoints)
    part = part_of(data, side, checkpoints)
    console.print(f"{folder}: side {side}, {len(part)} of {len(data)} products", markup=False)
    if not part.queries:
        raise SourceError(
            f"{folder}: expected judged products on the side {side} that were not trained on, "
            "found none; --side all asks about those that were trained on, too"
        )
    return part


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate every folder; returns the report."""
    names = [*(args.beside or OTHERS), "make"]
    trained = set(names) & set(BASELINES)  # with the shipped checkpoint, on its products
    checkpoints = [args.checkpoint, *([SHIPPED] if trained else [])]
    asked = {folder: asked_about(folder, args.side, checkpoints) for folder in args.data}
    systems = [s for s in systems_of(load_towers(args.checkpoint), baselines()) if s.name in names]
    report = {}
    for folder, data in asked.items():
        if trained and side_of(folder, SHIPPED) == "new":
            said = f"{folder}: {', '.join(sorted(trained))} were not trained on this catalog"
            console.print(said, markup=False)
        views = args.slice or list(VIEWS)
        found = evaluate(data, systems, views)
        if left_out := [name for name in views if name not in found["make"]]:
            console.print(f"{folder}: no slices {', '.join(left_out)}: {NEEDED}", markup=False)
        say(data, found)
        report[str(folder)] = as_json(found)
        if any(data.images) and "all" in found["make"]:
            named = {system.name: system for system in systems}
            shown = [named[best_baseline(found, "make")], named["make"]]
            alike = [other for other in asked if other.name == folder.name]
            number = f"-{alike.index(folder) + 1}" if len(alike) > 1 else ""
            page = args.out / f"{data.name}{number}.html"
            write_page(data, shown, page, SAMPLES, SHOWN)
            console.print(f"page: {page}", markup=False)
    return report


def main() -> None:
    """Command line."""
    answer(run, parser())


if __name__ == "__main__":
    main()
