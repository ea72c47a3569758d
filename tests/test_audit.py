"""An audit finds every kind of wrong row, on both Milvuses; a repair leaves the others alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.stand_in import BAD, StandIns
from retrieval_client import Catalog, Collection, Encoders, ProductRow, Settings
from retrieval_client.__main__ import main
from retrieval_client.audit import KINDS, ROTTEN, Audit, Found
from retrieval_client.collection import Ask, Consistency
from retrieval_client.deadline import Deadline
from retrieval_client.picture import draw_results
from retrieval_client.push import Push
from retrieval_client.query import stored
from retrieval_client.records import stored_from_row
from retrieval_client.rows import candidate_from_row
from retrieval_client.sources import SourceRow
from tests.conftest import photo, product_row
from tests.shop import damage

DIM, RELEASE = 8, "0123456789abcdef"


def source(count: int) -> list[SourceRow]:
    return [SourceRow(f"p{i}", f"red dress number {i}".encode()) for i in range(count)]


def stored_row(row: SourceRow, release_id: str = RELEASE) -> ProductRow:
    """As a push of this row would store it, but for its vector."""
    said = candidate_from_row(row, True)
    plain = product_row(row.id, DIM, int(row.id[1:]), said.title)
    return dataclasses.replace(
        plain, content_hash=said.content_hash(release_id), row_hash=said.row_hash
    )


@pytest.fixture
def filled(milvus: Settings) -> Iterator[tuple[Catalog, Collection]]:
    """Twenty good rows."""
    with Catalog(milvus) as catalog:
        collection = catalog.prepare(RELEASE, DIM)
        collection.upsert([stored_row(row) for row in source(20)])
        yield catalog, collection


def test_what_is_right_is_found_right(filled: tuple[Catalog, Collection]) -> None:
    catalog, _ = filled
    report = Audit(catalog).run(source(20))
    assert report.clean
    (found,) = report.found
    assert (report.read, report.refused, found.stored) == (20, 0, 20)


def test_of_an_empty_collection_everything_is_missing(milvus: Settings) -> None:
    with Catalog(milvus) as catalog:
        catalog.prepare(RELEASE, DIM)
        (found,) = Audit(catalog).run(source(20)).found
    assert (found.stored, found.counts["missing"], sum(found.counts.values())) == (0, 20, 20)


def test_every_kind_of_wrong_row_is_found_and_named(filled: tuple[Catalog, Collection]) -> None:
    catalog, collection = filled
    collection.delete(["p1"])
    other = stored_row(source(20)[2], "feedfacefeedface")
    changed = dataclasses.replace(stored_row(source(20)[3]), row_hash="another price")
    older = stored_row(SourceRow("p4", b"an older title"))
    surplus = stored_row(SourceRow("p99", b"sold out"))
    collection.upsert([other, changed, older, surplus])
    long = 2 * stored_row(source(20)[5]).vector
    wanted = {"p1": "missing", "p2": "other_release", "p3": "stale", "p4": "stale"}
    wanted |= {"p99": "surplus", "p5": "norm", "p7": "damaged", "p8": "damaged", "p9": "damaged"}
    damage(collection, "p5", vector=long)
    damage(collection, "p7", vector=stored_row(source(20)[6]).vector)
    damage(collection, "p8", title="red dress number 3")
    damage(collection, "p9", attributes={"price": 1})
    damage(collection, "p11", bucket=-5)
    damage(collection, "p12", bucket=5000)
    wanted |= {"p11": "damaged", "p12": "damaged"}
    if collection.milvus.lite:  # a server refuses it
        damage(collection, "p6", vector=np.full(DIM, np.nan, np.float32))
        wanted["p6"] = "not_finite"
    else:  # which keeps two rows of one id, and shows one
        second = stored_from_row(stored_row(source(20)[10]))
        collection.milvus.client.insert(collection.name, [second])
        wanted["p10"] = "duplicate"
    report = Audit(catalog).run(source(20))
    (found,) = report.found
    named = {product_id: kind for kind, ids in found.examples.items() for product_id in ids}
    assert named == wanted
    assert found.stored == 20
    assert sum(found.counts.values()) == len(wanted)
    report.found.insert(0, Found("cleared away meanwhile", "f" * 16, rotten=["p13"]))
    Audit(catalog).mend(report)
    rotten = {i for i, kind in wanted.items() if kind in ROTTEN}
    there = {f"p{i}" for i in range(2, 20)} | {"p0", "p99"}
    assert {row["id"] for row in collection.query('id != ""', [])} == there - rotten
    assert collection.count() == len(there - rotten)


def test_a_repair_deletes_what_is_rotten_only_where_the_source_has_it(
    filled: tuple[Catalog, Collection],
) -> None:
    """The rest is a push's to delete, which asks before it deletes much."""
    catalog, collection = filled
    for product_id in ("p3", "p15"):
        damage(collection, product_id, title="another")
    report = Audit(catalog).run(source(10))
    assert sorted(report.found[0].examples["damaged"]) == ["p15", "p3"]
    Audit(catalog).mend(report)
    there = {row["id"] for row in collection.query('id != ""', [])}
    assert there == {f"p{i}" for i in range(20)} - {"p3"}


