"""The CLIP adapter against Hugging Face's own code, on tiny random checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from retrieval_contract.errors import CheckpointError
from tests.clip_family import (
    FAMILIES,
    LAYERS,
    PICTURE_SIZES,
    SIDE,
    TALL,
    TEXTS,
    TOKENS,
    WIDE,
    Family,
    close,
    parts,
    picture,
    pixels,
    product,
    query,
    tokens,
)
from towers.checkpoint import load_towers
from towers.clip import load_clip
from towers.two_towers import TwoTowers


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    made = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        model, tokenizer, processor = parts(name)
        for part in (model, tokenizer, processor):
            part.save_pretrained(folder)
        towers, again = load_clip(str(folder)), AutoTokenizer.from_pretrained(folder)
        made[name] = Family(name, folder, towers, model, again, processor)
    return made


@pytest.fixture
def clip_copy(families: dict[str, Family], tmp_path: Path) -> Path:
    """A folder to spoil."""
    return copy_of(families["clip"], tmp_path)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def test_query_equals_hugging_face(family: Family) -> None:
    """Same ids and same vector for texts of several lengths, languages and one cut short."""
    ours = query(family.towers, TEXTS)
    close(ours, family.text(TEXTS))
    likeness = ours @ ours.T - torch.eye(len(TEXTS))
    assert likeness.max() < 0.999, "texts cannot be told apart: this test could not fail"


@pytest.mark.parametrize("size", PICTURE_SIZES)
def test_image_equals_hugging_face(family: Family, size: tuple[int, int]) -> None:
    one = picture(size)
    close(product(family.towers, None, one), family.image([one]))
    assert (family.image([one]) @ family.image([picture((61, 40))]).T).item() < 0.999


def test_a_text_alone_equals_itself_in_company(family: Family) -> None:
    alone = [query(family.towers, [text]) for text in TEXTS]
    close(query(family.towers, TEXTS), torch.cat(alone))


def test_vector_does_not_depend_on_padding(family: Family) -> None:
    spec, (ids, mask) = family.towers.spec.query.spec, tokens(family.towers, ["red"])
    if spec.pad_to == "max":  # then there is one length, and the padding is part of the text
        assert (family.name, ids.shape) == ("siglip", (1, TOKENS))
        assert (ids[0, 2:] == spec.pad_id).all()
        return
    assert ids.shape == (1, 8), "a short text is padded to the next step of 8 only"
    more = TOKENS - ids.shape[1]
    with torch.no_grad():
        longer = family.towers.encode_query(
            F.pad(ids, (0, more), value=spec.pad_id), F.pad(mask, (0, more))
        )
    close(longer, query(family.towers, ["red"]))


def test_old_clip_finds_its_end_beside_a_higher_pad_id(clip_copy: Path) -> None:
    """`eos_token_id` 2 means "pool at the highest id", which a later added pad token has."""
    edit(clip_copy / "config.json", lambda c: c["text_config"].update(eos_token_id=2))
    tokenizer = AutoTokenizer.from_pretrained(clip_copy)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(clip_copy)
    towers, model = load_clip(str(clip_copy)), CLIPModel.from_pretrained(clip_copy)
    assert towers.spec.query.spec.pad_id > tokenizer.eos_token_id
    for text, ours in zip(TEXTS, query(towers, TEXTS), strict=True):  # theirs: no padding at all
        inputs = tokenizer(text, truncation=True, max_length=TOKENS, return_tensors="pt")
        with torch.no_grad():
            theirs = F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
        close(ours, theirs[0])


def test_an_absent_text_gives_finite_numbers(family: Family) -> None:
    ids, mask = tokens(family.towers, ["red dress", ""])
    assert mask[1].sum() == 0
    with torch.no_grad():
        vectors = family.towers.encode_query(ids, mask)
    assert vectors.isfinite().all()
    if family.name != "siglip":
        close(vectors[:1], query(family.towers, ["red dress"]))


def test_product_is_the_mean_of_what_is_there(family: Family) -> None:
    title, image = "red linen dress", picture(WIDE)
    text, look = family.text([title]), family.image([image])
    close(product(family.towers, title, None), text)
    close(product(family.towers, None, image), look)
    close(product(family.towers, title, image), F.normalize((text + look) / 2, dim=-1))
    assert (text @ look.T).abs().item() < 0.99


def test_spec_says_what_the_checkpoint_says(family: Family) -> None:
    spec, siglip = family.towers.spec, family.name == "siglip"
    text = spec.query.spec
    assert spec.family == family.name
    assert (
        spec.vector_dim
        == (LAYERS["hidden_size"] if siglip else 24)
        == family.text(["red"]).shape[1]
    )
    assert spec.vocabulary == family.model.config.text_config.vocab_size
    assert (text.max_tokens, text.pad_id) == (TOKENS, family.tokenizer.pad_token_id)
    assert text.pad_to == ("max" if siglip else "longest")
    assert (spec.image.fit, spec.image.resample) == {
        "clip": ("crop", "bicubic"),
        "siglip": ("squash", "bilinear"),
        "chinese_clip": ("squash", "bicubic"),
    }[family.name]
    assert not family.towers.training
    assert {p.dtype for p in family.towers.parameters()} == {torch.float32}
    side = json.loads(spec.query.tokenizer_json)
    assert (side["truncation"], side["padding"]) == (None, None)


def test_identity_is_of_the_content(families: dict[str, Family], clip_copy: Path) -> None:
    original = families["clip"].towers.release()
    place = {"_name_or_path": "/some/where", "transformers_version": "0"}
    edit(clip_copy / "config.json", lambda c: c.update(place))
    moved = load_towers(str(clip_copy))
    assert moved.release() == original
    assert str(clip_copy) not in moved.spec.architecture
    edit(clip_copy / "config.json", lambda c: c["text_config"].update(hidden_act="gelu"))
    assert load_towers(str(clip_copy)).release().release_id != original.release_id


class Both(nn.Module):
    """Both functions in one graph, to export once a family."""

    def __init__(self, towers: TwoTowers) -> None:
        super().__init__()
        self.towers = towers

    def forward(
        self, ids: Tensor, mask: Tensor, has_title: Tensor, image: Tensor, has_image: Tensor
    ) -> tuple[Tensor, Tensor]:
        return (
            self.towers.encode_query(ids, mask),
            self.towers.encode_product(ids, mask, has_title, image, has_image),
        )


def both_inputs(towers: TwoTowers, texts: list[str]) -> tuple[Tensor, ...]:
    """Rows with a title and a picture by turns: the first has both, the second no picture."""
    ids, mask = tokens(towers, texts)
    image = pixels(towers, [picture((40 + 8 * i, 48)) for i in range(len(texts))])
    has_title = mask.amax(1, keepdim=True).float()
    has_image = torch.tensor([[float(i % 2 == 0)] for i in range(len(texts))])
    return ids, mask, has_title, image, has_image


@pytest.mark.filterwarnings("ignore")  # the exporter's own, about names of axes
def test_export_runs_with_any_batch_and_length(family: Family, tmp_path: Path) -> None:
    towers, path = family.towers, tmp_path / "both.onnx"
    names = ["ids", "mask", "has_title", "image", "has_image"]
    rows: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=64)}
    text = dict(rows)
    if towers.spec.query.spec.pad_to == "longest":
        text[1] = torch.export.Dim("tokens", min=2, max=TOKENS)
    torch.onnx.export(
        Both(towers).eval(),
        both_inputs(towers, TEXTS[:3]),
        path,
        input_names=names,
        output_names=["raw_query", "raw_product"],
        dynamic_shapes=(text, text, rows, rows, rows),
        opset_version=20,
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == names, "the contract feeds all of them"
    for texts in (["red"], ["red", "", TEXTS[2]], TEXTS):  # 8, 16 or 24 tokens, one absent title
        inputs = both_inputs(towers, texts)
        with torch.no_grad():
            ours = Both(towers)(*inputs)
        found = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
        for one, other in zip(ours, found, strict=True):
            close(torch.from_numpy(other), one)


def copy_of(family: Family, tmp_path: Path) -> Path:
    return Path(shutil.copytree(family.folder, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(where: Path | str, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_clip(str(where))
    for word in ("expected", "got", ";", *words):
        assert word in str(caught.value), str(caught.value)


def test_a_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    # Offline the library fails at once, with the same kind of error as an unreachable hub.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("no-such-owner/no-such-model", "no-such-owner/no-such-model", "network")
    refused("/no/such/folder", "/no/such/folder")


@pytest.mark.parametrize("model_type", ["bert", "siglip2", None])
def test_another_kind_of_model(clip_copy: Path, model_type: str | None) -> None:
    edit(clip_copy / "config.json", lambda c: c.update(model_type=model_type))
    refused(clip_copy, repr(model_type), "chinese_clip")


def test_weights_that_are_not_there(family: Family, tmp_path: Path) -> None:
    folder = copy_of(family, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(weights) if n.endswith("layers.1.mlp.fc1.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, name, "download")
    (folder / "model.safetensors").write_bytes(b"cut short")
    refused(folder, "weights of a")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors")


def test_tokenizers_of_siglip(families: dict[str, Family], tmp_path: Path) -> None:
    """Its class is Python code that wants sentencepiece: its `tokenizer.json` is taken, or none."""
    folder = copy_of(families["siglip"], tmp_path)
    path = folder / "tokenizer_config.json"
    edit(path, lambda c: c.update(tokenizer_class="SiglipTokenizer"))
    cut = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    edit(folder / "tokenizer.json", lambda c: c.update(truncation=cut))  # ours is in the spec
    assert load_clip(str(folder)).spec.query == families["siglip"].towers.spec.query
    edit(path, lambda c: c.update(padding_side="left"))
    refused(folder, "on the left")
    edit(path, lambda c: c.update(padding_side="right", pad_token=None))
    refused(folder, "pad token None")
    (folder / "tokenizer.json").unlink()
    refused(folder, "a file named tokenizer.json", "convert")


def test_a_tokenizer_of_another_vocabulary(clip_copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(clip_copy)
    for path in clip_copy.glob("tokenizer*"):  # the library then makes an empty one
        path.unlink()
    refused(clip_copy, "got 2 tokens")
    tokenizer.add_tokens([f"extra{i}" for i in range(4)], special_tokens=True)
    tokenizer.save_pretrained(clip_copy)
    refused(clip_copy, f"got {len(tokenizer)} tokens")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"resample": 1}, "resample 1"),
        ({"do_normalize": False}, "do_normalize"),
        ({"image_mean": [0.5]}, "1 means"),
        ({"size": {"shortest_edge": SIDE + 8}}, "cropped to"),
        ({"size": SIDE + 8, "do_center_crop": False}, "size 40"),
        ({"size": {"longest_edge": SIDE}}, "KeyError"),
    ],
)
def test_pictures_that_we_cannot_make(clip_copy: Path, change: dict[str, Any], word: str) -> None:
    edit(clip_copy / "preprocessor_config.json", lambda c: c.update(change))
    refused(clip_copy, word, "[32, 32]")
    (clip_copy / "preprocessor_config.json").unlink()
    refused(clip_copy, "preprocessor_config.json")


@pytest.mark.parametrize(
    ("change", "fit"),
    [
        ({"size": SIDE, "crop_size": SIDE}, "crop"),
        ({"size": [SIDE, SIDE], "do_center_crop": None, "crop_size": None}, "squash"),
        ({"size": {"height": SIDE, "width": SIDE}}, "squash"),
        ({"rescale_factor": 1 / 127.5}, "crop"),
    ],
)
def test_spellings_of_the_preprocessor(clip_copy: Path, change: dict[str, Any], fit: str) -> None:
    edit(clip_copy / "preprocessor_config.json", lambda c: c.update(change))
    towers, one = load_clip(str(clip_copy)), picture(TALL)
    assert towers.spec.image.fit == fit
    theirs = CLIPImageProcessorPil.from_pretrained(clip_copy)([one], return_tensors="pt")
    close(pixels(towers, [one]), theirs.pixel_values)


def test_a_whole_saved_processor_comes_first(clip_copy: Path) -> None:
    whole, alone = clip_copy / "processor_config.json", clip_copy / "preprocessor_config.json"
    other = json.loads(alone.read_text()) | {"resample": 2}
    whole.write_text(json.dumps({"image_processor": other}))
    assert load_clip(str(clip_copy)).spec.image.resample == "bilinear"
    whole.write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert load_clip(str(clip_copy)).spec.image.resample == "bicubic"
