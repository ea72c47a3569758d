"""The CLIP adapter against Hugging Face's own code, on tiny random checkpoints."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import (
    ChineseCLIPImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from retrieval_contract.errors import CheckpointError
from retrieval_contract.preprocess import ImagePreprocessor, TextPreprocessor
from towers.checkpoint import load_towers
from towers.clip import load_clip
from towers.two_towers import TwoTowers

FAMILIES = ("clip", "siglip", "chinese_clip")
TOKENS = 24
WORDS = "red linen dress for summer men running shoes size 42 blue".split()
TEXTS = [
    "red",
    "red linen dress",
    "running shoes for men, size 42",
    "红色 亚麻 连衣裙 dress",
    "blue summer dress " * 12,  # cut at max_tokens, by us and by them
]
SIDE = 32
SQUARE, WIDE, TALL, NEAR = (48, 48), (96, 48), (40, 120), (33, 32)
"""(width, height) whose resized margins are even or too small to matter: bit-equal pixels."""
LAYERS = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


@dataclass(frozen=True)
class Family:
    """One checkpoint on disk, its towers, and Hugging Face's own parts to compare with."""

    name: str
    folder: Path
    towers: TwoTowers
    model: Any
    tokenizer: Any
    processor: Any

    def text(self, texts: list[str]) -> Tensor:
        """Their tokenizer and text features, as their documentation calls them: unit (B, V)."""
        padding = "max_length" if self.name == "siglip" else "longest"
        inputs = self.tokenizer(
            texts, padding=padding, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        with torch.no_grad():
            return F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)

    def image(self, pictures: list[Image.Image]) -> Tensor:
        """Their image processor and image features: unit (B, V)."""
        inputs = self.processor(pictures, return_tensors="pt")
        with torch.no_grad():
            return F.normalize(self.model.get_image_features(**inputs).pooler_output, dim=-1)


def clip_tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, vocabulary = [], [*letters, *(c + "</w>" for c in letters)]
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts[:2] = ["".join(pair)]
            if parts[0] not in vocabulary:
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges,
        model_max_length=TOKENS,
    )  # fmt: skip


def siglip_tokenizer() -> Any:
    pieces = ["</s>", "<unk>", "▁", *(f"▁{w}" for w in WORDS), *"abcdefghijklmnopqrstuvwxyz4"]
    core = Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=1))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="</s>", unk_token="<unk>",
        model_max_length=TOKENS, model_input_names=["input_ids"], padding_side="right",
    )  # fmt: skip


def bert_tokenizer() -> Any:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"红色亚麻连衣裙,", *WORDS]
    return BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}, model_max_length=TOKENS)


def parts(name: str) -> tuple[Any, Any, Any]:
    """(model, tokenizer, image processor) of a tiny checkpoint; CLIP is asymmetric in width."""
    vision = LAYERS | {"image_size": SIDE, "patch_size": 8}
    crop = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    squash = {"size": {"height": SIDE, "width": SIDE}}
    if name == "clip":
        tokenizer = clip_tokenizer()
        end = tokenizer.eos_token_id
        text = LAYERS | {"eos_token_id": end, "pad_token_id": end, "bos_token_id": end - 1}
        kinds, processor = (CLIPConfig, CLIPModel), CLIPImageProcessorPil(**crop)
    elif name == "siglip":
        tokenizer, text = siglip_tokenizer(), LAYERS | {"projection_size": 32}
        kinds, processor = (SiglipConfig, SiglipModel), SiglipImageProcessorPil(**squash, resample=2)
    else:
        tokenizer, text = bert_tokenizer(), dict(LAYERS)
        kinds = ChineseCLIPConfig, ChineseCLIPModel
        processor = ChineseCLIPImageProcessorPil(**squash, do_center_crop=False)
    text |= {"vocab_size": len(tokenizer) + 3, "max_position_embeddings": TOKENS}
    size = {} if name == "siglip" else {"projection_dim": 24}
    torch.manual_seed(7)
    model = kinds[1](kinds[0](text_config=text, vision_config=vision, **size)).eval()
    with torch.no_grad():  # the library's own noise is so small that all texts look alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model, tokenizer, processor


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


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def tokens(towers: TwoTowers, texts: list[str]) -> tuple[Tensor, Tensor]:
    side = towers.spec.query
    batch = TextPreprocessor(side.tokenizer_json, side.spec, required=False)(
        [t.encode() for t in texts]
    )
    assert not any(batch.status)
    return torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)


def query(towers: TwoTowers, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return towers.encode_query(*tokens(towers, texts))


def picture(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1] // 4, size[0] // 4, 3))
    return Image.fromarray(noise.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def pixels(towers: TwoTowers, pictures: list[Image.Image]) -> Tensor:
    """Our bytes → uint8, then the mean and std that surgery puts into the graph."""
    files = []
    for one in pictures:
        one.save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    spec = towers.spec.image
    batch = ImagePreprocessor(spec)(files)
    assert not any(batch.status)
    scaled = (batch.pixels - np.array(spec.mean)) / np.array(spec.std)
    return torch.from_numpy(scaled.astype(np.float32)).permute(0, 3, 1, 2)


def product(towers: TwoTowers, title: str | None, image: Image.Image | None) -> Tensor:
    """The unit vector of one product, absent modalities as the preprocessor blanks them."""
    ids, mask = tokens(towers, [title or ""])
    blank = Image.new("RGB", SQUARE, "white")
    flags = [torch.tensor([[float(x is not None)]]) for x in (title, image)]
    with torch.no_grad():
        vector = towers.encode_product(
            ids, mask, flags[0], pixels(towers, [image or blank]), flags[1]
        )
    return F.normalize(vector, dim=-1)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def test_query_equals_hugging_face(family: Family) -> None:
    ours = query(family.towers, TEXTS)
    close(ours, family.text(TEXTS))
    likeness = ours @ ours.T - torch.eye(len(TEXTS))
    assert likeness.max() < 0.999, "texts cannot be told apart: this test could not fail"


@pytest.mark.parametrize("size", [SQUARE, WIDE, TALL, NEAR, (51, 40), (97, 31)])
def test_image_equals_hugging_face(family: Family, size: tuple[int, int]) -> None:
    one = picture(size)
    theirs = family.processor([one], return_tensors="pt").pixel_values
    d = (pixels(family.towers, [one])-theirs).abs().max()
    ours = product(family.towers, None, one)
    print(family.name, size, d, (ours-family.image([one])).abs().max(), (ours*family.image([one])).sum())
    assert 0

