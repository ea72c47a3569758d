"""An audit finds every kind of wrong row, on both Milvuses, and a repair leaves the others alone."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retrieval_client import Catalog, Collection, Encoders, ProductRow, Settings
from retrieval_client.audit import KINDS, Audit
from retrieval_client.push import Push
from retrieval_client.rows import candidate_from_row
from retrieval_client.sources import SourceRow
from tests.conftest import photo, product_row

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
    wanted |= {"p99": "surplus", "p5": "norm"}
    put_unchecked(collection, "p5", long)
    if collection.milvus.lite:  # a server refuses it
        put_unchecked(collection, "p6", np.full(DIM, np.nan, np.float32))
        wanted["p6"] = "not_finite"
    (found,) = Audit(catalog).run(source(20)).found
    named = {product_id: kind for kind, ids in found.examples.items() for product_id in ids}
    assert named == wanted
    assert found.stored == 20
    assert sum(found.counts.values()) == len(wanted)


def put_unchecked(collection: Collection, product_id: str, vector: np.ndarray) -> None:
    """As a damaged file would have it: `Collection.upsert` refuses such vectors."""
    fields = ["title", "content_hash", "row_hash", "bucket", "attributes", "thumbnail"]
    row = collection.of_ids([product_id], fields)[product_id]
    collection.milvus.client.upsert(collection.name, [{**row, "vector": vector}])


def test_rows_that_cannot_be_stored_are_neither_missing_nor_surplus(
    filled: tuple[Catalog, Collection],
) -> None:
    """What a refused row replaced stays: its product is still in the source."""
    catalog, _ = filled
    bad = [SourceRow("p0"), SourceRow("p77", b""), SourceRow("p7", b"red dress number 7")]
    report = Audit(catalog).run([*bad[:2], *source(20)[1:], bad[2]])
    assert (report.refused, report.clean) == (3, True)


def test_a_repair_makes_it_what_the_source_says(settings: Settings, tmp_path: Path) -> None:
    """With the real encoder, through the command; what was right is not written again."""
    rows = source(40)
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        Push(settings, encoders, catalog).run([*rows, SourceRow("gone", image=photo())])
        collection = catalog.serving()
        collection.delete(["p1"])
        wrong = encoders.for_collection(collection.info).encode_products(["a blue mug"], [b""])
        put_unchecked(collection, "p2", wrong.vectors[0])  # a good vector, but of another product
        report = Audit(catalog).run(rows, encoders, sample=40)
    (found,) = report.found
    assert found.sampled == 39
    assert {k: v for k, v in found.counts.items() if v} == {
        "missing": 1,
        "surplus": 1,
        "differs": 1,
    }
    lines = [json.dumps({"id": row.id, "title": row.title.decode()}) for row in rows]
    (tmp_path / "source.jsonl").write_text("\n".join(lines))
    done = audit(settings, tmp_path / "source.jsonl", "--repair", "--sample", "40", "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["clean"], said["read"]) == (0, True, 40)
    (before,), (after,) = said["before"], said["collections"]
    assert (before["counts"], after["stored"]) == (found.counts, 40)
    assert set(after["counts"]) == set(KINDS)


def audit(settings: Settings, *args: object) -> subprocess.CompletedProcess[str]:
    where = ["--triton", settings.triton, "--milvus", settings.milvus]
    command = [sys.executable, "-m", "retrieval_client", "audit", *map(str, args), *where]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_says_what_is_wrong_and_changes_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        Push(settings, encoders, catalog).run(source(3))
    (tmp_path / "source.csv").write_text("id,title\np0,red dress number 0\np5,a mug\n")
    done = audit(settings, tmp_path / "source.csv", "--no-thumbnails")
    assert done.returncode == 3, done.stderr
    for said in ("in the source, not stored", "stored, not in the source", "p5", "p1, p2"):
        assert said in done.stdout
    assert "--repair" in done.stderr
    with Catalog(settings) as catalog:
        assert catalog.serving().count() == 3


def test_a_repair_needs_a_source_that_can_be_read_twice(settings: Settings) -> None:
    done = audit(settings, "-", "--repair")
    assert done.returncode == 1
    assert "reads the source twice" in done.stderr
