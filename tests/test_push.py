"""A push makes a catalog what its source says, at the least cost; on both Milvuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.stand_in import BAD, StandIns
from retrieval_client import Catalog, Collection, Settings
from retrieval_client.book import Differences
from retrieval_client.catalog import Role
from retrieval_client.feed import LOOK_UP_ROWS, Plan
from retrieval_client.push import Push, PushReport
from retrieval_client.sources import Source, SourceRow
from retrieval_client.window import FEWEST, FIRST, MOST, Window
from retrieval_contract.errors import (
    CatalogError,
    ItemError,
    Reason,
    ServerUnavailable,
    TooMuchToDelete,
)
from tests.conftest import ROOT, photo

RELEASE, OTHER = "a" * 16, "b" * 16
PHOTO = photo()


def row(at: int, title: str = "", **attributes: object) -> SourceRow:
    """One with a photo in three."""
    image = PHOTO if at % 3 == 0 else b""
    return SourceRow(f"p{at}", (title or f"product {at}").encode(), image, attributes)


class Shop:
    """One catalog, stand-ins of both releases, and pushes into it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = replace(settings, retry_s=2.0)
        self.encoders = StandIns(RELEASE)
        self.catalog = Catalog(self.settings)

    def push(self, rows: Iterable[SourceRow], plan: Plan | None = None, **more: Any) -> PushReport:
        """What it did."""
        push = Push(self.settings, self.encoders, self.catalog, plan)
        return push.run(rows, **more)

    @property
    def collection(self) -> Collection:
        """Which is served."""
        return self.catalog.serving(max_age_s=0)

    def rows(self, collection: Collection | None = None) -> dict[str, dict[str, Any]]:
        """All that is stored."""
        fields = ["title", "attributes", "content_hash", "row_hash", "vector", "thumbnail"]
        steps = (collection or self.collection).every(fields)
        return {row["id"]: row for step in steps for row in step}


@pytest.fixture(scope="module")
def place(backend: Callable[[], Settings]) -> Shop:
    """A collection costs the server seconds: one for all tests that can share it."""
    shop = Shop(backend())
    shop.catalog.prepare(RELEASE, 8)
    return shop


@pytest.fixture
def shop(place: Shop) -> Shop:
    """That one, empty."""
    ids = list(place.rows())
    for start in range(0, len(ids), LOOK_UP_ROWS):
        place.collection.delete(ids[start : start + LOOK_UP_ROWS])
    place.encoders = StandIns(RELEASE)
    return place


def test_a_second_push_encodes_and_stores_nothing(shop: Shop) -> None:
    rows = [row(at, price=at) for at in range(70)]
    first = shop.push(rows)
    assert (first.read, first.encoded, first.stored, first.unchanged) == (70, 70, 70, 0)
    assert first.settled == 70
    second = shop.push(rows)
    assert (second.encoded, second.renewed, second.stored, second.unchanged) == (0, 0, 0, 70)
    assert shop.encoders.asked == 70
    assert second.fed[RELEASE].left is None, "nothing was written, so nothing was audited"
    assert first.fed[RELEASE].left == Differences(0, 0, 0, 0)


def test_a_price_changes_without_encoding_and_the_vector_stays_bit_for_bit(shop: Shop) -> None:
    shop.push([row(at, price=1.0) for at in range(9)])
    before = shop.rows()
    report = shop.push([row(at, price=1.0 + (at == 6)) for at in range(9)])
    assert (report.encoded, report.renewed, report.stored) == (0, 1, 1)
    assert shop.encoders.asked == 9
    after = shop.rows()
    assert after["p6"]["attributes"] == {"price": 2.0}
    for product_id in before:
        assert np.array_equal(before[product_id]["vector"], after[product_id]["vector"])
        assert before[product_id]["thumbnail"] == after[product_id]["thumbnail"]
    assert before["p6"]["content_hash"] == after["p6"]["content_hash"]
    assert before["p6"]["row_hash"] != after["p6"]["row_hash"]
    assert after["p6"]["thumbnail"], "of a photo"


