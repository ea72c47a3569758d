"""The catalog on Milvus Lite and on the server: schema, ids as they come, nothing lost."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pymilvus import DataType, MilvusClient

from retrieval_client import Catalog, Collection, Settings
from retrieval_client.capabilities import Feature
from retrieval_client.catalog import Role
from retrieval_client.collection import Ask
from retrieval_client.index import KINDS, index_of
from retrieval_client.records import check_id, id_filter
from retrieval_client.releases import Releases
from retrieval_contract import models
from retrieval_contract.errors import (
    CatalogUnavailable,
    CollectionGone,
    ContractError,
    ItemError,
    ReleaseMismatch,
)
from tests.conftest import product_row

DIM = 8
RELEASE = "0123456789abcdef"
HOSTILE_IDS = [
    "plain",
    "it's",
    'double"quote',
    "back\\slash",
    "emoji 👟",
    "漢字",
    "a] or id not in [",
    "x'] or id not in ['y",
    '"] or true or id in ["',
    "%_like",
    "  spaces  ",
    "-- drop",
    "\\u0041",
]


@pytest.fixture
def store(milvus: Settings) -> Settings:
    """An empty place, for what needs one of its own."""
    return milvus


@pytest.fixture
def lite(tmp_path: Path) -> Settings:
    """For what a server has not: a folder, and one process that may use it."""
    return Settings(milvus=str(tmp_path / "deep" / "catalog.db"))


@pytest.fixture(scope="module")
def shared(backend: Callable[[], Settings]) -> Settings:
    """A place with a prepared collection, for tests that change nothing but its rows."""
    settings = backend()
    with Catalog(settings) as connected:
        connected.prepare(RELEASE, DIM)
    return settings


@pytest.fixture
def stored(shared: Settings) -> Iterator[Collection]:
    """An empty collection behind the alias."""
    with Catalog(shared) as connected:
        collection = connected.prepare(RELEASE, DIM)
        connected.milvus.client.delete(collection.name, filter='id != ""')
        assert collection.count() == 0
        yield collection


def hashes(stored: Collection, ids: list[str]) -> dict[str, str]:
    return {i: row["content_hash"] for i, row in stored.of_ids(ids, ["content_hash"]).items()}


def test_the_collection_is_the_contracts(stored: Collection, shared: Settings) -> None:
    info = stored.info
    name = f"{shared.collection}_{RELEASE}"
    assert (info.name, info.release_id, info.vector_dim) == (name, RELEASE, DIM)
    found = MilvusClient(shared.milvus).describe_collection(shared.collection)
    assert [(f["name"], f["type"].name) for f in found["fields"]] == [
        (f.name, f.kind)
        for f in models.PRODUCTS.fields
        if not f.words_of or Feature.BM25 in stored.milvus.backend.features
    ]
    assert found["properties"]["release_id"] == RELEASE


def test_rows_come_back_and_upserting_replaces(stored: Collection) -> None:
    row = dataclasses.replace(
        product_row("a", DIM, 1, "red"), attributes={"price": 9.5, "tags": ["x"]}, thumbnail=b"jpg"
    )
    stored.upsert([row, product_row("b", DIM, 2)])
    stored.flush()
    (hits,) = stored.search(row.vector[None], Ask(5, thumbnails=True))
    assert [h.id for h in hits] == ["a", "b"]
    assert hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert (hits[0].title, hits[0].attributes, hits[0].thumbnail) == (
        "red",
        {"price": 9.5, "tags": ["x"]},
        b"jpg",
    )
    stored.upsert([dataclasses.replace(row, title="green", content_hash="new")])
    assert stored.count() == 2
    assert hashes(stored, ["a", "b", "c"]) == {"a": "new", "b": "hash-2"}


def test_a_pass_sees_what_was_written_just_before(stored: Collection) -> None:
    for number in range(3):
        stored.upsert([product_row("a", DIM, number), product_row(f"b{number}", DIM)])
        stored.delete([f"b{number - 1}"])
        seen = [row for step in stored.every(["content_hash"]) for row in step]
        found = {row["id"]: row["content_hash"] for row in seen}
        assert found == {"a": f"hash-{number}", f"b{number}": "hash-0"}


def test_hostile_ids_are_found_and_deleted_one_by_one(stored: Collection) -> None:
    stored.upsert([product_row(i, DIM, n) for n, i in enumerate(HOSTILE_IDS)])
    assert set(stored.of_ids(HOSTILE_IDS, [])) == set(HOSTILE_IDS)
    for left, product_id in reversed(list(enumerate(HOSTILE_IDS))):
        assert stored.delete([product_id]) == [product_id]
        assert stored.count() == left, f"{product_id!r} took other rows with it"
    assert stored.delete(HOSTILE_IDS) == []


def test_ids_are_quoted_without_escapes_that_milvus_cannot_read() -> None:
    assert id_filter(['a"b', "👟"]) == 'id in ["a\\"b", "👟"]'


@pytest.mark.parametrize("bad", ["", "a\nb", "a\x00", "x" * 257, "é" * 129])
def test_ids_that_cannot_be_stored_are_refused(bad: str) -> None:
    with pytest.raises(ItemError, match="bad_id"):
        check_id(bad)


def test_an_id_of_full_length_is_stored(stored: Collection) -> None:
    longest = "é" * 128
    check_id(longest)
    stored.upsert([product_row(longest, DIM)])
    assert set(stored.of_ids([longest], [])) == {longest}


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 0.5])
def test_vectors_that_milvus_would_take_silently_are_refused(
    stored: Collection, value: float
) -> None:
    good = product_row("good", DIM)
    bad = dataclasses.replace(product_row("bad", DIM), vector=np.full(DIM, value, np.float32))
    with pytest.raises(ContractError, match="bad: expected a unit vector"):
        stored.upsert([good, bad])
    assert stored.count() == 0


def test_vectors_of_another_size_are_refused(stored: Collection) -> None:
    with pytest.raises(ContractError, match=r"expected \(rows, 8\), got \(1, 9\)"):
        stored.upsert([product_row("a", DIM + 1)])


@pytest.mark.parametrize(("release", "dim"), [("other", DIM), (RELEASE, DIM + 1)])
def test_another_release_or_size_is_refused_and_nothing_is_lost(
    stored: Collection, shared: Settings, release: str, dim: int
) -> None:
    stored.upsert([product_row("a", DIM)])
    mismatch = pytest.raises(ReleaseMismatch, match="serve the collection's release")
    with Catalog(shared) as other, mismatch:
        other.prepare(release, dim)
    assert stored.count() == 1


def test_somebody_elses_collection_is_refused_and_left_alone(store: Settings) -> None:
    if store.milvus.endswith(".db"):
        Path(store.milvus).parent.mkdir(parents=True)
    client = MilvusClient(store.milvus)
    schema = client.create_schema()
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=4)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="COSINE")
    client.create_collection(store.collection, schema=schema, index_params=index)
    with Catalog(store) as catalog, pytest.raises(ReleaseMismatch, match="release unknown"):
        catalog.prepare(RELEASE, DIM)
    assert len(client.describe_collection(store.collection)["fields"]) == 2


@pytest.mark.parametrize("index", [True, False])
def test_an_interrupted_creation_is_finished(store: Settings, index: bool) -> None:
    """Killed between collection, index and alias: the next push takes it up."""
    with Catalog(store) as catalog:
        catalog.prepare(RELEASE, DIM)
        client = MilvusClient(store.milvus)
        client.drop_alias(store.collection)
        if not index:
            name = f"{store.collection}_{RELEASE}"
            client.release_collection(name)
            client.drop_index(name, "vector")
            assert "vector" not in client.list_indexes(name)
        assert catalog.find() is None
        stored = catalog.prepare(RELEASE, DIM)
        stored.upsert([product_row("a", DIM)])
        assert stored.count() == 1, "and searches of a server see what a count has seen"
        assert stored.search(np.eye(1, DIM, dtype=np.float32))[0][0].id == "a"


def test_a_collection_without_an_index_is_said_and_mended(store: Settings) -> None:
    """`index.build`, or the making of a release, was cut short. Milvus Lite needs no index."""
    with Catalog(store) as catalog:
        stored = catalog.prepare(RELEASE, DIM)
        client = MilvusClient(store.milvus)

        def lose() -> None:
            client.release_collection(stored.name)
            client.drop_index(stored.name, "vector")

        lose()
        if not (lite := catalog.milvus.lite):
            with pytest.raises(CatalogUnavailable, match=r"tune --kind.* cut short: run it again"):
                catalog.find()
        releases = Releases(store, SimpleNamespace(sort=dict), catalog)  # type: ignore[arg-type]
        (told,) = releases.status()
        assert told.roles == (Role.SERVING,)
        assert (told.rows, "cut short" in told.problem) == ((0, False) if lite else (None, True))
        catalog.point(stored.name, Role.CANDIDATE)
        assert releases.abort().name == stored.name, "what cannot be loaded can be cleared away"
        catalog.mend(Role.SERVING)
        assert index_of(catalog.serving(max_age_s=0)).kind in KINDS
        lose()
        assert (found := catalog.of_name(stored.name))
        assert found.count() == 0


def test_rows_go_where_they_were_prepared_for_when_the_alias_moves(
    stored: Collection, shared: Settings
) -> None:
    alias = f"{shared.collection}_other"
    client = MilvusClient(shared.milvus)
    with Catalog(dataclasses.replace(shared, collection=alias)) as second:
        others = second.prepare("feedfacefeedface", DIM)
        client.alter_alias(models.PRODUCTS.name("feedfacefeedface", alias), shared.collection)
        try:
            stored.upsert([product_row("a", DIM)])
            assert (stored.count(), others.count()) == (1, 0)
        finally:
            client.alter_alias(f"{shared.collection}_{RELEASE}", shared.collection)


def test_reading_makes_no_store(lite: Settings) -> None:
    with Catalog(lite) as catalog, pytest.raises(CollectionGone, match="retrieval push"):
        catalog.serving()
    assert not Path(lite.milvus).exists()


def test_of_many_who_find_it_old_one_looks(
    shared: Settings, stored: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stored` is asked for so that there is something behind the alias."""
    with Catalog(shared) as catalog:
        known, looks = catalog.serving(), []
        going_on = threading.Event()

        def slowly(alias: str, deadline: object) -> Collection:
            looks.append(alias)
            going_on.wait(10)
            return stored

        monkeypatch.setattr(catalog, "_look", slowly)
        with ThreadPoolExecutor(9) as pool:
            found = [pool.submit(catalog.serving, max_age_s=1e-9) for _ in range(9)]
            done = as_completed(found, timeout=10)
            assert all(next(done).result() is known for _ in range(8))
            going_on.set()
        assert len(looks) == 1
        assert {future.result() for future in found} == {known, stored}