def test_a_damaged_photo_is_found_and_costs_no_other_hit(
    filled: tuple[Catalog, Collection], tmp_path: Path
) -> None:
    """Rows of an earlier version have a checksum without it: there it must be one at all."""
    catalog, collection = filled
    rows = [dataclasses.replace(stored_row(row), thumbnail=photo()) for row in source(20)]
    collection.upsert(rows)
    good = stored_from_row(rows[0])["thumbnail"]
    before = {at: stored_from_row(dataclasses.replace(rows[at], thumbnail=b"")) for at in (5, 6)}
    damage(collection, "p3", thumbnail="!" + good[1:])
    damage(collection, "p4", thumbnail=good[:100] + "AAAA" + good[104:])
    damage(collection, "p5", checksum=before[5]["checksum"])
    damage(collection, "p6", checksum=before[6]["checksum"], thumbnail=good[:101])
    damage(collection, "p7", thumbnail="")
    (found,) = Audit(catalog).run(source(20)).found
    assert sorted(found.examples["damaged"]) == ["p3", "p4", "p6", "p7"]
    ask = Ask(20, thumbnails=True, consistency=Consistency.ALL)
    (hits,) = collection.search(rows[3].vector[None], ask)
    photos = {hit.id: hit.thumbnail for hit in hits}
    assert (len(photos), photos["p0"], photos["p3"]) == (20, photo(), b"")
    draw_results(["all"], [hits], tmp_path / "page.png")


