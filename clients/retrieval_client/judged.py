"""Queries with judgements, as a data folder holds them, and how well a ranking answers them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retrieval_contract.errors import SourceError

QUERIES_FILE, QRELS_FILE = "queries.csv", "qrels.csv"
Grades = Mapping[str, int]
"""Product id → grade; what is not in it is irrelevant."""


@dataclass(frozen=True)
class Asked:
    """Texts, and where there are judgements the grades for each."""

    texts: list[str]
    grades: list[dict[str, int]] = field(default_factory=list)

    @classmethod
    def read(cls, queries: Path, qrels: Path | None = None) -> Asked:
        """A CSV with `query`, and with qrels (`query_id`, `id`, `rel`) also with `query_id`: then
        only queries that something was judged right for. SourceError when columns are missing."""
        if qrels is None:
            texts = [row["query"] for row in _records(queries, "query")]
            return cls(list(dict.fromkeys(filter(None, texts))))
        grades: dict[str, dict[str, int]] = {}
        for row in _records(qrels, "query_id", "id", "rel"):
            try:
                grade = int(float(row["rel"]))
            except ValueError as exc:
                raise SourceError(f"{qrels}: rel: expected a number, got {row['rel']!r}") from exc
            if grade > 0:
                grades.setdefault(row["query_id"], {})[row["id"]] = grade
        asked = [row for row in _records(queries, "query_id", "query") if row["query_id"] in grades]
        if not asked:
            raise SourceError(f"{queries}: expected queries that {qrels} judges, got none")
        return cls([row["query"] for row in asked], [grades[row["query_id"]] for row in asked])

    @classmethod
    def of_folder(cls, folder: Path) -> Asked:
        """QUERIES_FILE and, where it is there, QRELS_FILE."""
        qrels = folder / QRELS_FILE
        return cls.read(folder / QUERIES_FILE, qrels if qrels.is_file() else None)


def _records(path: Path, *columns: str) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := set(columns) - set(reader.fieldnames or ()):
                raise SourceError(
                    f"{path}: expected the columns {', '.join(columns)}, got no "
                    f"{', '.join(sorted(missing))}"
                )
            return [{name: row[name] or "" for name in columns} for row in reader]
    except (OSError, UnicodeDecodeError) as exc:
        raise SourceError(f"{path}: expected a CSV file in UTF-8 ({exc})") from exc


def ndcg(ids: Sequence[str], grades: Grades, depth: int = 10) -> float:
    """nDCG of one ranking with gains of 2^grade − 1 (Burges et al., ICML 2005), 0 to 1."""
    best = sorted(grades.values(), reverse=True)
    ideal = _dcg([2**grade - 1 for grade in best], depth)
    return _dcg([2 ** grades.get(i, 0) - 1 for i in ids], depth) / ideal if ideal else 0.0


def _dcg(gains: Sequence[int], depth: int) -> float:
    return sum(gain / math.log2(rank) for rank, gain in enumerate(gains[:depth], start=2))
