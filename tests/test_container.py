"""How the serve image starts: versions that belong together, then Triton on what can be served."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deploy import container
from deploy.server import LOOPBACK, choose_ports
from deploy.stopping import DRAIN_S
from deploy.wheel import SERVER_PYTHON, find_wheel
from retrieval_client import Encoder, Settings
from retrieval_contract.errors import RetrievalError
from retrieval_contract.models import Target
from tests.certificates import authority, certificate
from tests.conftest import ROOT, UNSHARE, can_unshare

TAG = "26.09-py3"


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like /opt/tritonserver whose server says how it was started."""
    home = tmp_path / "tritonserver"
    (home / "bin").mkdir(parents=True)
    server = home / "bin" / "tritonserver"
    server.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    server.chmod(0o755)
    monkeypatch.setenv("TRITON_SERVER_VERSION", "2.73.0")
    monkeypatch.setenv("CUDA_VERSION", "13.4.1.005")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return home


def entry_point(image: Path, *arguments: str) -> list[str]:
    """The image's, with another home for Triton."""
    code = (
        "import pathlib, sys; from deploy import container, versions; "
        f"container.TRITON_HOME = pathlib.Path({str(image)!r}); sys.argv[0] = 'container'; "
        "container.main()"
    )
    return [sys.executable, "-c", code, *arguments]


def start(image: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """It, until it ends by itself."""
    command = entry_point(image, *arguments)
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)


def test_it_starts_triton_on_the_processor(image: Path, release_folder: Path) -> None:
    where = [f"--tag={TAG}", "--target=cpu", f"--release={release_folder}"]
    done = start(image, *where, "--http-port=8123", "--log-verbose=1")
    said = done.stderr.splitlines()
    key = next(line for line in said if line.startswith("--grpc-restricted-protocol="))
    assert {
        f"--model-repository={release_folder}/model_repository",
        "--model-config-name=cpu",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={DRAIN_S}",
        "--model-control-mode=explicit",
        "--http-port=8123",
        "--metrics-address=0.0.0.0",
        "--grpc-address=0.0.0.0",
        "--grpc-port=8001",
        "--log-verbose=1",
        key.replace("grpc-restricted-protocol", "http-restricted-api"),
    } <= set(said)
    assert "triton       2.73.0     2.73.0         ok" in done.stderr
    assert done.returncode == 1, "the stand-in does not stay"
    assert "error: Triton exited with code 0 while starting" in done.stderr


def test_without_a_gpu_the_flag_decides(image: Path, release_folder: Path, tmp_path: Path) -> None:
    where = [f"--tag={TAG}", f"--release={release_folder}", f"--cache={tmp_path / 'cache'}"]
    served = start(image, *where, "--missing=cpu")
    assert "--model-config-name=cpu" in served.stderr.splitlines(), served.stderr
    refused = start(image, *where)
    assert refused.returncode == 1
    assert "--model-config-name" not in refused.stderr
    assert "error: expected a GPU" in refused.stderr


@pytest.mark.parametrize("said", [["--allow-http=0"], ["--allow-http", "False"]])
def test_it_needs_http_to_watch_the_server(
    image: Path, release_folder: Path, said: list[str]
) -> None:
    where = [f"--tag={TAG}", "--target=cpu", f"--release={release_folder}"]
    refused = start(image, *where, *said)
    assert refused.returncode == 1
    assert "--http-address=127.0.0.1" in refused.stderr


def test_a_release_that_is_not_mounted_is_said(image: Path, tmp_path: Path) -> None:
    refused = start(image, f"--tag={TAG}", "--target=cpu", f"--release={tmp_path}")
    assert refused.returncode == 1
    assert f"error: {tmp_path}/release.json" in refused.stderr
    assert "probes" not in refused.stderr


def test_what_has_no_tls_stays_inside_where_grpc_has_it() -> None:
    def where(*flags: str) -> str:
        return container.in_the_clear_at(*container.parser().parse_known_args(flags))

    assert where("--http-port=1") == container.EVERYWHERE
    assert where("--grpc-use-ssl=true", "--grpc-server-cert=x") == LOOPBACK
    assert where("--grpc-use-ssl-mutual", "true", "--http-address=0.0.0.0") == container.EVERYWHERE


