"""A checkpoint is a folder: `config.json`, `model.safetensors`, `tokenizer.json`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from retrieval_contract.errors import CheckpointError
from towers import clip, make
from towers.two_towers import TwoTowers

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"


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
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: not found; a checkpoint has {CONFIG_FILE}, {WEIGHTS_FILE}, {TOKENIZER_FILE}"
        )
    try:
        weights = load_file(path)
    except SafetensorError as exc:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({exc}); copy it again"
        ) from exc
    wanted = {name: tuple(t.shape) for name, t in towers.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if wanted != found:
        names = sorted(n for n in wanted | found if wanted.get(n) != found.get(n))
        first = names[0]
        raise CheckpointError(
            f"{path}: {len(names)} tensors do not fit {CONFIG_FILE}, the first is {first}: "
            f"expected {wanted.get(first)}, got {found.get(first)}; restore the config or "
            "make the weights anew (python -m towers.pretrained)"
        )
    towers.load_state_dict(weights)
    return towers


def save_make(towers: make.Make, folder: Path) -> None:
    """Write the three files; float32, one copy of each weight.

    The weights come last and whole: who finds them finds a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS_FILE
    path.unlink(missing_ok=True)
    (folder / CONFIG_FILE).write_text(towers.config.to_json(), "utf-8")
    (folder / TOKENIZER_FILE).write_text(towers.spec.title.tokenizer_json, "utf-8")
    state = {name: tensor.contiguous() for name, tensor in towers.named_state()}
    unfinished = path.with_suffix(".unfinished")
    save_file(state, unfinished)
    unfinished.replace(path)


def _read(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: not found; a checkpoint has {CONFIG_FILE}, {WEIGHTS_FILE}, {TOKENIZER_FILE}"
        )
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
