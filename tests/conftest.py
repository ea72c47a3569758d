"""The real parts as fixtures: a release from pretrained weights, Triton, Milvus Lite.

Everything binds to loopback on free ports and is stopped at the end of the session.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from deploy import local
from export.publish import publish
from retrieval_client import Catalog, Encoder, ProductRow, Settings
from retrieval_contract.release import Release
from towers.make import Make
from towers.pretrained import pretrained_make

ROOT = Path(__file__).parent.parent
REAL_CATALOG = ROOT.parent / "shared" / "data" / "fashion_products_small"


@pytest.fixture(scope="session")
def towers() -> Make:
    """Untrained MAKE on its pretrained encoders."""
    return pretrained_make()


@pytest.fixture(scope="session")
def release_folder(towers: Make) -> Path:
    """The built release that `make demo` serves, built here when it is not there yet."""
    return publish(towers, ROOT / "build" / "releases", Console(stderr=True))


@pytest.fixture(scope="session")
def release(release_folder: Path) -> Release:
    """Its `release.json`."""
    return Release.load(release_folder)


@pytest.fixture(scope="session")
def triton(
    release_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[local.Server]:
    """The real Triton over the release; its log is kept beside the other test files."""
    log_path = tmp_path_factory.mktemp("triton") / "server.log"
    with log_path.open("w") as log, local.triton(release_folder, log=log) as server:
        yield server


@pytest.fixture
def settings(triton: local.Server, tmp_path: Path) -> Settings:
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