def test_grpc_is_a_door_of_the_image(
    image: Path, release_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only one that clients use: it must be open before the server counts as ready."""
    monkeypatch.setattr(container, "TRITON_HOME", image)
    flags = ["--target=cpu", f"--release={release_folder}", "--grpc-port=8123"]
    instance = container.instance_of(*container.parser().parse_known_args(flags))
    assert instance.doors == [(LOOPBACK, 8123)]


def test_a_certificate_that_has_expired_does_not_start(
    image: Path, release_folder: Path, tmp_path: Path
) -> None:
    authority(tmp_path, "ours")
    certificate(tmp_path, "server", "ours", days=-1)
    tls = ["--grpc-use-ssl=true", f"--grpc-server-cert={tmp_path / 'server.pem'}"]
    done = start(image, f"--tag={TAG}", "--target=cpu", f"--release={release_folder}", *tls)
    assert (done.returncode, "server.pem: expired at 20" in done.stderr) == (1, True), done.stderr


# ── on the real server, as process 1 ─────────────────────────────────────────────────────
IN_A_NAMESPACE = [*UNSHARE, "--pid", "--fork", "--kill-child", "--mount-proc"]
ALONE = can_unshare(*IN_A_NAMESPACE[len(UNSHARE) :])


@pytest.fixture
def real_image(image: Path, release_folder: Path, tmp_path: Path) -> Path:
    """The same folder around the wheel's server, on the one target that it has."""
    wheel = find_wheel(SERVER_PYTHON)
    backend = shutil.copytree(wheel.triton / "backends" / "python", tmp_path / "backends/python")
    Path(shutil.copy(wheel.stub, backend)).chmod(0o755)
    copy = tmp_path / "model_repository"
    shutil.copytree(release_folder / "model_repository", copy, copy_function=os.symlink)
    server = image / "bin" / "tritonserver"
    server.write_text(
        f"""#!{sys.executable}
import os, sys
os.environ["LD_LIBRARY_PATH"] = {wheel.libraries!r}
os.environ["PATH"] = {str(wheel.python.parent)!r} + ":" + os.environ["PATH"]
given = [a for a in sys.argv[1:] if "--model-config-name" not in a and "--model-rep" not in a]
real = {str(wheel.triton / "bin" / "tritonserver")!r}
os.execv(real, [real, *given, "--model-config-name=local", "--model-repository={copy}",
    "--backend-directory={backend.parent}", "--cache-directory={wheel.triton / "caches"}"])
"""
    )
    return image


@pytest.mark.skipif(not ALONE, reason="no process namespaces for this user")
def test_as_process_1_it_keeps_the_server_and_drains(
    real_image: Path, release_folder: Path, tmp_path: Path
) -> None:
    """Triton is killed and comes back; orphans are reaped; SIGTERM drains, and the code is 0."""
    ports = choose_ports(LOOPBACK)
    flags = [f"--{name}-port={port}" for name, port in vars(ports).items()]
    flags += [f"--{name}-address={LOOPBACK}" for name in vars(ports)]
    flags += [f"--tag={TAG}", "--target=cpu", f"--release={release_folder}"]
    log = tmp_path / "log"
    with log.open("w") as output:
        outside = subprocess.Popen(
            [*IN_A_NAMESPACE, *entry_point(real_image, *flags)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
    try:
        with Encoder(Settings(triton=f"{LOOPBACK}:{ports.grpc}", timeout_s=2.0)) as encoder:
            said(log, "supervisor: Triton is started, with the right vectors")
            first = answered(encoder, outside, log)
            (inside,) = children(outside.pid)
            (victim,) = [pid for pid in children(inside) if "tritonserver" in command_of(pid)]
            prefix = re.search(r"shm-region-prefix-name=([\w-]+)", command_of(victim))[1]
            assert list(Path("/dev/shm").glob(f"{prefix}*"))
            os.kill(victim, signal.SIGKILL)
            said(log, "supervisor: Triton is started again")
            assert (answered(encoder, outside, log) == first).all()
        end = time.monotonic() + 5
        while zombies := [pid for pid in children(inside) if not command_of(pid)]:
            assert time.monotonic() < end, zombies
            time.sleep(0.1)
        os.kill(inside, signal.SIGTERM)
        assert outside.wait(60) == 0, log.read_text()[-2000:]
    finally:
        outside.kill()
        outside.wait()
    assert "Timeout 30: Found 0 model versions that have in-flight" in log.read_text()
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))


def answered(encoder: Encoder, process: subprocess.Popen, log: Path) -> np.ndarray:
    """The vector, as soon as there is one."""
    end = time.monotonic() + 60
    while True:
        try:
            return encoder.encode_queries(["red shoes"]).vector(0)
        except RetrievalError:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)


def said(log: Path, words: str) -> None:
    end = time.monotonic() + 60
    while words not in log.read_text():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    found = [Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for paths in found for path in paths for child in path.read_text().split()]


def command_of(pid: int) -> str:
    """Empty for a zombie."""
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")


def test_an_image_that_differs_does_not_start(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_SERVER_VERSION", "2.51.0")
    done = start(image, f"--tag={TAG}", "--target=cpu", f"--release={tmp_path}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "triton       2.73.0     2.51.0         DIFFERS" in done.stderr
    assert "Traceback" not in done.stderr


def test_outside_the_image_it_says_so(tmp_path: Path, release_folder: Path) -> None:
    done = start(tmp_path, f"--tag={TAG}", "--target=cpu", f"--release={release_folder}")
    assert done.returncode == 1
    assert "run this in the image" in done.stderr


def test_the_targets_are_those_with_a_config() -> None:
    assert container.triton_command(Path("/r"), Target.GPU, [])[1:] == [
        "--model-repository=/r/model_repository",
        "--model-config-name=gpu",
    ]
