"""python -m deploy.rendered.catalog --out DIR: a product catalog to try the search with.

Drawn photographs, seller-like titles, queries, qrels. Everything follows from the number of
products and the seed, so two runs write the same bytes. Many titles leave out the colour or the
pattern: those products are found by their picture.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.rendered.photo import Look, photograph
from deploy.rendered.stock import COLOURS, Product, catalog_products, catalog_queries, relevance

FORMAT = 1  # raise it when the drawing or the titles change, so that old catalogs are redrawn
FILES = ("products.parquet", "images.parquet", "queries.csv", "qrels.csv", "catalog.json")


def write_rendered_catalog(
    folder: Path, *, products: int = 480, seed: int = 7, progress: bool = False
) -> Path:
    """Write the catalog into a folder, all of it or nothing; one already there is kept."""
    made = {"format": FORMAT, "products": products, "seed": seed}
    rows = catalog_products(products, seed)
    folder = Path(folder).resolve()
    if _is_catalog(folder):
        if json.loads((folder / "catalog.json").read_text()) == made:
            return folder
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files; give an empty or a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as stage:
        fresh = Path(stage) / "new"
        fresh.mkdir()
        _write_tables(fresh, rows, seed, progress)
        _write_queries(fresh, rows)
        (fresh / "catalog.json").write_text(json.dumps(made) + "\n")
        if folder.exists():
            folder.rename(Path(stage) / "old")
        fresh.rename(folder)
    return folder


def _is_catalog(folder: Path) -> bool:
    """Whether the folder holds a rendered catalog and nothing else, and so may be replaced."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} == set(FILES)


def _write_tables(folder: Path, rows: list[Product], seed: int, progress: bool) -> None:
    """Draw every product, and write the products and their pictures in the same order."""
    pictures = [_picture(row, seed, place) for place, row in enumerate(_track(rows, progress))]
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows]), folder / "products.parquet")
    images = pa.table({"id": [row.id for row in rows], "jpeg": pa.array(pictures, pa.binary())})
    pq.write_table(images, folder / "images.parquet", compression="none")


def _write_queries(folder: Path, rows: list[Product]) -> None:
    """Write the queries and which products answer them."""
    queries = {f"q{i:02d}": query for i, query in enumerate(catalog_queries(len(rows)), 1)}
    _write_csv(
        folder / "queries.csv",
        ("query_id", "query", "kind", "colour", "pattern"),
        ((i, q.text, q.kind, q.colour, q.pattern) for i, q in queries.items()),
    )
    judged = ((i, row.id, relevance(q, row)) for i, q in queries.items() for row in rows)
    _write_csv(
        folder / "qrels.csv",
        ("query_id", "id", "rel"),
        (judgement for judgement in judged if judgement[2]),
    )


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a small CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _track(rows: list[Product], progress: bool) -> Iterable[Product]:
    """The rows, with a progress line on standard error when asked for."""
    if not progress:
        return rows
    from rich.console import Console
    from rich.progress import track

    return track(rows, "Drawing products", console=Console(stderr=True))


def _picture(row: Product, seed: int, place: int) -> bytes:
    """The product's photograph, in a shade of its colour."""
    rng = np.random.default_rng([seed, place, 1])
    shade = np.array(COLOURS[row.colour]) * rng.uniform(0.95, 1.04) + rng.normal(0, 3, 3)
    red, green, blue = np.clip(shade, 0, 255).astype(int).tolist()
    return photograph(Look(row.kind, (red, green, blue), row.pattern), rng)


def main(argv: Sequence[str] | None = None) -> None:
    """Render a catalog from the command line; the last line is JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.rendered.catalog", description=main.__doc__
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--products", type=int, default=480, metavar="N")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        folder = write_rendered_catalog(
            args.out, products=args.products, seed=args.seed, progress=True
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"folder": str(folder), "products": args.products, "seconds": seconds}))


if __name__ == "__main__":
    main()