def test_rows_that_are_counted_and_not_shown_are_said(
    filled: tuple[Catalog, Collection], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, _ = filled
    count = Collection.count
    monkeypatch.setattr(
        Collection, "count", lambda self, condition="": count(self, condition) + 2 * (not condition)
    )
    report = Audit(catalog).run(source(20))
    assert not report.clean
    assert {kind: n for kind, n in report.found[0].counts.items() if n} == {"unseen": 2}


def test_what_a_server_refuses_is_not_missing(
    filled: tuple[Catalog, Collection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether nothing is stored under its id, or an older row; and it is asked about few others."""
    catalog, collection = filled
    stand_ins: Any = StandIns(RELEASE, vector_dim=DIM)
    bad = [SourceRow("p3", BAD.encode()), SourceRow("p50", BAD.encode())]
    rows = [*source(3), *bad, *source(20)[4:]]
    report = Audit(catalog).run(rows, stand_ins)
    assert (report.refused, report.clean, stand_ins.asked) == (2, True, 2)
    monkeypatch.setattr("retrieval_client.audit.TAKEN", 1)
    collection.upsert([stored_row(source(20)[3], "feedfacefeedface")])
    found = Audit(catalog).run([*rows, *source(120)[51:]], stand_ins).found[0]
    assert (found.counts["missing"], found.examples["other_release"]) == (69, ["p3"])
    assert stand_ins.asked == 2 + 32


ODD: dict[str, Any] = {
    "whole": 1.0,
    "numbers": [0, -0.0, 1e-7, 0.1 + 0.2, 1e308, 5e-324, 2**53 + 1, -(2**63), 2**64 - 1],
    "words": ["ünïcode", "\u2028", "\x00", "🛍", 'a "quote" \\', ""],
    "nested": {"b": {}, "a": [[], [None, True]]},
    "nothing": None,
}


def test_what_a_milvus_does_to_attributes_is_no_damage(milvus: Settings) -> None:
    """Each brings them back in words of its own; the checksum must not depend on those."""
    rows = [
        SourceRow(f"p{at}", b"a mug", attributes={name: value})
        for at, (name, value) in enumerate(ODD.items())
    ]
    with Catalog(milvus) as catalog:
        catalog.prepare(RELEASE, DIM)
        stand_ins = StandIns(RELEASE, vector_dim=DIM)
        assert Push(milvus, stand_ins, catalog).run(rows).stored == len(rows)
        assert Audit(catalog).run(rows).clean


def test_rows_that_cannot_be_stored_are_neither_missing_nor_surplus(
    filled: tuple[Catalog, Collection],
) -> None:
    """What a refused row replaced stays: its product is still in the source."""
    catalog, _ = filled
    bad = [SourceRow("p0"), SourceRow("p77", b""), SourceRow("p7", b"red dress number 7")]
    report = Audit(catalog).run([*bad[:2], *source(20)[1:], bad[2]])
    assert (report.refused, report.clean) == (3, True)


def test_a_repair_makes_it_what_the_source_says(settings: Settings, tmp_path: Path, capsys) -> None:
    """With the real encoder, through the command; what was right is not written again.

    The photos of p4, which was stored without one, and of p40 cannot be read.
    """
    rows = source(40)
    said = [{"id": row.id, "title": row.title.decode(), "image": ""} for row in source(41)]
    said[4]["image"] = said[40]["image"] = "broken.jpg"
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    lines = map(json.dumps, said)
    (tmp_path / "source.jsonl").write_text("\n".join(lines))
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        Push(settings, encoders, catalog).run([*rows, SourceRow("gone", b"a mug")])
        collection = catalog.serving()
        collection.delete(["p1"])
        wrong = encoders.for_collection(collection.info).encode_products(["a blue mug"], [b""])
        other = stored_row(rows[2], collection.info.release_id)
        collection.upsert([dataclasses.replace(other, vector=wrong.vectors[0])])
        damage(collection, "p3", title="a mug")
        command = ("audit", tmp_path / "source.jsonl", "--sample", "41", "--json")
        code, said, _ = retrieval(capsys, settings, *command)
        (found,) = json.loads(said)["collections"]
        wanted = {"missing": 1, "surplus": 1, "damaged": 1, "differs": 1}
        assert (code, found["sampled"], json.loads(said)["refused"]) == (3, 38, 2)
        assert {kind: count for kind, count in found["counts"].items() if count} == wanted
        code, said, _ = retrieval(capsys, settings, *command, "--repair")
        (before,), (after,) = json.loads(said)["before"], json.loads(said)["collections"]
        assert (code, json.loads(said)["clean"], after["stored"]) == (0, True, 40)
        assert before == found
        assert set(after["counts"]) == set(KINDS)


def retrieval(capsys, settings: Settings, *args: object) -> tuple[int, str, str]:
    """The command, in the one process that may open a folder of Milvus Lite."""
    where = ["--triton", settings.triton, "--milvus", settings.milvus]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, args), *where])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_says_what_is_wrong_and_changes_nothing(
    settings: Settings, tmp_path: Path, capsys
) -> None:
    (tmp_path / "source.csv").write_text("id,title\np0,red dress number 0\n[/b]p5,a mug\n")
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        Push(settings, encoders, catalog).run(source(3))
        code, said, err = retrieval(capsys, settings, "audit", tmp_path / "source.csv")
        assert code == 3
        for words in ("in the source, not stored", "stored, not in the source", "[/b]p5", "p1, p2"):
            assert words in said
        assert "--repair" in err
        assert catalog.serving().count() == 3


def test_a_repair_needs_a_source_that_can_be_read_twice(settings: Settings, capsys) -> None:
    code, _, err = retrieval(capsys, settings, "audit", "-", "--repair")
    assert code == 1
    assert "reads the source twice" in err


def test_a_damaged_vector_costs_only_who_asks_for_its_like(
    filled: tuple[Catalog, Collection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store serves changed bytes without a word."""
    collection = filled[1]
    vectors = {"p0": [np.nan] * DIM, "p1": [1.0] * DIM}
    rows = {product_id: {"vector": vector} for product_id, vector in vectors.items()}
    monkeypatch.setattr(collection, "of_ids", lambda *args: rows)
    found = stored(["p0", "p1"], collection, Consistency.ANY, Deadline(1))
    assert [error is None for error in found.errors] == [False, True]
    assert "run an audit" in str(found.errors[0])
    assert np.isfinite(found.vectors).all()
