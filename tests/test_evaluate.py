"""Data folders, splits, training queries, slices and figures: on a small catalog made here."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_contract.errors import SourceError
from tests.conftest import ROOT
from tests.judged import write_judged_catalog
from tests.tiny import tiny_make
from towers.evaluate import evaluate, known_items
from towers.learning import views
from towers.learning.baselines import BASELINES
from towers.learning.catalog import HIGHEST_GRADE, ProductData, Query, read_data
from towers.learning.metrics import figures_of, mean_interval, ratio_interval
from towers.learning.queries import QueryMaker, mistype
from towers.learning.split import groups_of, is_held_out, sides_of
from towers.learning.systems import BM25, Towers
from towers.learning.words import words_of

LOG = 1 / np.log2(3)
"""What a gain is worth in the second place."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judged_catalog(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def data(folder: Path) -> ProductData:
    return read_data(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Men's T-Shirts", "men tshirt"),
        ("tee shirts, dresses & shoes", "tshirt dress shoe"),
        ("V-Neck Watches", "vneck watch"),
        ("", ""),
    ],
)
def test_variants_of_a_word_are_one(text: str, words: str) -> None:
    assert words_of(text) == words.split()


def test_a_data_folder_is_read(data: ProductData) -> None:
    assert (len(data), len(data.queries)) == (360, 18)
    assert set(data.attributes) == {"gender", "baseColour", "articleType"}
    assert data.queries[0].attributes == {
        "gender": "Men",
        "baseColour": "Red",
        "articleType": "Shirts",
    }
    assert set(data.queries[0].grades.values()) == {2}
    assert data.images[0].startswith(b"\xff\xd8")


def test_graded_labels_start_at_their_lowest(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"product_id": ["a", "b", "c"], "title": ["x", "y", ""]}),
        tmp_path / "products.parquet",
    )
    (tmp_path / "queries.csv").write_text("query_id,query\n1,x\n2,nobody found anything\n")
    (tmp_path / "labels.csv").write_text(
        "query_id,product_id,relevance\n1,a,3.0\n1,b,1.0\n1,c,2.4\n"
    )
    (query,) = read_data(tmp_path).queries
    assert query.grades == {"a": 2, "c": 1}
    assert query.judged == {"a", "b", "c"}


def test_a_folder_without_products_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"products\.parquet: not found"):
        read_data(tmp_path)


@pytest.mark.parametrize(
    ("table", "beside", "said"),
    [
        (
            {"id": ["a"], "name": ["x"]},
            {},
            r"one of the columns \('title',\), got \['id', 'name'\]",
        ),
        ({"id": ["a"], "title": ["x"]}, {"queries.csv": "query_id,query\n1,x\n"}, "qrels.csv or"),
    ],
)
def test_a_folder_that_lacks_a_part_is_said(
    tmp_path: Path, table: dict[str, list[str]], beside: dict[str, str], said: str
) -> None:
    pq.write_table(pa.table(table), tmp_path / "products.parquet")
    for name, text in beside.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=said):
        read_data(tmp_path)


def test_what_shares_a_title_or_a_picture_stays_together(data: ProductData) -> None:
    assert groups_of(["a", "b", "A ", "c"], [b"1", b"2", b"3", b"2"]) == [0, 1, 0, 1]
    assert groups_of(["", ""], [b"", b""]) == [0, 1], "nothing is not a thing to share"
    apart = [str(row) for row in range(100)]
    assert groups_of(apart, [b"no photo yet"] * 100) == list(range(100))
    sides = sides_of(data)
    assert sorted(row for rows in sides.values() for row in rows) == list(range(360))
    assert len(sides["train"]) > len(sides["test"]) > len(sides["dev"]) > 0


def held_out_named(data: ProductData, text: str) -> list[tuple[str, ...]]:
    """Combinations of the whole catalog that a text names: each value with a word of its own."""
    said = set(words_of(text))
    of = {
        column: {v: w for v in set(values) if v != "NA" and (w := set(words_of(v))) <= said}
        for column, values in data.attributes.items()
    }
    whole = [words for values in of.values() for words in values.values()]
    named = [
        [v for v, w in values.items() if not any(w < o for o in whole)] for values in of.values()
    ]
    return [
        three
        for columns in combinations(named, 3)
        for three in product(*columns)
        if is_held_out(three)
    ]


def test_no_training_query_names_a_held_out_combination(data: ProductData) -> None:
    """Whoever's product it is drawn for, and whichever columns are asked by."""
    columns = list(data.attributes)
    maker, rng = QueryMaker(data, columns), random.Random(0)
    drawn = [maker.draw(row, rng) for _ in range(10) for row in range(len(data))]
    drawn += [QueryMaker(data, []).draw(row, rng) for _ in range(3) for row in range(len(data))]
    values = {v for column in columns for v in data.attributes[column]}
    for query in drawn:
        assert query.text
        assert len(query.text.split()) == 1 or not held_out_named(data, query.text), query
        assert {value for _, value in query.attributes} <= values
    held_out = sum(is_held_out([*query.attributes.values()]) for query in data.queries)
    assert 0 < held_out < len(data.queries), "the fixture has both"
    again = random.Random(0)
    assert [maker.draw(row, again) for row in range(9)] == drawn[:9]


