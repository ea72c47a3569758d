"""What a push relies on: whole passes, releases side by side, the window, the command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.stand_in import BAD, StandIns
from retrieval_client import Settings
from retrieval_client.catalog import Role
from retrieval_client.feed import LOOK_UP_ROWS, Plan
from retrieval_client.index import RECALL_ASKED
from retrieval_client.releases import Releases, unfinished
from retrieval_client.shards import ShardWriter, rows_of
from retrieval_client.sources import Source, SourceRow
from retrieval_client.verify import Verify
from retrieval_client.window import FEWEST, FIRST, MOST, Window
from retrieval_contract.errors import (
    CatalogError,
)
from tests.conftest import ROOT, product_row
from tests.shop import OTHER, PHOTO, RELEASE, Shop, candidate, row


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


def test_a_push_that_another_overtakes_leaves_no_title_with_the_others_vector(shop: Shop) -> None:
    """What it knows of the stored rows is as old as its start."""
    shop.push([row(1, "blue shirt", price=1), row(2, price=1)])

    def source() -> Iterator[SourceRow]:
        yield row(2, price=1)
        shop.push([row(1, "red dress", price=1)])
        yield row(1, "blue shirt", price=2)

    shop.push(source(), rows_expected=2)
    stored = shop.rows()["p1"]
    assert (stored["title"], stored["attributes"]) == ("blue shirt", {"price": 2})
    wanted = shop.encoders.by_release[RELEASE].vector("blue shirt", b"")
    assert float(np.dot(stored["vector"], wanted)) > 0.999


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
    with pytest.raises(CatalogError, match="expected an id to be stored once, got 'p"):
        list(shop.collection.every([]))


def test_a_bucket_that_is_too_large_is_read_by_ids(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each is of some ten million products and more."""
    monkeypatch.setattr("retrieval_contract.models.BUCKETS", 1)
    ids = [*(f"p{at}" for at in range(30)), 'q"uote', "back\\slash", "apos'trophe", "é", "👟", "字"]
    shop.push([SourceRow(i, b"title") for i in ids])
    monkeypatch.setattr("retrieval_client.collection.MAX_RESULTS", 20)
    found = [r["id"] for step in shop.collection.every([]) for r in step]
    assert sorted(found) == sorted(ids)
    some = [r["id"] for step in shop.collection.every([], 'id != "p1"') for r in step]
    assert sorted(some) == sorted(set(ids) - {"p1"})


# ── releases side by side ────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("role", [Role.CANDIDATE, Role.PREVIOUS])
def test_every_live_release_is_fed_with_its_own_vectors(shop: Shop, role: Role) -> None:
    rows = [row(at, price=at) for at in range(40)]
    with candidate(shop, role) as second:
        report = shop.push([*rows, row(1)])
        assert {r: fed.stored for r, fed in report.fed.items()} == {RELEASE: 40, OTHER: 40}
        assert (report.settled, report.done, report.read) == (82, 41, 41), "one was refused"
        there, here = shop.rows(second), shop.rows()
        assert {len(r["vector"]) for r in there.values()} == {12}
        assert {len(r["vector"]) for r in here.values()} == {8}
        assert all(r["content_hash"].startswith(f"{OTHER}:") for r in there.values())
        report = shop.push([row(at, price=at + 1) for at in range(1, 40)], Plan(sync=True))
        assert (report.encoded, report.renewed, report.deleted) == (0, 78, 2)
        report = shop.push([SourceRow("bad", BAD.encode())])
        assert (report.refused.total(), len(report.rejects)) == (1, 1), "by both, and said once"


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


def test_products_without_titles_are_verified_by_others_like_them(shop: Shop) -> None:
    """With the recall that was asked for."""
    with candidate(shop) as second:
        client = shop.catalog.milvus.client
        client.alter_collection_properties(second.name, {RECALL_ASKED: "0.98"})
        shop.push([SourceRow(f"p{at}", b"", PHOTO + bytes([at])) for at in range(30)])
        found = Verify(shop.settings, shop.encoders, shop.catalog).run()  # type: ignore[arg-type]
    assert found.passed, found.checks
    (recall,) = (check for check in found.checks if check.name == "recall")
    assert (recall.expected, recall.got) == ("at least 0.98", "1.0000")
    assert {change.query for change in found.changes} == {f"p{at}" for at in range(30)}
    assert all(len(change.serving) == len(change.candidate) == 10 for change in found.changes)


