"""A push makes a catalog what its source says, at the least cost; on both Milvuses."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.stand_in import BAD, StandIn
from retrieval_client import Collection, Settings
from retrieval_client.book import Differences
from retrieval_client.collection import CollectionInfo
from retrieval_client.feed import Plan
from retrieval_client.sources import Source, SourceRow
from retrieval_contract.errors import (
    CatalogError,
    ItemError,
    Reason,
    ReleaseMismatch,
    RetrievalError,
    ServerUnavailable,
    SourceError,
    TooMuchToDelete,
)
from tests.shop import PHOTO, RELEASE, Shop, candidate, damage, row


@pytest.fixture(scope="module")
def place(backend: Callable[[], Settings]) -> Shop:
    """One for all tests of this file."""
    shop = Shop(backend())
    shop.catalog.prepare(RELEASE, 8)
    return shop


@pytest.fixture
def shop(place: Shop) -> Shop:
    """That one, empty."""
    return place.empty()


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


def test_a_vector_that_is_not_what_was_written_is_not_kept(shop: Shop) -> None:
    shop.push([row(at, price=1.0) for at in range(9)])
    damage(shop.collection, "p6", vector=shop.rows()["p3"]["vector"])
    report = shop.push([row(at, price=2.0) for at in range(9)])
    assert (report.encoded, report.renewed) == (1, 8)
    wanted = shop.encoders.by_release[RELEASE].vector("product 6", PHOTO)
    assert np.allclose(shop.rows()["p6"]["vector"], wanted, atol=1e-6)


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


@pytest.mark.parametrize(
    ("spoiled", "error"),
    [
        ('p8,product 8\np9,"product 9\n', SourceError),
        ("p8,product 8\np9\n", TooMuchToDelete),
        ("p8,product 8\np", TooMuchToDelete),
    ],
)
def test_sync_believes_no_csv_that_is_spoiled(
    shop: Shop, tmp_path: Path, spoiled: str, error: type[RetrievalError]
) -> None:
    """By a quote that swallows the rest, a row without all of its cells, or a cut."""
    source = Source(tmp_path / "c.csv")
    good = "".join(f"p{at},product {at}\n" for at in range(8))
    source.path.write_text(f"id,title\n{good}p8,product 8\np9,product 9\n")
    shop.push(source.rows())
    source.path.write_text(f"id,title\n{good}{spoiled}")
    with pytest.raises(error):
        shop.push(source.rows(), Plan(sync=True))
    assert {i: r["title"] for i, r in shop.rows().items()} == {
        f"p{at}": f"product {at}" for at in range(10)
    }


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


def test_a_dry_run_says_that_the_run_would_be_refused(shop: Shop) -> None:
    rows = [row(at) for at in range(20)]
    shop.push(rows)
    broken = SourceRow("", problem=ItemError(Reason.BAD_ATTRIBUTES, "not a JSON line"))
    for source in (rows[5:], [*rows[1:], broken]):
        said = shop.push(source, Plan(sync=True, dry=True)).fed[RELEASE]
        with pytest.raises(TooMuchToDelete) as refused:
            shop.push(source, Plan(sync=True))
        assert said.refusal == str(refused.value)
        assert said.deleted > 0
        for plan in (Plan(sync=True, dry=True, certain=True), Plan(dry=True)):
            assert shop.push(source, plan).fed[RELEASE].refusal == ""
    assert shop.push(rows[1:], Plan(sync=True, dry=True)).fed[RELEASE].refusal == ""
    assert len(shop.rows()) == 20


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


@pytest.mark.parametrize(("whole", "known"), [(True, True), (False, True), (False, False)])
def test_a_small_push_asks_for_its_ids_alone(
    shop: Shop, whole: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its source does not say how many rows it has."""
    shop.push([row(at) for at in range(40)])
    passes: list[str] = []
    every = Collection.every
    monkeypatch.setattr(
        Collection, "every", lambda self, *a: passes.append(self.name) or every(self, *a)
    )
    rows = [row(at, "new" if at < 2 else "") for at in range(30 if whole else 5)]
    report = shop.push(rows, rows_expected=len(rows) if known else None)
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
                end = time.monotonic() + 20
                while not shop.collection.count() and time.monotonic() < end:
                    time.sleep(0.05)
                counts.append(shop.collection.count())
            yield row(1 + 3 * at)

    shop.push(slowly())
    assert counts[0] > 0


def test_a_server_that_is_away_for_a_moment_is_waited_for(shop: Shop) -> None:
    shop.encoders.by_release[RELEASE].failures = [ServerUnavailable("away")] * 3
    assert shop.push([row(at) for at in range(40)]).stored == 40


def test_a_server_that_comes_to_another_address_is_waited_for(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its own came back with another release."""
    shop.encoders.by_release[RELEASE].failures = [ReleaseMismatch("another")]
    found, away = shop.encoders.for_collection, [None, ServerUnavailable("starts"), None]

    def for_collection(info: CollectionInfo) -> StandIn:
        if error := away.pop(0):
            raise error
        return found(info)

    monkeypatch.setattr(shop.encoders, "for_collection", for_collection)
    monkeypatch.setattr(shop.encoders, "forget", lambda: None, raising=False)
    assert (shop.push([row(at) for at in range(4)]).stored, away) == (4, [])


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to it, which a shell takes from what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
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
