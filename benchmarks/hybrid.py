"""python -m benchmarks.hybrid --data DIR [--data DIR …]: what the words of titles add to vectors.

The products of each folder go into a Milvus Lite of their own, with the vectors of the shipped
checkpoint; both routes are asked for every judged query, and each way of fusing them is judged by
nDCG@10. A default must serve catalogs that nobody has judged: so each folder is judged by what the
*other* folders would choose, and the difference to the vectors alone is tested over its queries
(paired randomisation, two-sided). What all folders together choose is the default of
`retrieval_client.hybrid.Hybrid`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.program import print_report
from retrieval_client import Catalog, ProductRow, Settings
from retrieval_client.collection import Ask, Collection
from retrieval_client.hybrid import Fusion, Hybrid
from retrieval_client.records import TITLE, Hit
from retrieval_contract.errors import SourceError
from towers.checkpoint import SHIPPED, load_make
from towers.evaluate import part_of, side_of
from towers.learning.catalog import ProductData, Query, read_data
from towers.learning.encoders import Encoders
from towers.learning.metrics import ratio_interval
from towers.learning.split import fraction_of
from towers.two_towers import unit

TOP = 10
ASKED, WRITTEN = 16, 2048
JUDGED_SHARE = 0.75
"""Of a sample; the rest are products that nobody has judged for its queries."""
FLIPS = 20_000
RELEASE = "0" * 16
"""Of a collection that nobody serves."""
WEIGHTS = tuple(round(0.05 * step, 2) for step in range(1, 20))
WAYS = {
    f"{fusion}, words {words}" + (f", k {k}" if fusion is Fusion.RRF else ""): Hybrid(
        fusion, words, k
    )
    for fusion in Fusion
    for k in ((10, 60) if fusion is Fusion.RRF else (60,))
    for words in WEIGHTS
}
VECTOR, WORDS, PLAIN = "vector alone", "words alone", "rrf, words 0.5, k 60"
Values = NDArray[np.float64]
console = Console(stderr=True)


@dataclass(frozen=True)
class Judged:
    """A folder's queries, and nDCG@10 of each by every way: name → (queries,)."""

    name: str
    queries: int
    products: int
    by_way: Mapping[str, Values]


def sample(data: ProductData, products: int | None) -> ProductData:
    """At most so many products: queries, in the order of a hash, as long as what is judged for them
    fills no more than JUDGED_SHARE of it, then others by a hash."""
    if products is None:
        return data
    there, judged, kept = set(data.ids), set(), set()
    for query in sorted(data.queries, key=lambda query: fraction_of(query.text)):
        more = judged | (there & {*query.judged, *query.grades})
        if len(more) <= JUDGED_SHARE * products:
            judged, kept = more, kept | {query.id}
    rows = sorted(
        range(len(data)), key=lambda row: (data.ids[row] not in judged, fraction_of(data.ids[row]))
    )
    chosen = data.select(sorted(rows[:products]))
    return replace(chosen, queries=[query for query in chosen.queries if query.id in kept])


