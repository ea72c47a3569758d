"""Searches of many threads that ask the same of the same collection travel as one call.

A call has a price (wire, plan, Python around it) that a search in it does not: one at a time costs
Milvus many times what the same searches cost in one call. So callers with equal questions (filter,
limit, fields) are merged as `coalesce.py` does it: a lone one goes at once and by itself, those who
come while calls are under way travel with the next. Each keeps its own deadline and gets its own
error.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from retrieval_client.coalesce import Coalescer
from retrieval_client.collection import Ask, Collection
from retrieval_client.deadline import Deadline
from retrieval_client.records import Hit, check_vectors
from retrieval_contract.errors import CatalogError, CatalogUnavailable, CollectionGone
from retrieval_contract.tensors import Array

TOGETHER = 32
"""Vectors in one call, at most: so of 64 callers one half is computed while the other is read."""

Found = list[list[Hit] | CatalogError]
"""One entry a vector: its hits, or why there are none."""


def most_together(ask: Ask) -> int:
    """How many vectors may travel in one call for this question."""
    return min(TOGETHER, ask.at_once)


class _Line:
    """Those who ask the same of the same collection now."""

    def __init__(self, collection: Collection, ask: Ask) -> None:
        self.collection, self.ask = collection, ask
        self.callers = 0

    @cached_property
    def together(self) -> Coalescer[Array, Found]:
        """Made when there is a second one."""
        return Coalescer(self._send, most_together(self.ask), refuse=False)

    def _send(self, vectors: Sequence[Array], deadline: Deadline) -> Found:
        """One call for all. What Milvus refuses of many (an answer too large for the wire), it may
        do for fewer: then halves, so that an error is everybody's only where each alone gets it."""
        try:
            return list(self.collection.search(np.stack(vectors), self.ask, deadline))
        except (CatalogUnavailable, CollectionGone):
            raise
        except CatalogError as exc:
            if len(vectors) == 1:
                return [exc]
            half = len(vectors) // 2
            return self._send(vectors[:half], deadline) + self._send(vectors[half:], deadline)


class Searches:
    """Merges searches; safe between threads, and of use only there."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, Ask], _Line] = {}
        """Only those somebody stands in, so never more than there are callers."""
        self._lock = threading.Lock()

    def __call__(
        self, collection: Collection, vectors: Array, ask: Ask, deadline: Deadline
    ) -> list[list[Hit]]:
        """As `Collection.search`, and raises what that raises; vectors must be finite and unit.

        Raises ContractError for others, before they can join anybody, and DeadlineExceeded when
        the caller's time is up, waiting included.
        """
        check_vectors(
            [f"vector {n}" for n in range(len(vectors))], vectors, collection.info.vector_dim
        )
        if not 0 < len(vectors) <= most_together(ask) // 2:
            return _of_one(collection, vectors, ask, deadline)
        key = (collection.name, ask)
        with self._lock:
            line = self._lines.get(key)
            if line is None:
                line = self._lines[key] = _Line(collection, ask)
            line.collection = collection  # what was read of it last
            line.callers += 1
            together = line.together if line.callers > 1 else None
        try:
            if together is None:
                return collection.search(vectors, ask, deadline)
            found = together(list(vectors), deadline)
        finally:
            with self._lock:
                line.callers -= 1
                if not line.callers:
                    del self._lines[key]
        return [_hits(each) for each in found]


def _of_one(
    collection: Collection, vectors: Array, ask: Ask, deadline: Deadline
) -> list[list[Hit]]:
    """The many searches of one caller; halves of what is refused together, as `_send`."""
    try:
        return collection.search(vectors, ask, deadline)
    except (CatalogUnavailable, CollectionGone):
        raise
    except CatalogError:
        if len(vectors) <= 1:
            raise
        half = len(vectors) // 2
        first = _of_one(collection, vectors[:half], ask, deadline)
        return first + _of_one(collection, vectors[half:], ask, deadline)


def _hits(found: list[Hit] | CatalogError) -> list[Hit]:
    if isinstance(found, CatalogError):
        raise type(found)(*found.args)
    return found