def test_a_title_that_says_everything_names_no_held_out_combination() -> None:
    """Values of others, too; five in one title: one that goes may leave three that are held out."""
    kinds = {"gender": "Women", "usage": "Casual", "baseColour": "Brown", "articleType": "Heels"}
    kinds |= {"brand": "Catwalk", "material": "Leather"}
    other = {"gender": "Men", "usage": "Party", "baseColour": "Coffee Brown"}
    other |= {"articleType": "Flats", "brand": "Puma", "material": "Suede"}
    titles = [" ".join([*kinds.values(), "Flats", "Coffee"]), "Men Party Flats Suede"]
    attributes = {name: [value, other[name]] for name, value in kinds.items()}
    two = ProductData("two", ["a", "b"], titles, attributes, [b"", b""], [])
    maker, rng = QueryMaker(two, list(kinds)), random.Random(0)
    for _ in range(500):
        assert held_out_named(two, text := maker.draw(0, rng).text) == [], text


@pytest.mark.parametrize("values", [("-", "-", "-"), ("Мужчины", "Красный", "Рубашки")])
def test_a_query_is_drawn_whatever_the_script(values: tuple[str, ...]) -> None:
    attributes = {f"kind {at}": [value] for at, value in enumerate(values)}
    title = "Рубашка мужская красная" if values[0] != "-" else "red shirt"
    maker = QueryMaker(ProductData("one", ["a"], [title], attributes, [b""], []), list(attributes))
    rng = random.Random(0)
    drawn = [maker.draw(0, rng) for _ in range(100)]
    assert all(query.text for query in drawn)
    assert any(query.attributes for query in drawn) == (values[0] != "-"), "a dash says nothing"


@pytest.mark.parametrize("size", ["s", "XS", "eu s"])
def test_a_size_is_no_plural(size: str) -> None:
    data = ProductData("one", ["a"], [""], {"size": [size]}, [b""], [])
    maker, rng = QueryMaker(data, ["size"]), random.Random(0)
    assert {maker.draw(0, rng).text for _ in range(50)} == {size.lower()}


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        ("gender", "acme, for acme"),
        ("primary_color", "acme, in acme"),
        ("Fabric", "acme, in acme, made of acme"),
        ("Brand name", "acme, by acme, from acme"),
        ("articleType", "acme"),
    ],
)
def test_a_columns_name_says_how_its_values_are_asked_for(column: str, texts: str) -> None:
    maker = QueryMaker(ProductData("", ["a"], [""], {column: ["Acme"]}, [b""], []), [column])
    rng = random.Random(0)
    drawn = {maker.draw(0, rng).text for _ in range(200)}
    assert drawn >= {*texts.split(", ")}
    assert {*" ".join(drawn).split()} == {*texts.replace(",", "").split()}


def test_words_are_those_of_any_script() -> None:
    assert words_of("Größe café T-Shirts") == ["größe", "café", "tshirt"]
    assert not views.names_colour("Рубашка", "Красный")
    assert views.names_colour("красный шарф", "Красный")


def test_a_typo_changes_a_word_a_little() -> None:
    rng = random.Random(1)
    assert mistype("red", rng) == "red"
    assert all(abs(len(mistype("handbag", rng)) - 7) <= 1 for _ in range(50))


def test_slices(data: ProductData) -> None:
    hidden = views.colour_not_in_title(data)
    assert hidden is not None
    assert len(hidden) == 90
    assert all(len(query.grades) == 5 for query in hidden.queries)
    unseen = views.unseen_combination(data)
    assert unseen is not None
    assert all(is_held_out([*query.attributes.values()]) for query in unseen.queries)
    assert not any(views.no_image(data).images)
    titleless = views.no_title(data)
    assert titleless is not None
    assert not any(titleless.titles)
    text_only = views.no_image(data)
    assert views.no_title(text_only) is None
    assert views.uneven(text_only) is None


def test_the_uneven_catalog_is_the_same_everywhere(data: ProductData) -> None:
    spoiled, again = views.uneven(data), views.uneven(data)
    assert spoiled is not None
    assert spoiled == again
    assert spoiled.images.count(views.blank_picture()) == pytest.approx(0.15 * 360, abs=20)
    short = sum(len(title.split()) == 1 for title in spoiled.titles)
    assert short == pytest.approx(0.15 * 360, abs=20)
    named = [
        sum(
            views.names_colour(t, c)
            for t, c in zip(d.titles, d.attributes["baseColour"], strict=True)
        )
        for d in (data, spoiled)
    ]
    assert named[1] == pytest.approx(0.6 * named[0], abs=30)
    assert "".join(views.without_words("Red Shirt", {"red", "shirt"}).split()) == "RedShirt"


