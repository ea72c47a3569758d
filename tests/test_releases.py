"""Two real releases beside each other on both Milvuses: built, verified, promoted, taken back."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.promotions import Outcome, promotions
from deploy.server import LOOPBACK, choose_ports
from deploy.server import triton as start_triton
from retrieval_client import Catalog, Encoders, ProductSearch, Settings
from retrieval_client.catalog import Role
from retrieval_client.feed import Plan
from retrieval_client.judged import Asked
from retrieval_client.push import Push
from retrieval_client.records import checksum_of
from retrieval_client.releases import Releases, unfinished
from retrieval_client.sources import SourceRow
from retrieval_client.verdict import PROPERTY, Verdict
from retrieval_client.verify import Verification, Verify, Wanted
from retrieval_contract.errors import (
    CatalogError,
    NotVerified,
    ReleaseMismatch,
    ServerUnavailable,
)
from retrieval_contract.probes import Probes
from tests.conftest import ROOT, photo
from tests.test_replicas import Way
from tests.tiny import tiny_release

PRODUCTS = 60
WORDS = ("red dress", "navy shirt", "white shoes", "green watch", "black jeans")
SIZES = {"old": (16, 0), "equal": (16, 1), "other": (24, 1)}
"""Vector size and seed of each release."""


def source(count: int = PRODUCTS, **changed: str) -> list[SourceRow]:
    """Some with photos; `changed`: other titles by id."""
    return [
        SourceRow(
            f"p{i}",
            changed.get(f"p{i}", f"Brand {i} {WORDS[i % 5]} no {7 * i}").encode(),
            photo((200, i, 40)) if i % 3 == 0 else b"",
            {"price": i},
        )
        for i in range(count)
    ]


@dataclasses.dataclass(frozen=True)
class Served:
    """A release, and who serves it."""

    folder: Path
    address: str

    @property
    def id(self) -> str:
        return self.folder.name


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """A Triton for each of SIZES."""
    folder = ROOT / "build" / "test-releases"
    with ExitStack() as stack:
        log = stack.enter_context((tmp_path_factory.mktemp("triton") / "log").open("w"))
        yield {
            name: Served(
                release := tiny_release(folder, dim, seed),
                stack.enter_context(start_triton(release, log=log)).grpc_address,
            )
            for name, (dim, seed) in SIZES.items()
        }


@pytest.fixture(scope="module")
def place(backend: Callable[[], Settings], served: dict[str, Served]) -> Settings:
    """A catalog of the old release, beside it a candidate of another vector size."""
    both = f"{served['old'].address},{served['other'].address}"
    settings = backend().override(triton=both, retry_s=5.0, timeout_s=10.0)
    first = settings.override(triton=served["old"].address)
    with Encoders(first) as encoders, Catalog(settings) as catalog:
        Push(settings, encoders, catalog).run(source())
    return settings


@pytest.fixture
def ours(place: Settings, served: dict[str, Served]) -> Iterator[Releases]:
    """The same state before each test: the candidate holds the source, and nobody verified it."""
    with Encoders(place) as encoders, Catalog(place) as catalog:
        old = catalog.alias + "_" + served["old"].id
        catalog.point(old, Role.SERVING)
        with suppress(CatalogError):
            catalog.unpoint(Role.PREVIOUS)
        ours = Releases(place, encoders, catalog)
        if (there := catalog.find(Role.CANDIDATE)) and there.info.release_id == served["old"].id:
            catalog.unpoint(Role.CANDIDATE)
        ours.build(source(), served["other"].id, Plan(sync=True, certain=True))
        candidate = catalog.find(Role.CANDIDATE)
        assert candidate
        catalog.milvus.client.alter_collection_properties(candidate.name, {PROPERTY: "none"})
        yield ours


def roles(ours: Releases) -> dict[str, str]:
    return {role.name: each.info.release_id for role, each in ours.catalog.roles().items()}


def verify(ours: Releases, wanted: Wanted | None = None, to: Path | None = None) -> Verification:
    return Verify(ours.settings, ours.encoders, ours.catalog).run(wanted, to)


def failed(found: Verification) -> set[str]:
    return {check.name for check in found.checks if not check.passed}


# ── build ────────────────────────────────────────────────────────────────────────────────
def test_a_build_can_be_repeated_and_pushes_reach_both(
    ours: Releases, served: dict[str, Served]
) -> None:
    assert roles(ours) == {"SERVING": served["old"].id, "CANDIDATE": served["other"].id}
    assert ours.build(source()).stored == 0
    push = Push(ours.settings, ours.encoders, ours.catalog)
    report = push.run(source(p7="Brand 7 a yellow hat"))
    assert {release: fed.encoded for release, fed in report.fed.items()} == {
        served["old"].id: 1,
        served["other"].id: 1,
    }
    for collection in ours.catalog.live().values():
        assert collection.of_ids(["p7"], ["title"])["p7"]["title"] == "Brand 7 a yellow hat"


def test_a_push_waits_for_the_one_of_two_servers_that_starts_again(
    ours: Releases, served: dict[str, Served]
) -> None:
    """Which has not yet said to this client what it serves."""
    port = choose_ports(LOOPBACK).grpc
    both = f"{served['other'].address},{LOOPBACK}:{port}"
    ways: list[Way] = []
    timer = threading.Timer(0.5, lambda: ways.append(Way(served["old"].address, port)))
    with Encoders(ours.settings.override(triton=both)) as encoders:
        with pytest.raises(ServerUnavailable, match=rf"and no answer from .*:{port}; start"):
            encoders.for_collection(ours.catalog.serving().info)
        timer.start()
        report = Push(ours.settings.override(retry_s=20.0), encoders, ours.catalog).run(
            source(p7="Brand 7 a yellow hat")
        )
    ways[0].listener.close()
    assert [fed.encoded for fed in report.fed.values()] == [1, 1]


def test_a_build_that_cannot_be_meant_is_refused(ours: Releases, served: dict[str, Served]) -> None:
    with pytest.raises(ReleaseMismatch, match="promote it, or `retrieval release abort` it"):
        ours.prepare("feedfacefeedface")
    with Encoders(ours.settings.override(triton=served["old"].address)) as alone:
        ours.catalog.unpoint(Role.CANDIDATE)
        try:
            with pytest.raises(ReleaseMismatch, match="not in use yet, got none; serve the new"):
                Releases(ours.settings, alone, ours.catalog).prepare()
            with pytest.raises(ReleaseMismatch, match="got the serving one"):
                ours.prepare(served["old"].id)
            assert ours.prepare().info.release_id == served["other"].id, "the one without a role"
        finally:
            ours.prepare(served["other"].id)


# ── verify ───────────────────────────────────────────────────────────────────────────────
def test_a_good_candidate_passes_and_may_be_promoted(
    ours: Releases, served: dict[str, Served], tmp_path: Path
) -> None:
    with pytest.raises(NotVerified, match="got no verdict"):
        ours.promote()
    right = [{f"p{i}": 1 for i in range(n, 60, 5)} for n in range(5)]
    judged = Asked([*WORDS, " "], [*right, {"p1": 1}])  # the last is refused, and not sought
    probes = Probes.load(served["other"].folder)
    unread = SourceRow("p60", b"a hat", b"no picture")
    wanted = Wanted(source=[*source(), unread], probes=probes, asked=judged, ndcg_loss=1.0)
    found = verify(ours, wanted, tmp_path)
    assert found.passed, found.checks
    assert "all are; 1 are refused by its server" in {check.got for check in found.checks}
    assert [check.name for check in found.checks] == [
        "vectors",
        "release of rows",
        "rows",
        "row by row",
        "source",
        "encoded again",
        "recall",
        "probes",
        "nDCG@10",
        "overlap",
    ]
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["passed"] is True
    assert len(said["changes"]) == 6
    assert Image.open(tmp_path / "changes.png").height > 5 * 200
    ours.promote()
    assert roles(ours) == {"SERVING": served["other"].id, "PREVIOUS": served["old"].id}
    ours.rollback()
    assert roles(ours) == {"SERVING": served["old"].id, "CANDIDATE": served["other"].id}
    ours.promote()
    assert roles(ours)["SERVING"] == served["other"].id, "the verdict holds for the same rows"


def test_what_has_changed_since_is_not_promoted(ours: Releases) -> None:
    assert verify(ours).passed
    Push(ours.settings, ours.encoders, ours.catalog).run(source(p3="another title"))
    with pytest.raises(NotVerified, match=r"expected .* as it was verified at .*got other rows"):
        ours.promote()
    assert verify(ours).passed, "a push has changed both alike"
    ours.promote()


def test_what_is_wrong_with_a_candidate_is_found(ours: Releases, served: dict[str, Served]) -> None:
    candidate = ours.catalog.find(Role.CANDIDATE)
    assert candidate
    candidate.delete(["p1"])
    found = verify(ours, Wanted(source=source(), probes=Probes.load(served["old"].folder)))
    assert failed(found) == {"rows", "row by row", "source", "probes"}
    with pytest.raises(NotVerified, match="got rows, row by row, source, probes failed at"):
        ours.promote()
    ours.build(source())
    for product_id, field, value, names in (
        ("p2", "row_hash", "another price", {"row by row", "source"}),
        ("p3", "content_hash", f"{served['old'].id}:x", {"release of rows", "source"}),
        ("p4", "vector", [3.0] * 24, {"vectors", "encoded again"}),
        ("p5", "vector", np.eye(24)[0].tolist(), {"encoded again"}),
    ):
        (row,) = candidate.query(f'id == "{product_id}"', ["*"])
        client, good = candidate.milvus.client, {k: v for k, v in row.items() if k != "words"}
        written = good | {field: value}
        client.upsert(candidate.name, [written | {"checksum": checksum_of(written)}])
        assert failed(verify(ours, Wanted(source=source()))) == names
        client.upsert(candidate.name, [good | {"title": "damaged"}])
        assert failed(verify(ours, Wanted(source=source()))) == {"vectors"}
        client.upsert(candidate.name, [good])
    assert failed(verify(ours, Wanted(source=source(), lowest_overlap=1.0))) == {"overlap"}
    assert verify(ours, Wanted(source=source())).passed


def test_a_worse_ranking_is_found(ours: Releases) -> None:
    """Judged by what serving answers: the other release cannot do as well."""
    texts = [*WORDS, "Brand 3", "no 49"]
    with ProductSearch(ours.settings) as search:
        right = [{hit.id: 1 for hit in search(text)} for text in texts]
    found = verify(ours, Wanted(asked=Asked(texts, right)))
    assert failed(found) == {"nDCG@10"}
    (check,) = (check for check in found.checks if check.name == "nDCG@10")
    assert check.expected.startswith("at least 1.0000"), check


# ── killed between two steps ─────────────────────────────────────────────────────────────
class Killed(BaseException):
    """In place of a SIGKILL: nothing is caught, nothing is tidied."""


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("command", ["promote", "rollback"])
def test_a_command_that_died_is_named_and_finished(
    ours: Releases,
    served: dict[str, Served],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    step: int,
) -> None:
    old, new = served["old"].id, served["other"].id
    if command == "rollback":
        ours.promote(certain=True)
    done = {"promote": lambda: ours.promote(certain=True), "rollback": ours.rollback}[command]
    moves = iter(range(9))

    def until_killed(real: Callable[..., None]) -> Callable[..., None]:
        def move(*args: object) -> None:
            if next(moves) == step:
                raise Killed
            real(*args)

        return move

    for name in ("point", "unpoint"):
        monkeypatch.setattr(ours.catalog, name, until_killed(getattr(ours.catalog, name)))
    with pytest.raises(Killed):
        done()
    monkeypatch.undo()
    names = {collection.info.release_id for collection in ours.catalog.live().values()}
    assert names == {old, new}, "a push would miss one"
    assert len(unfinished(ours.status())) == (1 if step else 0)
    with ProductSearch(ours.settings) as search:
        assert search("red dress")
    done()
    assert unfinished(ours.status()) == []
    now = {"SERVING": new, "PREVIOUS": old}
    assert roles(ours) == (now if command == "promote" else {"SERVING": old, "CANDIDATE": new})


def test_every_live_collection_is_seen_while_roles_move(ours: Releases) -> None:
    over, names = threading.Event(), {each.name for each in ours.catalog.live().values()}
    assert len(names) == 2

    def look() -> None:
        with Catalog(ours.settings) as catalog:
            while not over.is_set():
                seen.append({each.name for each in catalog.live().values()})

    seen: list[set[str]] = []
    thread = threading.Thread(target=look)
    thread.start()
    end, moves = time.monotonic() + 60, 0
    while moves < 5 or (len(seen) < 10 and time.monotonic() < end):  # a busy machine looks seldom
        ours.promote(certain=True)
        ours.rollback()
        moves += 1
    over.set()
    thread.join()
    assert len(seen) >= 10
    assert all(each == names for each in seen)


# ── clearing away ────────────────────────────────────────────────────────────────────────
def test_only_what_no_role_needs_is_dropped(ours: Releases, served: dict[str, Served]) -> None:
    old, new = (ours.catalog.alias + "_" + served[name].id for name in ("old", "other"))
    assert ours.gc(certain=True).dropped == []
    ours.promote(certain=True)
    cleared = ours.gc()
    assert (cleared.dropped, list(cleared.left)) == ([], [old])
    ours.rollback()
    client = ours.catalog.milvus.client
    ours.catalog.unpoint(Role.CANDIDATE)
    client.create_alias(new, f"{ours.catalog.alias}_mine")
    (note,) = unfinished(ours.status())
    assert note == f"{new} has no role: `gc` drops it"
    assert ours.gc(certain=True).left == {new: f"somebody calls it {ours.catalog.alias}_mine"}
    client.drop_alias(f"{ours.catalog.alias}_mine")
    assert ours.gc().dropped == [new]
    assert list(ours.catalog.built()) == [old]
    with pytest.raises(CatalogError, match="expected a candidate, got none beside"):
        ours.promote()
    with pytest.raises(CatalogError, match="expected a previous release to go back to"):
        ours.rollback()
    with pytest.raises(CatalogError, match="expected a candidate, got none"):
        ours.abort()
    assert ours.catalog.serving().count() == PRODUCTS


def test_an_aborted_candidate_is_gone_and_what_serves_is_not(ours: Releases) -> None:
    gone = ours.abort()
    assert list(ours.catalog.built()) == [ours.catalog.serving().name]
    assert Verdict.of(gone) is None


# ── searches meanwhile ───────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("new", ["equal", "other"])
def test_no_search_fails_or_mixes_releases(
    new: str, backend: Callable[[], Settings], served: dict[str, Served]
) -> None:
    found: Outcome = promotions(served["old"].address, served[new].address, backend(), 100, 2)
    assert (found.errors, found.mixed) == (0, 0), found
    assert (found.promotions, found.rollbacks, found.dropped) == (2, 2, 1)
    assert set(found.answers) == {served["old"].id, served[new].id}
    assert min(found.answers.values()) > 10


def test_a_server_of_another_release_may_come_to_a_silent_address(
    served: dict[str, Served], tmp_path: Path
) -> None:
    """At first it is taken for another replica that is away."""
    ports = choose_ports(LOOPBACK)
    both = f"{served['old'].address},{LOOPBACK}:{ports.grpc}"
    settings = Settings(triton=both, milvus=str(tmp_path / "catalog.db"), timeout_s=10)
    with ProductSearch(settings) as search:
        Push(settings, search.encoders, search.catalog).run(source(10))
        search("red dress")
        log = (tmp_path / "log").open("w")
        with start_triton(served["other"].folder, ports=ports, log=log):
            end = time.monotonic() + 3
            while time.monotonic() < end:
                assert len(search("red dress")) == 10
            assert set(search.encoders.served()) == {served["old"].id, served["other"].id}
        assert len(search("red dress")) == 10, "and go again"
