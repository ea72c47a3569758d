"""The rendered catalog is repeatable, truthful about its pictures, and answers its own queries."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deploy.rendered.catalog import FILES, write_rendered_catalog
from deploy.rendered.photo import HEIGHT, PATTERNS, WIDTH, Look, photograph
from deploy.rendered.shapes import SHAPES
from deploy.rendered.stock import (
    ALL,
    COLOUR_WORDS,
    COLOURS,
    KINDS,
    PATTERN_WORDS,
    QUERIES,
    Product,
    Query,
    catalog_products,
    catalog_queries,
    relevance,
)

PRODUCTS = 44
SEED = 3
ROOT = Path(__file__).parents[1]
# Kinds whose middle shows nothing but the main colour.
FILLED = ("t-shirt", "dress", "backpack", "mug", "cushion", "sweater", "sneaker", "chair")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalog") / "small"
    return write_rendered_catalog(path, products=PRODUCTS, seed=SEED)


@pytest.fixture(scope="module")
def rows() -> list[Product]:
    return catalog_products(480, 7)


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), np.float32)


def _middle(jpeg: bytes) -> np.ndarray:
    """The median colour of the picture's middle, (3,)."""
    return np.median(_pixels(jpeg)[140:190, 90:150].reshape(-1, 3), axis=0)


def _names(title: str, words: tuple[str, ...]) -> bool:
    return any(re.search(rf"\b{re.escape(word)}\b", title.lower()) for word in words)


def test_another_process_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "deploy.rendered.catalog",
        "--out",
        str(tmp_path / "again"),
        "--products",
        str(PRODUCTS),
        "--seed",
        str(SEED),
    ]
    env = os.environ | {"PYTHONHASHSEED": "11", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1])["products"] == PRODUCTS
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_catalog_already_there_is_kept_and_another_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.rendered.catalog.photograph", lambda look, _: repr(look).encode())
    path = tmp_path / "catalog"
    write_rendered_catalog(path, products=30, seed=1)
    before = {name: (path / name).stat().st_mtime_ns for name in FILES}
    write_rendered_catalog(path, products=30, seed=1)
    assert {name: (path / name).stat().st_mtime_ns for name in FILES} == before
    first = (path / "images.parquet").read_bytes()
    write_rendered_catalog(path, products=30, seed=2)
    assert (path / "images.parquet").read_bytes() != first
    assert [entry.name for entry in tmp_path.iterdir()] == ["catalog"]


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "products.parquet").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        write_rendered_catalog(tmp_path, products=30)
    assert (tmp_path / "products.parquet").read_bytes() == b"mine"


def test_nothing_is_left_behind_when_the_drawing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise RuntimeError("no paint")

    monkeypatch.setattr("deploy.rendered.catalog.photograph", fail)
    with pytest.raises(RuntimeError, match="no paint"):
        write_rendered_catalog(tmp_path / "catalog", products=30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("products", "seed", "message"),
    [(29, 7, "at least 30"), (0, 7, "at least 30"), (30, -1, "negative")],
)
def test_wrong_sizes_are_refused(tmp_path: Path, products: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_rendered_catalog(tmp_path / "catalog", products=products, seed=seed)
    assert not (tmp_path / "catalog").exists()


def test_unknown_kinds_and_patterns_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="cannot draw a 'piano'"):
        photograph(Look("piano", (0, 0, 0)), rng)
    with pytest.raises(ValueError, match="no pattern 'zebra'"):
        photograph(Look("mug", (0, 0, 0), "zebra"), rng)


def test_files_hold_every_product_and_picture(folder: Path) -> None:
    products = pq.read_table(folder / "products.parquet")
    images = pq.read_table(folder / "images.parquet")
    assert products.column_names == list(Product.__dataclass_fields__)
    assert products.num_rows == images.num_rows == len(set(products["id"].to_pylist())) == PRODUCTS
    assert products["id"] == images["id"]
    for jpeg in images["jpeg"].to_pylist():
        picture = Image.open(io.BytesIO(jpeg))
        assert (picture.format, picture.size) == ("JPEG", (WIDTH, HEIGHT)) == ("JPEG", (240, 320))
        assert _pixels(jpeg).std() > 8
    assert len(set(images["jpeg"].to_pylist())) == PRODUCTS


def test_the_catalog_is_varied(rows: list[Product]) -> None:
    assert KINDS.keys() == SHAPES.keys()
    assert len(KINDS) >= 16
    assert ALL == PATTERNS
    assert {row.kind for row in rows} == set(KINDS)
    assert {row.colour for row in rows} == set(COLOURS)
    assert len(COLOURS) >= 12
    assert all(row.pattern in KINDS[row.kind].patterns and row.price > 0 for row in rows)
    assert len({row.title for row in rows}) > 0.95 * len(rows)