def test_another_title_is_encoded_and_only_that(shop: Shop) -> None:
    shop.push([row(at) for at in range(9)])
    report = shop.push([row(at, "another" if at == 2 else "") for at in range(9)])
    assert (report.encoded, report.renewed, report.stored) == (1, 0, 1)
    stored = shop.rows()["p2"]
    wanted = shop.encoders.by_release[RELEASE].vector("another", b"")
    assert stored["title"] == "another"
    assert np.allclose(stored["vector"], wanted, atol=1e-6)


def test_sync_deletes_what_the_source_lacks_and_refuses_to_delete_much(shop: Shop) -> None:
    rows = [row(at) for at in range(20)]
    shop.push(rows)
    assert shop.push(rows[:10]).deleted == 0, "only where it is asked for"
    assert shop.push(rows[2:], Plan(sync=True)).deleted == 2
    with pytest.raises(TooMuchToDelete, match=r"lacks at most 20% of the 18 rows.*lacks 4;"):
        shop.push(rows[6:], Plan(sync=True))
    assert set(shop.rows()) == {f"p{at}" for at in range(2, 20)}
    assert shop.push(rows[6:], Plan(sync=True, certain=True)).deleted == 4
    assert set(shop.rows()) == {f"p{at}" for at in range(6, 20)}


def test_sync_spares_rows_that_may_be_those_that_cannot_be_read(shop: Shop) -> None:
    """A line that is broken has lost its id, too."""
    rows = [row(at) for at in range(20)]
    shop.push(rows)
    broken = SourceRow("", problem=ItemError(Reason.BAD_ATTRIBUTES, "not a JSON line"))
    with pytest.raises(TooMuchToDelete, match="1 rows without one, which may be any of the 1 "):
        shop.push([*rows[1:], broken], Plan(sync=True))
    assert len(shop.rows()) == 20
    assert shop.push([*rows, broken], Plan(sync=True)).deleted == 0


def test_sync_deletes_from_no_collection_when_one_would_lose_too_much(shop: Shop) -> None:
    rows = [row(at) for at in range(20)]
    with candidate(shop) as second:
        shop.push(rows)
        second.delete([f"p{at}" for at in range(3, 20)])  # of 3 rows there, 1 is surplus
        with pytest.raises(TooMuchToDelete):
            shop.push([*rows[1:], *(row(at) for at in range(90, 95))], Plan(sync=True))
        assert "p0" in shop.rows()
        assert "p0" in shop.rows(second)


def test_a_dry_run_writes_nothing_and_says_what_a_run_then_does(shop: Shop) -> None:
    shop.push([row(at, price=1) for at in range(30)])
    before = shop.rows()
    changed = [row(at, "new" if at < 5 else "", price=1 + (at > 25)) for at in range(3, 33)]
    asked = shop.encoders.asked
    said = shop.push(changed, Plan(sync=True, dry=True))
    assert (shop.rows(), shop.encoders.asked) == (before, asked)
    done = shop.push(changed, Plan(sync=True))
    for name in ("encoded", "renewed", "unchanged", "deleted"):
        assert getattr(said, name) == getattr(done, name), name
    assert (said.encoded, said.renewed, said.unchanged, said.deleted) == (5, 4, 21, 3)
    assert (said.stored, done.stored) == (0, 9)


def test_a_duplicate_is_refused_and_the_first_stays(shop: Shop) -> None:
    report = shop.push([row(1), row(2), row(1, "another"), row(1)])
    assert report.refused == {"duplicate_id": 2}
    assert report.settled == report.read == 4
    assert shop.rows()["p1"]["title"] == "product 1"


