"""The awaited face of the search: the same answers, errors and deadlines."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import get_type_hints

import pytest

from deploy.server import Server
from retrieval_client import AsyncProductSearch, Encoder, ProductRow, ProductSearch, Query, Settings
from retrieval_client.options import OptionFields, Options
from retrieval_contract.errors import (
    ContractError,
    DeadlineExceeded,
    ItemError,
    RetrievalError,
    ServerUnavailable,
)
from retrieval_contract.release import Release

TITLES = [f"{colour} {kind}" for colour in ("red", "blue") for kind in ("shirt", "dress", "mug")]


@pytest.fixture(scope="module")
def filled(
    triton: Server, release: Release, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Settings]:
    """Six titles on Milvus Lite; what Milvus it is makes no difference here."""
    path = tmp_path_factory.mktemp("aio") / "catalog.db"
    settings = Settings(triton=triton.grpc_address, milvus=str(path), timeout_s=60)
    with ProductSearch(settings) as search, Encoder(settings) as encoder:
        stored = search.catalog.prepare(release.release_id, release.vector_dim)
        vectors = encoder.encode_products(TITLES, [b""] * len(TITLES)).vectors
        rows = zip(TITLES, vectors, strict=True)
        stored.upsert([ProductRow(title, title, "hash", vector) for title, vector in rows])
        yield settings


def test_it_has_the_same_face() -> None:
    for name in ("__call__", "many"):
        sync, awaited = (getattr(c, name) for c in (ProductSearch, AsyncProductSearch))
        assert inspect.signature(sync) == inspect.signature(awaited)
        assert inspect.iscoroutinefunction(awaited)


def test_options_are_keyword_arguments_of_the_same_kinds() -> None:
    fields = get_type_hints(OptionFields)
    assert fields == get_type_hints(Options)
    with pytest.raises(TypeError):
        Options(limits=3)
    with pytest.raises(ContractError, match="text_weight"):
        Query("x", text_weight=1.5)


def test_many_are_answered_at_once_and_alike(filled: Settings) -> None:
    async def ask() -> list[object]:
        async with AsyncProductSearch(filled) as search:
            await search.connect()
            alone = search(Query("blue mug", like="red mug"), limit=2, where='id != "blue mug"')
            several = [search(title, limit=3) for title in TITLES * 8]
            wrong = asyncio.gather(search(""), search("x", limit=0), return_exceptions=True)
            return [await alone, await asyncio.gather(*several), await wrong]

    alone, several, wrong = asyncio.run(ask())
    with ProductSearch(filled) as search:
        ids = [[hit.id for hit in search(title, limit=3)] for title in TITLES]
        query = Query("blue mug", like="red mug")
        expected = search(query, limit=2, where='id != "blue mug"')
    assert [hit.id for hit in alone] == [hit.id for hit in expected]
    assert [[hit.id for hit in hits] for hits in several] == ids * 8
    assert [type(error) for error in wrong] == [ItemError, ContractError]


def test_deadlines_hold_also_for_who_waits_for_a_thread(filled: Settings) -> None:
    async def ask() -> float:
        async with AsyncProductSearch(filled, threads=1) as search:
            await search("red mug")
            over = threading.Event()
            search._threads.submit(over.wait, 30)
            started = time.monotonic()
            try:
                with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
                    await search("red mug", timeout_s=0.2)
                return time.monotonic() - started
            finally:
                over.set()
                assert await search("red mug", limit=1), "and the next one is answered"

    assert asyncio.run(ask()) < 2


@pytest.mark.parametrize("timeout_s", [0, -1])
def test_no_time_at_all_is_not_the_default(filled: Settings, timeout_s: float) -> None:
    async def ask() -> None:
        async with AsyncProductSearch(filled) as search:
            await search.many(["red mug"], timeout_s=timeout_s)

    with ProductSearch(filled) as search:
        before = search.encoder.statistics()
        started = time.monotonic()
        for call in (search.many, search.timed):
            with pytest.raises(DeadlineExceeded, match=f"no time left of {timeout_s} s"):
                call(["red mug"], timeout_s=timeout_s)
        with pytest.raises(DeadlineExceeded):
            asyncio.run(ask())
        assert search.encoder.statistics() == before, "nobody was asked"
        encoder = search.encoder
        for encode in (encoder.encode_queries, partial(encoder.encode_products, images=[b""])):
            with pytest.raises(DeadlineExceeded):
                encode(["red mug"], timeout_s=timeout_s)
        assert time.monotonic() - started < 1


def test_who_is_cancelled_leaves_no_trace(filled: Settings) -> None:
    async def ask() -> int:
        async with AsyncProductSearch(filled, threads=1) as search:
            await search.connect()
            over = threading.Event()
            search._threads.submit(over.wait, 30)
            tasks = [asyncio.create_task(search("red mug")) for _ in range(20)]
            await asyncio.sleep(0.05)
            before = search.search.encoder.statistics().requests["query_encoder"]
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(each, asyncio.CancelledError) for each in done)
            over.set()
            await search("blue mug")
            return search.search.encoder.statistics().requests["query_encoder"] - before

    assert asyncio.run(ask()) <= 1, "those who waited for a thread were never asked for"


def test_who_still_awaits_when_it_is_closed_gets_an_error(filled: Settings) -> None:
    """And is not cancelled: nobody did that to his task."""

    async def ask() -> list[object]:
        async with AsyncProductSearch(filled, threads=1) as search:
            over = threading.Event()
            search._threads.submit(over.wait, 30)
            waiting = asyncio.create_task(search("red mug"))
            await asyncio.sleep(0.05)
            search.close()
            over.set()
            return await asyncio.gather(waiting, search("red mug"), return_exceptions=True)

    for error in asyncio.run(ask()):
        assert type(error) is RetrievalError
        assert "closed" in str(error)


def test_a_time_that_is_no_number_is_refused_and_an_endless_one_ends(filled: Settings) -> None:
    with ProductSearch(filled) as search:
        with pytest.raises(ContractError, match="timeout_s"):
            search("red mug", timeout_s=float("nan"))
        assert search("red mug", limit=1, timeout_s=float("inf"))


def test_a_server_that_is_away_is_said(tmp_path: Path, filled: Settings) -> None:
    async def ask() -> None:
        async with AsyncProductSearch(filled.override(triton="127.0.0.1:1")) as search:
            await search("red mug", timeout_s=2)

    with pytest.raises(ServerUnavailable):
        asyncio.run(ask())
