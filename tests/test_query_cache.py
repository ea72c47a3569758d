"""The response cache on the real server: hits where they are right, and never another's answer."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from benchmarks.cache_plan import lookups
from benchmarks.ledger import fill
from deploy.pbtxt import parse
from deploy.query_cache import put_cache_before_queries
from deploy.server import Server, triton
from deploy.stubs import stubs_of
from deploy.tuning import Profile
from export.config_from_contract import config_from_text
from retrieval_client import Encoder, Settings
from retrieval_client.__main__ import main
from retrieval_client.spelling import query_bytes
from retrieval_contract import models
from retrieval_contract.errors import Reason, RetrievalError, ServerError, ServerUnavailable
from retrieval_contract.preprocess import text_from_bytes
from retrieval_contract.probes import Probes
from retrieval_contract.release import Release
from tests.hostile import Wire, prefixed, request
from tests.negated import negated
from tests.serving import serve

PUBLIC = models.QUERY_ENCODER.name
TRIALS = 5


@pytest.fixture(scope="module")
def cached(release_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = (tmp_path_factory.mktemp("cached") / "log").open("w")
    with triton(release_folder, log=log, profile=Profile(query_cache_mb=8)) as server:
        yield server


@pytest.fixture
def encoder(cached: Server) -> Iterator[Encoder]:
    with Encoder(Settings(triton=cached.grpc_address)) as connected:
        assert connected.served().cached
        yield connected


@pytest.fixture
def wire(cached: Server) -> Iterator[Wire]:
    with Wire(cached) as connected:
        yield connected


def asked(text: bytes, *outputs: str, model: str = PUBLIC, rows: int = 1) -> pb.ModelInferRequest:
    return request(model, ("query", "BYTES", [rows, 1], prefixed(text)), outputs=outputs)


def names(reply: pb.ModelInferResponse) -> list[str]:
    return sorted(output.name for output in reply.outputs)


BOTH = ["item_status", "query_vector"]


def test_the_same_text_is_computed_once_however_it_is_spelt(
    cached: Server, encoder: Encoder
) -> None:
    hits, misses = lookups(cached)
    spellings = ["one spelling", " one  spelling ", "one\tspelling\n", "one\u00a0spelling"]
    found = [encoder.encode_queries([text]).vector(0) for text in spellings]
    assert lookups(cached) == (hits + 3, misses + 1)
    fresh = encoder.encode_queries(["one spelling"], fresh=True).vector(0)
    assert lookups(cached) == (hits + 3, misses + 1), "`fresh` goes past it"
    assert all((vector == found[0]).all() for vector in found)
    np.testing.assert_allclose(fresh, found[0], atol=1e-5)


@pytest.mark.parametrize(
    "text", ["red shoes", "  x\t", "Café\u0301 \x07 b", "", " ", "long " * 300, "a\0b", "\ud800 x"]
)
def test_a_spelling_means_the_same_to_the_server(text: str) -> None:
    def read(raw: bytes) -> str:
        try:
            return text_from_bytes(raw, 1000)
        except RetrievalError as exc:
            return str(exc)

    assert read(query_bytes(text)) == read(text.encode("utf-8", "surrogatepass"))


def test_a_look_at_the_server_goes_past_its_memory(
    cached: Server, release: Release, tmp_path: Path
) -> None:
    """Else it would be green while nothing can be computed."""
    settings = Settings(triton=cached.grpc_address, milvus=str(tmp_path / "catalog.db"))
    fill(settings, release, 5)
    flags = ["--triton", settings.triton, "--milvus", settings.milvus]
    before = lookups(cached)
    for _ in range(2):
        with pytest.raises(SystemExit, match="0"):
            main(["status", *flags])
    assert lookups(cached) == before


def test_a_refused_text_is_refused_from_memory_too(cached: Server, encoder: Encoder) -> None:
    encoder.encode_queries([""])
    hits, misses = lookups(cached)
    for _ in range(2):
        (error,) = encoder.encode_queries([""]).errors
        assert error is not None
        assert error.reason is Reason.EMPTY
    assert lookups(cached) == (hits + 2, misses)


def test_who_wants_one_output_leaves_both_for_the_next(wire: Wire) -> None:
    for text, output in ((b"half an answer", "item_status"), (b"the other half", "query_vector")):
        assert names(wire.infer(asked(text, output))) == [output]
        assert names(wire.infer(asked(text))) == BOTH
        assert names(wire.infer(asked(text, output))) == [output]


def test_a_batch_axis_that_lies_leaves_no_other_shape(wire: Wire) -> None:
    wire.infer(asked(b"a lying shape", rows=2**40))
    reply = wire.infer(asked(b"a lying shape"))
    assert wire.arrays(models.QUERY_ENCODER, reply, rows=1)["item_status"][0] == b""


def test_half_an_answer_left_on_purpose_is_noticed_and_asked_again(
    cached: Server, encoder: Encoder, wire: Wire
) -> None:
    wire.infer(asked(b"left on purpose", "item_status", model=models.QUERY_CACHED))
    reply = wire.infer(asked(b"left on purpose"))
    with pytest.raises(ServerError, match="expected query_vector"):
        wire.arrays(models.QUERY_ENCODER, reply, rows=1)
    found = encoder.encode_queries(["left on purpose"]).vector(0)
    right = encoder.encode_queries(["left on purpose"], fresh=True).vector(0)
    np.testing.assert_allclose(found, right, atol=1e-5)


def test_a_call_that_failed_leaves_nothing(release_folder: Path, tmp_path: Path) -> None:
    """The model's process is killed: an error, and once it is back the answer, not an empty one.

    One time in ten Triton 2.51 itself aborts then (boost's lock_exception). It forgets all, which
    proves nothing: another one is asked.
    """
    log = (tmp_path / "log").open("w")
    for _ in range(TRIALS):
        with (
            triton(release_folder, log=log, profile=Profile(query_cache_mb=8)) as server,
            Encoder(Settings(triton=server.grpc_address)) as encoder,
        ):
            try:
                ask_around_a_kill(server, encoder)
                return
            except RetrievalError:
                if server.process.wait(10) != -signal.SIGABRT:
                    raise
            finally:  # asked to stop, a server that has lost a process waits half a minute for it
                with suppress(ProcessLookupError):
                    os.killpg(server.process.pid, signal.SIGKILL)
    pytest.fail(f"Triton aborted in each of {TRIALS} trials")


def ask_around_a_kill(server: Server, encoder: Encoder) -> None:
    before = encoder.encode_queries(["asked before"]).vector(0)
    (stub,) = [s for s in stubs_of(server.process.pid) if s.model == models.QUERY_UNCACHED]
    os.kill(stub.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(ServerError):
            encoder.encode_queries(["asked while it is dead"])
    assert (encoder.encode_queries(["asked before"]).vector(0) == before).all()
    server.instance.http.unload(models.QUERY_UNCACHED, 30)
    time.sleep(0.5)
    for name in (models.QUERY_UNCACHED, models.QUERY_CACHED, PUBLIC):
        server.instance.http.load(name, 60)
    found = encoder.encode_queries(["asked while it is dead"]).vector(0)
    right = encoder.encode_queries(["asked while it is dead"], fresh=True).vector(0)
    np.testing.assert_allclose(found, right, atol=1e-5)


def test_hits_do_not_hide_a_model_that_hangs(release_folder: Path, tmp_path: Path) -> None:
    """Answered from memory all the while; the model behind it is killed, and comes back.

    Or all of the server does: when a model's process is killed, Triton 2.51 may abort.
    """
    flags = ["--query-cache-mb=4"]
    with (
        serve(release_folder, tmp_path / "log", hung_s=1.5, flags=flags) as serving,
        Encoder(Settings(triton=serving.address, timeout_s=2.0)) as encoder,
    ):
        known = encoder.encode_queries(["known"]).vector(0)
        hanging = next(
            stub
            for group in groups_with(serving.scratch.name)
            for stub in stubs_of(group)
            if stub.model == models.QUERY_UNCACHED
        )
        os.kill(hanging.pid, signal.SIGSTOP)
        end = time.monotonic() + 30
        while f"{models.QUERY_UNCACHED} hangs: killed" not in serving.log.read_text():
            assert (encoder.encode_queries(["known"]).vector(0) == known).all()
            assert time.monotonic() < end, serving.log.read_text()[-2000:]
            time.sleep(0.05)
        mended = f"{models.QUERY_UNCACHED}: a process of it had died; loaded again"
        serving.said(f"({mended}|Triton is started again, with the right vectors)")
        end = time.monotonic() + 20
        while True:
            try:
                assert encoder.encode_queries(["a new one"], timeout_s=10).errors == [None]
                break
            except ServerUnavailable:  # the channel looks for a new server within a second
                assert time.monotonic() < end, serving.log.read_text()[-2000:]
        # Asked to stop, a server that has lost a process waits half a minute for it.
        serving.process.kill()
        for left in groups_with(serving.scratch.name):
            os.killpg(left, signal.SIGKILL)
        for region in Path("/dev/shm").glob(f"{serving.scratch.name}*"):
            region.unlink()


def groups_with(name: str) -> set[int]:
    """Process groups in which a command line holds the name of a server's folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            if name in path.read_text(errors="replace"):
                found.add(os.getpgid(int(path.parent.name)))
    return found


def replace(server: Server, release: Path) -> None:
    """Put another release in the place of the one that is served, and load it."""
    words = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
    repository = Path(next(w for w in words if "--model-repository" in w).partition("=")[2])
    assert repository.parent.name.startswith("retrieval-triton-"), "a server's own links"
    fresh = repository.with_name("fresh")
    shutil.copytree(release / "model_repository", fresh, copy_function=os.symlink)
    put_cache_before_queries(fresh)
    for entry in fresh.iterdir():
        shutil.rmtree(repository / entry.name)
        entry.rename(repository / entry.name)
    members = [*(m.name for m in models.MODELS), models.QUERY_UNCACHED, models.QUERY_CACHED]
    for name in (*members, *(e.name for e in models.ENSEMBLES)):
        server.instance.http.load(name, 60)


def test_another_release_never_gives_the_answers_of_the_one_before(
    release_folder: Path, tmp_path: Path
) -> None:
    """Loaded in the place of the first, under load, in the same server with the same cache."""
    old, new = release_folder, negated(release_folder, tmp_path)
    probe = Probes.load(old)
    probes = {release.name: Probes.load(release) for release in (old, new)}
    seen: dict[str, int] = dict.fromkeys(probes, 0)
    wrong, over = [], threading.Event()

    def ask(row: int) -> None:
        with Encoder(Settings(triton=server.grpc_address)) as encoder:
            while not over.is_set():
                try:
                    found = encoder.encode_queries([probe.queries[row]])
                except RetrievalError:
                    continue  # between the two
                right = probes[found.served.release_id].query_vectors[row]
                if float(found.vector(0) @ right) < 0.999:
                    wrong.append((found.served.release_id, row))
                seen[found.served.release_id] += 1

    with triton(old, log=(tmp_path / "log").open("w"), profile=Profile(query_cache_mb=8)) as server:
        threads = [threading.Thread(target=ask, args=(row,)) for row in range(4)]
        for thread in threads:
            thread.start()
        for release in (old, new):
            if release is new:
                replace(server, new)
            end = time.monotonic() + 20
            while seen[release.name] < 100 and time.monotonic() < end:
                time.sleep(0.05)
        hits, _ = lookups(server)
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert min(seen.values()) >= 100, seen
    assert hits > 50, "the new one is answered from memory, too"


def test_the_pages_of_a_cached_repository_are_valid(release_folder: Path, tmp_path: Path) -> None:
    """Read by protobuf itself, on all targets' files; the release is left as it was."""
    home = tmp_path / "repository"
    shutil.copytree(release_folder / "model_repository", home, copy_function=os.symlink)
    put_cache_before_queries(home)
    for path in home.rglob("*.pbtxt"):
        assert config_from_text(path.read_text()).name == path.relative_to(home).parts[0]
    enabled = [
        path.relative_to(home).parts[0]
        for path in home.rglob("*.pbtxt")
        if config_from_text(path.read_text()).response_cache.enable
    ]
    assert enabled == [models.QUERY_CACHED]
    source = release_folder / "model_repository" / PUBLIC / "config.pbtxt"
    assert parse(source.read_text())["name"] == f'"{PUBLIC}"'
