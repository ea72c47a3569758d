"""Starting and stopping the real server: readable errors, drained exits, clients that recover."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import local
from retrieval_client import Encoder, Settings
from retrieval_contract.errors import DeployError, ServerUnavailable
from tests.conftest import ROOT


def test_a_missing_environment_is_said(tmp_path: Path, release_folder: Path) -> None:
    with (
        pytest.raises(DeployError, match="no server environment there; run `make setup`"),
        local.triton(release_folder, server_python=tmp_path / "python"),
    ):
        pass


def test_a_missing_wheel_is_said(release_folder: Path) -> None:
    """The client environment has no Triton."""
    with (
        pytest.raises(DeployError, match="nvidia-pytriton is not installed"),
        local.triton(release_folder, server_python=Path(sys.executable)),
    ):
        pass


def test_a_missing_libpython_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ldd` finds the library on this machine: hide it as a slim distribution would."""
    real = subprocess.run

    def without(args: list, **kwargs: object) -> subprocess.CompletedProcess:
        done = real(args, **kwargs)
        if args[0] == "ldd":
            done.stdout = "\tlibpython3.11.so.1.0 => not found\n"
        return done

    monkeypatch.setattr(subprocess, "run", without)
    with pytest.raises(DeployError, match=r"lacks \['libpython3.11.so.1.0'\].*apt-get install"):
        local.find_wheel(local.SERVER_PYTHON)


def test_a_taken_port_is_said() -> None:
    with socket.socket() as taken:
        taken.bind((local.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DeployError, match=f"gRPC port {port} .* choose another"):
            local.choose_ports(local.LOOPBACK, grpc=port)


def test_free_ports_differ() -> None:
    ports = local.choose_ports(local.LOOPBACK)
    assert len({ports.grpc, ports.http, ports.metrics}) == 3


def test_a_server_that_cannot_load_says_why(release_folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(release_folder, broken, symlinks=True)
    model = next(broken.glob("model_repository/query_tower/*/model.onnx"))
    model.chmod(0o644)
    model.write_bytes(b"not a graph")
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(DeployError, match=r"(?s)exited with code 1.*query_tower"),
        local.triton(broken, log=log),
    ):
        pass


SERVE = [sys.executable, "-m", "deploy.local"]
FREE_PORTS = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """The command as a user starts it: its process, gRPC address and log."""
    path = tmp_path / "serve.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [*SERVE, *FREE_PORTS], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield process, wait_for_address(path, process), path
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_stopping_drains_and_leaves_nothing(
    stop: signal.Signals, serving: tuple[subprocess.Popen[bytes], str, Path]
) -> None:
    """Requests in flight are answered; scratch folders and shared memory are gone."""
    process, address, log = serving
    results: list[object] = []
    with Encoder(Settings(triton=address, timeout_s=30)) as encoder:
        encoder.served()
        threads = [threading.Thread(target=lambda: results.append(ask(encoder))) for _ in range(16)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        process.send_signal(stop)
        for thread in threads:
            thread.join()
    assert process.wait(60) == 0
    answered = [r for r in results if r == 128]
    refused = [r for r in results if isinstance(r, ServerUnavailable)]
    assert len(answered) + len(refused) == 16, results
    assert answered, "what was in flight must be answered"
    said = log.read_text()
    assert "serves release" in said
    (scratch,) = set(re.findall(r"/(retrieval-triton-\w+)", said))
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    assert not [path for place in places for path in place.glob(f"{scratch}*")]


def test_a_killed_launcher_takes_the_server_with_it(
    serving: tuple[subprocess.Popen[bytes], str, Path],
) -> None:
    """Nobody is left to stop the server: its port must come free for the next start."""
    process, address, _ = serving
    process.kill()
    port = int(address.split(":")[1])
    end = time.monotonic() + 20
    while True:
        try:
            local.choose_ports(local.LOOPBACK, grpc=port)
            return
        except DeployError:
            assert time.monotonic() < end, f"port {port} is still taken"
            time.sleep(0.2)


def ask(encoder: Encoder) -> object:
    """A full batch: 128 good vectors, or the error that the caller got."""
    try:
        return sum(e is None for e in encoder.encode_queries(["red dress"] * 128).errors)
    except ServerUnavailable as exc:
        return exc


def wait_for_address(log: Path, process: subprocess.Popen) -> str:
    """The gRPC address that the command printed."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text().splitlines():
            if line.strip().startswith("gRPC "):
                return line.split()[1]
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])


def test_a_client_recovers_when_the_server_comes_back(release_folder: Path, tmp_path: Path) -> None:
    """Killed without warning, restarted on the same port: the same client object goes on."""
    with (tmp_path / "log").open("w") as log:
        with local.triton(release_folder, log=log) as server:
            ports, encoder = server.ports, Encoder(Settings(triton=server.grpc_address))
            first = encoder.encode_queries(["red dress"]).vector(0)
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            with pytest.raises(ServerUnavailable, match="start it with `make serve`"):
                encoder.encode_queries(["red dress"])
        with local.triton(release_folder, ports=ports, log=log), encoder:
            end = time.monotonic() + 5
            while True:
                try:
                    again = encoder.encode_queries(["red dress"]).vector(0)
                    break
                except ServerUnavailable:
                    assert time.monotonic() < end, "the client did not find the server again"
                    time.sleep(0.1)
    assert (first == again).all()


def test_a_command_runs_beside_a_server(tmp_path: Path) -> None:
    """`--run` gives the command the address and gives back its exit code."""
    script = (
        "import sys; from retrieval_client import Encoder, Settings; "
        "e = Encoder(Settings.from_env()); e.encode_queries(['x']).vector(0); sys.exit(7)"
    )
    done = subprocess.run(
        [*SERVE, *FREE_PORTS, "--run", sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 7, done.stderr[-2000:]
