"""The picture encoder's upper blocks: what they are taught, resuming, and that they learn it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.judged import write_judged_catalog
from tests.tiny import tiny_make
from towers.learning.catalog import ProductData, read_data
from towers.learning.pictures import (
    Labels,
    PictureLesson,
    PictureTeaching,
    finished,
    labels_of,
    maps_of,
    moved,
    run_name,
)
from towers.make import Make
from towers.train import Bars, teach_pictures

LESSON = PictureLesson(epochs=2, batch=32, rarest_word=5)
COLUMNS = ["baseColour", "articleType"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ProductData:
    catalog = read_data(write_judged_catalog(tmp_path_factory.mktemp("judged")))
    return catalog.select(list(range(0, 360, 3)))


@pytest.fixture(scope="module")
def towers() -> Make:
    return tiny_make()


@pytest.fixture(scope="module")
def labels(data: ProductData) -> Labels:
    return labels_of(data, COLUMNS, LESSON.rarest_word)


@pytest.fixture(scope="module")
def maps(towers: Make, data: ProductData) -> torch.Tensor:
    return maps_of(towers, data.images)


def test_labels_are_what_the_catalog_says(data: ProductData, labels: Labels) -> None:
    assert labels.words.shape[0] == labels.values.shape[0] == len(data)
    assert labels.words.sum(0).min() >= LESSON.rarest_word
    for column, name in enumerate(COLUMNS):
        named = data.attributes[name]
        same = [named[0] == value for value in named]
        assert (labels.values[:, column] == labels.values[0, column]).tolist() == same
    assert not labels_of(data.select([0]), [], 2), "one title has no frequent word"


def test_early_and_late_are_the_whole_encoder(towers: Make) -> None:
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        maps, means = towers.image_encoder.early(image)
        both = torch.cat([towers.image_encoder.late(maps), *means], -1)
        assert torch.equal(both, towers.image_encoder(image))


def test_a_missing_picture_has_no_maps(towers: Make, data: ProductData) -> None:
    maps = maps_of(towers, [data.images[0], b"", b"not a picture"])
    assert maps[0].any()
    assert not maps[1:].any()


def test_moving_keeps_the_shape_and_most_of_the_picture() -> None:
    torch.manual_seed(0)
    maps = torch.ones(2, 1, 6, 5)
    for _ in range(20):
        out = moved(maps)
        assert out.shape == maps.shape
        assert out.sum() >= 2 * 5 * 4


def test_a_run_that_was_cut_ends_as_if_it_had_not_been(
    towers: Make, maps: torch.Tensor, labels: Labels, tmp_path: Path
) -> None:
    def teaching() -> PictureTeaching:
        return PictureTeaching(towers.image_encoder, maps, labels, LESSON)

    whole = teaching().run()
    path = tmp_path / "run.pt"

    class Killed(Exception):
        pass

    def kill(step: int, loss: float) -> None:
        if step > len(maps) // LESSON.batch:
            raise Killed

    with pytest.raises(Killed):
        teaching().run(path, kill)
    assert finished(path) is None
    again = teaching().run(path)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    kept = finished(path)
    assert kept is not None
    assert all(torch.equal(kept[name], whole[name]) for name in whole)


def test_a_run_that_was_kept_on_a_gpu_is_read_without_one(
    towers: Make,
    maps: torch.Tensor,
    labels: Labels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its file says of every tensor that it lay on a GPU."""

    def run() -> dict[str, Any]:
        lesson = replace(LESSON, epochs=1)
        return PictureTeaching(towers.image_encoder, maps, labels, lesson).run(tmp_path / "run.pt")

    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
        whole = run()
    for again in (finished(tmp_path / "run.pt"), run()):
        assert again is not None
        assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_only_the_upper_blocks_learn_and_they_do(
    towers: Make, maps: torch.Tensor, labels: Labels
) -> None:
    losses: list[float] = []
    lesson = PictureLesson(epochs=6, batch=32, rarest_word=5, mixed=0.0, dropout=0.0)
    weights = PictureTeaching(towers.image_encoder, maps, labels, lesson).run(
        told=lambda step, loss: losses.append(loss)
    )
    before = towers.image_encoder.state_dict()
    changed = {
        name.split(".")[1] for name in before if not torch.equal(before[name], weights[name])
    }
    assert {int(number) for number in changed if number.isdigit()} == {11, 12, 13, 14, 15}
    assert sum(losses[-3:]) < 0.93 * sum(losses[:3])


def test_a_catalog_without_words_or_pictures_changes_nothing(
    towers: Make, data: ProductData
) -> None:
    for bare in (data.select([0]), ProductData("none", ["1"], ["a title"], {}, [b""], [])):
        lesson = PictureLesson(epochs=1)
        assert teach_pictures(towers, bare, [], lesson, Bars()) is towers


def test_other_lessons_and_pictures_are_other_runs(
    towers: Make, data: ProductData, labels: Labels
) -> None:
    name = run_name(towers, data, labels, LESSON)
    assert name == run_name(towers, data, labels, LESSON)
    assert name != run_name(towers, data, labels, PictureLesson(epochs=3))
    assert name != run_name(tiny_make(seed=1), data, labels, LESSON)
    fewer = data.select(list(range(100)))
    assert name != run_name(towers, fewer, labels, LESSON)
