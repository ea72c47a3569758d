"""A data folder, read: products, pictures, queries and their judgements.

`products.parquet` (id or product_id, title, any attributes, pictures as `jpeg` or `image`) or
pictures in an `images.parquet` (same rows), `queries.csv` (query_id, query) and either `qrels.csv`
(query_id, id, rel: the relevant products) or `labels.csv` (query_id, product_id, a graded score
whose lowest value means irrelevant). Judgements of products that are not there are left out.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_contract.errors import SourceError

IDS = ("id", "product_id")
TITLES = ("title",)
PICTURES = ("jpeg", "image")
GRADES = ("rel", "rating", "relevance", "grade")
QUERY_ID, QUERY = ("query_id",), ("query",)
MAX_VALUES, FEW_VALUES = 300, 32
MAX_SHARE, MAX_SHARE_OF_FEW = 0.05, 0.5
"""A text column is an attribute when it has at most so many values, and few for its rows: a
twentieth, and where they are few in themselves, half."""


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


def read_data(folder: Path, chosen: Sequence[str] = ()) -> ProductData:
    """Read a data folder; SourceError naming what is missing.

    `chosen` columns are attributes whatever is in them.
    """
    path = folder / "products.parquet"
    if not path.is_file():
        raise SourceError(f"{path}: not found; expected a data folder, see towers/learning")
    table = pq.read_table(path)
    names = table.column_names
    key, title = _first(IDS, names, path), _first(TITLES, names, path)
    if unknown := sorted(set(chosen) - set(names)):
        raise SourceError(f"{path}: expected columns {unknown}, got {names}; choose among these")
    ids = [str(value) for value in table[key].to_pylist()]
    attributes = {}
    for name in names:
        if name in chosen or (name not in (key, title) and _is_text(table.schema.field(name))):
            values = ["" if v is None else str(v) for v in table[name].to_pylist()]
            if name in chosen or _repeats(values):
                attributes[name] = values
    return ProductData(
        folder.name,
        ids,
        [str(value or "") for value in table[title].to_pylist()],
        attributes,
        _images(folder, table, ids),
        _queries(folder, attributes, set(ids)),
    )


def _is_text(column: pa.Field) -> bool:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _repeats(values: Sequence[str]) -> bool:
    """Whether they are of few kinds for their number."""
    of_few = min(FEW_VALUES, MAX_SHARE_OF_FEW * len(values))
    return 2 <= len(set(values)) <= min(MAX_VALUES, max(MAX_SHARE * len(values), of_few))


def _first(names: tuple[str, ...], there: Iterable[str], path: Path) -> str:
    for name in names:
        if name in there:
            return name
    raise SourceError(f"{path}: expected one of the columns {names}, got {[*there]}")


def _images(folder: Path, products: pa.Table, ids: list[str]) -> list[bytes]:
    path, table = folder / "images.parquet", products
    if path.is_file():
        table = pq.read_table(path)
        if [str(i) for i in table[_first(IDS, table.column_names, path)].to_pylist()] != ids:
            raise SourceError(f"{path}: expected the ids of products.parquet in the same order")
    elif not set(PICTURES) & set(products.column_names):
        return [b""] * len(ids)
    column = table[_first(PICTURES, table.column_names, path)]
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        said = f"expected the files themselves as binary, got {column.type}"
        raise SourceError(f"{folder}: pictures: {said}")
    return [value or b"" for value in column.to_pylist()]


def _queries(folder: Path, attributes: Iterable[str], ids: Set[str]) -> list[Query]:
    path, qrels, labels = (folder / n for n in ("queries.csv", "qrels.csv", "labels.csv"))
    if not path.is_file():
        return []
    graded = labels.is_file() and not qrels.is_file()
    if not graded and not qrels.is_file():
        raise SourceError(
            f"{path}: expected {qrels.name} or {labels.name} beside it, found neither"
        )
    scores = _scores(labels if graded else qrels, graded, ids)
    found = []
    for row in _records(path, QUERY_ID, QUERY):
        of_query = scores.get(row["query_id"], {})
        found.append(
            Query(
                row["query_id"],
                row["query"],
                {i: grade for i, score in of_query.items() if (grade := round(score)) > 0},
                {name: row[name] for name in attributes if row.get(name)},
                frozenset(of_query) if graded else frozenset(),
            )
        )
    return [query for query in found if query.grades]  # the others cannot be answered


def _scores(path: Path, graded: bool, ids: Set[str]) -> dict[str, dict[str, float]]:
    """Query → product → score, the lowest of a graded file being zero."""
    rows = _records(path, QUERY_ID, IDS, GRADES)
    if not rows:
        return {}
    key, grade = _first(IDS, rows[0], path), _first(GRADES, rows[0], path)
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for line, row in enumerate(rows, 2):
        try:
            scores[row["query_id"]][row[key]] = float(row[grade])
        except (TypeError, ValueError):
            said = f"expected a number as {grade}, got {row[grade]!r}"
            raise SourceError(f"{path}, row {line}: {said}") from None
    values = {score for of_query in scores.values() for score in of_query.values()}
    if graded and len(values) == 1:
        said = f"every {grade} is {min(values)}; expected two grades or more"
        raise SourceError(f"{path}: {said}, the lowest of which means irrelevant")
    base = min(values) if graded else 0.0
    known = {
        query: {i: score - base for i, score in of_query.items() if i in ids}
        for query, of_query in scores.items()
    }
    if not any(known.values()):
        raise SourceError(f"{path}: expected ids of products.parquet as {key}, got none of them")
    return known


def _records(path: Path, *columns: tuple[str, ...]) -> list[dict[str, str]]:
    """All rows; one of each of the `columns` must be there."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for names in columns:
                _first(names, reader.fieldnames or [], path)
            return list(reader)
    except (UnicodeDecodeError, csv.Error) as exc:
        raise SourceError(f"{path}: expected CSV in UTF-8, got {exc}; save it as that") from exc
