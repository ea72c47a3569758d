"""The whole path, as a newcomer walks it: a drawn catalog in, the right products out."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deploy import demo
from deploy.rendered.catalog import write_rendered_catalog
from retrieval_client import Catalog, Encoder, ProductSearch, Settings
from retrieval_client.push import Push
from retrieval_client.sources import Source
from tests.conftest import ROOT

PRODUCTS = 300


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalog that `make demo` draws, a little smaller."""
    folder = tmp_path_factory.mktemp("drawn") / "catalog"
    return write_rendered_catalog(folder, products=PRODUCTS, progress=False)


@pytest.fixture
def filled(settings: Settings, drawn: Path) -> Settings:
    """That catalog in Milvus."""
    with Encoder(settings) as encoder, Catalog(settings) as catalog:
        report = Push(settings, encoder, catalog).run(Source(drawn).rows())
    assert (report.stored, report.rejects) == (PRODUCTS, [])
    return settings


def test_queries_find_products_that_answer_them(filled: Settings, drawn: Path) -> None:
    """Untrained towers know titles, not photos: most of the first three must still be right."""
    with (drawn / "queries.csv").open() as file:
        queries = {row["query_id"]: row["query"] for row in csv.DictReader(file)}
    with (drawn / "qrels.csv").open() as file:
        right = {(row["query_id"], row["id"]) for row in csv.DictReader(file)}
    with ProductSearch(filled) as search:
        results = [search(query, limit=3) for query in queries.values()]
    found = [
        (query_id, hit.id) in right
        for query_id, hits in zip(queries, results, strict=True)
        for hit in hits
    ]
    share = sum(found) / len(found)
    by_chance = len(right) / (len(queries) * PRODUCTS)
    assert share > 0.6, f"{share:.2f} of the first three answer their query"
    assert by_chance < 0.3, "the catalog must be hard enough for the test to fail"


def test_the_demo_takes_any_catalog_and_ends_with_json(tmp_path: Path) -> None:
    source = tmp_path / "mine.csv"
    titles = ["red dress", "blue shirt", "steel knife", "garden hose", "white shoes", "green mug"]
    lines = [f"{i},{title} number {i}" for i, title in enumerate(titles * 3)]
    source.write_text("id,title\n" + "\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "deploy.demo", "--catalog", source, "--query", "knife"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said) == {
        "products",
        "queries",
        "release_id",
        "server",
        "milvus",
        "top1",
        "elapsed_s",
    }
    assert (said["products"], said["queries"], said["milvus"]) == (18, 1, "lite")
    assert said["server"].startswith("triton 2.")
    assert "knife" in said["top1"][0]["title"]
    assert Image.open(demo.DEMO / "results.png").height > 100


def test_the_demo_says_what_is_wrong_with_a_catalog() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.demo", "--catalog", "nowhere.csv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 1
    assert "nowhere.csv: not found" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_queries_come_from_the_catalog(drawn: Path, tmp_path: Path) -> None:
    rows = list(demo.spread_rows(Source(drawn), 150))
    assert len(rows) == 150
    assert rows[1].id != rows[0].id
    queries = demo.choose_queries(drawn, rows)
    assert len(queries) == demo.QUERIES
    with (drawn / "queries.csv").open() as file:
        assert set(queries) <= {row["query"] for row in csv.DictReader(file)}
    titled = demo.choose_queries(tmp_path, rows)
    assert len(titled) == demo.QUERIES
    assert all(len(q.split()) <= demo.QUERY_WORDS for q in titled)
