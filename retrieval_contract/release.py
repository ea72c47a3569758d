"""`release.json`: the sizes of a model, how its inputs are prepared, and who it is.

Export writes it beside the models; servers, clients and the index all derive from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from retrieval_contract import models
from retrieval_contract.errors import ContractError
from retrieval_contract.models import Target
from retrieval_contract.tensors import Ensemble, Model, Sizes, Tensor, UpTo

RELEASE_FILE = "release.json"
RELEASE_PARAMETER = "release_id"
"""Key of the release id in every Triton config's parameters and collection's properties."""

PREPROCESSING_VERSION = 1
"""Raise it when `preprocess.py` would turn the same bytes into other tensors."""


class Precision(StrEnum):
    """What a release's towers are computed in on a processor; engines on a GPU are in FP16."""

    FP32 = "fp32"
    """By ONNX Runtime."""
    BF16 = "bf16"
    """By OpenVINO, on processors that have it."""


@dataclass(frozen=True)
class TextSpec:
    """How text becomes token ids.

    `pad_to` is "longest" (of the batch, in steps of 8) or "max" for towers that were trained
    on full-length padding (SigLIP). Lengths: tokens for `max_tokens`, characters for
    `max_chars`, past which a text is refused and not silently cut.
    """

    max_tokens: int
    pad_id: int
    max_chars: int
    pad_to: Literal["longest", "max"] = "longest"


@dataclass(frozen=True)
class ImageSpec:
    """How an image file becomes pixels; mean and std are on the 0..255 scale.

    `fit`: "pad" keeps the whole picture on a `background` border, "crop" keeps the middle,
    "squash" ignores the aspect ratio.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["pad", "crop", "squash"] = "pad"
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    background: tuple[int, int, int] = (255, 255, 255)


@dataclass(frozen=True)
class Release:
    """One exported pair of towers. `hashes` are SHA-256 by part: weights, code, tokenizers."""

    family: str
    vector_dim: int
    vocabulary: int
    query: TextSpec
    title: TextSpec
    image: ImageSpec
    hashes: dict[str, str]
    precision: str = Precision.FP32

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if size < 1:
                raise ContractError(f"release: {name} must be at least 1, got {size}")
        if self.precision not in list(Precision):
            raise ContractError(
                f"release: expected a precision of {list(map(str, Precision))}, got "
                f"{self.precision!r}"
            )

    @property
    def sizes(self) -> Sizes:
        """Every number that `models.py` asks for by name."""
        return {
            "vector_dim": self.vector_dim,
            "vocabulary": self.vocabulary,
            "query_tokens": self.query.max_tokens,
            "title_tokens": self.title.max_tokens,
            "image_height": self.image.height,
            "image_width": self.image.width,
        }

    def dims(self, tensor: Tensor) -> tuple[int, ...]:
        """A tensor's dims as Triton writes them, -1 where the length varies in this release.

        Token axes of towers that always pad to the full length do not.
        """
        always_full = {
            "query_tokens": self.query.pad_to == "max",
            "title_tokens": self.title.pad_to == "max",
        }
        return tuple(
            full if isinstance(axis, UpTo) and always_full.get(axis.size) else dim
            for axis, dim, full in zip(
                tensor.axes, tensor.dims(self.sizes), tensor.largest(self.sizes), strict=True
            )
        )

    @property
    def targets(self) -> tuple[Target, ...]:
        """Where it can be served: vectors of an engine are not those of bf16."""
        return tuple(t for t in Target if t is not Target.GPU or self.precision == Precision.FP32)

    def for_target(self, target: Target) -> Release:
        """Itself; ContractError where it cannot be served on that target."""
        if target not in self.targets:
            raise ContractError(
                f"release {self.release_id}: expected one of {[str(t) for t in self.targets]} for "
                f"{self.precision}, got {str(target)!r}; build it with --precision fp32, or "
                "serve it on one of those"
            )
        return self

    @property
    def release_id(self) -> str:
        """16 hex digits over weights, code, tokenizers, preprocessing, precision, contract."""
        identity = dataclasses.asdict(self) | {"contract": contract_fingerprint()}
        return sha256_of_json(identity)[:16]

    @property
    def version(self) -> int:
        """The version number of this release's models inside Triton."""
        return version_of(self.release_id)

    def to_json(self) -> str:
        """The text of `release.json`."""
        return json.dumps({RELEASE_PARAMETER: self.release_id} | dataclasses.asdict(self), indent=2)

    def save(self, folder: Path) -> None:
        """Write `release.json` into `folder`."""
        (folder / RELEASE_FILE).write_text(self.to_json() + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Release:
        """Read `release.json` of `folder`; ContractError when absent, edited or of other code."""
        path = folder / RELEASE_FILE
        if not path.is_file():
            raise ContractError(f"{path}: not found; build it with `python -m export repository`")
        try:
            stored: dict[str, Any] = json.loads(path.read_text("utf-8"))
            stored_id = stored.pop(RELEASE_PARAMETER)
            release = cls(
                **stored
                | {
                    "query": TextSpec(**stored["query"]),
                    "title": TextSpec(**stored["title"]),
                    "image": image_spec_from_json(stored["image"]),
                }
            )
        except (ValueError, KeyError, TypeError) as exc:
            raise ContractError(f"{path}: not a release file ({exc}); export it again") from exc
        if stored_id != release.release_id:
            raise ContractError(
                f"{path}: says release {stored_id}, but its content under this code is "
                f"{release.release_id}; it was edited or made by another version: export it again"
            )
        return release


def version_of(release_id: str) -> int:
    """A release's own Triton version number: 48 bits of its id.

    Requests ask for it by number, so a server of another release refuses them, and no cache
    keyed by name and version can mix two.
    """
    return max(1, int(release_id[:12], 16))


def image_spec_from_json(stored: dict[str, Any]) -> ImageSpec:
    """JSON has no tuples: give them back."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return ImageSpec(**values)


def contract_fingerprint() -> str:
    """SHA-256 over all that the code fixes: names, dtypes, axes, fields, preprocessing."""

    def tensor(t: Tensor) -> list[str]:
        return [t.name, t.dtype.name, *map(str, t.axes)]

    parts: tuple[Model | Ensemble, ...] = (*models.MODELS, *models.ENSEMBLES)
    declared = {
        part.name: [[tensor(t) for t in part.inputs], [tensor(t) for t in part.outputs]]
        for part in parts
    }
    fields = [list(dataclasses.astuple(f)) for f in models.PRODUCTS.fields]
    return sha256_of_json([declared, fields, models.PRODUCTS.metric, PREPROCESSING_VERSION])


def sha256_of_json(value: object) -> str:
    """SHA-256 of the canonical JSON text of `value`, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