def test_figures_are_the_textbooks() -> None:
    """Against sums done by hand: gains 3 and 1 at ranks 2 and 4 of 12, one never found."""
    query = Query("q", "", {"b": 2, "d": 1, "nowhere": 1})
    ids = list("abcdefghijkl")
    scores = -np.arange(12, dtype=np.float32)[None]
    figures = {name: values[0] for name, values in figures_of([query], ids, scores).items()}
    dcg = 3 / np.log2(3) + 1 / np.log2(5)
    ideal = 3 / np.log2(2) + 1 / np.log2(3) + 1 / np.log2(4)
    assert figures["ndcg@10"] == pytest.approx(dcg / ideal)
    assert figures["mrr"] == 0.5
    assert figures["capped_recall@10"] == pytest.approx(2 / 3)
    assert figures["recall@100"] == pytest.approx(2 / 3)
    assert "pool_ndcg@10" not in figures


def test_the_highest_grade_can_be_counted() -> None:
    query = Query("q", "", {"a": HIGHEST_GRADE, "b": HIGHEST_GRADE - 1})
    for scores, wanted in (([2, 1], 1.0), ([1, 2], (511 + 1023 * LOG) / (1023 + 511 * LOG))):
        figures = figures_of([query], ["a", "b"], np.array([scores], np.float32))
        assert figures["ndcg@10"][0] == pytest.approx(wanted)


def test_the_judged_pool_ranks_what_was_judged() -> None:
    query = Query("q", "", {"c": 1}, judged=frozenset("bc"))
    figures = figures_of([query], list("abc"), np.array([[3, 2, 1]], np.float32))
    assert figures["pool_ndcg@10"][0] == pytest.approx(1 / np.log2(3))
    assert figures["ndcg@10"][0] == pytest.approx(1 / np.log2(4))


def test_intervals_are_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.1, 0.9, 200)
    ratio = ratio_interval(hard * 1.05, hard)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.05, 1.05, 1.05))
    seeds = np.stack([hard * 1.05, hard * 1.10])
    ratio = ratio_interval(seeds, np.stack([hard, hard]))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.075, 1.05, 1.10)), "of seeds"
    alone = mean_interval(hard)
    assert alone.low < alone.value < alone.high
    assert alone.high - alone.low == pytest.approx(4 * hard.std() / 200**0.5, rel=0.15)


def test_bm25_knows_the_words_and_not_the_pictures(data: ProductData) -> None:
    found = evaluate(data, [BM25()], ["all", "colour_not_in_title", "no_title"])["bm25"]
    assert found["all"]["ndcg@10"].mean() > 0.9
    assert found["colour_not_in_title"]["ndcg@10"].mean() < 0.7
    assert found["no_title"]["ndcg@10"].mean() < 0.2
    assert found["all"]["known_item_hit@10"].mean() > 0.5
    assert (BM25().scores(data, ["qwertyuiop"]) == 0).all(), "no known word, no score"


def test_towers_see_what_their_view_shows(data: ProductData) -> None:
    towers = Towers("tiny", tiny_make())
    view = data.select(list(range(20)))
    whole = towers.products(view)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    nothing = towers.products(views.no_image(view.select([0])).select([0]))
    assert np.linalg.norm(nothing) == pytest.approx(1, abs=1e-5)
    assert not np.allclose(whole[0], nothing[0], atol=1e-3)
    alone = Towers("the same, knowing nothing", tiny_make()).products(view.select([7]))
    np.testing.assert_allclose(alone[0], whole[7], atol=1e-5)
    steps: list[int] = []
    np.testing.assert_array_equal(towers.products(view, steps.append), whole)
    assert steps == [20], "nothing was encoded again"


def test_known_items_come_from_the_titles(data: ProductData) -> None:
    queries = known_items(data)
    assert len(queries) == 360
    title = data.titles[data.ids.index(next(iter(queries[0].grades)))]
    assert set(queries[0].text.split()) <= set(title.lower().split())


def test_the_command_ends_with_figures_and_a_page(folder: Path, tmp_path: Path) -> None:
    from towers.checkpoint import save_make

    save_make(tiny_make(), tmp_path / "checkpoint")
    command = [sys.executable, "-m", "towers.evaluate", "--data", str(folder)]
    command += ["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path)]
    command += ["--slice", "all", "--slice", "uneven"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])[str(folder)]
    assert list(report) == ["bm25", "pretrained", *BASELINES, "make"]
    for slices in report.values():
        assert set(slices) == {"all", "uneven"}
        low, high = slices["all"]["ndcg@10_interval"]
        assert low <= slices["all"]["ndcg@10"] <= high
    ours, bm25 = report["make"]["all"], report["bm25"]["all"]
    assert bm25["ndcg@10"] > ours["ndcg@10"], "an unborn model"
    less, low, high = bm25["make_less_it_ndcg@10"]
    assert less == pytest.approx(ours["ndcg@10"] - bm25["ndcg@10"], abs=2e-4)
    assert low <= less <= high < 0
    page = next(tmp_path.glob("*.html")).read_text("utf-8")
    assert page.count("<h2>") >= 12
    assert "class=right" in page
