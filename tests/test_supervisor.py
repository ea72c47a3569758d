"""What dies or hangs under load comes back by itself, and nobody gets a wrong vector."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from deploy.supervisor import Stub, stubs_of
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


class Load:
    """Callers that never stop asking; when each failed, and how many answers were wrong."""

    def __init__(self, settings: Settings) -> None:
        self.failed: list[float] = []
        self.answered: list[float] = []
        self.wrong = 0
        self.over = threading.Event()
        self.encoder = Encoder(settings)
        look = photo((200, 20, 20))
        self.asks: list[Callable[[], np.ndarray]] = [
            *(lambda text=text: self.encoder.encode_queries([text]).vectors for text in TEXTS[:3]),
            lambda: self.encoder.encode_products(["a red shirt"], [look]).vectors,
        ]
        self.right = [ask() for ask in self.asks]
        self.threads = [
            threading.Thread(target=self.run, args=pair)
            for pair in zip(self.asks, self.right, strict=True)
        ]

    def run(self, ask: Callable[[], np.ndarray], right: np.ndarray) -> None:
        while not self.over.is_set():
            try:
                vectors = ask()
            except RetrievalError:
                self.failed.append(time.monotonic())
                time.sleep(0.05)
                continue
            self.answered.append(time.monotonic())
            self.wrong += bool(np.abs(vectors - right).max() > 1e-4)


@contextmanager
def load(serving: Serving) -> Iterator[Load]:
    asking = Load(Settings(triton=serving.address, timeout_s=2.0))
    for thread in asking.threads:
        thread.start()
    try:
        yield asking
    finally:
        asking.over.set()
        for thread in asking.threads:
            thread.join()
        asking.encoder.close()


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


MODELS = ["query_encoder", "product_preprocessor", "product_tower"]
STUBS = 6
"""The preprocessor has two; tokenizer and tower of the queries run beside their encoder."""


@pytest.mark.parametrize("model", MODELS)
def test_a_killed_model_is_back_within_seconds(serving: Serving, model: str) -> None:
    with load(serving) as asking:
        time.sleep(0.5)
        os.kill(stub_of(serving, model).pid, signal.SIGKILL)
        killed = time.monotonic()
        time.sleep(BACK_S + 3)
        after = [at for at in asking.failed if at > killed + BACK_S]
    assert asking.wrong == 0
    assert after == [], f"failed {[round(at - killed, 1) for at in after]} s after the kill"
    assert any(at > killed + BACK_S for at in asking.answered)
    assert f"supervisor: {model}: a process of it had died; loaded again" in serving.log.read_text()


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
