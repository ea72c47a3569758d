"""A checkpoint is a folder: `config.json`, `tokenizer.json`, and the weights.

Weights are `model.safetensors`, or several such files and an index of them where that would be
large (Hugging Face's layout). Tensors that half precision holds exactly are stored in it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from retrieval_contract.errors import CheckpointError
from towers import clip, make
from towers.two_towers import TwoTowers

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LARGEST_FILE = "48MB"
TOKENIZER_FILE = "tokenizer.json"
WORDS = ("title_text.bert.embeddings.", "query_text.bert.embeddings.")
"""Both text encoders' names for the embeddings that they share."""
FROZEN = ("title_text.", "image_encoder.")
"""Parts of a MAKE that heads are trained on: no training of heads changes them."""
TRAINING_FILE = "training.json"
"""What a checkpoint was trained on and how, where it was trained here."""
SHIPPED = Path(__file__).parent / "weights" / "make"
EXPECTED = f"a checkpoint has {CONFIG_FILE}, {WEIGHTS_FILE}, {TOKENIZER_FILE}"


def training_of(where: str | Path) -> dict[str, Any] | None:
    """What a checkpoint's TRAINING_FILE says; none where it was not trained here."""
    path = Path(where) / TRAINING_FILE
    if not path.is_file():
        return None
    facts: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return facts


def load_towers(where: str) -> TwoTowers:
    """The towers of a checkpoint folder, in evaluation mode.

    `config.json` says which: `"family": "make"` is ours, `"family": "package.module:Class"` is
    yours (a TwoTowers; its `load` gets the folder), and a Hugging Face `model_type` of the CLIP
    family is adapted. A name that is no folder is looked up on the Hugging Face hub.
    Raises CheckpointError.
    """
    folder = Path(where)
    if not folder.is_dir():
        return clip.load_clip(where)
    config = _read(folder / CONFIG_FILE)
    try:
        family = json.loads(config)
        family = family.get("family") or family.get("model_type", "")
    except (ValueError, AttributeError) as exc:
        raise CheckpointError(f"{folder / CONFIG_FILE}: not a JSON object ({exc})") from exc
    if family == make.FAMILY:
        return load_make(folder).eval()
    if family in clip.MODELS:
        return clip.load_clip(where)
    if ":" in family:
        return _plugin(family).load(folder).eval()
    raise CheckpointError(
        f"{folder}: expected family 'make', 'package.module:Class' or a Hugging Face "
        f"model_type in {sorted(clip.MODELS)}, got {family!r}"
    )


def load_make(folder: Path) -> make.Make:
    """A MAKE checkpoint; every weight must be there, in the shape that the config asks for."""
    tokenizer = _read(folder / TOKENIZER_FILE)
    try:
        towers = make.Make(make.MakeConfig.from_json(_read(folder / CONFIG_FILE)), tokenizer)
    except (TypeError, ValueError, RuntimeError) as exc:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: no model can be made of these values ({exc}); restore it"
        ) from exc
    weights = {name: t.float() if t.is_floating_point() else t for name, t in _weights(folder)}
    state = towers.state_dict()
    for name in [name for name in weights if name.startswith(WORDS[0])]:
        weights.setdefault(name.replace(*WORDS), weights[name])  # one table, stored once
    wanted = {name: tuple(t.shape) for name, t in state.items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if wanted != found:
        names = sorted(n for n in wanted | found if wanted.get(n) != found.get(n))
        first = names[0]
        raise CheckpointError(
            f"{folder}: {len(names)} tensors do not fit {CONFIG_FILE}, the first is {first}: "
            f"expected {wanted.get(first)}, got {found.get(first)}; restore the config or "
            "make the weights anew (python -m towers.pretrained)"
        )
    towers.load_state_dict(weights)
    return towers


def _weights(folder: Path) -> list[tuple[str, Tensor]]:
    files = [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        names = json.loads(_read(folder / INDEX_FILE))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    found: list[tuple[str, Tensor]] = []
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: not found; {EXPECTED}")
        try:
            found += load_file(path).items()
        except SafetensorError as exc:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({exc}); copy it again"
            ) from exc
    return found


def save_make(towers: make.Make, folder: Path) -> None:
    """Write the files; every value comes back as it is.

    The weights come last and whole: who finds them finds a checkpoint. Those of FROZEN parts come
    first among them, so that a training leaves a large checkpoint's first file as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [folder / INDEX_FILE, *folder.glob("model*.safetensors")]:
        old.unlink(missing_ok=True)
    (folder / CONFIG_FILE).write_text(towers.config.to_json(), "utf-8")
    (folder / TOKENIZER_FILE).write_text(towers.spec.title.tokenizer_json, "utf-8")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished") as unfinished:
        first = [
            item for part in FROZEN for item in towers.named_state() if item[0].startswith(part)
        ]
        state = stored(dict([*first, *towers.named_state()]))
        save_torch_state_dict(state, unfinished, max_shard_size=LARGEST_FILE)
        for path in sorted(Path(unfinished).iterdir(), key=lambda path: path.name == INDEX_FILE):
            path.chmod(0o644)
            path.replace(folder / path.name)


def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in the smaller of its type and half precision that loses nothing, once."""
    first: dict[int, str] = {}
    out = {}
    for name, tensor in state.items():
        if tensor.numel() and first.setdefault(tensor.data_ptr(), name) != name:
            continue
        half = tensor.half() if tensor.is_floating_point() else tensor
        out[name] = half if torch.equal(half.to(tensor.dtype), tensor) else tensor
    return out


def file_hash(path: Path) -> str:
    """SHA-256 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"{path}: not found; {EXPECTED}")
    return path.read_text("utf-8")


def _plugin(family: str) -> type[TwoTowers]:
    module, _, name = family.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise CheckpointError(
            f"family {family!r}: cannot be imported ({exc}); put its folder on PYTHONPATH"
        ) from exc
    if not (isinstance(found, type) and issubclass(found, TwoTowers)):
        raise CheckpointError(f"family {family!r}: expected a subclass of TwoTowers, got {found}")
    return found
