"""Heads of simpler kinds, trained with equal care, that MAKE is compared with."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from retrieval_contract.errors import CheckpointError
from towers.checkpoint import stored
from towers.heads import Heads
from towers.make import IMAGE_FEATURES

BASELINES = ("title", "image", "mean", "concat")
UNUSED = {"title": "image_head.", "image": "title_head."}
"""Heads that a fusion never looks at; they are not stored."""
FOLDER = Path(__file__).parents[1] / "weights" / "baselines"


def save_heads(heads: Heads, folder: Path, fusion: str) -> None:
    """One file, in the smallest types that lose nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    left_out = UNUSED.get(fusion, "-")
    state = {n: t for n, t in heads.state_dict().items() if not n.startswith(left_out)}
    save_file(stored(state), folder / f"{fusion}.safetensors")


def load_heads(folder: Path, fusion: str) -> Heads:
    """The heads of a file; their sizes are those of its tensors."""
    path = folder / f"{fusion}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: not found; make it (python -m towers.ablation --baselines)")
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    hidden, width = state["query_head.residual.0.weight"].shape
    heads = Heads(fusion, width, IMAGE_FEATURES, hidden, len(state["projection.weight"]))
    heads.load_state_dict(state, strict=False)
    return heads.eval()


def baselines(folder: Path = FOLDER) -> dict[str, Heads]:
    """Those that are shipped."""
    return {name: load_heads(folder, name) for name in BASELINES}
