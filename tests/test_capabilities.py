"""The table of what each Milvus can do, held against the real ones: by what comes of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from pymilvus import DataType, Function, FunctionType
from pymilvus.exceptions import MilvusException

from retrieval_client import Settings
from retrieval_client.capabilities import LITE, SINCE, Backend, Feature
from retrieval_client.milvus import Milvus
from retrieval_contract.errors import CatalogError, Unsupported

ROWS, DIM = 3000, 8


@pytest.fixture(scope="module")
def connected(backend: Callable[[], Settings]) -> Iterator[Milvus]:
    """One Milvus, then the other."""
    milvus = Milvus(backend())
    milvus.make()
    yield milvus
    milvus.close()


@pytest.fixture(scope="module")
def plain(connected: Milvus) -> str:
    """A collection of random unit vectors, numbered, with a graph as its index."""
    client, name = connected.client, connected._settings.collection
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("far", DataType.INT64)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index(
        "vector", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 100}
    )
    client.create_collection(name, schema=schema, index_params=index)
    far = set(farthest())
    rows = [{"id": i, "far": int(i in far), "vector": v} for i, v in enumerate(vectors())]
    client.insert(name, rows)
    client.flush(name)
    client.load_collection(name)
    client.release_collection(name)  # Milvus Lite uses a graph from the second time on
    client.load_collection(name)
    return name


def vectors() -> np.ndarray:
    found = np.random.default_rng(3).standard_normal((ROWS, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def farthest() -> list[int]:
    """One percent, the farthest from the first vector."""
    found: list[int] = np.argsort(vectors() @ vectors()[0])[: ROWS // 100].tolist()
    return found


def has_words(milvus: Milvus, plain: str) -> bool:
    """A collection whose titles are found by their words."""
    client, name = milvus.client, f"{plain}_words"
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("title", DataType.VARCHAR, max_length=100, enable_analyzer=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    schema.add_field("words", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_function(Function("words", FunctionType.BM25, ["title"], ["words"]))
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    index.add_index("words", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    try:
        client.create_collection(name, schema=schema, index_params=index)
        titles = ["red dress", "blue dress", "steel knife"]
        rows = [{"id": at, "title": t, "vector": [1.0, 0.0]} for at, t in enumerate(titles)]
        client.insert(name, rows)
        client.load_collection(name)
        (hits,) = client.search(name, ["dress blue"], anns_field="words", limit=5)
        return [hit["id"] for hit in hits] == [1, 0]
    except MilvusException:
        return False
    finally:
        client.drop_collection(name)


def finds_the_few_that_a_condition_leaves(milvus: Milvus, plain: str) -> bool:
    """A graph is of use where it finds what an exact search finds, also where that is far away."""
    (hits,) = milvus.client.search(
        plain,
        [vectors()[0]],
        filter="far == 1",
        limit=10,
        anns_field="vector",
        consistency_level="Strong",
    )
    return sorted(hit["id"] for hit in hits) == sorted(farthest()[-10:])


PROBES: dict[Feature, Callable[[Milvus, str], bool]] = {
    Feature.BM25: has_words,
    Feature.HNSW: finds_the_few_that_a_condition_leaves,
}


@pytest.mark.parametrize("feature", Feature)
def test_the_table_says_what_comes_of_it(connected: Milvus, plain: str, feature: Feature) -> None:
    """A feature without a probe, or a backend that has learned one, fails here."""
    says = feature in connected.backend.features
    assert PROBES[feature](connected, plain) == says, f"{feature} on {connected.backend.version}"
    if says:
        connected.backend.need(feature)
    else:
        with pytest.raises(Unsupported, match="expected a Milvus with"):
            connected.backend.need(feature)


def test_what_a_milvus_is_follows_from_what_it_says() -> None:
    assert Backend.of("milvus_lite-3.2.2").features == LITE
    assert Feature.BM25 not in Backend.of("v2.4.15").features
    assert Feature.BM25 in Backend.of("2.6.1-dev").features
    assert set(SINCE) == set(Feature)
    with pytest.raises(Unsupported, match=r"got v2\.3\.5-lite; Milvus Lite, a server since 2\.5"):
        Backend.of("v2.3.5-lite").need(Feature.BM25)
    with pytest.raises(Unsupported, match=r"got milvus_lite-3\.2\.2; every server has it"):
        Backend.of("milvus_lite-3.2.2").need(Feature.HNSW)
    with pytest.raises(CatalogError, match="give another address"):
        Backend.of("unknown")
