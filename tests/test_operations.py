"""docs/operations.md, walked through: every command in it, in its order, on two small releases."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from deploy.rendered.catalog import write_rendered_catalog
from deploy.server import LOOPBACK, choose_ports
from retrieval_client.__main__ import main, parser
from tests.conftest import ROOT
from tests.tiny import tiny_release

OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")
LINES = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", OPERATIONS, re.DOTALL)
    for line in block.splitlines()
]
PORTS = ("8001", "8000", "8002", "8011", "8010", "8012")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two releases and a catalog where the text has them."""
    built = ROOT / "build" / "test-releases"
    (tmp_path / "build" / "releases").mkdir(parents=True)
    for release in (tiny_release(built, 16, 0), tiny_release(built, 24, 1)):
        (tmp_path / "build" / "releases" / release.name).symlink_to(release)
    write_rendered_catalog(tmp_path / "build/rendered_catalog", products=60, progress=False)
    return tmp_path


def as_here(text: str) -> str:
    """With this test's releases and free ports."""
    folder = ROOT / "build" / "test-releases"
    old, new = tiny_release(folder, 16, 0).name, tiny_release(folder, 24, 1).name
    text = re.sub(r"OLD=\w+ NEW=\w+", f"OLD={old} NEW={new}", text)
    first, second = choose_ports(LOOPBACK), choose_ports(LOOPBACK)
    free = [p for ports in (first, second) for p in (ports.grpc, ports.http, ports.metrics)]
    for named, port in zip(PORTS, free, strict=True):
        text = re.sub(rf"\b{named}\b", str(port), text)
    return text


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    """Stopped in the end."""
    with ExitStack() as stack:
        yield stack


def serve(words: list[str], place: Path, servers: ExitStack) -> None:
    """As in a terminal of its own; returns when it is ready."""
    log = place / f"server{len(list(place.glob('server*')))}.log"
    process = subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=place,
        stderr=log.open("w"),
    )
    servers.callback(process.wait, 60)
    servers.callback(process.terminate)
    while "Ctrl-C stops" not in log.read_text():
        assert process.poll() is None, log.read_text()[-2000:]
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)


def test_every_command_of_the_text_works(
    place: Path,
    servers: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`retrieval` in this process, for each start of Python costs more than what most do."""
    monkeypatch.chdir(place)
    said: dict[str, str] = {}
    for line in as_here("\n".join(LINES)).splitlines():
        words = shlex.split(os.path.expandvars(line))
        if words[0] == "export":
            for name, value in (word.split("=", 1) for word in words[1:]):
                monkeypatch.setenv(name, value)
        elif words[0] == "retrieval":
            with pytest.raises(SystemExit) as ended:
                main(words[1:])
            out, err = capsys.readouterr()
            assert ended.value.code == 0, f"{line}: {out}{err}"
            said[line] = out + err
        else:
            assert words[:3] == ["python", "-m", "deploy.local"], "only servers run beside"
            serve(words[1:], place, servers)
    env = os.environ
    assert Image.open(place / "build/verification/changes.png").height > 500
    assert f"release {env['NEW']} serves" in said["retrieval release promote"]
    assert f"release {env['OLD']} serves" in said["retrieval release rollback"]
    assert f"dropped products_{env['OLD']}" in said["retrieval release gc --yes"]
    assert env["OLD"] not in said["retrieval release status"], "the last one"
    shadow = next(text for line, text in said.items() if "--shadow" in line)
    assert "asked 1, answered 1, failed 0" in shadow


def test_the_text_names_only_what_there_is() -> None:
    for command in re.findall(r"`retrieval ([^`]*?)`", OPERATIONS):
        words = command.split()
        with pytest.raises(SystemExit) as stopped:
            parser().parse_args([*words, "--help"])
        assert stopped.value.code == 0, command
    for name in ("build", "verify", "promote", "rollback", "status", "gc", "abort"):
        assert f"release {name}" in OPERATIONS
    for link in re.findall(r"\]\(([^)#]+)\)", OPERATIONS):
        assert (ROOT / "docs" / link).exists()
