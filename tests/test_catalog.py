"""The catalog on Milvus Lite and on the server: schema, ids as they come, nothing lost."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pymilvus import DataType, MilvusClient

from retrieval_client import Catalog, Settings
from retrieval_client.catalog import check_id, id_filter
from retrieval_contract import models
from retrieval_contract.errors import (
    CatalogError,
    CatalogUnavailable,
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
def catalog(shared: Settings) -> Iterator[Catalog]:
    """Prepared, and empty."""
    with Catalog(shared) as connected:
        connected.prepare(RELEASE, DIM)
        client = MilvusClient(shared.milvus)
        client.delete(shared.collection, filter='id != ""')
        client.close()
        assert connected.count() == 0
        yield connected


def test_the_collection_is_the_contracts(catalog: Catalog, shared: Settings) -> None:
    info = catalog.info()
    assert info is not None
    name = f"{shared.collection}_{RELEASE}"
    assert (info.name, info.release_id, info.vector_dim) == (name, RELEASE, DIM)
    found = MilvusClient(shared.milvus).describe_collection(shared.collection)
    assert [(f["name"], f["type"].name) for f in found["fields"]] == [
        (f.name, f.kind) for f in models.PRODUCTS.fields
    ]
    assert found["properties"]["release_id"] == RELEASE


def test_rows_come_back_and_upserting_replaces(catalog: Catalog) -> None:
    row = dataclasses.replace(
        product_row("a", DIM, 1, "red"), attributes={"price": 9.5, "tags": ["x"]}, thumbnail=b"jpg"
    )
    catalog.upsert([row, product_row("b", DIM, 2)])
    catalog.flush()
    (hits,) = catalog.search(row.vector[None], limit=5, thumbnails=True)
    assert [h.id for h in hits] == ["a", "b"]
    assert hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert (hits[0].title, hits[0].attributes, hits[0].thumbnail) == (
        "red",
        {"price": 9.5, "tags": ["x"]},
        b"jpg",
    )
    catalog.upsert([dataclasses.replace(row, title="green", content_hash="new")])
    assert catalog.count() == 2
    assert catalog.stored_hashes(["a", "b", "c"]) == {"a": "new", "b": "hash-2"}


def test_hostile_ids_are_found_and_deleted_one_by_one(catalog: Catalog) -> None:
    catalog.upsert([product_row(i, DIM, n) for n, i in enumerate(HOSTILE_IDS)])
    assert set(catalog.stored_hashes(HOSTILE_IDS)) == set(HOSTILE_IDS)
    for left, product_id in reversed(list(enumerate(HOSTILE_IDS))):
        assert catalog.delete([product_id]) == [product_id]
        assert catalog.count() == left, f"{product_id!r} took other rows with it"
    assert catalog.delete(HOSTILE_IDS) == []


def test_ids_are_quoted_without_escapes_that_milvus_cannot_read() -> None:
    assert id_filter(['a"b', "👟"]) == 'id in ["a\\"b", "👟"]'


@pytest.mark.parametrize("bad", ["", "a\nb", "a\x00", "x" * 257, "é" * 129])
def test_ids_that_cannot_be_stored_are_refused(bad: str) -> None:
    with pytest.raises(ItemError, match="bad_id"):
        check_id(bad)


def test_an_id_of_full_length_is_stored(catalog: Catalog) -> None:
    longest = "é" * 128
    check_id(longest)
    catalog.upsert([product_row(longest, DIM)])
    assert set(catalog.stored_hashes([longest])) == {longest}


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 0.5])
def test_vectors_that_milvus_would_take_silently_are_refused(
    catalog: Catalog, value: float
) -> None:
    good = product_row("good", DIM)
    bad = dataclasses.replace(product_row("bad", DIM), vector=np.full(DIM, value, np.float32))
    with pytest.raises(ContractError, match="bad: expected a unit vector"):
        catalog.upsert([good, bad])
    assert catalog.count() == 0


def test_vectors_of_another_size_are_refused(catalog: Catalog) -> None:
    with pytest.raises(ContractError, match=r"expected \(rows, 8\), got \(1, 9\)"):
        catalog.upsert([product_row("a", DIM + 1)])


@pytest.mark.parametrize(("release", "dim"), [("other", DIM), (RELEASE, DIM + 1)])
def test_another_release_or_size_is_refused_and_nothing_is_lost(
    catalog: Catalog, shared: Settings, release: str, dim: int
) -> None:
    catalog.upsert([product_row("a", DIM)])
    with Catalog(shared) as other:
        with pytest.raises(ReleaseMismatch, match="serve the collection's release"):
            other.prepare(release, dim)
        with pytest.raises(ReleaseMismatch):
            other.check(release, dim)
    assert catalog.count() == 1


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
            assert client.list_indexes(name) == []
        assert catalog.info() is None
        catalog.prepare(RELEASE, DIM)
        catalog.upsert([product_row("a", DIM)])
        assert catalog.count() == 1, "and searches of a server see what a count has seen"
        assert catalog.search(np.eye(1, DIM, dtype=np.float32))[0][0].id == "a"


def test_rows_go_where_they_were_prepared_for_when_the_alias_moves(
    catalog: Catalog, shared: Settings
) -> None:
    alias = f"{shared.collection}_other"
    client = MilvusClient(shared.milvus)
    with Catalog(dataclasses.replace(shared, collection=alias)) as second:
        second.prepare("feedfacefeedface", DIM)
        client.alter_alias(models.PRODUCTS.name("feedfacefeedface", alias), shared.collection)
        try:
            catalog.upsert([product_row("a", DIM)])
            assert (catalog.count(), second.count()) == (1, 0)
        finally:
            client.alter_alias(f"{shared.collection}_{RELEASE}", shared.collection)


def test_writing_without_saying_for_which_release_is_refused(store: Settings) -> None:
    with Catalog(store) as catalog, pytest.raises(CatalogError, match="call `prepare` first"):
        catalog.upsert([product_row("a", DIM)])


def test_reading_makes_no_store(lite: Settings) -> None:
    with Catalog(lite) as catalog, pytest.raises(CatalogError, match="retrieval push"):
        catalog.count()
    assert not Path(lite.milvus).exists()


def test_an_empty_catalog_says_how_to_fill_it(store: Settings) -> None:
    with Catalog(store) as catalog, pytest.raises(CatalogError, match="retrieval push"):
        catalog.check(RELEASE, DIM)


def test_limits_are_checked(catalog: Catalog) -> None:
    for limit in (0, 20_000):
        with pytest.raises(ContractError, match="limit: expected 1 to 16384"):
            catalog.search(np.zeros((1, DIM), np.float32), limit=limit)


def test_a_server_that_is_down_is_said_in_time() -> None:
    settings = Settings(milvus="http://127.0.0.1:1", timeout_s=2)
    started = time.monotonic()
    with Catalog(settings) as catalog, pytest.raises(CatalogUnavailable, match="see that it runs"):
        catalog.count()
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
            catalog.count()
    finally:
        holder.kill()
        holder.wait()
    with Catalog(lite) as catalog:
        assert catalog.count() == 0, "the lock went with its process"


def test_a_path_that_is_no_catalog_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    path.write_text("not a store")
    with (
        Catalog(Settings(milvus=str(path))) as catalog,
        pytest.raises(CatalogUnavailable, match="cannot be opened"),
    ):
        catalog.count()
    assert path.read_text() == "not a store"


def test_what_was_written_survives_the_process(store: Settings) -> None:
    script = (
        "from tests.conftest import product_row; from retrieval_client import Catalog, Settings; "
        f"c = Catalog(Settings(milvus={store.milvus!r}, collection={store.collection!r})); "
        f"c.prepare({RELEASE!r}, {DIM}); "
        f"c.upsert([product_row(str(i), {DIM}, i) for i in range(50)]); "
        "import os; os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=os.getcwd())
    with Catalog(store) as catalog:
        assert catalog.check(RELEASE, DIM)
        assert catalog.count() == 50
        (hits,) = catalog.search(product_row("7", DIM, 7).vector[None], limit=1)
    assert hits[0].id == "7"
