"""The real parts as fixtures: a release of the shipped checkpoint, Triton, Milvus Lite.

Everything binds to loopback on free ports and is stopped at the end of the session.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from deploy.demo import REAL_CATALOG
from deploy.server import Server
from deploy.server import triton as start_triton
from export.publish import publish
from retrieval_client import Catalog, Encoder, ProductRow, Settings
from retrieval_contract.release import Release
from towers.checkpoint import SHIPPED, load_make
from towers.make import Make

ROOT = Path(__file__).parent.parent


def left_out() -> Iterator[tuple[str, str, str]]:
    """What no test covers here, why, and what to do to have it."""
    gpu = shutil.which("nvidia-smi")
    yield (
        "TensorRT plans and the `gpu` target",
        "no test runs on this machine's GPU" if gpu else "no NVIDIA GPU here",
        "start the serve image with --gpus, or run `python -m deploy.engines prepare` on that GPU",
    )
    engine = next(filter(shutil.which, ("docker", "podman", "buildah")), None)
    yield (
        "container images: linted, not built",
        f"no test drives {engine}" if engine else "no container engine here",
        "build and run them as the head of the Dockerfile says",
    )
    yield (
        "a Milvus server",
        "the tests use Milvus Lite, which needs no service",
        "run `retrieval push` and `retrieval search` with RETRIEVAL_MILVUS=http://host:19530",
    )
    if not REAL_CATALOG.is_dir():
        place = os.path.relpath(REAL_CATALOG, ROOT)
        yield "the real product catalog", f"{place} is not there", "put it there"
    if not shutil.which("curl"):
        yield "curl in the health check", "not installed; a stand-in asked", "install curl"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A green run must not look like more than it was."""
    terminalreporter.section("left out")
    for what, why, how in left_out():
        terminalreporter.write_line(f"{what}: {why}; to have it: {how}")


@pytest.fixture(scope="session")
def towers() -> Make:
    """The MAKE that is shipped."""
    return load_make(SHIPPED).eval()


@pytest.fixture(scope="session")
def release_folder(towers: Make) -> Path:
    """The release of `make demo`, in a place of its own: `make serve` serves what a user built."""
    return publish(towers, ROOT / "build" / "test-releases", Console(stderr=True))


@pytest.fixture(scope="session")
def release(release_folder: Path) -> Release:
    """Its `release.json`."""
    return Release.load(release_folder)


@pytest.fixture(scope="session")
def triton(release_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real Triton over the release; its log is kept beside the other test files."""
    log_path = tmp_path_factory.mktemp("triton") / "server.log"
    with log_path.open("w") as log, start_triton(release_folder, log=log) as server:
        yield server


@pytest.fixture
def settings(triton: Server, tmp_path: Path) -> Settings:
    """Settings for the running server and an empty catalog of its own."""
    return Settings(triton=triton.grpc_address, milvus=str(tmp_path / "catalog.db"), retry_s=5.0)


@pytest.fixture
def encoder(settings: Settings) -> Iterator[Encoder]:
    """A connection to the running server."""
    with Encoder(settings) as connected:
        yield connected


@pytest.fixture
def catalog(settings: Settings, release: Release) -> Iterator[Catalog]:
    """An empty catalog of the running release on real Milvus Lite."""
    with Catalog(settings) as connected:
        connected.prepare(release.release_id, release.vector_dim)
        yield connected


def photo(
    colour: tuple[int, int, int] = (200, 30, 40),
    size: tuple[int, int] = (96, 128),
    format: str = "JPEG",
    mode: str = "RGB",
    **save: object,
) -> bytes:
    """An image file with a coloured block on white."""
    picture = Image.new("RGB", size, "white")
    box = (size[0] // 4, size[1] // 4, 3 * size[0] // 4 + 1, 3 * size[1] // 4 + 1)
    picture.paste(colour, box)
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, format, **save)
    return buffer.getvalue()


def product_row(product_id: str, dim: int, seed: int = 0, title: str = "title") -> ProductRow:
    """A row with a random unit vector (dim,)."""
    vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return ProductRow(product_id, title, f"hash-{seed}", vector / np.linalg.norm(vector))
