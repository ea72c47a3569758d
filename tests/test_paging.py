"""Pages over products of equal vectors: each is on one page, whatever a Milvus does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from retrieval_client import Catalog, Collection, End, Hit, Query, Settings, finding
from retrieval_client.collection import Ask, Consistency
from retrieval_client.deadline import Deadline
from retrieval_client.finding import Finder, Hits
from retrieval_client.options import OptionFields, Options
from retrieval_contract.tensors import Array
from tests.conftest import product_row

DIM, ROWS, EQUAL = 8, 240, 30
"""Of each vector there are so many; a family has one of each."""


@pytest.fixture(scope="module")
def filled(backend: Callable[[], Settings]) -> Iterator[Collection]:
    """Stored in an order that says nothing, in several files."""
    with Catalog(backend()) as catalog:
        collection = catalog.prepare("0123456789abcdef", DIM)
        rows = [
            replace(
                product_row(f"p{n:03}", DIM, n % (ROWS // EQUAL)), attributes={"family": n % 40}
            )
            for n in np.random.default_rng(1).permutation(ROWS).tolist()
        ]
        for start in range(0, ROWS, 80):
            collection.upsert(rows[start : start + 80])
            collection.flush()
        assert collection.count() == ROWS
        yield collection


class Asked:
    """The collection's own search, and what it was asked."""

    def __init__(self, collection: Collection) -> None:
        self.collection, self.calls = collection, list[tuple[int, int]]()

    def __call__(self, vectors: Array, ask: Ask, deadline: Deadline) -> list[list[Hit]]:
        self.calls.append((len(vectors), ask.limit))
        return self.collection.search(vectors, ask, deadline)

    def find(self, query: Query, **options: object) -> Hits:
        seed = int(query.like[1:]) % (ROWS // EQUAL) if query.like else 3
        (hits,) = self.many([query], [seed], **options)
        return hits

    def many(self, queries: list[Query], seeds: list[int], **options: object) -> list[Hits]:
        vectors = np.stack([product_row("", DIM, seed).vector for seed in seeds])
        known: OptionFields = {"consistency": Consistency.OWN, **options}  # type: ignore[typeddict-item]
        return Finder(self.collection, self, Options(**known))(queries, vectors, Deadline(60))


@pytest.mark.parametrize("options", [{}, {"group_by": "family"}, {"like": "p011"}], ids=str)
def test_pages_neither_repeat_nor_skip_products(filled: Collection, options: dict) -> None:
    asked = Asked(filled)
    query = Query("x", like=options.pop("like", ""))
    whole = asked.find(query, limit=1000, **options)
    assert len(whole) == {True: 40, False: ROWS - bool(query.like)}["group_by" in options]
    assert whole.end is End.ALL
    assert whole == sorted(whole, key=lambda hit: (-round(hit.score, 4), hit.id))
    for size in (7, 30):
        starts = range(0, len(whole), size)
        pages = [asked.find(query, limit=size, offset=at, **options) for at in starts]
        ids = [hit.id for page in pages for hit in page]
        assert ids == [hit.id for hit in whole], size


def test_a_page_without_equals_at_its_end_costs_one_call(filled: Collection) -> None:
    asked = Asked(filled)
    asked.find(Query("x"), limit=EQUAL)
    assert asked.calls == [(1, EQUAL + 1)]
    asked.find(Query("x"), limit=EQUAL, offset=2 * EQUAL)
    assert asked.calls[1:] == [(1, 3 * EQUAL + 1)]
    asked.calls.clear()
    some = asked.many([Query("x")] * 3, [1, 2, 3], limit=EQUAL, where="bucket < 500")
    assert len(some) == 3
    assert asked.calls[0] == (3, EQUAL + 1)


def test_a_look_for_equals_has_a_bound_and_pages_share_it(
    filled: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "DEEPEST", 20)
    asked = Asked(filled)
    pages = [asked.find(Query("x"), limit=5, offset=at) for at in (0, 5, 10)]
    assert asked.calls == [(1, 6), (1, 20), (1, 11), (1, 20), (1, 16), (1, 20)]
    assert len({hit.id for page in pages for hit in page}) == 15
    assert [page.end for page in pages] == [End.LIMIT] * 3


def test_equal_vectors_are_equal_whoever_shares_the_call(filled: Collection) -> None:
    """Their scores differ in the last bits, by who shares it: planted here, as both Milvuses do."""
    companions = 0

    def nearest(vectors: Array, ask: Ask, deadline: Deadline) -> list[list[Hit]]:
        nonlocal companions
        companions += 1
        dice = np.random.default_rng(companions)
        return [
            [replace(hit, score=hit.score + float(dice.normal(0, 5e-8))) for hit in hits]
            for hits in filled.search(vectors, ask, deadline)
        ]

    vectors = product_row("", DIM, 3).vector[None]
    ids: list[str] = []
    for start in range(0, ROWS, 7):
        options = Options(limit=7, offset=start, consistency=Consistency.OWN)
        (page,) = Finder(filled, nearest, options)([Query("x")], vectors, Deadline(60))
        ids += [hit.id for hit in page]
    assert len(ids) == len(set(ids)) == ROWS


def test_what_a_product_is_like_is_not_what_others_are_scaled_to(filled: Collection) -> None:
    """A hybrid search for more of it gives what one gives that never saw the product itself."""
    vectors = product_row("", DIM, 3).vector[None]
    words = [Hit("p001", 9.0, "", {}), Hit("p011", 8.0, "", {}), Hit("p002", 3.0, "", {})]
    near = [Hit("p011", 1.0, "", {}), Hit("p003", 0.8, "", {}), Hit("p001", 0.6, "", {})]

    def found(product: str) -> list[tuple[str, float]]:
        left_out = set() if product else {"p011"}
        lists = [[hit for hit in each if hit.id not in left_out] for each in (near, words)]
        collection = SimpleNamespace(search_words=lambda *asked: [lists[1]])
        finder = Finder(collection, lambda *asked: [lists[0]], Options(hybrid=True))  # type: ignore[arg-type]
        (hits,) = finder([Query("x", like=product)], vectors, Deadline(9))
        return [(hit.id, round(hit.score, 6)) for hit in hits]

    assert found("p011") == found("")
