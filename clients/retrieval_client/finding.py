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
from retrieval_client.records import Hit
from retrieval_contract.errors import DeadlineExceeded
from retrieval_contract.tensors import Array

FIRST_LOOK, FURTHER_LOOK = 4, 8
"""Hits that are fetched for each group, and how many times as many where that was too few."""
DEEPEST = 1024
"""Hits that are looked at for groups, or for each group that is asked for one, if that is more."""


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
    """The best hits of one query, and whether these are all."""

    hits: list[Hit]
    all: bool


@dataclass(frozen=True)
class Finder:
    """One way to ask one collection."""

    collection: Collection
    nearest: Nearest
    options: Options

    def __call__(self, queries: Sequence[Query], vectors: Array, deadline: Deadline) -> list[Hits]:
        """The hits of each query, by its vector; `vectors` is float32 (queries, vector_dim)."""
        options = self.options
        others = any(query.like for query in queries)
        if not (options.group_by or options.routes or others):
            hits = self.nearest(vectors, options.ask(options.limit, options.offset), deadline)
            return [self._page(self._good(each, len(each) < options.limit), 0) for each in hits]
        if not options.group_by:
            count = min(options.end + others, MAX_RESULTS)
            found = self._first(queries, vectors, count, deadline)
            return [self._page(each, options.offset) for each in found]
        return self._groups(queries, vectors, deadline)

    def _groups(self, queries: Sequence[Query], vectors: Array, deadline: Deadline) -> list[Hits]:
        """Deeper and deeper for those that have too few, to a bound."""
        options = self.options
        depth, deepest = FIRST_LOOK * options.end, min(max(DEEPEST, options.end), MAX_RESULTS)
        hits: dict[int, Hits] = {}
        left = list(range(len(queries)))
        while left:
            depth = min(depth, deepest)
            found = self._first([queries[row] for row in left], vectors[left], depth, deadline)
            again = []
            for row, each in zip(left, found, strict=True):
                groups = _Found(best_of_groups(each.hits, options.group_by), each.all)
                hits[row] = self._page(groups, options.offset)
                if hits[row].end is End.DEPTH and depth < deepest and not options.routes:
                    again.append(row)
            left, depth = again, FURTHER_LOOK * depth
        return [hits[row] for row in range(len(queries))]

    def _first(
        self, queries: Sequence[Query], vectors: Array, count: int, deadline: Deadline
    ) -> list[_Found]:
        """The best hits of each query from the first on, without what it is like."""
        if deadline.passed:
            raise DeadlineExceeded(f"search: no time left of {deadline.seconds} s; raise it")
        if routes := self.options.routes:
            hits, whole = self._fused(queries, vectors, routes, deadline)
        else:
            hits = self.nearest(vectors, self.options.ask(count), deadline)
            whole = [len(of_query) < count for of_query in hits]
        return [
            self._good([hit for hit in of_query if hit.id != query.like], all_there)
            for query, of_query, all_there in zip(queries, hits, whole, strict=True)
        ]

    def _fused(
        self, queries: Sequence[Query], vectors: Array, how: Hybrid, deadline: Deadline
    ) -> tuple[list[list[Hit]], list[bool]]:
        """Both routes, and whether they have all; a query without a text has the one."""
        ask = self.options.ask(how.depth)
        by_vector = self.nearest(vectors, ask, deadline)
        worded = [row for row, query in enumerate(queries) if query.text]
        by_words: dict[int, list[Hit]] = {}
        if worded:
            texts = [queries[row].text for row in worded]
            words = self.collection.search_words(texts, ask, deadline)
            by_words = dict(zip(worded, words, strict=True))
        fused = [how.fuse(hits, by_words.get(row, [])) for row, hits in enumerate(by_vector)]
        return fused, [len(hits) < how.depth for hits in by_vector]

    def _good(self, hits: list[Hit], all_there: bool) -> _Found:
        """Those of a high enough score; below the first of the others there is none."""
        least = self.options.min_score
        good = hits if least is None else [hit for hit in hits if hit.score >= least]
        return _Found(good, all_there or len(good) < len(hits))

    def _page(self, found: _Found, offset: int) -> Hits:
        """The part that was asked for."""
        options = self.options
        hits = found.hits[offset : offset + options.limit]
        end = End.ALL if found.all else End.DEPTH
        if len(hits) == options.limit:
            end = End.LIMIT
        return Hits((replace(hit, attributes=options.attributes_of(hit)) for hit in hits), end)


def best_of_groups(hits: Sequence[Hit], attribute: str) -> list[Hit]:
    """The first hit of each value of an attribute; who has none is a group of its own."""
    groups: dict[str, Hit] = {}
    for hit in hits:
        value = hit.attributes.get(attribute)
        # No JSON text begins with a blank, so no id passes for a value.
        key = f" {hit.id}" if value is None else json.dumps(value, sort_keys=True)
        groups.setdefault(key, hit)
    return list(groups.values())