def test_colour_in_title_is_truthful(rows: list[Product]) -> None:
    every = tuple(word for words in COLOUR_WORDS.values() for word in words)
    for row in rows:
        assert _names(row.title, COLOUR_WORDS[row.colour]) == row.colour_in_title, row
        assert row.colour_in_title or not _names(row.title, every), row
    assert 0.28 < np.mean([not row.colour_in_title for row in rows]) < 0.42
    patterned = [row for row in rows if row.pattern != "plain"]
    unnamed = [row for row in patterned if not _names(row.title, PATTERN_WORDS[row.pattern])]
    assert 0.3 < len(unnamed) / len(patterned) < 0.5


@pytest.mark.parametrize("kind", FILLED[:5])
def test_plain_products_show_the_colour_they_are_named_for(kind: str) -> None:
    palette = np.array(list(COLOURS.values()), np.float32)
    for place, (name, colour) in enumerate(COLOURS.items()):
        shown = _middle(photograph(Look(kind, colour), np.random.default_rng(place)))
        away = np.linalg.norm(palette - shown, axis=1)
        assert away.argmin() == place, (name, shown)
        assert away[place] < 45, (name, shown)


def test_catalog_pictures_show_their_rows_colour(folder: Path) -> None:
    palette = np.array(list(COLOURS.values()), np.float32)
    pictures = pq.read_table(folder / "images.parquet")["jpeg"].to_pylist()
    seen = 0
    for row, jpeg in zip(catalog_products(PRODUCTS, SEED), pictures, strict=True):
        if row.kind in FILLED and row.pattern == "plain":
            nearest = np.linalg.norm(palette - _middle(jpeg), axis=1).argmin()
            assert list(COLOURS)[nearest] == row.colour, row
            seen += 1
    assert seen >= 4


def test_a_pattern_changes_the_picture() -> None:
    def draw(pattern: str) -> np.ndarray:
        return _pixels(
            photograph(Look("cushion", COLOURS["teal"], pattern), np.random.default_rng(5))
        )[110:210, 80:160]

    plain = draw("plain").std(axis=(0, 1)).mean()
    for pattern in PATTERN_WORDS:
        assert draw(pattern).std(axis=(0, 1)).mean() > 2 * plain, pattern


def test_relevance_follows_what_the_query_names() -> None:
    def boots(**changes: str) -> Product:
        attributes = {"kind": "boot", "colour": "black", "audience": "women"} | changes
        return Product(
            id="p1",
            title="Boots",
            pattern="plain",
            material="suede",
            price=9.95,
            colour_in_title=False,
            **attributes,
        )

    query = Query("women's black boots", "boot", "black", audience="women")
    assert relevance(query, boots()) == 2
    assert relevance(query, boots(audience="men")) == 1
    assert relevance(query, boots(colour="red")) == 1
    assert relevance(query, boots(colour="red", audience="men")) == 0
    assert relevance(query, boots(kind="sneaker")) == 0


@pytest.mark.parametrize("products", [30, 120, 480])
def test_every_query_has_answers(products: int) -> None:
    catalog = catalog_products(products, 11)
    queries = catalog_queries(products)
    assert len(queries) == (6 if products == 30 else len(QUERIES))
    for query in queries:
        assert query.kind in KINDS
        assert query.pattern in ("", *KINDS[query.kind].patterns)
        assert query.colour in ("", *COLOURS)
        assert sum(relevance(query, row) == 2 for row in catalog) >= 3, query


def test_qrels_agree_with_the_products(folder: Path) -> None:
    products = {row["id"]: row for row in pq.read_table(folder / "products.parquet").to_pylist()}
    queries = {row["query_id"]: row for row in _csv(folder / "queries.csv")}
    judged = {(row["query_id"], row["id"]): int(row["rel"]) for row in _csv(folder / "qrels.csv")}
    assert [row["query"] for row in queries.values()] == [
        query.text for query in catalog_queries(PRODUCTS)
    ]
    for number, query in queries.items():
        audience = re.match(r"(women|men)'s ", query["query"])
        named = {name: query[name] for name in ("colour", "pattern") if query[name]}
        named |= {"audience": audience[1]} if audience else {}
        for key, product in products.items():
            agree = [product[name] == value for name, value in named.items()]
            expected = (product["kind"] == query["kind"]) * (any(agree) + all(agree))
            assert judged.get((number, key), 0) == expected, (query, product)
    assert 2 in judged.values()
