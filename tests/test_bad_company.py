"""Good requests in bad company: what the server merges with hostile ones, and what kills it."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc.service_pb2 import ModelInferRequest

from deploy.server import Server, triton
from retrieval_client import Encoder, Settings
from tests.conftest import photo
from tests.hostile import SERVED, Wire, prefixed
from tests.test_bad_wire import CODE, HARMLESS, REFUSED, TOKENS, lie, product, query, tower

WORDS = ("red", "shoes for men", "blue linen dress for a summer evening", "usb c hub", "鞋")
TEXTS = [f"{WORDS[i % 5]} {i}".encode() for i in range(16)]


@pytest.fixture(scope="module")
def wire(triton: Server) -> Iterator[Wire]:
    with Wire(triton) as connected:
        yield connected


def company(wire: Wire, hostile: list[ModelInferRequest]) -> Counter[str]:
    """64 threads ask good queries while 4 more send hostile requests; what the good ones got."""
    expected = {text: wire.queries(text)[0].vector for text in TEXTS}
    done = threading.Event()

    def abuse(start: int) -> int:
        codes: Counter[grpc.StatusCode] = Counter()
        for sent in itertools.count(start):
            if done.is_set():
                break
            try:
                wire.infer(hostile[sent % len(hostile)])
                codes[CODE.OK] += 1
            except grpc.RpcError as error:
                codes[error.code()] += 1
        assert CODE.UNAVAILABLE not in codes
        return codes.total()

    def ask(thread: int) -> Counter[str]:
        got: Counter[str] = Counter()
        for i in range(12):
            text = TEXTS[(thread + i) % len(TEXTS)]
            try:
                (answer,) = wire.queries(text)
            except grpc.RpcError as error:
                got[error.code().name] += 1
                continue
            right = np.abs(answer.vector - expected[text]).max() < 1e-5
            got["right" if right and answer.outcome == SERVED else "wrong"] += 1
        return got

    with ThreadPoolExecutor(68) as pool:
        abusers = [pool.submit(abuse, start) for start in range(4)]
        total = sum(pool.map(ask, range(64)), Counter())
        done.set()
        assert min(a.result() for a in abusers) > 3
    return total


def test_hostile_requests_do_not_touch_their_neighbours(wire: Wire) -> None:
    bad_rows = [query(contents=prefixed(t)) for t in (b"", b"\xff", b"\0", b"x" * 9999)]
    lies = ("length_too_long", "length_ffffffff")  # see below: not Triton's strong side
    refused = [message for name, (message, _) in REFUSED.items() if name not in lies]
    strange = [message for message, _ in HARMLESS.values()]
    picture = product(image=("image", "BYTES", [1, 1], prefixed(photo()[:600])))
    before = wire.health()
    got = company(wire, [*refused, *bad_rows, *strange, picture])
    assert got == {"right": 64 * 12}
    np.testing.assert_allclose(wire.health(), before, atol=1e-6)


# ── what this Triton cannot take ─────────────────────────────────────────────────────────
class KnownFault(Exception):
    """The very failure that a test expects was seen; any other failure fails the test."""


@contextlib.contextmanager
def doomed_server(release_folder: Path, folder: Path) -> Iterator[tuple[Server, Wire]]:
    """A server for one test to harm; it has answered through both ensembles."""
    with (
        (folder / "server.log").open("w") as log,
        triton(release_folder, log=log) as server,
        Wire(server) as connected,
    ):
        connected.health()
        yield server, connected
        server.process.kill()  # after such harm it would drain for half a minute


@pytest.fixture
def doomed(release_folder: Path, tmp_path: Path) -> Iterator[tuple[Server, Wire]]:
    with doomed_server(release_folder, tmp_path) as harmed:
        yield harmed


@pytest.fixture(scope="module")
def lied_to(release_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """What good queries got beside requests that lie about a length."""
    with doomed_server(release_folder, tmp_path_factory.mktemp("lied_to")) as (_, wire):
        before = wire.health()
        got = company(wire, [query(contents=lie(99))])
        np.testing.assert_allclose(wire.health(), before, atol=1e-6)
    return got


def test_a_lying_length_gives_no_neighbour_a_wrong_vector(lied_to: Counter[str]) -> None:
    assert lied_to["right"] > 0
    assert set(lied_to) <= {"right", "INVALID_ARGUMENT"}


@pytest.mark.xfail(
    strict=True,
    raises=KnownFault,
    reason="Triton 2.51 fails the whole merged batch of a Python model for one lying length",
)
def test_a_lying_length_fails_alone(lied_to: Counter[str]) -> None:
    if set(lied_to) == {"right", "INVALID_ARGUMENT"}:
        raise KnownFault(f"{lied_to['INVALID_ARGUMENT']} good queries were refused")
    assert lied_to == {"right": 64 * 12}


def test_our_client_asks_again_what_a_lie_took_with_it(
    release_folder: Path, tmp_path: Path
) -> None:
    """Four clients, and somebody who lies now and then."""
    told = threading.Event()
    with doomed_server(release_folder, tmp_path) as (server, wire), ExitStack() as stack:

        def tell() -> None:
            while not told.wait(0.05):
                with contextlib.suppress(grpc.RpcError):
                    wire.infer(query(contents=lie(99)))

        def ask(encoder: Encoder) -> None:
            for n in range(60):
                encoder.encode_queries([f"red shoes {n}"]).vector(0)

        settings = Settings(triton=server.grpc_address, timeout_s=10)
        clients = [stack.enter_context(Encoder(settings)) for _ in range(4)]
        pool = stack.enter_context(ThreadPoolExecutor(5))
        liar = pool.submit(tell)
        try:
            list(pool.map(ask, clients))
        finally:
            told.set()
        liar.result()


@pytest.mark.xfail(
    strict=True,
    raises=KnownFault,
    reason="Triton 2.51 multiplies dims without a check: 2^62 INT32 are 0 bytes, and the stub dies",
)
def test_a_tower_survives_a_shape_that_overflows(doomed: tuple[Server, Wire]) -> None:
    """Through the tower's own name; the ensembles' inputs have no free dim."""
    server, wire = doomed
    with pytest.raises(grpc.RpcError):
        wire.infer(tower([1, 2**62], count=0))
    assert server.process.poll() is None
    try:
        wire.infer(tower([1, TOKENS]))
    except grpc.RpcError as error:
        if "Stub process 'query_tower" in error.details():
            raise KnownFault(error.details()) from error
        raise


@pytest.mark.xfail(
    strict=True,
    raises=KnownFault,
    reason="Triton 2.51 divides by the element size of BYTES, which is 0, and dies of SIGFPE",
)
def test_the_server_survives_classification_of_a_text_output(
    doomed: tuple[Server, Wire],
) -> None:
    """One request to any model with a BYTES output ends the whole server."""
    server, wire = doomed
    bad = product()
    bad.outputs.add(name="item_status").parameters["classification"].int64_param = 1
    with pytest.raises(grpc.RpcError):
        wire.infer(bad)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(5)
    if server.process.returncode == -signal.SIGFPE:
        raise KnownFault("the server died of SIGFPE")
    wire.health()