@torch.inference_mode()
def vectors_of(
    data: ProductData, encoders: Encoders, progress: Callable[[str, int], Callable[[int], None]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of queries and products, unit norm, as the checkpoint makes them."""
    heads = encoders.towers.heads.eval()
    titles = encoders.titles(data.titles, progress(f"{data.name}, titles", len(data)))
    pictures = encoders.pictures(data.images, progress(f"{data.name}, pictures", len(data)))
    has_title = (titles.abs().sum(1, keepdim=True) > 0).float()
    has_picture = (pictures.abs().sum(1, keepdim=True) > 0).float()
    products = unit(heads.product(titles, has_title, pictures, has_picture))
    queries = unit(heads.query(encoders.queries([query.text for query in data.queries])))
    return queries.numpy(), products.numpy()


def fill(collection: Collection, data: ProductData, vectors: NDArray[np.float32]) -> None:
    """Every product that can be found at all."""
    for start in range(0, len(data), WRITTEN):
        rows = range(start, min(start + WRITTEN, len(data)))
        collection.upsert(
            [
                ProductRow(data.ids[row], data.titles[row][:2000], "", vectors[row])
                for row in rows
                if np.linalg.norm(vectors[row]) > 0.5
            ]
        )
    collection.flush()


def ndcg(query: Query, hits: Sequence[Hit]) -> float:
    """nDCG@10 with gains of 2^grade − 1."""

    def summed(grades: Sequence[int]) -> float:
        return sum((2**grade - 1) / math.log2(rank + 2) for rank, grade in enumerate(grades))

    found = [query.grades.get(hit.id, 0) for hit in hits[:TOP]]
    return summed(found) / summed(sorted(query.grades.values(), reverse=True)[:TOP])


def judge(data: ProductData, queries: NDArray[np.float32], collection: Collection) -> Judged:
    """Both routes of every query, and every way of fusing them."""
    ask, routes = Ask(Hybrid().depth, fields=(TITLE.name,)), []
    for start in range(0, len(queries), ASKED):
        texts = [query.text for query in data.queries[start : start + ASKED]]
        by_vector = collection.search(queries[start : start + ASKED], ask)
        routes += [*zip(by_vector, collection.search_words(texts, ask), strict=True)]
    by_way = {VECTOR: [v for v, _ in routes], WORDS: [w for _, w in routes]} | {
        name: [way.fuse(*both) for both in routes] for name, way in WAYS.items()
    }
    values = {
        name: np.array([ndcg(q, hits) for q, hits in zip(data.queries, found, strict=True)])
        for name, found in by_way.items()
    }
    return Judged(data.name, len(queries), len(data), values)


def chosen(judged: Sequence[Judged]) -> str:
    """The way of the highest mean over folders of the mean over queries."""
    return max(WAYS, key=lambda way: float(np.mean([one.by_way[way].mean() for one in judged])))


def chance(ours: Values, theirs: Values, seed: int = 0) -> float:
    """How often a difference as large comes of flipping its sign query by query (Fisher)."""
    differences = ours - theirs
    signs = np.random.default_rng(seed).integers(0, 2, (FLIPS, len(differences)), np.int8)
    means = ((2.0 * signs - 1) @ differences) / len(differences)
    return float((1 + np.sum(np.abs(means) >= abs(differences.mean()) - 1e-12)) / (FLIPS + 1))


def report_of(judged: Sequence[Judged]) -> dict[str, Any]:
    """Of each folder what the others choose, beside each route alone; and what all choose."""
    report: dict[str, Any] = {"chosen": chosen(judged), "folders": {}}
    for one in judged:
        others = [other for other in judged if other is not one] or [one]
        way = chosen(others)
        ours, vector = one.by_way[way], one.by_way[VECTOR]
        ratio = ratio_interval(ours, vector)
        report["folders"][one.name] = {
            "queries": one.queries,
            "products": one.products,
            "chosen by the others": way,
            "ndcg@10": {
                name: round(float(one.by_way[name].mean()), 4)
                for name in (VECTOR, WORDS, PLAIN, report["chosen"], way, chosen([one]))
            },
            "to vector alone": [round(x, 4) for x in (ratio.value, ratio.low, ratio.high)],
            "p": chance(ours, vector),
        }
    return report


def show(report: Mapping[str, Any]) -> None:
    """As a table."""
    table = Table(title=f"nDCG@10; all together choose: {report['chosen']}", title_justify="left")
    for name in ("folder", VECTOR, WORDS, PLAIN, "chosen by the others", "÷ vector", "p"):
        table.add_column(name)
    for name, found in report["folders"].items():
        figures, way = found["ndcg@10"], found["chosen by the others"]
        value, low, high = found["to vector alone"]
        cells = [f"{figures[each]:.3f}" for each in (VECTOR, WORDS, PLAIN)]
        table.add_row(
            f"{name}\n{found['queries']} queries",
            *cells,
            f"{figures[way]:.3f}\n{way}",
            f"{value:.3f} [{low:.3f}, {high:.3f}]",
            f"{found['p']:.4f}",
        )
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.hybrid", description=__doc__)
    top.add_argument("--data", type=Path, action="append", required=True, help="a judged folder")
    top.add_argument("--products", type=int, help="so many of each folder; default: all")
    top.add_argument("--features", type=Path, default=Path("build/hybrid"), help="kept there")
    return top


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Encode, fill, ask, fuse, judge; returns the report."""
    encoders, judged = Encoders(load_make(SHIPPED), args.features), []
    with tempfile.TemporaryDirectory() as place, Progress(console=console) as bar:

        def progress(what: str, rows: int) -> Callable[[int], None]:
            task = bar.add_task(what, total=rows)
            return lambda done: bar.advance(task, done)

        settings = Settings(milvus=f"{place}/catalog.db", timeout_s=600)
        for folder in args.data:
            data = part_of(read_data(folder), side_of(folder, SHIPPED), [SHIPPED])
            data = sample(data, args.products)
            if not data.queries:
                raise SourceError(f"{folder}: expected queries.csv with judgements, found none")
            queries, products = vectors_of(data, encoders, progress)
            with Catalog(settings.override(collection=f"products_{len(judged)}")) as catalog:
                collection = catalog.prepare(RELEASE, products.shape[1])
                fill(collection, data, products)
                judged.append(judge(data, queries, collection))
    report = report_of(judged)
    show(report)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    print_report(run, parser().parse_args(argv))


if __name__ == "__main__":
    main()
