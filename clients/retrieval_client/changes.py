"""What another release would change for those who search: both answers to the same queries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_client.collection import Ask, Collection
from retrieval_client.deadline import Deadline
from retrieval_client.fleet import Encoders
from retrieval_client.picture import draw_results
from retrieval_client.records import THUMBNAIL, VECTOR, Hit, photo_of
from retrieval_contract.tensors import Array

TOGETHER = 64
"""Vectors in one search: a lone one costs Milvus many times as much."""
SHOWN = 8
"""Queries in the picture, and photos beside each."""
SIDES = ("serving", "candidate")
REPORT_FILE, PICTURE_FILE = "report.json", "changes.png"


@dataclass(frozen=True)
class Answers:
    """Of one release to some texts: its vectors (texts, vector_dim), and its hits, best first.

    What it refuses to encode has a zero vector and no hits.
    """

    collection: Collection
    vectors: Array
    hits: list[list[Hit]]


@dataclass(frozen=True)
class Change:
    """One query, and what each release answers it with, best first."""

    query: str
    overlap: float
    serving: list[Hit]
    candidate: list[Hit]

    def to_json(self) -> dict[str, Any]:
        """With ids alone."""
        ids = {side: [hit.id for hit in getattr(self, side)] for side in SIDES}
        return {"query": self.query, "overlap": self.overlap, **ids}


def answers_of(
    collection: Collection,
    encoders: Encoders,
    texts: Sequence[str],
    depth: int,
    patience_s: float,
) -> Answers:
    """Encoded by the collection's own release; every call has `patience_s`."""
    encoder = encoders.for_collection(collection.info)
    encoded = encoder.encode_queries(texts, timeout_s=patience_s, fresh=True)
    good = [row for row, error in enumerate(encoded.errors) if error is None]
    return _answers(collection, encoded.vectors, good, depth, patience_s)


def answers_like(
    collection: Collection, ids: Sequence[str], depth: int, patience_s: float
) -> Answers:
    """To stored products in place of texts: by the vectors that they have there."""
    stored = collection.of_ids(ids, [VECTOR.name])
    vectors = np.zeros((len(ids), collection.info.vector_dim), np.float32)
    for row, product_id in enumerate(ids):
        if product_id in stored:
            vectors[row] = stored[product_id][VECTOR.name]
    good = [row for row, vector in enumerate(vectors) if vector.any() and np.isfinite(vector).all()]
    return _answers(collection, vectors, good, depth, patience_s)


def _answers(
    collection: Collection, vectors: Array, good: list[int], depth: int, patience_s: float
) -> Answers:
    """Of the rows that are good."""
    hits: list[list[Hit]] = [[] for _ in vectors]
    for start in range(0, len(good), TOGETHER):
        some = good[start : start + TOGETHER]
        found = collection.search(vectors[some], Ask(depth), Deadline(patience_s))
        for row, of_row in zip(some, found, strict=True):
            hits[row] = of_row
    vectors = np.where(np.isin(np.arange(len(vectors)), good)[:, None], vectors, 0)
    return Answers(collection, vectors.astype(np.float32), hits)


def overlap_of(one: Sequence[Hit], other: Sequence[Hit]) -> float:
    """Share of the hits that both have, in any order; 1 where neither has any."""
    most = max(len(one), len(other))
    return len({hit.id for hit in one} & {hit.id for hit in other}) / most if most else 1.0


def changes_between(texts: Sequence[str], serving: Answers, candidate: Answers) -> list[Change]:
    """The most changed first."""
    changes = [
        Change(text, overlap_of(old, new), old, new)
        for text, old, new in zip(texts, serving.hits, candidate.hits, strict=False)
    ]
    return sorted(changes, key=lambda change: (change.overlap, change.query))


def write_report(
    said: Mapping[str, Any],
    changes: Sequence[Change],
    serving: Collection,
    candidate: Collection,
    folder: Path,
) -> None:
    """REPORT_FILE, and PICTURE_FILE: the most changed queries, both answers below each other."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    labels, results = [], []
    for change in changes[:SHOWN]:
        for side, collection in zip(SIDES, (serving, candidate), strict=True):
            labels.append(f"{change.query} ({side}, {change.overlap:.0%} in both)")
            results.append(with_photos(getattr(change, side)[:SHOWN], collection))
    if labels:
        draw_results(labels, results, folder / PICTURE_FILE)


def with_photos(hits: Sequence[Hit], collection: Collection) -> list[Hit]:
    """The same with their small photos."""
    photos = collection.of_ids([hit.id for hit in hits], [THUMBNAIL.name])
    return [
        replace(hit, thumbnail=photo_of(photos.get(hit.id, {}).get(THUMBNAIL.name, "")))
        for hit in hits
    ]
