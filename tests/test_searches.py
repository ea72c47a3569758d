"""Searches that travel together: everyone's own answer, deadline and error, on both backends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from pymilvus.exceptions import MilvusException

from benchmarks.searches import MEANINGS, measured, show, ways
from deploy.milvus import MilvusServer
from retrieval_client import Catalog, Collection, Hit, ProductSearch, Settings
from retrieval_client.collection import Ask, CollectionInfo
from retrieval_client.deadline import Deadline
from retrieval_client.finding import Hits
from retrieval_client.milvus import Milvus
from retrieval_client.searches import Searches, most_together
from retrieval_client.translate import milvus_errors
from retrieval_contract.errors import (
    CatalogError,
    CatalogUnavailable,
    ContractError,
    DeadlineExceeded,
)
from retrieval_contract.tensors import Array
from tests.conftest import product_row

RELEASE, DIM, ROWS = "0123456789abcdef", 16, 300
Found = list[list[Hit]]


class Counted(Collection):
    """The real one; remembers how many vectors each call had, and can hold or refuse a call."""

    def __init__(self, of: Collection) -> None:
        super().__init__(of.milvus, of.info)
        self.calls: list[int] = []
        self.passes = threading.Semaphore(1000)
        """One is taken by each call."""
        self.most = 1000

    def search(
        self, vectors: Array, ask: Ask | None = None, deadline: Deadline | None = None
    ) -> Found:
        self.calls.append(len(vectors))
        assert self.passes.acquire(timeout=10)
        if len(vectors) > self.most:
            raise CatalogError("too large together")
        return super().search(vectors, ask, deadline)


@pytest.fixture(scope="module")
def filled(backend: Callable[[], Settings]) -> Iterator[Collection]:
    """Rows with random vectors; nobody writes to it."""
    with Catalog(backend()) as catalog:
        collection = catalog.prepare(RELEASE, DIM)
        collection.upsert([product_row(f"p{n}", DIM, n) for n in range(ROWS)])
        collection.flush()
        assert collection.count() == ROWS  # and so every search sees them
        yield collection


@pytest.fixture
def counted(filled: Collection) -> Counted:
    return Counted(filled)


def vector_of(seed: int) -> Array:
    return product_row("", DIM, seed).vector[None]


def asks(
    pool: ThreadPoolExecutor,
    searches: Searches,
    collection: Collection,
    vectors: Array,
    seconds: float = 20.0,
    ask: Ask | None = None,
) -> Future[Found]:
    return pool.submit(searches, collection, vectors, ask or Ask(5), Deadline(seconds))


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def waiting(searches: Searches) -> int:
    return sum(line.callers for line in searches._lines.values())


def test_each_gets_what_it_would_get_alone(counted: Counted) -> None:
    queries = [np.concatenate([vector_of(n), vector_of(n + 1)][: 1 + n % 2]) for n in range(200)]
    alone = [counted.search(query, Ask(5)) for query in queries]
    counted.calls.clear()
    searches = Searches()
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda q: searches(counted, q, Ask(5), Deadline(60)), queries))
    for mine, expected in zip(found, alone, strict=True):
        for hits, others in zip(mine, expected, strict=True):
            assert [h.id for h in hits] == [h.id for h in others]
            assert [h.score for h in hits] == pytest.approx([h.score for h in others], abs=1e-6)
    assert sum(counted.calls) == sum(map(len, queries)), "nothing twice, nothing lost"
    assert len(counted.calls) < len(queries) / 3
    assert not searches._lines, "nobody stands in line, so there is none"


def test_a_lone_caller_goes_at_once_and_alone(counted: Counted) -> None:
    searches = Searches()
    for n in range(3):
        searches(counted, vector_of(n), Ask(5), Deadline(20))
    assert counted.calls == [1, 1, 1]


def test_who_asks_something_else_does_not_travel_along(counted: Counted) -> None:
    searches = Searches()
    counted.passes = threading.Semaphore(0)
    questions = [Ask(5), Ask(6), Ask(5, "bucket < 500"), Ask(5, thumbnails=True)]
    with ThreadPoolExecutor(4) as pool:
        calls = [asks(pool, searches, counted, vector_of(1), ask=ask) for ask in questions]
        until(lambda: len(counted.calls) == 4)
        counted.passes.release(20)
        found = [call.result()[0] for call in calls]
    assert list(map(len, found)) == [5, 6, 5, 5]


def test_who_has_no_time_left_waits_no_longer_and_costs_nobody(counted: Counted) -> None:
    searches = Searches()
    counted.passes = threading.Semaphore(0)
    with ThreadPoolExecutor(4) as pool:
        alone, leader = (asks(pool, searches, counted, vector_of(n)) for n in (1, 2))
        until(lambda: counted.calls == [1, 1])
        started = time.monotonic()
        hasty = asks(pool, searches, counted, vector_of(3), 0.2)
        patient = asks(pool, searches, counted, vector_of(4))
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.2 s"):
            hasty.result()
        assert time.monotonic() - started < 2
        counted.passes.release(20)
        found = [call.result()[0][0].id for call in (alone, leader, patient)]
        assert found == ["p1", "p2", "p4"]


def test_a_search_that_milvus_does_not_finish_in_time_is_told_from_a_milvus_that_is_away(
    counted: Counted,
) -> None:
    many = np.concatenate([vector_of(n) for n in range(1000)])
    with pytest.raises(DeadlineExceeded, match="no answer within 1e-09 s"):
        counted.search(many, Ask(100), Deadline(1e-9))
    nobody = Milvus(Settings(milvus="http://127.0.0.1:1"))
    away = Collection(nobody, CollectionInfo("products", RELEASE, DIM))
    searches = Searches()
    with ThreadPoolExecutor(3) as pool:
        calls = [asks(pool, searches, away, vector_of(n), 30.0) for n in range(3)]
        for call in calls:
            with pytest.raises(CatalogUnavailable, match="see that it runs"):
                call.result()


def test_a_search_that_the_server_gave_up_is_late_and_not_broken() -> None:
    """In a race with pymilvus's own timeout; the words are of Milvus 2.3."""

    def told(deadline: Deadline | None) -> None:
        with milvus_errors("http://127.0.0.1:1", "search", deadline):
            raise MilvusException(65535, "[search] Retry timeout: 0.1s, message=context Done")

    with pytest.raises(DeadlineExceeded, match=r"search: no answer within 0\.1 s"):
        told(Deadline(0.1))
    with pytest.raises(CatalogError, match="context Done"):
        told(None)


