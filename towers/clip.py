"""Checkpoints of the CLIP family (CLIP, SigLIP, Chinese-CLIP) as two towers.

The query tower is the text tower. The product tower encodes the title with the same text
tower and the picture with the image tower, and averages the unit vectors that are there.

Shapes: B batch, Q/T tokens, V vector_dim.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import cached_file

from retrieval_contract.errors import CheckpointError
from retrieval_contract.release import ImageSpec, TextSpec
from towers.two_towers import TextSide, TowersSpec, TwoTowers, unit

MODELS: dict[str, type[PreTrainedModel]] = {
    "clip": transformers.CLIPModel,
    "siglip": transformers.SiglipModel,  # also SigLIP 2 of fixed resolution
    "chinese_clip": transformers.ChineseCLIPModel,
}
QUERY_CHARS, TITLE_CHARS = 1000, 2000
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class Clip(TwoTowers):
    """A Hugging Face model of the CLIP family behind our protocol."""

    def __init__(self, model: PreTrainedModel, spec: TowersSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = model

    def encode_query(self, query_ids: Tensor, query_mask: Tensor) -> Tensor:
        """See TwoTowers."""
        return self._text(query_ids, query_mask)

    def encode_product(
        self,
        title_ids: Tensor,
        title_mask: Tensor,
        has_title: Tensor,
        image: Tensor,
        has_image: Tensor,
    ) -> Tensor:
        """See TwoTowers."""
        title = self._text(title_ids, title_mask)  # (B, V)
        picture = unit(self.model.get_image_features(pixel_values=image).pooler_output)  # (B, V)
        there = (has_title + has_image).clamp(min=1.0)  # (B, 1)
        return (title * has_title + picture * has_image) / there

    def _text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Int (B, T) twice → unit vectors, float32 (B, V)."""
        if self.spec.family == "siglip":
            # Trained on full-length padding that it attends to like text: it takes no mask.
            features = self.model.get_text_features(input_ids=ids)
        else:
            # CLIP pools where it finds the end token, in old configs the highest id: blanked
            # padding cannot be taken for it, whichever pad token the checkpoint has.
            features = self.model.get_text_features(input_ids=ids * mask, attention_mask=mask)
        return unit(features.pooler_output)


def load_clip(where: str) -> Clip:
    """The towers of a Hugging Face folder or hub name, float32, in evaluation mode.

    Raises CheckpointError when something cannot be fetched, is missing, or is of a kind that
    the served graphs cannot express.
    """
    advice = "check the name and the network, or download it and give its folder"
    with _explained(where, "a Hugging Face folder or hub name", advice):
        config, _ = PreTrainedConfig.get_config_dict(where)
    family = config.get("model_type")
    if family not in MODELS:
        raise CheckpointError(
            f"{where}: expected a model_type of {tuple(MODELS)}, got {family!r}; use such a "
            "checkpoint (of SigLIP 2 one of fixed resolution) or write a TwoTowers"
        )
    model = _model(where, MODELS[family])
    text, vision = model.config.text_config, model.config.vision_config
    query, title = _text_sides(where, family, text)
    image = _image_spec(where, _box(vision.image_size))
    dim = text.projection_size if family == "siglip" else model.config.projection_dim
    architecture = json.dumps(_portable(config), sort_keys=True)
    spec = TowersSpec(family, dim, text.vocab_size, query, title, image, architecture)
    return Clip(model, spec).eval()