class Killed(BaseException):
    """In place of a SIGKILL."""


def test_a_rollback_beside_a_candidate_that_died_leaves_nobody_without_a_role(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next one, or `gc`, ends it."""
    ours = Releases(shop.settings, shop.encoders, shop.catalog)  # type: ignore[arg-type]
    monkeypatch.setattr(ours, "_try", lambda collection: None)
    monkeypatch.setattr(shop.encoders, "sort", dict, raising=False)
    third = shop.catalog.prepare("c" * 16, 8, Role.CANDIDATE)
    with candidate(shop, Role.PREVIOUS):
        for step, done in enumerate([ours.rollback, ours.rollback, ours.gc, ours.rollback]):
            moves = iter(range(9))

            def killed(real: Callable[..., None], *args: object, step: int = step) -> None:
                if next(moves) == step:  # noqa: B023
                    raise Killed
                real(*args)

            with pytest.MonkeyPatch.context() as patch:
                for name in ("point", "unpoint"):
                    real = getattr(shop.catalog, name)
                    patch.setattr(shop.catalog, name, partial(killed, real))
                with pytest.raises(Killed):
                    ours.rollback()
            live = {each.info.release_id for each in shop.catalog.live().values()}
            assert live == {RELEASE, OTHER, "c" * 16}, "a push would miss one"
            said = " ".join(unfinished(ours.status()))
            assert ("`rollback` ends it" in said) == (step > 0)
            done()
            now = {role: each.info.release_id for role, each in shop.catalog.roles().items()}
            assert now == {Role.SERVING: OTHER, Role.PREVIOUS: RELEASE, Role.CANDIDATE: "c" * 16}
            assert ours.rollback().info.release_id == RELEASE
        shop.catalog.unpoint(Role.CANDIDATE)
        shop.catalog.drop(third)


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


def test_rejects_may_go_to_a_device_a_pipe_or_a_link(tmp_path: Path) -> None:
    """Which are not the push's to remove."""
    from retrieval_client.commands.shared import rejects_file

    pipe, link, there = (tmp_path / name for name in ("pipe", "link", "there"))
    os.mkfifo(pipe)
    read = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    link.symlink_to(there)
    for path in (pipe, link):
        with rejects_file(path):
            pass
        with rejects_file(path) as file:
            print("{}", file=file)
    assert os.read(read, 9) == there.read_bytes() == b"{}\n"
    os.close(read)
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_a_second_command_does_not_write_into_the_list_of_refused_rows(tmp_path: Path) -> None:
    from retrieval_client.commands.shared import rejects_file
    from retrieval_contract.errors import RetrievalError

    path = tmp_path / "rejects.jsonl"
    with rejects_file(path) as file:
        print("{}", file=file, flush=True)
        with pytest.raises(RetrievalError, match="--rejects"), rejects_file(path):
            pass
        assert path.read_text() == "{}\n"
    with rejects_file(path):
        pass
    assert not path.exists(), "that of the last command, which refused nothing"


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_comment_in_a_photo_costs_neither_its_row_nor_the_push(format: str) -> None:
    """Pillow writes it along: too much for a thumbnail, or for ever."""
    import io

    from PIL import Image, PngImagePlugin

    from retrieval_client.rows import thumbnail

    said, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    said.add_itxt("comment", "é" * 33_000)
    more = {"pnginfo": said} if format == "PNG" else {"comment": b"c" * 60_000}
    Image.new("RGB", (64, 64), (200, 0, 0)).save(buffer, format, **more)
    assert len(buffer.getvalue()) > 1000
    assert len(thumbnail(buffer.getvalue())) < 2000


def test_a_load_holds_one_row_group_at_a_time(tmp_path: Path) -> None:
    """Groups end where their rows are heavy: several may be more than a Milvus takes at once."""
    with ShardWriter(tmp_path / "s.parquet") as writer:
        for start in (0, 3):
            writer.write([product_row(f"p{start + at}", 8) for at in range(3)])
    assert [len(rows) for rows in rows_of(tmp_path / "s.parquet", 8)] == [3, 3]