def test_while_the_server_hangs_the_hasty_are_told_and_the_patient_answered(
    filled: Collection, request: pytest.FixtureRequest
) -> None:
    """Of a merged call, the most impatient's end is not the others'."""
    if filled.milvus.lite:
        pytest.skip("Milvus Lite is in this process: it cannot hang while we do not")
    server: MilvusServer = request.getfixturevalue("milvus_server")
    counted, searches = Counted(filled), Searches()
    counted.passes = threading.Semaphore(0)
    with ThreadPoolExecutor(4) as pool:
        first = asks(pool, searches, counted, vector_of(1))
        until(lambda: counted.calls == [1])
        hasty = asks(pool, searches, counted, vector_of(2), 1.0)
        patient = [asks(pool, searches, counted, vector_of(n)) for n in (3, 4)]
        until(lambda: waiting(searches) == 4)
        counted.passes.release()
        first.result()
        os.kill(server.pid, signal.SIGSTOP)
        counted.passes.release(10)
        try:
            with pytest.raises(DeadlineExceeded):
                hasty.result()
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert [call.result()[0][0].id for call in patient] == ["p3", "p4"]


def test_a_vector_that_is_none_is_refused_before_it_meets_others(counted: Counted) -> None:
    searches = Searches()
    for bad in (np.full((1, DIM), np.nan, np.float32), np.zeros((1, DIM), np.float32)):
        with pytest.raises(ContractError, match="vector 0: expected a unit vector"):
            searches(counted, bad, Ask(5), Deadline(5))
    with pytest.raises(ContractError, match=rf"expected \(rows, {DIM}\)"):
        searches(counted, np.ones((1, DIM - 1), np.float32), Ask(5), Deadline(5))
    assert not counted.calls


