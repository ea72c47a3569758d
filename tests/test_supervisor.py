"""What dies or hangs under load comes back by itself, and nobody gets a wrong vector."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from benchmarks.faults import server_kills, stub_kills
from deploy.beside import run_beside
from deploy.own_http import Done
from deploy.server import Server, triton
from deploy.stubs import Stub, regions, stubs_of
from deploy.supervisor import Restarts, Supervisor
from retrieval_client import Encoder, Settings
from retrieval_client.channel import channel_to
from retrieval_client.wire import request_from_rows
from retrieval_contract import models
from retrieval_contract.errors import DeadlineExceeded, DeployError, RetrievalError
from retrieval_contract.pulse import Pulse, still_s
from tests.conftest import ROOT, UNSHARE, can_unshare, photo
from tests.serving import FREE_PORTS, Serving, serve

BACK_S = 5.0
"""After this no request may fail because of a kill."""
TEXTS = [f"red shoes number {n}" for n in range(24)]


@pytest.fixture(scope="module")
def serving(release_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    log = tmp_path_factory.mktemp("supervised") / "log"
    with serve(release_folder, log, hung_s=5.0) as running:
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
    found = server_kills(release_folder, 1)
    assert (found.wrong, found.late_failures) == (0, 0), found
    assert found.failed > 0


@contextmanager
def supervised(
    release: Path, log: Path, **options: object
) -> Iterator[tuple[Server, Supervisor, list[str]]]:
    """In this process: the server, who looks after it, and what it says."""
    said: list[str] = []
    with log.open("w") as lines, triton(release, log=lines) as server:
        supervisor = Supervisor(server.instance, said.append, **options)
        supervisor.start()
        yield server, supervisor, said
        supervisor.stop()


def test_a_server_that_answers_nothing_is_started_again(
    release_folder: Path, tmp_path: Path
) -> None:
    """It is there, and so are its ports; nothing but an unanswered question shows it."""
    with supervised(release_folder, tmp_path / "log", hung_s=1.0) as (server, _, said):
        hanging = server.process
        os.kill(hanging.pid, signal.SIGSTOP)
        until_said("is started again, with the right vectors", said, within_s=60)
        assert hanging.poll() == -signal.SIGKILL
        with Encoder(Settings(triton=server.grpc_address)) as encoder:
            assert encoder.encode_queries(["red shoes"]).errors == [None]
        assert {path.name for path in regions(server.instance.shm_prefix)}
    assert not list(regions(server.instance.shm_prefix))


def test_what_cannot_start_again_is_given_up(release_folder: Path, tmp_path: Path) -> None:
    """After so many attempts, and with the server's own words; a command beside it ends. Others'
    memory stays."""
    strangers = Path("/dev/shm/retrieval-triton-of-somebody-else")
    strangers.touch()
    try:
        few = Restarts(most=2, pause_s=0.1)
        with supervised(release_folder, tmp_path / "log", restarts=few) as (server, watch, said):
            (repository,) = [a for a in server.instance.args if "--model-repository=" in a]
            for graph in Path(repository.partition("=")[2]).glob("product_tower/*/model.onnx"):
                graph.unlink()
            os.kill(server.process.pid, signal.SIGKILL)
            with pytest.raises(DeployError, match=r"(?s)2 times.* given up.*product_tower") as why:
                run_beside(["sleep", "60"], {}, look=watch.wait)
            assert "model.onnx" in str(why.value)
            assert [line[:30] for line in said] == [
                "Triton is gone (SIGKILL); its ",
                "Triton cannot be started again",
                "Triton cannot be started again",
            ]
            assert not list(regions(server.instance.shm_prefix))
        assert strangers.exists()
    finally:
        strangers.unlink()


@pytest.mark.parametrize("failure", [OSError(12, "Cannot allocate memory"), DeployError("slow")])
def test_starts_that_fail_slowly_are_given_up_too(failure: Exception) -> None:
    """Each takes so long that no window holds many of them."""

    class Dead:
        process, http, words = SimpleNamespace(wait=lambda: 1, pid=0), None, io.StringIO("words")

        def kill(self) -> None:
            pass

        def start(self) -> None:
            raise failure

    said: list[str] = []
    watch = Supervisor(Dead(), said.append, restarts=Restarts(most=3, within_s=0.0, pause_s=0.0))
    with pytest.raises(DeployError, match=r"(?s)started again 3 times, .*given up.*words"):
        watch._start_again()
    assert sum("cannot be started again yet" in line for line in said) == 3


def test_pauses_grow() -> None:
    assert [Restarts().pause_after(n) for n in range(5)] == [0, 1, 2, 4, 8]


NAMESPACE = can_unshare("-m")
TOO_MUCH = """
import io, sys, time
import numpy as np
from PIL import Image
from retrieval_client import Encoder, Settings
from retrieval_contract.errors import ServerError
noise, buffer = np.random.default_rng(0).integers(0, 255, (1200, 1200, 3), np.uint8), io.BytesIO()
Image.fromarray(noise).save(buffer, "PNG")
with Encoder(Settings.from_env()) as encoder:
    assert encoder.encode_products([""], [buffer.getvalue()]).errors == [None]
    time.sleep(2)
    try:
        encoder.encode_products([""] * 4, [buffer.getvalue()] * 4)
    except ServerError as exc:
        print("refused:", exc, flush=True)
    assert encoder.encode_queries(["red shoes"]).errors == [None]
    assert encoder.encode_products(["red shoes"], [b""]).errors == [None]
