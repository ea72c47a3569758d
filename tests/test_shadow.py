"""Live queries are asked of the candidate as well, and nobody who searches need know."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.server import LOOPBACK, choose_ports, triton
from retrieval_client import AsyncProductSearch, Encoders, ProductSearch, Settings
from retrieval_client.__main__ import main
from retrieval_client.catalog import Catalog, Role
from retrieval_client.collection import Ask
from retrieval_client.options import Options
from retrieval_client.push import Push
from retrieval_client.shadow import WAITING, Shadow
from retrieval_client.sources import SourceRow
from retrieval_contract.errors import RetrievalError
from tests.conftest import ROOT, product_row
from tests.tiny import tiny_release

TITLES = ["red dress", "blue shirt", "white shoes", "green mug", "black watch"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Triton over a small release."""
    release = tiny_release(ROOT / "build" / "test-releases")
    log = tmp_path_factory.mktemp("triton") / "log"
    with log.open("w") as file, triton(release, log=file) as server:
        yield server.grpc_address


@pytest.fixture
def settings(address: str, tmp_path: Path) -> Settings:
    """An empty catalog."""
    return Settings(triton=address, milvus=str(tmp_path / "catalog.db"), retry_s=5.0)


@pytest.fixture
def shadowed(settings: Settings) -> Settings:
    """Every search; the candidate is of the same release, under another name, and lacks two
    products."""
    settings = settings.override(shadow=100)
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        rows = [SourceRow(f"p{i}", title.encode()) for i, title in enumerate(TITLES)]
        Push(settings, encoders, catalog).run(rows)
        other = settings.override(collection="other")
        with Catalog(other) as beside:
            Push(other, encoders, beside).run(rows[:3])
            catalog.point(beside.serving().name, Role.CANDIDATE)
    return settings


def test_overlap_and_times_are_reported(shadowed: Settings) -> None:
    with ProductSearch(shadowed) as search:
        for title in TITLES:
            assert len(search(title)) == 5
        report = search.shadow.report(wait_s=10)
    assert (report.asked, report.answered, report.failed, report.left_out) == (5, 5, 0, 0)
    assert report.overlap == pytest.approx(3 / 5)
    assert report.latency_ratio is not None
    assert report.latency_ratio > 0


def test_the_command_line_says_it(shadowed: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: a store of Milvus Lite belongs to one."""
    flags = ["--triton", shadowed.triton, "--milvus", shadowed.milvus, "--json"]
    with pytest.raises(SystemExit):
        main(["search", *flags, "--shadow", "100", *TITLES])
    said = json.loads(capsys.readouterr().out)
    assert len(said["searches"]) == len(TITLES)
    assert (said["shadow"]["asked"], said["shadow"]["answered"]) == (1, 1), "one call, one search"


def test_without_a_candidate_or_a_share_nothing_is_asked(shadowed: Settings) -> None:
    with Catalog(shadowed) as catalog:
        catalog.unpoint(Role.CANDIDATE)
    with ProductSearch(shadowed) as search:
        assert search("red dress")
        report = search.shadow.report(wait_s=10)
    assert (report.asked, report.left_out, report.overlap) == (1, 1, None)
    with ProductSearch(shadowed.override(shadow=0)) as search:
        assert search("red dress")
        assert search.shadow.report().asked == 0
    with pytest.raises(RetrievalError, match="shadow: expected a percentage"):
        shadowed.override(shadow=101)


def test_a_candidate_that_nobody_serves_costs_no_live_answer(shadowed: Settings) -> None:
    with Catalog(shadowed) as catalog:
        strange = Catalog(shadowed.override(collection="strange"))
        collection = strange.prepare("feedfacefeedface", 8)
        collection.upsert([product_row("p0", 8)])
        catalog.point(collection.name, Role.CANDIDATE)
    with ProductSearch(shadowed) as search:
        for title in TITLES:
            assert len(search(title)) == 5
        report = search.shadow.report(wait_s=10)
    assert (report.asked, report.failed, report.answered) == (5, 5, 0)
    assert "holds vectors of release feedfacefeedface" in report.last_error


def test_a_candidate_that_hangs_holds_nobody_up(settings: Settings) -> None:
    """An address that takes connections and says nothing is not needed: here Milvus is away."""
    nobody = f"http://{LOOPBACK}:{choose_ports(LOOPBACK).grpc}"
    shadow = Shadow(settings.override(shadow=100, milvus=nobody, timeout_s=1.0))
    start = time.monotonic()
    for _ in range(WAITING + 50):
        shadow.offer(["red dress"], Ask(), [[]], 0.01)
    assert time.monotonic() - start < 0.5
    report = shadow.report(wait_s=3)
    assert report.asked == WAITING + 50
    assert report.left_out >= 40
    assert report.failed >= 1
    shadow.close()
    assert time.monotonic() - start < 10


def test_an_awaited_client_closes_at_once_whatever_its_shadow_waits_for(settings: Settings) -> None:
    async def ask() -> float:
        with socket.create_server((LOOPBACK, 0)) as silent:
            away = f"http://{LOOPBACK}:{silent.getsockname()[1]}"
            async with AsyncProductSearch(settings.override(shadow=100, milvus=away)) as search:
                search.shadow.offer(["red dress"], Options(), [[]], 0.01)
                await asyncio.sleep(0.2)
                started = time.monotonic()
            return time.monotonic() - started

    assert asyncio.run(ask()) < 0.5
