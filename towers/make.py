"""MAKE: two text encoders, an image encoder, and the heads that are trained on them.

Our reading of "Delving into E-Commerce Product Retrieval with Vision-Language Pre-training" /
MAKE, Taobao Search, WWW 2023 (arXiv 2301.12646): its abstract and public summaries give the
parts, no code or weights are public. Queries are short and titles long, so each has its own
encoder; title and picture are weighed per product (Modal Adaptation, `towers/heads.py`). Keyword
Enhancement acts in training only and leaves nothing in the served graphs.

Shapes: B batch, Q/T tokens, D text width, F picture features, V vector_dim.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from retrieval_contract.errors import CheckpointError
from retrieval_contract.release import ImageSpec, TextSpec
from towers.efficientnet_lite import POOLED_FEATURES, EfficientNetLite0
from towers.heads import FUSIONS, Heads
from towers.two_towers import TextSide, TowersSpec, TwoTowers

FAMILY = "make"
MASK_FLOOR = -1e4
"""Added to what attention must not see: softmax gives exact zeros, and half precision holds it."""


@dataclass(frozen=True)
class MakeConfig:
    """Everything that shapes a MAKE model; `config.json` of a checkpoint holds just this.

    Lengths are tokens and characters, image sides pixels. Lite0 was trained on (x − 127) / 128.
    """

    vector_dim: int = 384
    query_tokens: int = 32
    title_tokens: int = 64
    query_chars: int = 1000
    title_chars: int = 2000
    image_height: int = 160
    image_width: int = 128
    image_mean: float = 127.0
    image_std: float = 128.0
    fusion: str = "modal_adaptation"
    head_width: int = 384
    query_layers: int | None = None  # None: as many as the title encoder has
    text_encoder: dict[str, Any] = field(default_factory=dict)  # BertConfig fields of the titles'

    @classmethod
    def from_json(cls, text: str) -> MakeConfig:
        """Read `config.json`; unknown or missing names are errors."""
        values = json.loads(text)
        if values.pop("family", FAMILY) != FAMILY:
            raise CheckpointError(f"config.json: expected family '{FAMILY}'")
        if unknown := set(values) - set(cls.__dataclass_fields__):
            raise CheckpointError(
                f"config.json: unknown {sorted(unknown)}; known are "
                f"{sorted(cls.__dataclass_fields__)}"
            )
        if values.get("fusion", cls.fusion) not in FUSIONS:
            raise CheckpointError(
                f"config.json: expected a fusion of {sorted(FUSIONS)}, got {values['fusion']!r}"
            )
        return cls(**values)

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps({"family": FAMILY} | asdict(self), indent=2) + "\n"


class TextEncoder(nn.Module):
    """BERT-style encoder: the mean of its tokens' states."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Int (B, T) twice → masked mean (B, D)."""
        # Types and an additive mask are given, or the exported graph would compute them by a
        # detour of a dozen nodes.
        hidden = (1.0 - mask[:, None, None, :].to(self.bert.dtype)) * MASK_FLOOR  # (B, 1, 1, T)
        tokens = self.bert(
            input_ids=ids, attention_mask=hidden, token_type_ids=torch.zeros_like(ids)
        ).last_hidden_state  # (B, T, D)
        weight = mask.unsqueeze(-1).to(tokens.dtype)  # (B, T, 1)
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1.0)  # (B, D)


class ColourHistogram(nn.Module):
    """How much of a picture is of each of 64 colours; every pixel counts for those near it.

    share = softmax(−|x − c|² / τ) over a 4 × 4 × 4 lattice of colours c in [−1, 1]³, as a 1 × 1
    convolution: |x|² is the same for every c and drops out.
    """

    LEVELS, SHARPNESS = 4, 20.0
    COLOURS = LEVELS**3

    def __init__(self) -> None:
        super().__init__()
        levels = (torch.arange(self.LEVELS) + 0.5) / self.LEVELS * 2 - 1
        lattice = torch.cartesian_prod(levels, levels, levels)  # (64, 3)
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", 2 * self.SHARPNESS * lattice[..., None, None], False)
        self.register_buffer("bias", -self.SHARPNESS * lattice.square().sum(1), False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in about [−1, 1] → (B, 64), each row adds up to 1."""
        near = nn.functional.conv2d(image, self.weight, self.bias)  # (B, 64, H, W)
        return near.softmax(1).mean((2, 3))


IMAGE_FEATURES = POOLED_FEATURES + ColourHistogram.COLOURS


class Make(TwoTowers):
    """The reference model. `title_text` and the picture encoder's lower blocks stay as pretrained.

    Both text encoders share one table of word embeddings.
    """

    def __init__(self, config: MakeConfig, tokenizer_json: str) -> None:
        super().__init__()
        # "eager" attention exports to plain MatMul and Softmax, which TensorRT fuses itself.
        bert = BertConfig(**config.text_encoder, attn_implementation="eager")
        layers = config.query_layers or bert.num_hidden_layers
        short = BertConfig(
            **config.text_encoder | {"num_hidden_layers": layers}, attn_implementation="eager"
        )
        self.config = config
        self.spec = spec_from_config(config, bert.vocab_size, tokenizer_json)
        self.title_text = TextEncoder(bert)
        self.query_text = TextEncoder(short)
        self.query_text.bert.embeddings = self.title_text.bert.embeddings
        self.image_encoder = EfficientNetLite0()
        self.colours = ColourHistogram()
        self.heads = Heads(
            config.fusion,
            bert.hidden_size,
            IMAGE_FEATURES,
            config.head_width,
            config.vector_dim,
        )

    def image_features(self, image: Tensor) -> Tensor:
        """Normalised float32 (B, 3, H, W) → (B, F)."""
        return torch.cat([self.image_encoder(image), self.colours(image)], -1)

    def encode_query(self, query_ids: Tensor, query_mask: Tensor) -> Tensor:
        """See TwoTowers."""
        return self.heads.query(self.query_text(query_ids, query_mask))

    def encode_product(
        self,
        title_ids: Tensor,
        title_mask: Tensor,
        has_title: Tensor,
        image: Tensor,
        has_image: Tensor,
    ) -> Tensor:
        """See TwoTowers."""
        title = self.title_text(title_ids, title_mask)  # (B, D)
        return self.heads.product(title, has_title, self.image_features(image), has_image)


def spec_from_config(config: MakeConfig, vocabulary: int, tokenizer_json: str) -> TowersSpec:
    """What the contract needs to know about a MAKE model."""
    pad_id = config.text_encoder.get("pad_token_id", 0)

    def text(tokens: int, chars: int) -> TextSide:
        return TextSide(TextSpec(tokens, pad_id, chars), tokenizer_json)

    mean, std = config.image_mean, config.image_std
    return TowersSpec(
        family=FAMILY,
        vector_dim=config.vector_dim,
        vocabulary=vocabulary,
        query=text(config.query_tokens, config.query_chars),
        title=text(config.title_tokens, config.title_chars),
        image=ImageSpec(config.image_height, config.image_width, (mean,) * 3, (std,) * 3),
        architecture=config.to_json(),
    )