def test_what_is_stored_stays_when_its_row_is_refused(shop: Shop) -> None:
    shop.push([row(at) for at in range(6)])
    unread = SourceRow("p1", problem=ItemError(Reason.IMAGE_MISSING_FILE, "no file"))
    rows = [row(0), unread, row(2, "a\0b"), row(3, BAD), row(4), row(5)]
    rejected: list[str] = []
    report = shop.push(
        rows, Plan(sync=True), on_reject=lambda r: rejected.append(f"{r.id} {r.code}")
    )
    assert sorted(rejected) == ["p1 image_missing_file", "p2 nul", "p3 too_long"]
    assert (report.deleted, report.stored, report.unchanged) == (0, 0, 3)
    assert {i: r["title"] for i, r in shop.rows().items()} == {
        f"p{at}": f"product {at}" for at in range(6)
    }


@pytest.mark.parametrize("first", ["a\0b", BAD])
def test_a_row_that_was_refused_is_stored_once_it_is_good(shop: Shop, first: str) -> None:
    assert shop.push([row(1, first), row(2)]).refused.total() == 1
    assert set(shop.rows()) == {"p2"}
    assert shop.push([row(1), row(2)]).stored == 1
    later = [row(3, "a\0b"), row(3)]
    report = shop.push(later)
    assert (report.refused.total(), report.stored) == (1, 1), "a good row after a refused one"


