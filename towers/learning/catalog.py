"""A data folder, read: products, pictures, queries and their judgements.

`products.parquet` (id or product_id, title, any attributes, pictures as `jpeg` or `image`) or
pictures in an `images.parquet` (same rows), `queries.csv` (query_id, query) and either `qrels.csv`
(query_id, id, rel: the relevant products) or `labels.csv` (query_id, product_id, a graded score
whose lowest value means irrelevant). Scores are rounded to whole grades, halves to the even one.
Judgements of products that are not there are left out.
"""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
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
HIGHEST_GRADE = 10
"""A gain is 2^grade − 1: with more, the best product of a query would be all that counts."""
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
    table = _table(path)
    names = table.column_names
    key, title = _first(IDS, names, path), _first(TITLES, names, path)
    if unknown := sorted(set(chosen) - set(names)):
        raise SourceError(f"{path}: expected columns {unknown}, got {names}; choose among these")
    ids = [str(value) for value in table[key].to_pylist()]
    _once(ids, path, key)
    attributes = {}
    for name in names:
        if name in chosen or (name not in (key, title) and _is_text(table.schema.field(name))):
            values = _texts(table[name])
            if name in chosen or _repeats(values):
                attributes[name] = values
    return ProductData(
        folder.name,
        ids,
        _texts(table[title]),
        attributes,
        _images(folder, table, ids),
        _queries(folder, attributes, set(ids)),
    )


def _table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as exc:
        raise SourceError(f"{path}: expected a Parquet file, got {exc}; write it anew") from exc


def _texts(column: pa.ChunkedArray) -> list[str]:
    """What is null, or no number among numbers, is empty."""
    return ["" if v is None or v != v else str(v) for v in column.to_pylist()]


def _once(ids: Sequence[str], path: Path, key: str) -> None:
    """Figures go by ids: of two that are the same, one would be lost."""
    name, times = Counter(ids).most_common(1)[0] if ids else ("", 0)
    if times > 1:
        said = f"expected every {key} once, got {name!r} in {times} rows"
        raise SourceError(f"{path}: {said}; keep one of them")


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
        table = _table(path)
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
    rows = _records(path, QUERY_ID, QUERY)
    _once([row["query_id"] for row in rows], path, "query_id")
    for line, row in enumerate(rows, 2):
        if not (row["query"] or "").strip():
            said = f"expected a text as query, got {row['query']!r}"
            raise SourceError(f"{path}, row {line}: {said}; fill it in, or leave out the row")
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
        score = _number(row[grade])
        if not math.isfinite(score):
            said = f"expected a number as {grade}, got {row[grade]!r}"
            raise SourceError(f"{path}, row {line}: {said}; correct it, or leave out the row")
        scores[row["query_id"]][row[key]] = score
    values = {score for of_query in scores.values() for score in of_query.values()}
    if graded and len(values) == 1:
        said = f"every {grade} is {min(values)}; expected two grades or more"
        raise SourceError(f"{path}: {said}, the lowest of which means irrelevant")
    base = min(values) if graded else 0.0
    _check_grades({score - base for score in values}, path, grade)
    known = {
        query: {i: score - base for i, score in of_query.items() if i in ids}
        for query, of_query in scores.items()
    }
    if not any(known.values()):
        raise SourceError(f"{path}: expected ids of products.parquet as {key}, got none of them")
    return known


def _number(text: str | None) -> float:
    """NaN for what is none."""
    try:
        return float(text or "")
    except ValueError:
        return math.nan


def _check_grades(scores: Set[float], path: Path, grade: str) -> None:
    """Scores, irrelevant being zero, that grades can be made of."""
    highest = max(scores)
    if highest > HIGHEST_GRADE:
        said = f"expected each {grade} at most {HIGHEST_GRADE} above irrelevant, got {highest:g}"
        raise SourceError(f"{path}: {said}; map them to few grades, as 0 to 3")
    if highest <= 1 and (parts := sorted(score for score in scores if 0 < score < 1)):
        said = f"expected whole grades, got {parts[0]:g} of at most {highest:g} above irrelevant"
        raise SourceError(f"{path}: {said}; multiply them, so that each step is 1 or more")


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