"""


@pytest.mark.skipif(not NAMESPACE, reason="no mount namespaces for this user")
def test_full_shared_memory_is_said_and_survived(release_folder: Path, tmp_path: Path) -> None:
    """On 16 MiB: what is too large fails, what is small goes on, and the log says why."""
    small = 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"'
    command = [*UNSHARE, "-m", "sh", "-c", small, "sh", sys.executable, "-m", "deploy.local"]
    command += ["--release", str(release_folder), *FREE_PORTS]
    command += ["--run", sys.executable, "-c", TOO_MUCH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused: " in done.stdout
    assert "Failed to increase the shared memory pool size" in done.stdout
    assert re.search(r"supervisor: /dev/shm is full \(\d MiB of 16 MiB are left\)", done.stderr)


def test_one_of_two_copies_that_is_stopped_is_killed(serving: Serving) -> None:
    """Whoever asks is answered by the other one, the supervisor as well."""
    model = "product_preprocessor"
    copies = [stub for stub in stubs_of(server_group(serving)) if stub.model == model]
    assert len(copies) == 2
    os.kill(copies[0].pid, signal.SIGSTOP)
    serving.said(rf"({model} hangs: killed)", within_s=30)
    serving.said(rf"({model}: a process of it had died; loaded)", within_s=20)
    assert serving.log.read_text().count("hangs: killed") == 1, "the other one got on"
    with Encoder(Settings(triton=serving.address)) as encoder:
        assert encoder.encode_products(["red shoes"], [b""]).errors == [None]
    now = [stub for stub in stubs_of(server_group(serving)) if stub.model == model]
    assert len(now) == 2
    assert copies[0] not in now


def test_a_process_says_when_it_last_got_on() -> None:
    ours, pulse = os.getpid(), Pulse()
    assert still_s(ours) == 0, "nobody can tell"
    pulse.start()
    time.sleep(1.0)
    assert still_s(ours) < 0.8, "who has nothing to do gets on"
    pulse.moved()
    time.sleep(1.0)
    assert still_s(ours) > 0.9
    pulse.rest()
    time.sleep(0.5)
    assert still_s(ours) < 0.8
    pulse.close()


def test_models_that_hang_are_killed_and_loaded_again(serving: Serving) -> None:
    """The tower of the products hides behind a preprocessor that lets everybody in."""
    hanging = [stub_of(serving, model) for model in ("query_encoder", "product_tower")]
    for stub in hanging:
        os.kill(stub.pid, signal.SIGSTOP)
    for stub in hanging:
        serving.said(rf"({stub.model} hangs: killed)", within_s=30)
    end = time.monotonic() + 20
    with Encoder(Settings(triton=serving.address, timeout_s=2.0)) as encoder:
        while True:
            try:
                assert encoder.encode_queries(["red shoes"]).errors == [None]
                assert encoder.encode_products(["red shoes"], [b""]).errors == [None]
                break
            except RetrievalError:
                assert time.monotonic() < end, serving.log.read_text()[-2000:]
    for stub in hanging:
        assert stub_of(serving, stub.model).pid != stub.pid


def test_a_run_that_goes_on_is_a_sign_of_life_and_one_that_is_over_is_none() -> None:
    before = Done(answered=7, runs=3, pictures=40)
    assert Done(8, 3, 40).more_than(before)
    assert Done(7, 3, 41).more_than(before)
    assert not Done(7, 4, 80).more_than(before), "what comes after it may hang"
    assert not before.more_than(before)


def until_said(what: str, said: list[str], within_s: float = 20) -> None:
    """Wait for a line with these words."""
    end = time.monotonic() + within_s
    while not any(what in line for line in said):
        assert time.monotonic() < end, said
        time.sleep(0.1)


MUTE = """
from retrieval_contract.serving import OnnxQueryEncoder, pb_utils
class TritonPythonModel(OnnxQueryEncoder):
    def execute(self, requests):
        def said(request):
            return pb_utils.get_input_tensor_by_name(request, "query").as_numpy().tolist()
        super().execute([request for request in requests if said(request) != [[b"say nothing"]]])
    def compute(self, *arrays):
        while [b"loop for ever"] in arrays[0].tolist():
            pass
        if [b"break"] in arrays[0].tolist():
            self.graph.runtime = None  # so that each run from now on raises
        return super().compute(*arrays)
