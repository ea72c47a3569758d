"""Vectors and words → hits: one route or two, groups, and lists that say why they end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from retrieval_client.collection import MAX_RESULTS, Ask, Collection
from retrieval_client.deadline import Deadline
from retrieval_client.hybrid import Hybrid
from retrieval_client.options import Options
from retrieval_client.query import Query
from retrieval_client.records import ATTRIBUTES, Hit
from retrieval_contract.tensors import Array

FIRST_LOOK, FURTHER_LOOK = 4, 8
"""Hits that are fetched for each group, and how many times as many where a look was too short."""
DEEPEST = 1024
"""Hits that are looked at for a page that ends before them, whatever groups or equal scores it has;
for later pages that is MAX_RESULTS."""
EQUAL = 1e-6
"""Scores that differ by less are equal: some 16 times the step of a float32 near 1."""


class End(StrEnum):
    """Why a list of hits ends where it does."""

    LIMIT = "limit"
    """It has as many as were asked for; there may be more."""
    ALL = "all"
    """There are no others that fulfil what was asked."""
    DEPTH = "depth"
    """No more were looked at: there may be others further down (groups, hybrid search)."""


class Hits(list[Hit]):
    """Found products, best first; `end` says whether that was all."""

    def __init__(self, hits: Iterable[Hit], end: End) -> None:
        super().__init__(hits)
        self.end = end


Nearest = Callable[[Array, Ask, Deadline], list[list[Hit]]]
"""Collection.search, or what asks it for several callers at once."""


@dataclass(frozen=True)
class _Found:
    """The best hits of one query, in the order of pages, and whether these are all.

    `floor`: the best score that is equal to the last one: such hits may be missing.
    """

    hits: list[Hit]
    all: bool
    floor: float

    def settles(self, end: int) -> bool:
        """Whether the first `end` stay the first, however many more are fetched."""
        return self.all or (len(self.hits) >= end and self.hits[end - 1].score > self.floor)


@dataclass(frozen=True)
class Finder:
    """One way to ask one collection."""

    collection: Collection
    nearest: Nearest
    options: Options

    def __call__(self, queries: Sequence[Query], vectors: Array, deadline: Deadline) -> list[Hits]:
        """The hits of each query, by its vector; `vectors` is float32 (queries, vector_dim).

        Pages are cut here: which of equal hits Milvus leaves out depends on how many it is asked
        for. So one more than the page needs is fetched, and where that is not worse than the
        page's last, deeper and deeper, to a bound; as for groups.
        """
        options = self.options
        deepest = DEEPEST if options.end < DEEPEST else MAX_RESULTS
        depth = options.end + 1 + any(query.like for query in queries)
        if options.group_by:
            depth = FIRST_LOOK * options.end
        pages: list[Hits] = [Hits([], End.ALL)] * len(queries)
        rows: Sequence[int] = range(len(queries))
        while rows:
            depth = min(depth, deepest)
            found = self._look(queries, vectors, depth, deadline)
            for row, each in zip(rows, found, strict=True):
                pages[row] = self._page(each)
            left = [at for at, each in enumerate(found) if not each.settles(options.end)]
            if not left or depth == deepest or options.routes:
                break
            rows, queries = [rows[at] for at in left], [queries[at] for at in left]
            vectors, depth = vectors[left], depth * FURTHER_LOOK
        return pages

    def _look(
        self, queries: Sequence[Query], vectors: Array, depth: int, deadline: Deadline
    ) -> list[_Found]:
        """The best hits or groups of each query from the first on, without what it is like."""
        deadline.check("search")
        if routes := self.options.routes:
            hits, whole = self._fused(queries, vectors, routes, deadline)
        else:
            hits = list(map(ordered, self.nearest(vectors, self.options.ask(depth), deadline)))
            whole = [len(of_query) < depth for of_query in hits]
        return [
            self._good(query, of_query, all_there)
            for query, of_query, all_there in zip(queries, hits, whole, strict=True)
        ]

    def _fused(
        self, queries: Sequence[Query], vectors: Array, how: Hybrid, deadline: Deadline
    ) -> tuple[list[list[Hit]], list[bool]]:
        """Both routes, and whether they have all; a query without a text has the one."""
        depth = min(how.depth + any(query.like for query in queries), MAX_RESULTS)
        ask = self.options.ask(depth)
        by_vector = self.nearest(vectors, ask, deadline)
        worded = [row for row, query in enumerate(queries) if query.text]
        by_words: dict[int, list[Hit]] = {}
        if worded:
            texts = [queries[row].text for row in worded]
            words = self.collection.search_words(texts, ask, deadline)
            by_words = dict(zip(worded, words, strict=True))
        fused = []
        for row, hits in enumerate(by_vector):
            like = queries[row].like  # the best of its own list, all others would be scaled to it
            lists = (without(like, hits), without(like, by_words.get(row, [])))
            fused.append(how.fuse(*(ordered(each)[: how.depth] for each in lists)))
        return fused, [len(hits) < depth for hits in by_vector]

    def _good(self, query: Query, hits: list[Hit], all_there: bool) -> _Found:
        """Those of a high enough score; below the first of the others there is none."""
        least, group_by = self.options.min_score, self.options.group_by
        floor = 0.0
        if scores := sorted(hit.score for hit in hits):
            if least is not None and scores[0] < least:
                hits, all_there = [hit for hit in hits if hit.score >= least], True
            floor = scores[0]
            for score in scores:
                if score - floor >= EQUAL:
                    break
                floor = score
        hits = without(query.like, hits)
        return _Found(best_of_groups(hits, group_by) if group_by else hits, all_there, floor)

    def _page(self, found: _Found) -> Hits:
        """The part that was asked for."""
        options = self.options
        hits = found.hits[options.offset : options.end]
        end = End.ALL if found.all else End.DEPTH
        if len(hits) == options.limit:
            end = End.LIMIT
        if ATTRIBUTES.name not in options.fields:
            hits = [replace(hit, attributes=options.attributes_of(hit)) for hit in hits]
        return Hits(hits, end)


def without(product_id: str, hits: Iterable[Hit]) -> list[Hit]:
    """All but one product's."""
    return [hit for hit in hits if hit.id != product_id]


def ordered(hits: Iterable[Hit]) -> list[Hit]:
    """Best first; of equal ones, which Milvus gives in any order, by id.

    Equal is what differs from the next by less than EQUAL: equal vectors score unlike in their last
    bits, by how many queries travel in a call and which segment a row lies in.
    """
    found = sorted(hits, key=lambda hit: -hit.score)
    start = 0
    for at in range(1, len(found) + 1):
        if at == len(found) or found[at - 1].score - found[at].score >= EQUAL:
            if at - start > 1:
                found[start:at] = sorted(found[start:at], key=lambda hit: hit.id)
            start = at
    return found


def best_of_groups(hits: Sequence[Hit], attribute: str) -> list[Hit]:
    """The first hit of each value of an attribute; who has none is a group of its own."""
    groups: dict[str, Hit] = {}
    for hit in hits:
        value = hit.attributes.get(attribute)
        # No JSON text begins with a blank, so no id passes for a value.
        key = f" {hit.id}" if value is None else json.dumps(value, sort_keys=True)
        groups.setdefault(key, hit)
    return list(groups.values())
