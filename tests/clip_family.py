"""Tiny random CLIP-family checkpoints, each with Hugging Face's own parts to compare with."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel

from retrieval_contract.preprocess import ImagePreprocessor, TextPreprocessor
from towers.two_towers import TwoTowers

FAMILIES = ("clip", "siglip", "chinese_clip")
TOKENS = 24
WORDS = ("red", "linen", "dress", "for", "summer", "men", "running", "shoes", "size", "42", "blue")
TEXTS = [
    "red",
    "red linen dress",
    "running shoes for men, size 42",
    "红色 亚麻 连衣裙 dress",
    "blue summer dress " * 12,  # cut at max_tokens, by us and by them
]
SIDE = 32
SQUARE, WIDE, TALL = (48, 48), (96, 48), (40, 120)
PICTURE_SIZES = [
    SQUARE,
    WIDE,
    TALL,
    (32, 34),
    (97, 31),
    (16, 16),
    (33, 32),
    (51, 40),
    (320, 240),
    (211, 500),
]
"""(width, height) in pixels."""
LAYERS = {
    "hidden_size": 64,  # 16 a head: narrower ones are not fused by TensorRT
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


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
    """Byte-level BPE that joins each of WORDS from the left: r e d</w> → re d</w> → red</w>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, vocabulary = {}, dict.fromkeys([*letters, *(c + "</w>" for c in letters)])
    for word in WORDS:
        left = word[0]
        for right in [*word[1:-1], word[-1] + "</w>"]:
            merges[left, right] = left = left + right
            vocabulary[left] = None
    vocabulary |= {"<|startoftext|>": None, "<|endoftext|>": None}
    ids = {token: i for i, token in enumerate(vocabulary)}
    return hf.CLIPTokenizer(vocab=ids, merges=list(merges), model_max_length=TOKENS)


def siglip_tokenizer() -> Any:
    pieces = ["</s>", "<unk>", "▁", *(f"▁{w}" for w in WORDS), *"abcdefghijklmnopqrstuvwxyz4"]
    core = Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=1))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 0)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_max_length=TOKENS,
        model_input_names=["input_ids"],
        padding_side="right",
    )


def bert_tokenizer() -> Any:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"红色亚麻连衣裙,", *WORDS]
    return hf.BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}, model_max_length=TOKENS)


def parts(name: str) -> tuple[Any, Any, Any]:
    """(model, tokenizer, image processor) of a tiny checkpoint."""
    vision = LAYERS | {"image_size": SIDE, "patch_size": 8}
    text: dict[str, Any] = LAYERS | {"max_position_embeddings": TOKENS}
    squash = {"size": {"height": SIDE, "width": SIDE}}
    if name == "clip":
        tokenizer = clip_tokenizer()
        text["eos_token_id"] = tokenizer.eos_token_id
        config, kind = hf.CLIPConfig, CLIPModel
        processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=squash["size"])
    elif name == "siglip":
        tokenizer, config, kind = siglip_tokenizer(), hf.SiglipConfig, hf.SiglipModel
        processor = hf.SiglipImageProcessorPil(**squash, resample=2)
    else:
        tokenizer, config, kind = bert_tokenizer(), hf.ChineseCLIPConfig, hf.ChineseCLIPModel
        processor = hf.ChineseCLIPImageProcessorPil(**squash, do_center_crop=False)
    text["vocab_size"] = len(tokenizer) + 3
    size = {} if name == "siglip" else {"projection_dim": 24}
    torch.manual_seed(7)
    model = kind(config(text_config=text, vision_config=vision, **size)).eval()
    with torch.no_grad():  # the library's own noise is so small that all texts look alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model, tokenizer, processor


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
