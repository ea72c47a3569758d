"""A small judged catalog: attributes, titles, plain pictures, queries and what is right."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import photo

COLOURS = {"Red": (200, 20, 20), "Navy Blue": (20, 20, 120), "White": (240, 240, 240)}
KINDS = ("Shirts", "Dresses", "Tshirts")
GENDERS = ("Men", "Women")


def write_judged_catalog(folder: Path) -> Path:
    """360 products, 20 of each gender, colour and kind; every fourth title hides the colour."""
    rows, pictures, judgements, queries = [], [], [], []
    for gender in GENDERS:
        for colour, rgb in COLOURS.items():
            for kind in KINDS:
                query_id = f"q{len(queries)}"
                queries.append(
                    (query_id, f"{colour} {gender} {kind}".lower(), gender, colour, kind)
                )
                for i in range(20):
                    number = len(rows)
                    said = "" if i % 4 == 0 else f"{colour} "
                    title = f"Brand{number} {gender} {said}{kind[:-1]} no {number}"
                    rows.append((number, title, gender, colour, kind))
                    pictures.append(
                        photo(tuple(min(255, c + i) for c in rgb), (60, 80 + number % 7))
                    )
                    judgements.append((query_id, number, 2))
    names = ("id", "title", "gender", "baseColour", "articleType")
    pq.write_table(
        pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))),
        folder / "products.parquet",
    )
    table = pa.table({"id": [r[0] for r in rows], "jpeg": pictures})
    pq.write_table(table, folder / "images.parquet")
    for name, header, lines in (
        ("queries.csv", ("query_id", "query", *names[2:]), queries),
        ("qrels.csv", ("query_id", "id", "rel"), judgements),
    ):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([header, *lines])
    return folder
