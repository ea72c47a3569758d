"""What dies or hangs under load comes back by itself, and nobody gets a wrong vector."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults import server_kills, stub_kills
from deploy.stubs import Stub, stubs_of
from retrieval_client import Encoder, Settings
from retrieval_contract.errors import RetrievalError
from tests.conftest import photo
from tests.serving import Serving, serve

BACK_S = 5.0
"""After this no request may fail because of a kill."""
TEXTS = [f"red shoes number {n}" for n in range(24)]


@pytest.fixture(scope="module")
def serving(release_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    log = tmp_path_factory.mktemp("supervised") / "log"
    with serve(release_folder, log, hung_s=2.0) as running:
        running.address  # noqa: B018 (waits until it is ready)
        yield running


def server_group(serving: Serving) -> int:
    """The process group of Triton itself."""
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = line.read_text(errors="replace")
            if "bin/tritonserver\0" in text and serving.scratch.name in text:
                return os.getpgid(int(line.parent.name))
        except OSError:
            continue
    raise AssertionError("no tritonserver runs")


def stub_of(serving: Serving, model: str) -> Stub:
    return next(stub for stub in stubs_of(server_group(serving)) if stub.model == model)


STUBS = 6
"""The preprocessor has two; tokenizer and tower of the queries run beside their encoder."""


def test_killed_models_are_back_within_seconds(release_folder: Path) -> None:
    """One process after the other, of every model."""
    found = stub_kills(release_folder, 3)
    assert found.wrong == 0
    assert found.failed > 0, "a kill that nobody notices proves nothing"
    assert found.late_failures == 0, found
    assert found.answered > 100


def test_a_killed_server_is_back_by_itself(release_folder: Path) -> None:
    found = server_kills(release_folder, 2)
    assert (found.wrong, found.late_failures) == (0, 0), found
    assert found.failed > 0


def test_a_model_that_hangs_is_killed_and_loaded_again(serving: Serving) -> None:
    hanging = stub_of(serving, "query_encoder")
    os.kill(hanging.pid, signal.SIGSTOP)
    serving.said(r"(query_encoder hangs: killed)", within_s=20)
    end = time.monotonic() + 20
    with Encoder(Settings(triton=serving.address, timeout_s=2.0)) as encoder:
        while True:
            try:
                assert encoder.encode_queries(["red shoes"]).errors == [None]
                break
            except RetrievalError:
                assert time.monotonic() < end, serving.log.read_text()[-2000:]
    assert stub_of(serving, "query_encoder").pid != hanging.pid


def test_a_busy_server_is_left_alone(serving: Serving) -> None:
    """Minutes of queue are no hang: as long as work gets done nobody is killed."""
    end = time.monotonic() + 20
    while len(before := {stub.pid for stub in stubs_of(server_group(serving))}) < STUBS:
        assert time.monotonic() < end, "what a test before killed is still away"
        time.sleep(0.1)
    pictures = [photo((n, 0, 0), size=(2000, 3000)) for n in range(16)]
    with Encoder(Settings(triton=serving.address, timeout_s=60)) as encoder:
        threads = [
            threading.Thread(target=encoder.encode_products, args=([""] * 16, pictures))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    after = {stub.pid for stub in stubs_of(server_group(serving))}
    assert after == before, (stubs_of(server_group(serving)), serving.log.read_text()[-1500:])