def test_an_error_of_the_question_is_theirs_who_ask_it(counted: Counted) -> None:
    searches = Searches()
    with ThreadPoolExecutor(8) as pool:
        wrong = [
            asks(pool, searches, counted, vector_of(n), ask=Ask(5, "bucket <")) for n in range(4)
        ]
        right = [asks(pool, searches, counted, vector_of(n)) for n in range(4)]
        assert [call.result()[0][0].id for call in right] == [f"p{n}" for n in range(4)]
        errors = [call.exception() for call in wrong]
    assert all(isinstance(error, CatalogError) for error in errors)
    assert len(set(map(id, errors))) == 4, "each raises its own"


def test_what_fails_together_is_asked_in_smaller_company(counted: Counted) -> None:
    searches = Searches()
    counted.passes = threading.Semaphore(0)
    counted.most = 2
    with ThreadPoolExecutor(8) as pool:
        calls = [asks(pool, searches, counted, vector_of(n)) for n in range(2)]
        until(lambda: counted.calls == [1, 1])
        calls += [asks(pool, searches, counted, vector_of(n)) for n in range(2, 8)]
        until(lambda: waiting(searches) == 8)
        counted.passes.release(20)
        assert [call.result()[0][0].id for call in calls] == [f"p{n}" for n in range(8)]
    assert counted.calls[2] == 6


def test_a_batch_of_one_caller_travels_in_calls_that_a_server_takes(
    filled: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, calls = filled.milvus.client, list[int]()
    search = client.search

    def counted(name: str, data: list, **more: object) -> object:
        calls.append(len(data))
        return search(name, data, **more)

    monkeypatch.setattr(client, "search", counted)
    monkeypatch.setattr("retrieval_client.collection.RESULTS", 50)
    vectors = np.concatenate([vector_of(n) for n in range(25)])
    found = Searches()(filled, vectors, Ask(5), Deadline(60))
    assert calls == [10, 10, 5]
    assert [hits[0].id for hits in found] == [f"p{n}" for n in range(25)]
    monkeypatch.undo()
    if not filled.milvus.lite:  # which takes any number, and a second for a thousand
        many = np.tile(vectors, (700, 1))
        assert len(Searches()(filled, many, Ask(1), Deadline(60))) == len(many) > 16384


def test_what_is_refused_of_a_batch_is_asked_in_parts(counted: Counted) -> None:
    counted.most = 6
    vectors = np.concatenate([vector_of(n) for n in range(20)])
    found = Searches()(counted, vectors, Ask(5), Deadline(60))
    assert [hits[0].id for hits in found] == [f"p{n}" for n in range(20)]
    assert counted.calls == [20, 10, 5, 5, 10, 5, 5]
    with pytest.raises(CatalogError):
        Searches()(counted, vectors, Ask(5, "bucket <"), Deadline(60))
    assert counted.calls[7:] == [20, 10, 5, 2, 1], "the first that is refused alone is everybody's"


def test_the_benchmark_times_all_that_a_client_does(filled: Collection) -> None:
    """With the same answer as by a call alone."""
    settings = filled.milvus._settings
    with ProductSearch(settings) as search:
        assert search.catalog.serving().name == filled.name
        found = ways(search)
        hits = found.client(vector_of(7))
        assert isinstance(hits, Hits)
        assert [hit.id for hit in hits] == [hit.id for hit in found.alone(vector_of(7))[0]]
        said = measured(search, np.concatenate([vector_of(n) for n in range(64)]), 1, 0.2)
    assert said.keys() == MEANINGS.keys()
    show({"here": said})


def test_an_answer_has_bounds_however_many_ask() -> None:
    assert [most_together(Ask(limit)) for limit in (10, 1000, 16384)] == [32, 8, 1]
    assert most_together(Ask(100, thumbnails=True)) == 5
