"""Starting and stopping the real server: readable errors, drained exits, clients that recover."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deploy import stopping
from deploy.logs import LastWords
from deploy.server import LOOPBACK, choose_ports, triton
from deploy.supervisor import say
from deploy.wheel import SERVER_PYTHON, find_wheel
from retrieval_client import Encoder, Settings
from retrieval_contract.errors import DeployError, ServerUnavailable
from tests.conftest import photo
from tests.serving import Serving, serve


def test_a_missing_environment_is_said(tmp_path: Path, release_folder: Path) -> None:
    with (
        pytest.raises(DeployError, match="no server environment there; run `make setup`"),
        triton(release_folder, server_python=tmp_path / "python"),
    ):
        pass


def test_a_missing_wheel_is_said(release_folder: Path) -> None:
    """The client environment has no Triton."""
    with (
        pytest.raises(DeployError, match="nvidia-pytriton is not installed"),
        triton(release_folder, server_python=Path(sys.executable)),
    ):
        pass


def test_a_missing_libpython_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ldd` finds the library on this machine: hide it as a slim distribution would."""
    real = subprocess.run

    def without(args: list, **kwargs: object) -> subprocess.CompletedProcess:
        done = real(args, **kwargs)
        if "stub" in str(args[1]):
            done.stdout = "\tlibpython3.11.so.1.0 => not found\n"
        return done

    monkeypatch.setattr(subprocess, "run", without)
    with pytest.raises(DeployError, match=r"stub .*lacks \['libpython3.11.so.1.0'\].*apt-get inst"):
        find_wheel(SERVER_PYTHON)


@pytest.fixture
def torn_wheel(tmp_path: Path) -> Path:
    """An interpreter whose environment holds Triton's binary without the libraries beside it."""
    home = tmp_path / "site" / "pytriton" / "tritonserver"
    (home / "bin").mkdir(parents=True)
    shutil.copy(find_wheel(SERVER_PYTHON).triton / "bin" / "tritonserver", home / "bin")
    stub = home / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.touch()
    return python_that_says(tmp_path, "3.11")


def python_that_says(folder: Path, version: str) -> Path:
    """What `find_wheel` asks an interpreter, answered by a script."""
    answer = {"site": str(folder / "site"), "version": version, "libdir": ""}
    path = folder / f"python{version}"
    path.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    path.chmod(0o755)
    return path


def test_libraries_that_the_server_lacks_are_said(torn_wheel: Path) -> None:
    with pytest.raises(DeployError, match=r"tritonserver .*lacks .*libtritonserver.*apt-get inst"):
        find_wheel(torn_wheel)


def test_a_python_without_a_stub_is_said(torn_wheel: Path) -> None:
    with pytest.raises(DeployError, match=r"Python 3.13: .* stubs for \['3.11'\] only"):
        find_wheel(python_that_says(torn_wheel.parent, "3.13"))


def test_an_interpreter_that_cannot_answer_is_said(tmp_path: Path) -> None:
    mute = tmp_path / "python"
    mute.write_text("#!/bin/sh\nexit 3\n")
    mute.chmod(0o755)
    with pytest.raises(DeployError, match="does not run Python; give another --server-python"):
        find_wheel(mute)


def test_a_taken_port_is_said() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DeployError, match=f"gRPC port {port} .* choose another"):
            choose_ports(LOOPBACK, grpc=port)


@pytest.mark.parametrize("hosts", [("::1", None), (LOOPBACK, "::")])
def test_an_address_of_ipv6_is_refused(hosts: tuple[str, str | None]) -> None:
    with pytest.raises(DeployError, match="expected an IPv4 address or a name, got ::"):
        choose_ports(hosts[0], http_host=hosts[1])


def test_free_ports_differ() -> None:
    ports = choose_ports(LOOPBACK)
    assert len({ports.grpc, ports.http, ports.metrics}) == 3


def test_a_server_that_cannot_load_says_why(release_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(release_folder, broken, symlinks=True)
    model = next(broken.glob("model_repository/query_tower/*/model.onnx"))
    model.chmod(0o644)
    model.write_bytes(b"not a graph")
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(DeployError, match=r"(?s)exited with code 1.*query_tower"),
        triton(broken, log=log),
    ):
        pass


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (["I1 table", "E0102 no model", "I2 table"], ["E0102 no model"]),
        (["tritonserver: cannot open shared object file"] * 2, ["tritonserver: cannot open"] * 2),
        ([str(i) for i in range(50)], [str(i) for i in range(30, 50)]),
    ],
    ids=["telling", "no_line_tells", "only_the_last"],
)
def test_last_words_are_the_telling_lines_else_the_last(lines: list[str], kept: list[str]) -> None:
    """Such as the dynamic linker's, which have no form of Triton's."""
    code = f"print({chr(10).join(lines)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.wait()
    log = io.StringIO()
    said = LastWords(process, log).read().splitlines()
    assert [line[: len(start)] for line, start in zip(said, kept, strict=True)] == kept
    assert log.getvalue().splitlines() == lines


