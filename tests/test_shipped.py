"""The checkpoint that the repository ships: its size, its parts, what it finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deploy.demo import REAL_CATALOG
from towers.checkpoint import SHIPPED, TRAINING_FILE, file_hash, load_towers
from towers.efficientnet_lite import EARLY_BLOCKS
from towers.evaluate import evaluate, side_of
from towers.learning.baselines import BASELINES, baselines
from towers.learning.catalog import read_data
from towers.learning.split import sides_of
from towers.learning.systems import systems_of
from towers.learning.trained import new_rows
from towers.make import Make
from towers.pretrained import pretrained_make

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def shipped() -> Make:
    towers = load_towers(str(SHIPPED))
    assert isinstance(towers, Make)
    return towers


def test_it_keeps_to_its_size() -> None:
    sizes = {path.name: path.stat().st_size for path in SHIPPED.iterdir()}
    assert sum(sizes.values()) <= 70 * MEGABYTE
    assert max(sizes.values()) < 50 * MEGABYTE


def test_its_query_encoder_is_the_smaller_one(shipped: Make) -> None:
    layers = [len(t.bert.encoder.layer) for t in (shipped.query_text, shipped.title_text)]
    assert layers[0] in (2, 3)
    assert layers[1] == 6
    assert shipped.config.fusion == "modal_adaptation"


def test_its_title_encoder_and_the_eye_of_its_picture_encoder_are_the_public_ones(
    shipped: Make,
) -> None:
    public = pretrained_make()
    for name, tensor in public.named_state():
        block = name.split(".")[2] if name.startswith("image_encoder._blocks.") else ""
        if name.startswith("title_text.") or (block.isdigit() and int(block) <= EARLY_BLOCKS[-1]):
            assert torch.equal(tensor.half(), dict(shipped.named_state())[name].half()), name


def test_baselines_are_shipped_with_it() -> None:
    assert list(baselines()) == list(BASELINES)


def test_what_it_was_trained_on_is_not_asked_about(tmp_path: Path) -> None:
    facts = json.loads((SHIPPED / TRAINING_FILE).read_text("utf-8"))
    assert facts["side"] == "train"
    card = (SHIPPED / "README.md").read_text("utf-8")
    assert f"{facts['products']:,} products of `{facts['data']}`" in card
    (tmp_path / "products.parquet").write_bytes(b"another catalog")
    assert side_of(tmp_path, SHIPPED) == "new"


def test_what_its_start_was_trained_on_is_not_asked_about_either(tmp_path: Path) -> None:
    (tmp_path / "products.parquet").write_bytes(b"the first catalog")
    first = {"products_sha256": file_hash(tmp_path / "products.parquet"), "side": "train"}
    second = {"products_sha256": "of another", "side": "train", "start": first}
    (tmp_path / TRAINING_FILE).write_text(json.dumps(second))
    assert side_of(tmp_path, tmp_path) == "test"
    assert side_of(tmp_path, SHIPPED, tmp_path) == "test", "of any of those that are compared"


@pytest.mark.skipif(not REAL_CATALOG.is_dir(), reason="the real product catalog is not there")
def test_it_finds_what_titles_do_not_say(shipped: Make) -> None:
    """Every sixth product of the side that was never trained on."""
    assert side_of(REAL_CATALOG, SHIPPED) == "test"
    data = read_data(REAL_CATALOG)
    assert new_rows(data, [SHIPPED]) == sorted(set(range(len(data))) - {*sides_of(data)["train"]})
    data = data.select(sides_of(data)["test"][::6])
    slices = ["all", "colour_not_in_title"]
    found = {
        name: {part: figures["ndcg@10"].mean() for part, figures in of_slices.items()}
        for name, of_slices in evaluate(data, systems_of(shipped, baselines()), slices).items()
    }
    best = found["make"]
    assert best["all"] > 1.1 * max(found["bm25"]["all"], found["pretrained"]["all"])
    assert best["all"] > found["mean"]["all"]
    assert best["colour_not_in_title"] > 1.15 * found["title"]["colour_not_in_title"]
