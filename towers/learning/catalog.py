"""A data folder, read: products, pictures, queries and their judgements.

`products.parquet` (id or product_id, title, any attributes), optionally `images.parquet` (same
rows, `jpeg`), `queries.csv` (query_id, query) and either `qrels.csv` (query_id, id, rel: the
relevant products) or `labels.csv` (query_id, product_id, a graded score whose lowest value means
irrelevant).
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from retrieval_contract.errors import SourceError

IDS = ("id", "product_id")
TITLES = ("title",)
PICTURES = ("jpeg", "image")
GRADES = ("rel", "rating", "relevance", "grade")
MAX_VALUES = 300
MAX_SHARE = 0.05
"""A text column is an attribute when it has at most so many values, and few for its rows."""


@dataclass(frozen=True)
class Query:
    """One judged query; `grades`: product id → 1 and more."""

    id: str
    text: str
    grades: dict[str, int]
    attributes: dict[str, str] = field(default_factory=dict)
    judged: frozenset[str] = frozenset()
    """Ids that somebody looked at, the irrelevant included; empty where the rest is irrelevant."""


@dataclass(frozen=True)
class ProductData:
    """Columns of equal length; `images` holds b"" where there is no picture."""

    name: str
    ids: list[str]
    titles: list[str]
    attributes: dict[str, list[str]]
    images: list[bytes]
    queries: list[Query]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: list[int]) -> ProductData:
        """The same with these rows only; queries keep the grades of products that are left."""
        left = {self.ids[row] for row in rows}
        queries = []
        for query in self.queries:
            grades = {i: grade for i, grade in query.grades.items() if i in left}
            judged = query.judged & left
            queries.append(Query(query.id, query.text, grades, query.attributes, judged))
        return ProductData(
            self.name,
            [self.ids[row] for row in rows],
            [self.titles[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in self.attributes.items()},
            [self.images[row] for row in rows],
            [query for query in queries if query.grades],
        )


def read_data(folder: Path) -> ProductData:
    """Read a data folder; SourceError naming what is missing."""
    path = folder / "products.parquet"
    if not path.is_file():
        raise SourceError(f"{path}: not found; expected a data folder, see towers/learning")
    table = pq.read_table(path)
    key = _first(IDS, table.column_names, path)
    ids = [str(value) for value in table[key].to_pylist()]
    titles = [str(v or "") for v in table[_first(TITLES, table.column_names, path)].to_pylist()]
    attributes = {}
    for name in table.column_names:
        if name in (key, "title") or "string" not in str(table.schema.field(name).type):
            continue
        values = [str(value or "") for value in table[name].to_pylist()]
        if 2 <= len(set(values)) <= min(MAX_VALUES, MAX_SHARE * len(values)):
            attributes[name] = values
    return ProductData(
        folder.name, ids, titles, attributes, _images(folder, ids), _queries(folder, attributes)
    )


def _first(names: tuple[str, ...], there: list[str], path: Path) -> str:
    for name in names:
        if name in there:
            return name
    raise SourceError(f"{path}: expected one of the columns {names}, got {there}")


def _images(folder: Path, ids: list[str]) -> list[bytes]:
    path = folder / "images.parquet"
    if not path.is_file():
        return [b""] * len(ids)
    table = pq.read_table(path)
    names = table.column_names
    if [str(i) for i in table[_first(IDS, names, path)].to_pylist()] != ids:
        raise SourceError(f"{path}: expected the ids of products.parquet in the same order")
    return [value or b"" for value in table[_first(PICTURES, names, path)].to_pylist()]


def _queries(folder: Path, attributes: dict[str, list[str]]) -> list[Query]:
    path, qrels, labels = (folder / n for n in ("queries.csv", "qrels.csv", "labels.csv"))
    if not path.is_file():
        return []
    graded = labels.is_file() and not qrels.is_file()
    if not graded and not qrels.is_file():
        raise SourceError(
            f"{path}: expected {qrels.name} or {labels.name} beside it, found neither"
        )
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    judgements = _records(labels if graded else qrels)
    if judgements:
        key = _first(IDS, list(judgements[0]), qrels)
        grade = _first(GRADES, list(judgements[0]), qrels)
        for row in judgements:
            scores[row["query_id"]][row[key]] = float(row[grade])
    lowest = min((s for of_query in scores.values() for s in of_query.values()), default=0.0)
    base = lowest if graded else 0.0
    found = []
    for row in _records(path):
        of_query = scores[row["query_id"]]
        grades = {i: round(score - base) for i, score in of_query.items()}
        found.append(
            Query(
                row["query_id"],
                row["query"],
                {i: grade for i, grade in grades.items() if grade > 0},
                {name: row[name] for name in attributes if row.get(name)},
                frozenset(of_query) if graded else frozenset(),
            )
        )
    return [query for query in found if query.grades]  # the others cannot be answered


def _records(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