def test_the_closing_audit_finds_what_somebody_else_did(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = Collection.flush

    def tampered(self: Collection) -> None:
        self.delete(["p1", "p2"])
        flush(self)

    monkeypatch.setattr(Collection, "flush", tampered)
    with pytest.raises(CatalogError, match=r"missing=2, stale=0.*push again"):
        shop.push([row(at) for at in range(9)])
    monkeypatch.undo()
    report = shop.push([row(at) for at in range(9)])
    assert (report.stored, report.unchanged) == (2, 7), "and the next run repairs it"


@pytest.mark.parametrize("whole", [True, False])
def test_a_small_push_asks_for_its_ids_alone(
    shop: Shop, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.push([row(at) for at in range(40)])
    passes: list[str] = []
    every = Collection.every
    monkeypatch.setattr(
        Collection, "every", lambda self, *a: passes.append(self.name) or every(self, *a)
    )
    rows = [row(at, "new" if at < 2 else "") for at in range(30 if whole else 5)]
    report = shop.push(rows, rows_expected=len(rows))
    assert (report.encoded, report.unchanged) == (2, len(rows) - 2)
    assert report.fed[RELEASE].left == Differences(0, 0, 0, 0)
    assert bool(passes) == whole


def test_what_waits_is_written_although_the_batch_is_not_full(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow encoder must not make a kill dear."""
    monkeypatch.setattr("retrieval_client.feed.WRITE_S", 0.1)
    counts: list[int] = []

    def slowly() -> Iterator[SourceRow]:
        for at in range(1600):
            if at == 1599:
                time.sleep(0.3)
                counts.append(shop.collection.count())
            yield row(1 + 3 * at)

    shop.push(slowly())
    assert counts[0] > 0


def test_a_server_that_is_away_for_a_moment_is_waited_for(shop: Shop) -> None:
    shop.encoders.by_release[RELEASE].failures = [ServerUnavailable("away")] * 3
    assert shop.push([row(at) for at in range(40)]).stored == 40


def test_a_push_stops_at_once_when_it_is_told_to(shop: Shop) -> None:
    """Ctrl-C waits for no encoder."""
    encoder, release = shop.encoders.by_release[RELEASE], threading.Event()
    encoder.encode_products = lambda *_, **__: release.wait(20)  # type: ignore[method-assign]
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        shop.push(row(1 + 3 * at) for at in range(5000))
    assert time.monotonic() - started < 10
    release.set()


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, {"a": [2**70]}])
def test_a_number_that_milvus_cannot_hold_is_refused_with_its_row_alone(
    shop: Shop, value: object
) -> None:
    report = shop.push([row(1), row(2, n=value), row(4, n=2**63 - 1)])
    assert report.refused == {"bad_attributes": 1}
    assert report.stored == 2
    assert shop.rows()["p4"]["attributes"] == {"n": 2**63 - 1}


def test_attributes_within_each_other_have_a_bound(shop: Shop) -> None:
    def nested(depth: int) -> object:
        value: object = 1
        for _ in range(depth):
            value = {"a": value}
        return value

    report = shop.push([row(1, n=nested(40)), row(2, n=nested(300)), row(4, n=nested(2000))])
    assert report.refused == {"bad_attributes": 2}
    assert shop.rows()["p1"]["attributes"] == {"n": nested(40)}


# ── a pass over everything ───────────────────────────────────────────────────────────────
def test_a_pass_reads_every_row_once_whatever_the_ids(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quotes and backslashes where a step ends: an id must not bend the next step."""
    monkeypatch.setattr("retrieval_client.collection.PASS_ROWS", 10)
    hostile = ['q"uote', "back\\slash", "apos'trophe", 'x" or id != "', "é", "👟", "%", "\\"]
    ids = [f"{i}{at}" for at in range(12) for i in hostile] + [
        f"{at}{i}" for at, i in enumerate(hostile)
    ]
    shop.push([SourceRow(i, b"title") for i in ids])
    steps = list(shop.collection.every(["title"]))
    found = [row["id"] for step in steps for row in step]
    assert len(steps) > 5
    assert sorted(found) == sorted(ids)
    some = [r["id"] for step in shop.collection.every([], "bucket < 500") for r in step]
    assert 0 < len(some) < len(ids)
    assert set(some) < set(ids)


def test_a_step_that_is_too_large_is_halved(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.push([row(at) for at in range(100)])
    monkeypatch.setattr("retrieval_client.collection.MAX_RESULTS", 20)
    found = [r["id"] for step in shop.collection.every([]) for r in step]
    assert sorted(found) == sorted(f"p{at}" for at in range(100))
    monkeypatch.setattr("retrieval_client.collection.MAX_RESULTS", 1)
    with pytest.raises(CatalogError, match="spread them over several catalogs"):
        list(shop.collection.every([]))


# ── releases side by side ────────────────────────────────────────────────────────────────
class candidate:
    """While the block runs, a second release is built beside the one that is served."""

    def __init__(self, shop: Shop, role: Role = Role.CANDIDATE) -> None:
        self.shop, self.role = shop, role

    def __enter__(self) -> Collection:
        self.shop.encoders.by_release |= StandIns(OTHER, vector_dim=12).by_release
        self.made = self.shop.catalog.prepare(OTHER, 12, self.role)
        return self.made

    def __exit__(self, *exc: object) -> None:
        self.shop.catalog.unpoint(self.role)
        self.shop.catalog.drop(self.made)


@pytest.mark.parametrize("role", [Role.CANDIDATE, Role.PREVIOUS])
def test_every_live_release_is_fed_with_its_own_vectors(shop: Shop, role: Role) -> None:
    rows = [row(at, price=at) for at in range(40)]
    with candidate(shop, role) as second:
        report = shop.push(rows)
        assert {r: fed.stored for r, fed in report.fed.items()} == {RELEASE: 40, OTHER: 40}
        assert report.settled == 80
        there, here = shop.rows(second), shop.rows()
        assert {len(r["vector"]) for r in there.values()} == {12}
        assert {len(r["vector"]) for r in here.values()} == {8}
        assert all(r["content_hash"].startswith(f"{OTHER}:") for r in there.values())
        report = shop.push([row(at, price=at + 1) for at in range(1, 40)], Plan(sync=True))
        assert (report.encoded, report.renewed, report.deleted) == (0, 78, 2)


def test_a_release_that_begins_during_a_push_is_fed_from_then_on(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval_client.push.LIVE_TTL_S", 0.0)
    beside = candidate(shop)

    def rows() -> Iterator[SourceRow]:
        for at in range(3 * LOOK_UP_ROWS):
            if at == LOOK_UP_ROWS + 10:
                beside.__enter__()
            yield row(1 + 3 * at)

    try:
        report = shop.push(rows())
        assert report.fed[RELEASE].stored == 3 * LOOK_UP_ROWS
        assert 0 < report.fed[OTHER].stored < 3 * LOOK_UP_ROWS
    finally:
        beside.__exit__()


def test_a_first_push_makes_the_collection_and_only_if_one_release_is_served(
    backend: Callable[[], Settings],
) -> None:
    shop = Shop(backend())
    shop.encoders = StandIns(RELEASE, OTHER)
    with pytest.raises(Exception, match="expected one release for a new catalog"):
        shop.push([row(1)])
    assert shop.push([row(1)], Plan(dry=True)).encoded == 1
    shop.encoders = StandIns(RELEASE)
    assert shop.push([row(1)]).stored == 1
    assert shop.collection.info.release_id == RELEASE
    shop.catalog.milvus.client.drop_alias(shop.settings.collection)
    assert shop.catalog.find() is None, "the alias vanished"
    assert shop.push([row(1), row(2)]).unchanged == 1, "what it pointed to is taken up again"


# ── the window ───────────────────────────────────────────────────────────────────────────
def answer(window: Window, rates: Sequence[float]) -> list[int]:
    """Sizes, as a server answers at these rates (requests a second) in turn."""
    now, sizes = window._since, []
    for rate in rates:
        for _ in range(4 * window.size):
            now += 1 / rate
            window.answered(1, now)
        sizes.append(window.size)
    return sizes


def test_the_window_grows_while_that_makes_it_faster_and_not_beyond() -> None:
    window = Window()
    assert answer(window, [10, 12, 14, 16]) == [FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 4]
    assert answer(window, [16]) == [FIRST + 3], "wider was no faster: back"
    assert answer(window, [16, 16, 16])[-1] == FIRST + 3
    assert max(answer(window, [20 * 1.2**n for n in range(60)])) == MOST


def test_the_window_shrinks_when_the_server_is_full() -> None:
    window = Window(20)
    window.refused()
    assert window.size == 10
    for _ in range(9):
        window.refused()
    assert window.size == FEWEST
    assert answer(window, [10, 20])[-1] == FEWEST + 2, "and grows again"


# ── the command ──────────────────────────────────────────────────────────────────────────
def test_stdin_is_a_source_and_a_limit_is_no_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b'{"id": "a", "title": "red"}\n\n{broken\n{"id": "b", "title": "blue", "price": 2}\n'
    stdin = io.TextIOWrapper(io.BytesIO(lines))
    monkeypatch.setattr(sys, "stdin", stdin)
    source = Source(Path("-"))
    assert source.rows_expected is None
    rows = list(source.rows())
    assert [r.id for r in rows] == ["a", "", "b"]
    assert rows[1].problem
    command = [sys.executable, "-m", "retrieval_client", "push", "-", "--sync", "--limit", "3"]
    done = subprocess.run(command, cwd=ROOT, input=b"", capture_output=True)
    assert done.returncode == 1
    assert b"--sync: expected the whole source, got --limit" in done.stderr


def test_a_full_temporary_folder_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sqlite3

    from retrieval_client.book import Book
    from retrieval_contract.errors import RetrievalError

    with pytest.raises(RetrievalError, match=r"temporary file.*SQLITE_TMPDIR"), Book():
        raise sqlite3.OperationalError("database or disk is full")


def test_refused_rows_are_listed_in_their_file(tmp_path: Path) -> None:
    from retrieval_client.commands.shared import rejects_file
    from retrieval_client.rows import Reject

    with rejects_file(tmp_path / "none.jsonl"):
        pass
    assert not (tmp_path / "none.jsonl").exists()
    with rejects_file(tmp_path / "some.jsonl") as file:
        print(Reject("é\ud800", "nul", "x").to_json(), file=file)
    (line,) = (tmp_path / "some.jsonl").read_text().splitlines()
    assert json.loads(line) == {"id": "é\ud800", "code": "nul", "detail": "x"}
