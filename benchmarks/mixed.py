"""python -m benchmarks.mixed --data DIR: how much a text counts beside a picture.

"This one, but red": the picture of one product and a value of one attribute (`--asked`) that it
does not have. Right is what has that value and shares the picture's other attributes (`--kept`).
Every weight of the text is judged by nDCG@10, over products that the shipped checkpoint was not
trained on. Half of the queries choose a weight; the other half compare it with the default of
`retrieval_client.query.Query` (paired randomisation, two-sided). The last line is JSON.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.hybrid import TOP, chance, vectors_of
from benchmarks.program import print_report
from retrieval_client.query import TEXT_WEIGHT
from retrieval_contract.errors import SourceError
from towers.checkpoint import SHIPPED, load_make
from towers.evaluate import part_of, side_of
from towers.learning.catalog import ProductData, Query, read_data
from towers.learning.encoders import Encoders
from towers.learning.metrics import ratio_interval
from towers.learning.split import fraction_of

WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))
Values = NDArray[np.float64]
console = Console(stderr=True)


@dataclass(frozen=True)
class Mixed:
    """The picture of the product in `row`, the text beside it, and the rows that are right."""

    row: int
    text: str
    right: frozenset[int]


def asked_of(data: ProductData, asked: str, kept: Sequence[str], count: int) -> list[Mixed]:
    """At most so many, chosen by hashes of ids: the same on every machine."""
    for name in (asked, *kept):
        if name not in data.attributes:
            raise SourceError(
                f"{data.name}: expected the attribute {name}, got {', '.join(data.attributes)}"
            )
    alike: dict[tuple[str, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    keys = list(zip(*(data.attributes[name] for name in kept), strict=True))
    for row, (key, value) in enumerate(zip(keys, data.attributes[asked], strict=True)):
        alike[key][value].append(row)
    found = []
    for row in sorted(range(len(data)), key=lambda row: fraction_of(data.ids[row])):
        others = sorted({*alike[keys[row]]} - {"", data.attributes[asked][row]})
        if data.images[row] and others and len(found) < count:
            value = others[int(fraction_of(f"{data.ids[row]} {asked}") * len(others))]
            found.append(Mixed(row, value.lower(), frozenset(alike[keys[row]][value])))
    if len(found) < 2:
        raise SourceError(f"{data.name}: expected products with pictures that differ by {asked}")
    return found


def ndcg(scores: Values, query: Mixed) -> float:
    """nDCG@10 of a ranking without the product itself; `scores` (products,)."""
    ranked = [row for row in np.argsort(-scores)[: TOP + 1].tolist() if row != query.row][:TOP]
    gains = 1 / np.log2(np.arange(TOP) + 2)
    got = sum(gain for gain, row in zip(gains, ranked, strict=False) if row in query.right)
    return float(got / gains[: len(query.right)].sum())


def judged(
    queries: Sequence[Mixed], texts: Values, pictures: Values, products: Values
) -> dict[float, Values]:
    """Weight → nDCG@10 of each query; all vectors of norm 1, a row a query or product."""
    by_text, by_picture = texts @ products.T, pictures @ products.T
    return {
        weight: np.array(
            [
                ndcg(weight * t + (1 - weight) * p, query)
                for query, t, p in zip(queries, by_text, by_picture, strict=True)
            ]
        )
        for weight in WEIGHTS
    }


def report_of(by_weight: dict[float, Values]) -> dict[str, Any]:
    """What every other query chooses, beside the default, on the rest."""
    chosen = max(WEIGHTS, key=lambda weight: float(by_weight[weight][::2].mean()))
    ours, default = by_weight[chosen][1::2], by_weight[TEXT_WEIGHT][1::2]
    ratio = ratio_interval(ours, default)
    return {
        "ndcg@10": {weight: round(float(each.mean()), 4) for weight, each in by_weight.items()},
        "chosen": chosen,
        "chosen by default": [round(x, 4) for x in (ratio.value, ratio.low, ratio.high)],
        "p": chance(ours, default),
    }


def show(name: str, report: dict[str, Any]) -> None:
    """As a table, a line a weight."""
    table = Table(title=f"{name}: {report['queries']} queries", title_justify="left")
    for column in ("weight of the text", "nDCG@10"):
        table.add_column(column, justify="right")
    for weight, value in report["ndcg@10"].items():
        table.add_row(f"{weight:.2f}", f"{value:.3f}")
    console.print(table)
    value, low, high = report["chosen by default"]
    console.print(
        f"one half chooses {report['chosen']}; on the other that is {value:.3f} [{low:.3f}, "
        f"{high:.3f}] of the default {TEXT_WEIGHT}, p {report['p']:.4f}",
        highlight=False,
    )


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.mixed", description=__doc__)
    top.add_argument("--data", type=Path, required=True, help="a folder with attributes, pictures")
    top.add_argument("--asked", default="baseColour", help="the attribute that the text names")
    top.add_argument(
        "--kept", nargs="+", default=["articleType", "gender"], help="those of the picture"
    )
    top.add_argument("--products", type=int, help="so many of the folder; default: all")
    top.add_argument("--queries", type=int, default=1000, help="at most")
    top.add_argument("--features", type=Path, default=Path("build/mixed"), help="kept there")
    return top


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Encode, ask, judge; returns the report."""
    data = part_of(read_data(args.data), side_of(args.data, SHIPPED), [SHIPPED])
    rows = sorted(range(len(data)), key=lambda row: fraction_of(data.ids[row]))
    data = data.select(sorted(rows[: args.products]))
    queries = asked_of(data, args.asked, args.kept, args.queries)
    texts = [Query(str(at), query.text, {}) for at, query in enumerate(queries)]
    encoders = Encoders(load_make(SHIPPED), args.features)
    with Progress(console=console) as bar:

        def progress(what: str, rows: int) -> Callable[[int], None]:
            task = bar.add_task(what, total=rows)
            return lambda done: bar.advance(task, done)

        of_text, products = vectors_of(replace(data, queries=texts), encoders, progress)
        untitled = replace(data, titles=[""] * len(data), queries=texts)
        _, pictures = vectors_of(untitled, encoders, progress)
    shown = pictures[[query.row for query in queries]]
    by_weight = judged(queries, *(each.astype(np.float64) for each in (of_text, shown, products)))
    report = {"queries": len(queries), "products": len(data), **report_of(by_weight)}
    show(data.name, report)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    print_report(run, parser().parse_args(argv))


if __name__ == "__main__":
    main()
