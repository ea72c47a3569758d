"""MAKE: two text encoders, an image encoder, Modal Adaptation, one shared projection.

Our reading of "Delving into E-Commerce Product Retrieval with Vision-Language Pre-training" /
MAKE, Taobao Search, WWW 2023 (arXiv 2301.12646): its abstract and public summaries give the
parts, no code or weights are public. Queries are short and titles long, so each has its own
encoder; title and picture are weighed per product. Keyword Enhancement acts in training only
and leaves nothing in the served graphs.

Shapes: B batch, Q/T tokens, G grid cells, D hidden width, V vector_dim.
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
from towers.efficientnet_lite import GRID_CHANNELS, EfficientNetLite0
from towers.two_towers import TextSide, TowersSpec, TwoTowers, unit

FAMILY = "make"


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
    text_encoder: dict[str, Any] = field(default_factory=dict)  # BertConfig fields

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
        return cls(**values)

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps({"family": FAMILY} | asdict(self), indent=2) + "\n"


class TextEncoder(nn.Module):
    """BERT-style encoder: every token's state, and their mean."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Int (B, T) twice → tokens (B, T, D) and their masked mean (B, D)."""
        tokens = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, D)
        weight = mask.unsqueeze(-1).to(tokens.dtype)  # (B, T, 1)
        mean = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1.0)  # (B, D)
        return tokens, mean


class Attend(nn.Module):
    """Single-head attention of one vector over a set: what the set says about the vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.scale = width**-0.5

    def forward(self, vector: Tensor, items: Tensor, there: Tensor) -> Tensor:
        """(B, D), (B, N, D) and 1/0 (B, N) → weighted mean of the items, (B, D)."""
        score = (self.key(items) @ self.query(vector).unsqueeze(-1)).squeeze(-1)  # (B, N)
        score = score * self.scale + (1.0 - there) * -1e4
        return (score.softmax(-1).unsqueeze(1) @ items).squeeze(1)  # (B, D)


class ModalAdaptation(nn.Module):
    """Title and picture → one vector, by weights that each product decides for itself.

        t' = attend(i → title tokens)      what the title says about this picture
        i' = attend(t → picture grid)      what the picture shows of this title
        w  = softmax(gate([t, i, t', i'])) over the modalities that are there
        v  = w_t t + w_i i + correct([t, i, t', i', t∘i]) · has_title · has_image

    `gate` starts constant with most weight on the title and `correct` starts at zero, so an
    untrained model is the text encoder it started from.
    """

    TITLE_START = 3.0  # gate bias: softmax(3, 0) = 0.95 on the title

    def __init__(self, width: int) -> None:
        super().__init__()
        self.title_for_image = Attend(width)
        self.image_for_title = Attend(width)
        self.gate = nn.Linear(4 * width, 2)
        self.correct = nn.Sequential(
            nn.Linear(5 * width, width), nn.GELU(), nn.Linear(width, width)
        )
        nn.init.zeros_(self.gate.weight)
        self.gate.bias.data = torch.tensor([self.TITLE_START, 0.0])
        for parameter in self.correct[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        tokens: Tensor,
        token_mask: Tensor,
        title: Tensor,
        has_title: Tensor,
        grid: Tensor,
        image: Tensor,
        has_image: Tensor,
    ) -> Tensor:
        """Unit `title`, `image` (B, D); tokens (B, T, D), grid (B, G, D); flags (B, 1) → (B, D)."""
        cells = torch.ones_like(grid[..., 0])  # (B, G)
        seen_title = self.title_for_image(image, tokens, token_mask.to(tokens.dtype))
        seen_image = self.image_for_title(title, grid, cells)
        title, seen_title = title * has_title, seen_title * has_title
        image, seen_image = image * has_image, seen_image * has_image
        both = torch.cat([title, image, seen_title, seen_image], -1)  # (B, 4D)
        absent = 1.0 - torch.cat([has_title, has_image], -1)  # (B, 2)
        weight = (self.gate(both) - 1e4 * absent).softmax(-1)  # (B, 2)
        fused = weight[:, :1] * title + weight[:, 1:] * image  # (B, D)
        correction = self.correct(torch.cat([both, title * image], -1))  # (B, D)
        return fused + correction * has_title * has_image


class Make(TwoTowers):
    """The reference model."""

    def __init__(self, config: MakeConfig, tokenizer_json: str) -> None:
        super().__init__()
        # "eager" attention exports to plain MatMul and Softmax, which TensorRT fuses itself.
        bert = BertConfig(**config.text_encoder, attn_implementation="eager")
        self.config = config
        self.spec = spec_from_config(config, bert.vocab_size, tokenizer_json)
        self.query_text = TextEncoder(bert)
        self.title_text = TextEncoder(bert)
        self.image_encoder = EfficientNetLite0()
        self.image_projection = nn.Linear(GRID_CHANNELS, bert.hidden_size)
        self.modal_adaptation = ModalAdaptation(bert.hidden_size)
        self.projection = nn.Linear(bert.hidden_size, config.vector_dim, bias=False)

    def encode_query(self, query_ids: Tensor, query_mask: Tensor) -> Tensor:
        """See TwoTowers."""
        _, query = self.query_text(query_ids, query_mask)  # (B, D)
        return self.projection(query)  # (B, V)

    def encode_product(
        self,
        title_ids: Tensor,
        title_mask: Tensor,
        has_title: Tensor,
        image: Tensor,
        has_image: Tensor,
    ) -> Tensor:
        """See TwoTowers."""
        tokens, title = self.title_text(title_ids, title_mask)  # (B, T, D), (B, D)
        grid = self.image_projection(self.image_encoder(image))  # (B, G, D)
        fused = self.modal_adaptation(
            tokens, title_mask, unit(title), has_title, grid, unit(grid.mean(1)), has_image
        )
        return self.projection(fused)  # (B, V)


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