"""
SLOW = """
import threading
from retrieval_contract.serving import pb_utils
class Slow(TritonPythonModel):
    def compute(self, *arrays):
        while [b"loop for ever"] in arrays[0].tolist():
            pass
        return super().compute(*arrays)
    def execute(self, requests):
        def said(request):
            return pb_utils.get_input_tensor_by_name(request, "title").as_numpy().tolist()
        slow = [request for request in requests if said(request) == [[b"take your time"]]]
        threading.Timer(1.7, super().execute, (slow,)).start()
        super().execute([request for request in requests if request not in slow])
TritonPythonModel = Slow
"""


@pytest.fixture(scope="module")
def odd(
    release_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Settings, list[str]]]:
    """A server that never answers one query and is slow with one product; what its supervisor said.

    A model that gives None for a request: Triton lets its caller wait for ever.
    """
    place = tmp_path_factory.mktemp("odd")
    release = place / release_folder.resolve().name
    shutil.copytree(release_folder.resolve(), release, copy_function=os.symlink)
    changes = {"query_encoder": lambda code: MUTE, "product_preprocessor": lambda code: code + SLOW}
    for model, changed in changes.items():
        (path,) = release.glob(f"model_repository/{model}/*/model.py")
        code = path.read_text()
        path.unlink()
        path.write_text(changed(code))
    with supervised(release, place / "log", hung_s=1.0) as (server, _, said):
        yield Settings(triton=server.grpc_address, timeout_s=3.0), said


def test_a_reply_that_never_comes_costs_its_caller_alone(odd: tuple[Settings, list[str]]) -> None:
    settings, said = odd
    with Encoder(settings) as waiting, Encoder(settings) as others:
        with ThreadPoolExecutor(1) as pool:
            began = time.monotonic()
            mute = pool.submit(waiting.encode_queries, ["say nothing"])
            while not mute.done():
                assert others.encode_queries(["red shoes"]).errors == [None]
            with pytest.raises(DeadlineExceeded, match="3"):
                mute.result()
        assert time.monotonic() - began < 5
    assert not said, "nothing hangs: whoever else asks is answered"


def test_an_answer_that_takes_most_of_the_time_is_taken(odd: tuple[Settings, list[str]]) -> None:
    """And not given up for a second attempt, which would have less time for as much."""
    with Encoder(odd[0]) as encoder:
        right = encoder.encode_products(["red shoes"], [b""], timeout_s=30.0).vectors
        began = time.monotonic()
        slow = encoder.encode_products(["take your time"], [b""])
        assert 1.7 < time.monotonic() - began < 3.0
        assert slow.errors == [None]
        again = encoder.encode_products(["red shoes"], [b""]).vectors
        assert np.abs(again - right).max() < 1e-5
        with pytest.raises(DeadlineExceeded):
            encoder.encode_products(["take your time"], [b""], timeout_s=1.0)
        assert time.monotonic() - began < 5


def test_a_model_that_loops_is_killed_and_loaded_again(odd: tuple[Settings, list[str]]) -> None:
    """It goes on letting everybody in, and answers nobody."""
    settings, said = odd
    with Encoder(settings) as looping, pytest.raises(RetrievalError):
        looping.encode_queries(["loop for ever"])
    until_said("query_encoder: a process of it had died; loaded", said)
    assert "query_encoder hangs: killed" in said
    with Encoder(settings) as encoder:
        assert encoder.encode_queries(["red shoes"]).errors == [None]


def test_one_of_two_copies_that_loops_is_killed(odd: tuple[Settings, list[str]]) -> None:
    settings, said = odd
    columns = {models.TITLE.name: [b"loop for ever"], models.IMAGE.name: [b""]}
    request = request_from_rows(models.PRODUCT_ENCODER, columns)
    with channel_to(settings) as channel, Encoder(settings) as others:
        looping = GRPCInferenceServiceStub(channel).ModelInfer.future(request, timeout=12)
        until_said("product_preprocessor: a process of it had died; loaded", said)
        assert looping.exception()
        assert others.encode_products(["red shoes"], [b""]).errors == [None]
    assert said.count("product_preprocessor hangs: killed") == 1


def test_a_model_that_fails_every_request_is_killed(odd: tuple[Settings, list[str]]) -> None:
    """It gets nothing done, however often it begins."""
    settings, said = odd
    del said[:]
    with Encoder(settings) as encoder:
        with pytest.raises(RetrievalError, match="cannot run"):
            encoder.encode_queries(["break"])
        until_said("query_encoder: a process of it had died; loaded", said)
        assert encoder.encode_queries(["red shoes"]).errors == [None]


def test_a_busy_server_is_left_alone(serving: Serving) -> None:
    """Minutes of queue are no hang, nor are large pictures: as long as work gets done."""
    end = time.monotonic() + 20
    while len(before := {stub.pid for stub in stubs_of(server_group(serving))}) < STUBS:
        assert time.monotonic() < end, f"a test before killed what is still away: {before}"
        time.sleep(0.1)
    pictures = [photo((n, 0, 0), size=(2000, 3000)) for n in range(16)]
    began, hung_s = time.monotonic(), 5.0
    with (
        Encoder(Settings(triton=serving.address, timeout_s=60)) as encoder,
        ThreadPoolExecutor(6) as pool,
    ):
        while time.monotonic() < began + 1.5 * hung_s:
            calls = [pool.submit(encoder.encode_products, [""] * 16, pictures) for _ in range(6)]
            assert all(call.result().errors == [None] * 16 for call in calls)
    after = {stub.pid for stub in stubs_of(server_group(serving))}
    said = re.findall("^supervisor: (.*)", serving.log.read_text(), re.MULTILINE)
    assert after == before, said
