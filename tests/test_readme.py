"""The README's own lines, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deploy.server import Server
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")


def block(language: str, after: str) -> str:
    """The first fenced block of a language after some words."""
    found = re.search(rf"```{language}\n(.*?)```", README[README.index(after) :], re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def env(triton: Server, tmp_path: Path) -> dict[str, str]:
    """What a user's second terminal has, but for the server's address and the place of files."""
    tools = Path(sys.executable).parent
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RETRIEVAL_TRITON": triton.grpc_address,
        "RETRIEVAL_MILVUS": str(tmp_path / "build" / "catalog.db"),
    }


def test_the_second_terminal(env: dict[str, str], tmp_path: Path) -> None:
    lines = block("console", "In another").splitlines()
    assert lines.pop(0) == "$ source .venv/bin/activate"
    for line in lines:
        done = subprocess.run(
            line.removeprefix("$ "),
            shell=True,
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
    assert Image.open(tmp_path / "out.png").height > 100
    python = block("python", "Or from Python")
    done = subprocess.run(
        [sys.executable, "-c", python], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert len(done.stdout.splitlines()) == 10, done.stderr
    assert "navy" in done.stdout


def test_every_linked_file_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
