"""The index against an exact search: recall, what is chosen, and that searches use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from retrieval_client import Catalog, Collection, ProductRow, Settings
from retrieval_client import collection as collections
from retrieval_client import recalls as measuring
from retrieval_client.__main__ import main
from retrieval_client.catalog import Role
from retrieval_client.collection import Ask
from retrieval_client.index import (
    KINDS,
    best_kind,
    build,
    flat,
    graph,
    index_of,
    recall_asked,
    sample_titles,
    tune,
)
from retrieval_client.recalls import Exact, at_least, condition_of, cpu_seconds, found_at, recall
from retrieval_client.records import Hit, bucket_of
from retrieval_contract.errors import CatalogError
from retrieval_contract.release import Release
from retrieval_contract.tensors import Array
from tests.conftest import product_row

RELEASE, DIM, ROWS = "0123456789abcdef", 32, 3000


def unit(count: int, seed: int) -> Array:
    found = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    normed: Array = found / np.linalg.norm(found, axis=1, keepdims=True)
    return normed


STORED, QUERIES = unit(ROWS, 1), unit(40, 2)
IDS = [f"p{n}" for n in range(ROWS)]


@pytest.fixture(scope="module")
def place(backend: Callable[[], Settings]) -> Settings:
    """A catalog of random vectors: harder to find in than real ones."""
    settings = backend()
    with Catalog(settings) as catalog:
        collection = catalog.prepare(RELEASE, DIM)
        rows = zip(IDS, STORED, strict=True)
        collection.upsert([ProductRow(i, f"title of {i}", i, vector) for i, vector in rows])
        collection.flush()
    return settings


@pytest.fixture
def filled(place: Settings) -> Iterator[Collection]:
    with Catalog(place) as catalog:
        assert catalog.serving().count() == ROWS
        yield catalog.serving()


def test_the_exact_search_is_exact_and_reads_in_steps(
    filled: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collections, "PASS_ROWS", 700)
    passing = [n for n, product_id in enumerate(IDS) if bucket_of(product_id) < 100]
    for condition, rows in (("", range(ROWS)), (condition_of(0.1), passing)):
        scores = QUERIES @ STORED[list(rows)].T
        best = np.argsort(-scores, axis=1)[:, :10]
        found = Exact.search(filled, QUERIES, 10, condition)
        assert found.ids.tolist() == [[IDS[rows[n]] for n in row] for row in best]
        assert found.scores == pytest.approx(np.sort(scores)[:, :-11:-1], abs=1e-6)


def test_recall_counts_what_is_missing_and_forgives_ties() -> None:
    exact = Exact(np.eye(1, 2, dtype=np.float32), 4)
    exact.add(
        [
            {"id": i, "vector": [score, 0]}
            for i, score in zip("abcdz", (0.9, 0.8, 0.7, 0.6, 0), strict=True)
        ]
    )

    def of(*found: tuple[str, float]) -> float:
        return exact.recall([[Hit(i, score, "", {}) for i, score in found]], 4)[0]

    assert of(("a", 0.9), ("b", 0.8), ("c", 0.7), ("d", 0.6)) == 1
    assert of(("a", 0.9), ("b", 0.8), ("c", 0.7), ("e", 0.6)) == 1, "as good as d"
    assert of(("a", 0.9), ("b", 0.8), ("c", 0.7), ("e", 0.59)) == 0.75
    assert of(("a", 0.9), ("a", 0.9), ("a", 0.9), ("a", 0.9)) == 0.25
    assert of() == 0
    assert Exact(np.eye(1, 2, dtype=np.float32), 4).recall([[]], 4) == 1


def test_what_a_few_queries_find_is_no_promise() -> None:
    """20 that find all but one hit of one, 4 of which 1 finds none: the mean alone says more."""
    assert at_least(np.array([1.0] * 19 + [0.9])) == pytest.approx(0.995 - 0.0082, abs=1e-4)
    assert at_least(np.array([1.0, 1.0, 1.0, 0.0])) < 0.5
    assert at_least(np.ones(200)) == at_least(np.ones(1)) == 1.0


def test_a_graph_of_milvus_lite_loses_filtered_hits(filled: Collection) -> None:
    """Why FLAT is what it gets; the server looks at the few matches by itself."""
    exact = Exact.search(filled, QUERIES, 10, condition_of(0.01))
    if filled.milvus.lite:
        assert index_of(filled) == flat()
        build(filled, graph())
    assert index_of(filled).kind == "HNSW"
    found = found_at(filled.tuned({"ef": 64}), QUERIES, exact, 10, 0.01).mean()
    assert (found < 0.95) == filled.milvus.lite


def test_a_flat_index_finds_all_under_every_filter(filled: Collection) -> None:
    build(filled, flat())
    found = recall(filled, QUERIES, server_pid=1)
    assert [point.share for point in found.points] == [1.0, 0.1, 0.01, 0.001]
    assert {(point.recall_10, point.recall_100) for point in found.points} == {(1.0, 1.0)}
    assert all(point.latency_ms > 0 and point.client_cpu_ms > 0 for point in found.points)
    assert found.rows == ROWS


def test_until_it_is_tuned_it_looks_hard_enough(filled: Collection, place: Settings) -> None:
    build(filled, graph())
    with Catalog(place) as catalog:
        collection = catalog.serving()
    assert collection._search_params(Ask(5))["params"] == {"ef": 128}
    assert collection._search_params(Ask(5, "bucket < 5"))["params"] == {"ef": 256}
    assert collection._search_params(Ask(300))["params"] == {"ef": 300}, "or so many are not found"


def test_what_is_tuned_is_used_by_every_client_and_survives(
    filled: Collection, place: Settings
) -> None:
    build(filled, graph(m=8, ef_construction=32))  # one that needs effort
    tuned = tune(filled, QUERIES, target=0.9, filtered=0.05)
    assert tuned.recall[1.0] >= 0.9
    assert min(tuned.recall[0.1], tuned.recall[0.01]) >= 0.05
    assert tuned.params["ef"] > 16, "the least is not enough here"
    with Catalog(place) as catalog:
        other = catalog.serving()
        assert other._search_params(Ask(5))["params"] == tuned.params
        assert other._search_params(Ask(5, "bucket < 5"))["params"] == tuned.filtered_params
        exact = Exact.search(other, QUERIES, 10)
        found = found_at(other, QUERIES, exact, 10, 1.0).mean()
        assert found == pytest.approx(tuned.recall[1.0], abs=0.01)
        less = found_at(other.tuned({"ef": 10}), QUERIES, exact, 10, 1.0).mean()
        assert less < tuned.recall[1.0]
        more = tuned.params["ef"] + 100
        (hits,) = other.search(QUERIES[:1], Ask(more))
        assert len(hits) == more, "a graph is asked for no more than it looks at"
        same = not other.milvus.lite  # where Milvus Lite builds no graph by itself
        candidate = catalog.prepare("f" * 16, DIM, Role.CANDIDATE)
        catalog.unpoint(Role.CANDIDATE)
        catalog.drop(candidate)
        assert recall_asked(candidate) == 0.9, "is asked of what is built beside it"
        for condition, params in (("", tuned.params), ("bucket < 5", tuned.filtered_params)):
            found = candidate._search_params(Ask(5, condition)).get("params", {})
            assert found == (params if same else {})


def test_what_cannot_be_reached_is_said_and_nothing_is_stored(
    filled: Collection, place: Settings
) -> None:
    before = filled.info.properties
    with pytest.raises(CatalogError, match=r"expected recall@10 of surely 1\.1 .* --kind FLAT"):
        tune(filled, QUERIES, target=1.1)
    with Catalog(place) as catalog:
        assert catalog.serving().info.properties == before


def test_the_best_kind_is_exact_where_a_graph_gains_nothing(filled: Collection) -> None:
    lite = filled.milvus.lite
    assert best_kind(filled.milvus, 1000) == flat()
    assert best_kind(filled.milvus, 1_000_000) == (flat() if lite else graph())


def test_quantised_lists_can_be_chosen_where_they_find_enough(filled: Collection) -> None:
    index = KINDS["IVF_SQ8"](ROWS)
    build(filled, index)
    assert index_of(filled).kind == index.kind
    tuned = tune(filled, QUERIES, target=0.9, filtered=0.3)
    assert tuned.params.keys() == {"nprobe"}
    assert tuned.recall[1.0] >= 0.9


def test_titles_stand_in_for_queries(filled: Collection) -> None:
    titles = sample_titles(filled, 50)
    assert len(titles) == 50 == len(set(titles))
    assert titles == sample_titles(filled, 50)


def test_titles_of_many_products_are_of_one_bucket_at_least(
    filled: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filled, "count", lambda condition="": 10 if condition else 10**8)
    assert len(sample_titles(filled, 1)) == 1


def test_the_cpu_of_a_process_is_known_where_it_is_here() -> None:
    assert cpu_seconds(1) is not None
    assert cpu_seconds(None) is None


def test_the_commands_measure_and_tune(
    catalog: Catalog,
    release: Release,
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "TIMED", 3)
    collection = catalog.serving()
    collection.upsert(
        [product_row(f"p{n}", release.vector_dim, n, f"shirt {n}") for n in range(300)]
    )
    shared = ["--triton", settings.triton, "--milvus", settings.milvus, "--count", "20", "--json"]
    plot = tmp_path / "recall.svg"
    with pytest.raises(SystemExit) as ended:
        main(["index", "recall", *shared, "--plot", str(plot)])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["index"], found["rows"], found["queries"]) == ("FLAT", 300, 20)
    assert all(point["recall_10"] == 1 for point in found["points"])
    drawn = ElementTree.parse(plot).getroot()
    assert len(drawn.findall(".//{*}circle")) == len(found["points"]) == 4
    catalog.milvus.client.release_collection(collection.name)
    catalog.milvus.client.drop_index(collection.name, "vector")  # as a `tune` that was killed
    queries = tmp_path / "queries.txt"
    queries.write_text("red shirt\n\nblue dress\n")
    with pytest.raises(SystemExit) as ended:
        main(["index", "tune", *shared, "--queries", str(queries), "--kind", "HNSW"])
    assert ended.value.code == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["index"].startswith("HNSW")  # Milvus Lite says no more of it
    catalog.forget()
    assert catalog.serving()._search_params(Ask(5))["params"] == tuned["params"]
    with pytest.raises(SystemExit) as ended:
        main(["index", "recall", *shared, "--role", "candidate"])
    assert "expected a candidate collection" in capsys.readouterr().out
    queries.write_text("x" * 5000)
    with pytest.raises(SystemExit) as ended:
        main(["index", "tune", *shared, "--queries", str(queries)])
    assert "expected queries that can be encoded, got 1 that cannot" in capsys.readouterr().out
