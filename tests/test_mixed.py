"""A text beside a picture: what is asked, how it is judged, what the program says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import mixed
from retrieval_contract.errors import SourceError
from tests.judged import write_judged_catalog
from towers.learning.catalog import ProductData, read_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ProductData:
    return read_data(write_judged_catalog(tmp_path_factory.mktemp("judged")))


def test_the_right_ones_have_what_is_asked_and_what_the_picture_shows(data: ProductData) -> None:
    queries = mixed.asked_of(data, "baseColour", ["articleType", "gender"], 50)
    assert len(queries) == 50
    assert queries == mixed.asked_of(data, "baseColour", ["articleType", "gender"], 50)
    of = data.attributes
    for query in queries:
        assert query.text != of["baseColour"][query.row].lower()
        assert len(query.right) == 20
        for row in query.right:
            assert of["baseColour"][row].lower() == query.text
            assert of["articleType"][row] == of["articleType"][query.row]
            assert of["gender"][row] == of["gender"][query.row]
    with pytest.raises(SourceError, match="expected the attribute size, got gender"):
        mixed.asked_of(data, "size", ["gender"], 50)


def test_the_product_itself_takes_no_place() -> None:
    query = mixed.Mixed(0, "red", frozenset({2, 3}))
    best_first = -np.arange(5.0)
    gains = 1 / np.log2([2, 3, 4])
    assert mixed.ndcg(best_first, query) == pytest.approx((gains[1] + gains[2]) / gains[:2].sum())


def test_both_parts_count() -> None:
    """Two kinds and two colours, an axis each: the picture's kind in the text's colour is right,
    and alone either part has another one first."""
    products = np.array([[1.0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]])
    text, picture = np.array([[0.1, 0, 0, 1.0]]), np.array([[0, 1.0, 1.2, 0]])
    query = mixed.Mixed(2, "the other colour", frozenset({3}))
    found = mixed.judged([query], text, picture, products)
    assert found[0.0] == found[1.0] == pytest.approx(1 / np.log2(3))
    assert found[0.5] == 1


def test_a_weight_is_chosen_by_one_half_and_compared_on_the_other() -> None:
    same = {weight: np.full(40, 0.5) for weight in mixed.WEIGHTS}
    better = np.tile([0.9, 0.7], 20)
    report = mixed.report_of(same | {0.8: better})
    assert report["chosen"] == 0.8
    assert report["chosen by default"] == pytest.approx([1.4, 1.4, 1.4])
    assert report["p"] < 0.001


def test_the_program_judges_a_folder(data: ProductData, tmp_path: Path) -> None:
    folder = write_judged_catalog(tmp_path)
    command = ["--data", str(folder), "--products", "120", "--features", str(tmp_path / "kept")]
    report = mixed.run(mixed.parser().parse_args(command))
    assert (report["queries"], report["products"]) == (120, 120)
    assert report["ndcg@10"][0.0] < report["ndcg@10"][mixed.TEXT_WEIGHT]
