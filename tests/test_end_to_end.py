"""The whole path, as a newcomer walks it: a drawn catalog in, the right products out."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deploy import demo
from deploy.rendered.catalog import write_rendered_catalog
from deploy.server import LOOPBACK, Server, choose_ports
from retrieval_client import Catalog, Encoders, ProductSearch, Settings
from retrieval_client.push import Push
from retrieval_client.sources import Source
from retrieval_contract.errors import DeployError
from retrieval_contract.release import Release
from tests.conftest import ROOT, photo

PRODUCTS = 300


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalog that `make demo` draws, a little smaller."""
    folder = tmp_path_factory.mktemp("drawn") / "catalog"
    return write_rendered_catalog(folder, products=PRODUCTS, progress=False)


@pytest.fixture
def filled(settings: Settings, drawn: Path) -> Settings:
    """That catalog in Milvus."""
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        report = Push(settings, encoders, catalog).run(Source(drawn).rows())
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


# ── the demo ─────────────────────────────────────────────────────────────────────────────
TITLES = ["red dress", "blue shirt", "steel knife", "garden hose", "white shoes", "green mug"]


def run_demo(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.demo", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


def test_the_demo_takes_any_catalog_and_ends_with_json(
    tmp_path: Path, release_folder: Path
) -> None:
    source = tmp_path / "mine.csv"
    lines = [f"{i},{title} number {i}" for i, title in enumerate(TITLES * 3)]
    source.write_text("id,title\n" + "\n".join(lines) + "\n")
    out = tmp_path / "out"
    done = run_demo(
        "--catalog", source, "--query", "knife", "--release", release_folder, "--out", out
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said) == {
        "products",
        "refused",
        "queries",
        "release_id",
        "server",
        "milvus",
        "top1",
        "elapsed_s",
    }
    assert (said["products"], said["queries"], said["milvus"]) == (18, 1, "lite")
    assert said["release_id"] == release_folder.name
    assert said["server"].startswith("triton 2.")
    assert "knife" in said["top1"][0]["title"]
    assert Image.open(out / "results.png").height > 100
    assert (out / "triton.log").exists()


def test_the_demo_refuses_row_by_row(triton: Server, tmp_path: Path) -> None:
    rows = [{"id": f"p{i}", "title": title} for i, title in enumerate(TITLES)]
    bad = [
        {"id": "p0", "title": "the id of another"},
        {"id": "p7", "title": "a\0b"},
        {"id": "p8", "title": "x", "image_path": "nowhere.jpg"},
        {"title": "no id"},
    ]
    source = tmp_path / "mine.jsonl"
    source.write_text("\n".join(map(json.dumps, [*bad[1:], *rows, bad[0]])) + "\n{broken\n")
    catalog = Source(source)
    places = demo.choose_rows(catalog, 5000)
    queries = demo.choose_queries(source, list(demo.without_photos(catalog, places)))
    assert len(queries) == demo.QUERIES
    report = demo.demo(triton, catalog, places, queries, tmp_path)
    assert (report["products"], report["refused"]) == (len(rows), len(bad) + 1)
    assert (tmp_path / "results.png").exists()


def test_the_demo_says_when_nothing_was_stored(triton: Server, tmp_path: Path) -> None:
    (tmp_path / "no-picture.jpg").write_text("words")
    with pytest.raises(DeployError, match="of 1 rows 0 were stored and 1 refused"):
        demo.demo(triton, Source(tmp_path), frozenset({0}), ["shoes"], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.csv", None, "nowhere.csv: not found"),
        ("none.csv", b"id,title\n", "expected products, found none in it"),
        ("untitled/one.jpg", photo(), 'say what to look for: --query "red shoes"'),
    ],
)
def test_the_demo_says_what_is_wrong_with_a_catalog(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    """Before it builds and starts anything."""
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    path = path.parent if path.suffix == ".jpg" else path
    done = run_demo("--catalog", path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("products", ["0", "-1", "many"])
def test_the_demo_refuses_senseless_numbers(products: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.parser().parse_args(["--products", products])
    assert stopped.value.code == 2


@pytest.mark.parametrize(("total", "count"), [(9999, 5000), (37376, 5000), (6, 6), (3, 5), (10, 1)])
def test_a_sample_has_the_size_asked_for_and_is_even(total: int, count: int) -> None:
    places = demo.spread(total, count)
    assert len(set(places)) == len(places) == min(total, count)
    gaps = {b - a for a, b in itertools.pairwise([*places, total])}
    assert gaps <= {total // len(places), -(-total // len(places))}


def test_a_source_of_unknown_length_is_sampled_evenly(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("id,title\n" + "".join(f"{i},x\n" for i in range(9)))
    source = Source(tmp_path / "mine.csv")
    assert source.rows_expected is None
    rows = demo.rows_at(source, demo.choose_rows(source, 5))
    assert [row.id for row in rows] == ["0", "1", "3", "5", "7"]


def test_demo_queries_come_from_the_catalog(drawn: Path) -> None:
    source = Source(drawn)
    rows = list(demo.without_photos(source, demo.choose_rows(source, 150)))
    assert len({row.id for row in rows}) == 150
    queries = demo.choose_queries(drawn, rows)
    assert len(queries) == demo.QUERIES
    with (drawn / "queries.csv").open() as file:
        assert set(queries) <= {row["query"] for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    "queries", ["", "text,number\nred shoes,1\n", "query_id,query\n1\n", "query\n  \n"]
)
def test_titles_stand_in_for_queries(drawn: Path, tmp_path: Path, queries: str) -> None:
    """Where `queries.csv` is not there, or has no queries in it."""
    if queries:
        (tmp_path / "queries.csv").write_text(queries)
    source = Source(drawn)
    rows = list(demo.without_photos(source, demo.choose_rows(source, 150)))
    titled = demo.choose_queries(tmp_path, rows)
    assert len(set(titled)) == demo.QUERIES
    assert all(len(q.split()) <= demo.QUERY_WORDS for q in titled)
    assert rows[0].title.decode().startswith(titled[0])


# ── exit codes of the command ────────────────────────────────────────────────────────────
def retrieval(settings: Settings, *words: object) -> subprocess.CompletedProcess[str]:
    """The installed command."""
    where = ["--triton", settings.triton, "--milvus", settings.milvus]
    command = [Path(sys.executable).parent / "retrieval", *words, *where]
    folder = Path(settings.milvus).parent
    return subprocess.run(
        [str(word) for word in command], cwd=folder, capture_output=True, text=True, timeout=60
    )


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed command says, below a progress bar at most."""
    assert (done.returncode, done.stdout) == (1, ""), done
    *bar, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all("products ━" in other for other in bar), done.stderr
    return line


SEED = """import sys
import numpy as np
from retrieval_client import Catalog, ProductRow, Settings
uri, release_id, dim = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Catalog(Settings(milvus=uri)) as catalog:
    vector = np.eye(1, dim, dtype=np.float32)[0]
    catalog.prepare(release_id, dim).upsert([ProductRow("a", "title", "hash", vector)])
"""


def seed(settings: Settings, release_id: str, dim: int) -> None:
    """One row of a release, by a process that ends: Milvus Lite holds its lock until then."""
    subprocess.run([sys.executable, "-c", SEED, settings.milvus, release_id, str(dim)], check=True)


def held(settings: Settings) -> tuple[str, int]:
    """The release and the number of rows of a catalog, as the command sees them."""
    said = json.loads(retrieval(settings, "status", "--json").stdout)
    return said["holds"], said["products"]


@pytest.fixture
def one_title(tmp_path: Path) -> Path:
    (tmp_path / "mine.csv").write_text("id,title\nb,blue shirt\n")
    return tmp_path / "mine.csv"


@pytest.mark.parametrize("other", ["release", "size"])
def test_a_catalog_that_does_not_match_is_refused(
    settings: Settings, release: Release, one_title: Path, other: str
) -> None:
    """By search and by push; what it holds stays."""
    made_of = ("0" * 16, release.vector_dim) if other == "release" else (release.release_id, 16)
    seed(settings, *made_of)
    for words in (("search", "red dress"), ("push", one_title)):
        line = error_of(retrieval(settings, *words))
        assert f"{made_of[0]} ({made_of[1]} dims)" in line
        assert f"{release.release_id} ({release.vector_dim} dims)" in line
    assert held(settings) == (made_of[0], 1)


def test_a_push_without_a_server_leaves_the_catalog_alone(
    settings: Settings, release: Release, one_title: Path
) -> None:
    port = choose_ports(LOOPBACK).grpc
    away = settings.override(triton=f"{LOOPBACK}:{port}")
    line = error_of(retrieval(away, "push", one_title, "--retry-s", "1"))
    assert f"Triton at {LOOPBACK}:{port}" in line
    assert "start it with `make serve`" in line
    assert not Path(settings.milvus).exists()
    seed(settings, release.release_id, release.vector_dim)
    assert error_of(retrieval(away, "push", one_title, "--retry-s", "1")) == line
    assert held(settings) == (release.release_id, 1)


def test_a_mislabelled_picture_is_named_and_the_rest_goes_in(
    settings: Settings, release: Release, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "red.jpg").write_bytes(photo())
    (pictures / "text.jpg").write_text("These are words.")
    (pictures / "white.png").write_bytes(photo((9, 9, 9), format="PNG"))
    done = retrieval(settings, "push", pictures, "--json")
    assert done.returncode == 3, done.stderr
    said = json.loads(done.stdout)
    assert (said["stored"], said["rejected"], said["in_catalog"]) == (2, 1, 2)
    (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert (reject["id"], reject["code"]) == ("text.jpg", "image_format")
    assert held(settings) == (release.release_id, 2)