def test_limits_are_checked(stored: Collection) -> None:
    for limit in (0, 20_000):
        with pytest.raises(ContractError, match="limit: expected 1 to 16384"):
            stored.search(np.zeros((1, DIM), np.float32), Ask(limit))


def test_a_server_that_is_down_is_said_in_time() -> None:
    settings = Settings(milvus="http://127.0.0.1:1", timeout_s=2)
    started = time.monotonic()
    with Catalog(settings) as catalog, pytest.raises(CatalogUnavailable, match="see that it runs"):
        catalog.serving()
    assert time.monotonic() - started < 10


def test_a_store_held_by_another_process_is_said(lite: Settings, tmp_path: Path) -> None:
    script = (
        "import sys; from retrieval_client import Catalog, Settings; "
        f"c = Catalog(Settings(milvus={lite.milvus!r})); c.prepare({RELEASE!r}, {DIM}); "
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with Catalog(lite) as catalog, pytest.raises(CatalogUnavailable, match="may hold it"):
            catalog.serving()
    finally:
        holder.kill()
        holder.wait()
    with Catalog(lite) as catalog:
        assert catalog.serving().count() == 0, "the lock went with its process"


def test_a_path_that_is_no_catalog_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    path.write_text("not a store")
    with (
        Catalog(Settings(milvus=str(path))) as catalog,
        pytest.raises(CatalogUnavailable, match="cannot be opened"),
    ):
        catalog.serving()
    assert path.read_text() == "not a store"


def test_what_was_written_survives_the_process(store: Settings) -> None:
    script = (
        "from tests.conftest import product_row; from retrieval_client import Catalog, Settings; "
        f"c = Catalog(Settings(milvus={store.milvus!r}, collection={store.collection!r})); "
        f"c = c.prepare({RELEASE!r}, {DIM}); "
        f"c.upsert([product_row(str(i), {DIM}, i) for i in range(50)]); "
        "import os; os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=os.getcwd())
    with Catalog(store) as catalog:
        stored = catalog.serving()
        assert stored.info.release_id == RELEASE
        assert stored.count() == 50
        (hits,) = stored.search(product_row("7", DIM, 7).vector[None], Ask(1))
    assert hits[0].id == "7"
