"""The real parts as fixtures: a release of the shipped checkpoint, Triton, Milvus Lite.

Everything binds to loopback on free ports and is stopped at the end of the session.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pymilvus import MilvusClient
from rich.console import Console

from deploy.demo import REAL_CATALOG
from deploy.milvus import MilvusServer, namespace
from deploy.milvus import milvus_server as start_milvus
from deploy.server import Server
from deploy.server import triton as start_triton
from export.publish import publish
from retrieval_client import Catalog, Encoder, ProductRow, Settings
from retrieval_contract.errors import DeployError
from retrieval_contract.graph import why_no_bf16
from retrieval_contract.release import Release
from tests.tiny import tiny_make
from tests.traced import traced
from towers.checkpoint import SHIPPED, load_make, save_make
from towers.make import Make

ROOT = Path(__file__).parent.parent
TWO_CORES = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="one core: servers and client cannot be kept apart"
)
UNSHARE = ["unshare", *(["--map-root-user"] if os.geteuid() else [])]


def can_unshare(*flags: str) -> bool:
    """Whether this user may have namespaces of his own."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*UNSHARE, *flags, "true"], capture_output=True).returncode == 0


NAMES = (f"t{number:04}" for number in itertools.count())
"""Each is used once: Milvus's server clears what was dropped away in its own time."""


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
    if why := why_no_bf16():
        yield "releases in bf16", why, "run the tests where that is"
    try:
        namespace()
    except DeployError as exc:
        yield "the Milvus server", str(exc), "allow that, and run the tests again"
    if not can_unshare("--mount", "--pid", "--fork"):
        what = "process 1 of the image, full shared memory, full and read-only disks"
        yield what, "no namespaces for this user", "allow that, and run the tests again"
    if TWO_CORES.args[0]:
        yield "overload, limit and rates", "one core", "run the tests where there are two"
    if not REAL_CATALOG.is_dir():
        place = os.path.relpath(REAL_CATALOG, ROOT)
        yield "the real product catalog", f"{place} is not there", "put it there"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A green run must not look like more than it was."""
    terminalreporter.section("left out")
    for what, why, how in left_out():
        terminalreporter.write_line(f"{what}: {why}; to have it: {how}")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Of torch's, here and in what tests start: on two busy cores its threads wait for each other,
    and small towers take several times as long."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """What is published or climbed in this process takes its raw graphs from `traced`."""
    with pytest.MonkeyPatch.context() as patch:
        for user in ("export.publish", "export.rungs"):
            patch.setattr(f"{user}.onnx_from_towers", traced)
        yield


@pytest.fixture(scope="session")
def towers() -> Make:
    """The MAKE that is shipped."""
    return load_make(SHIPPED).eval()


@pytest.fixture(scope="session")
def release_folder(towers: Make) -> Path:
    """The release of `make demo`, in a place of its own: `make serve` serves what a user built."""
    return publish(towers, ROOT / "build" / "test-releases", Console(stderr=True))


@pytest.fixture(scope="session")
def tiny_release() -> Path:
    """A release of a tiny MAKE, for all tests: who changes anything in it takes a copy."""
    return publish(tiny_make(), ROOT / "build" / "test-releases", Console(quiet=True))


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny MAKE, for trainings to start from."""
    folder = tmp_path_factory.mktemp("start")
    save_make(tiny_make(), folder)
    return folder


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


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    """The real Milvus server, for all tests: use a collection name of your own, and kill it not.

    Skips where this machine has no network namespaces; `left_out` says so, too.
    """
    try:
        namespace()
    except DeployError as exc:
        pytest.skip(str(exc))
    place = tmp_path_factory.mktemp("milvus")
    # A server that gets no processor for its lease ends itself: here nobody waits for one to end.
    with (
        (place / "server.log").open("w") as log,
        start_milvus(place / "data", log=log, session_ttl_s=120) as server,
    ):
        yield server


@pytest.fixture(scope="module", params=["lite", "server"])
def backend(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Settings]]:
    """Gives empty places for catalogs, as many as asked for: on Milvus Lite, then on the server.

    A collection costs the server three seconds to make: share one where the test allows it.
    """
    server: MilvusServer | None = None
    if request.param == "server":
        server = request.getfixturevalue("milvus_server")
    made: list[Settings] = []

    def place() -> Settings:
        """With a name of its own; one of Milvus Lite is a folder that is not there yet."""
        uri = server.uri if server else str(tmp_path_factory.mktemp("lite") / "deep" / "catalog.db")
        made.append(Settings(milvus=uri, collection=f"products_{next(NAMES)}"))
        return made[-1]

    yield place
    for settings in made if server else ():
        drop_all(settings)


@pytest.fixture
def milvus(backend: Callable[[], Settings]) -> Settings:
    """An empty place for one catalog, on Milvus Lite and on the server."""
    return backend()


def drop_all(settings: Settings) -> None:
    """Aliases and collections whose names begin with the settings' one."""
    client = MilvusClient(settings.milvus, token=settings.milvus_token)
    for name in client.list_collections():
        if name.startswith(settings.collection):
            for alias in client.list_aliases(name)["aliases"]:
                client.drop_alias(alias)
            client.drop_collection(name)
    client.close()


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