@pytest.mark.parametrize("gpu", [False, True])
def test_what_cuda_complains_of_is_noise_only_without_a_gpu(gpu: bool) -> None:
    line = "E0102 query_tower: unable to create stream: CUDA driver version is insufficient"
    command = [sys.executable, "-c", f"print({line!r})"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process.wait()
    log = io.StringIO()
    assert LastWords(process, log, gpu=gpu).read().strip() == (line if gpu else "")
    assert log.getvalue().strip() == (line if gpu else "")


def test_a_log_that_takes_no_more_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more lines than a pipe holds: whoever stops reading ends who writes."""
    code = "for n in range(20_000): print('a line of the log', n)"
    full = Path("/dev/full").open("w")  # noqa: SIM115 (closing it raises as well)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    words = LastWords(process, full)
    assert process.wait(60) == 0
    assert words.read().endswith("log 19999\n")
    monkeypatch.setattr(sys, "stderr", full)
    say("cannot be written")
    with contextlib.suppress(OSError):
        full.close()


# ── the command, as a user starts and stops it ───────────────────────────────────────────
@pytest.fixture
def serving(release_folder: Path, tmp_path: Path) -> Iterator[Serving]:
    """The command, as a user starts it."""
    with serve(release_folder, tmp_path / "serve.log") as started:
        yield started


TEXTS = [f"a blue summer dress with long sleeves, flowers and pockets, {i}" for i in range(128)]


@dataclass(frozen=True)
class Drained:
    """A stopped server: what each request in flight got, of those that queue and were refused."""

    queries: list[object]
    products: list[object]
    unanswered: int
    exit_code: int
    leftovers: list[object]


def outcome(request: Future, right: np.ndarray) -> object:
    """ "right", "wrong" or the error that the caller got."""
    if (error := request.exception()) is not None:
        return error
    return "right" if np.abs(request.result().vectors - right).max() < 1e-5 else "wrong"


@pytest.fixture(scope="module")
def drained(release_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Drained:
    """SIGTERM while queries wait for their tower and products for their preprocessor."""
    with (
        serve(release_folder, tmp_path_factory.mktemp("drain") / "log") as serving,
        Encoder(Settings(triton=serving.address, timeout_s=60)) as encoder,
        ThreadPoolExecutor(64) as pool,
    ):
        photos = [photo((15 * i, 0, 0), size=(3000, 4000)) for i in range(16)]
        texts, products = (TEXTS,), ([""] * len(photos), photos)
        vectors = encoder.encode_queries(*texts).vectors
        looks = encoder.encode_products(*products).vectors
        queries = [pool.submit(encoder.encode_queries, *texts) for _ in range(24)]
        while True:  # one is being run
            answered = sum(query.done() for query in queries)
            if answered + serving.pending().get("query_encoder", 0) >= len(queries) - 1:
                break
        pictures = [pool.submit(encoder.encode_products, *products) for _ in range(16)]
        while "product_preprocessor" not in serving.pending():
            pass
        serving.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)  # for the launcher to hear it
        unanswered = len(wait([*queries, *pictures], timeout=0).not_done)
        return Drained(
            [outcome(query, vectors) for query in queries],
            [outcome(picture, looks) for picture in pictures],
            unanswered,
            serving.process.wait(60),
            [*serving.leftovers(), *serving.processes()],
        )


def test_stopping_answers_what_is_in_flight(drained: Drained) -> None:
    assert drained.unanswered > 4, "too few were in flight to prove anything"
    assert drained.queries == ["right"] * 24
    assert drained.products == ["right"] * 16


def test_stopping_leaves_nothing(drained: Drained) -> None:
    assert (drained.exit_code, drained.leftovers) == (0, [])


def test_a_stop_does_not_wait_for_callers_that_never_stop(serving: Serving) -> None:
    with Encoder(Settings(triton=serving.address)) as encoder, ThreadPoolExecutor(2) as pool:
        encoder.served()

        def ask() -> None:
            with contextlib.suppress(ServerUnavailable):
                while True:
                    encoder.encode_queries(["again"])

        callers = [pool.submit(ask) for _ in range(2)]
        serving.process.terminate()
        assert serving.process.wait(stopping.QUIET_S + 30) == 0
        assert [caller.exception() for caller in callers] == [None, None]


def test_a_second_ctrl_c_cuts_the_drain_short(serving: Serving) -> None:
    """And still nothing is left behind."""
    with (
        Encoder(Settings(triton=serving.address, timeout_s=60)) as encoder,
        ThreadPoolExecutor(32) as pool,
    ):
        encoder.served()
        requests = [pool.submit(encoder.encode_queries, TEXTS) for _ in range(32)]
        wait(requests, timeout=60, return_when="FIRST_COMPLETED")
        serving.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert serving.process.poll() is None, "it drains"
        serving.process.send_signal(signal.SIGINT)
        assert serving.process.wait(4) == 0
        assert {type(r.exception()) for r in requests} == {type(None), ServerUnavailable}
    assert [*serving.leftovers(), *serving.processes()] == []


def test_two_ctrl_c_while_starting_leave_nothing(serving: Serving) -> None:
    while not serving.processes():
        assert serving.process.poll() is None
    serving.process.send_signal(signal.SIGINT)
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(60) == 0
    assert "serves release" not in serving.log.read_text()
    assert [*serving.leftovers(), *serving.processes()] == []


def test_a_client_recovers_when_the_server_comes_back(release_folder: Path, tmp_path: Path) -> None:
    """Killed without warning, restarted on the same port: the same client object goes on."""
    with (tmp_path / "log").open("w") as log:
        with triton(release_folder, log=log) as server:
            ports, encoder = server.ports, Encoder(Settings(triton=server.grpc_address))
            first = encoder.encode_queries(["red dress"]).vector(0)
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            with pytest.raises(ServerUnavailable, match="start it with `make serve`"):
                encoder.encode_queries(["red dress"])
        with triton(release_folder, ports=ports, log=log), encoder:
            end = time.monotonic() + 5
            while True:
                try:
                    again = encoder.encode_queries(["red dress"]).vector(0)
                    break
                except ServerUnavailable:
                    assert time.monotonic() < end, "the client did not find the server again"
                    time.sleep(0.1)
    assert (first == again).all()


# ── --run: a command beside the server ───────────────────────────────────────────────────
ASK = """import sys
from retrieval_client import Encoder, Settings
Encoder(Settings.from_env()).encode_queries(["x"]).vector(0)
sys.exit(7)"""
STAY = """import os, signal, sys, time
for number in (int(n) for n in sys.argv[1:]):
    signal.signal(number, signal.SIG_IGN)
print("pid", os.getpid(), flush=True)
time.sleep(600)"""


def test_a_command_runs_beside_a_server(release_folder: Path, tmp_path: Path) -> None:
    """`--run` gives the command the address and gives back its exit code."""
    before = set(release_folder.rglob("*"))
    with serve(release_folder, tmp_path / "log", sys.executable, "-c", ASK) as serving:
        assert serving.process.wait(60) == 7, serving.log.read_text()[-2000:]
    assert [*serving.leftovers(), *serving.processes()] == []
    assert set(release_folder.rglob("*")) == before, "a release stays as it was built"


@pytest.mark.parametrize(
    ("stop", "ignored"),
    [(signal.SIGINT, ()), (signal.SIGTERM, (signal.SIGINT, signal.SIGTERM))],
    ids=["ctrl_c", "sigterm_and_a_stubborn_command"],
)
def test_stopping_stops_the_command_and_is_not_success(
    release_folder: Path, tmp_path: Path, stop: signal.Signals, ignored: Sequence[signal.Signals]
) -> None:
    command = [sys.executable, "-c", STAY, *(str(int(number)) for number in ignored)]
    with serve(release_folder, tmp_path / "log", *command) as serving:
        pid = int(serving.said(r"pid (\d+)\n"))
        serving.process.send_signal(stop)
        assert serving.process.wait(60) == 128 + stop
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert [*serving.leftovers(), *serving.processes()] == []


def test_a_command_that_is_not_there_is_said(release_folder: Path, tmp_path: Path) -> None:
    with serve(release_folder, tmp_path / "log", "no-such-program") as serving:
        assert serving.process.wait(60) == 1
    assert "error: --run no-such-program: No such file" in serving.log.read_text()
    assert "Traceback" not in serving.log.read_text()