def _model(where: str, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """The weights; the library would fill missing ones with noise, we refuse."""
    with _explained(where, f"weights of a {kind.__name__}", "download the checkpoint again"):
        # "eager" attention exports to plain MatMul and Softmax, which TensorRT fuses itself.
        model, report = kind.from_pretrained(
            where, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"none for {len(missing)} tensors, the first is {missing[0]}")
    return model


def _text_sides(where: str, family: str, text: PreTrainedConfig) -> tuple[TextSide, TextSide]:
    """Query and title side: one tokenizer, padded as the checkpoint was trained."""
    tokenizer = _tokenizer(where)
    known, pad_id, side = len(tokenizer), tokenizer.pad_token_id, tokenizer.padding_side
    # Without vocabulary files the library makes an all but empty tokenizer and says nothing.
    least, most = text.vocab_size // 2, text.vocab_size
    if pad_id is None or side != "right" or not least <= known <= most:
        raise CheckpointError(
            f"{where}: expected a tokenizer of {least} to {most} tokens that pads on the right, "
            f"got {known} tokens, pad token {pad_id} on the {side}; restore the files of the "
            "tokenizer that the model was trained with"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"truncation": None, "padding": None}  # the TextSpec says both
    tokens = min(text.max_position_embeddings, tokenizer.model_max_length)
    pad_to = "max" if family == "siglip" else "longest"
    query, title = (TextSpec(tokens, pad_id, n, pad_to) for n in (QUERY_CHARS, TITLE_CHARS))
    tokenizer_json = json.dumps(content, ensure_ascii=False)
    return TextSide(query, tokenizer_json), TextSide(title, tokenizer_json)


def _tokenizer(where: str) -> PreTrainedTokenizerFast:
    """The checkpoint's own tokenizer or, where that is Python code, its `tokenizer.json`."""
    advice = "convert its tokenizer and save that there (save_pretrained)"
    with _explained(where, "a fast tokenizer (tokenizer.json)", advice):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        except ImportError:  # SigLIP's class wants sentencepiece even beside a tokenizer.json
            tokenizer = None
        if tokenizer is None or not tokenizer.is_fast:
            cached_file(where, "tokenizer.json")  # without it the next line would guess
            tokenizer = PreTrainedTokenizerFast.from_pretrained(where)
    return tokenizer


def _image_spec(where: str, box: list[int]) -> ImageSpec:
    """Read the image processor's JSON: its classes may want torchvision, the file does not.

    `box`: the [height, width] in pixels that the model takes.
    """
    expected = f"a preprocessor_config.json that makes pictures of {box}"
    with _explained(where, expected, "mend or restore that file"):
        try:  # where a whole processor was saved, its file comes first
            config = _json(where, "processor_config.json")["image_processor"]
        except (OSError, KeyError):
            config = _json(where, "preprocessor_config.json")
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if config.get(step, True) is not True:
                raise ValueError(f"{step} = {config[step]}")
        size, crop_size = config["size"], config.get("crop_size")
        crop = config.get("do_center_crop", crop_size is not None)
        if _box(size) != box or (crop and _box(crop_size) != box):
            raise ValueError(f"size {size}" + f" cropped to {crop_size}" * bool(crop))
        # A picture resized to height and width has its size already: no crop is left to do.
        keeps_ratio = isinstance(size, int) or "shortest_edge" in size
        fit = "crop" if crop and keeps_ratio else "squash"
        if (resample := config.get("resample", 3)) not in RESAMPLE:
            raise ValueError(f"resample {resample}, known are {RESAMPLE}")
        factor = config.get("rescale_factor", 1 / 255)
        mean, std = (tuple(float(x) / factor for x in config[k])
                     for k in ("image_mean", "image_std"))  # fmt: skip
        if not len(mean) == len(std) == 3:
            raise ValueError(f"{len(mean)} means and {len(std)} deviations")
        return ImageSpec(*box, mean, std, fit, RESAMPLE[resample])


def _box(size: Any) -> list[int]:
    """[height, width] from any of the spellings of a size."""
    if isinstance(size, dict):
        size = size["shortest_edge"] if "shortest_edge" in size else [size["height"], size["width"]]
    return [size, size] if isinstance(size, int) else list(size)


def _json(where: str, name: str) -> dict[str, Any]:
    return json.loads(Path(cached_file(where, name)).read_text(encoding="utf-8"))


def _portable(config: Any) -> Any:
    """A config without what names a machine or a library version."""
    if not isinstance(config, dict):
        return config
    return {k: _portable(v) for k, v in config.items()
            if not k.startswith("_") and k != "transformers_version"}  # fmt: skip


@contextmanager
def _explained(where: str, expected: str, advice: str) -> Iterator[None]:
    """Whatever the library raises on a checkpoint it cannot read → CheckpointError."""
    try:
        yield
    except Exception as exc:  # the library raises many types; here all mean the same
        got = " ".join(f"{type(exc).__name__}: {exc}".split())[:300]
        raise CheckpointError(f"{where}: expected {expected}, got {got}; {advice}") from exc
