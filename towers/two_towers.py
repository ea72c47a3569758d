"""The protocol that every model of this bundle implements: one query and one product tower."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrieval_contract.errors import CheckpointError
from retrieval_contract.release import ImageSpec, Release, TextSpec

LIBRARIES = {"abc", "builtins", "torch", "transformers", "typing"}
"""Packages whose code is no part of a model's identity; `manifest.json` has their versions."""


@dataclass(frozen=True)
class TextSide:
    """How one kind of text is prepared: the rules, and the text of a `tokenizer.json`."""

    spec: TextSpec
    tokenizer_json: str


@dataclass(frozen=True)
class TowersSpec:
    """Everything about a model that its two graphs do not say themselves.

    `architecture` is a JSON text; with the weights it makes the identity of the model.
    """

    family: str
    vector_dim: int
    vocabulary: int
    query: TextSide
    title: TextSide
    image: ImageSpec
    architecture: str


class TwoTowers(nn.Module, ABC):
    """Subclass this to serve your own model: a spec, `load`, and two functions.

    B = batch, Q/T = padded tokens, V = `spec.vector_dim`. Vectors need not be normalised and
    refused rows need no care: the exported graphs see to both. A row's vector must not depend
    on the other rows of its batch nor on its own padding.
    """

    spec: TowersSpec

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The towers of a checkpoint folder whose `config.json` names this class."""
        raise CheckpointError(f"{cls.__name__}: has no classmethod `load(folder)`; write one")

    @abstractmethod
    def encode_query(self, query_ids: Tensor, query_mask: Tensor) -> Tensor:
        """Token ids and 1/0 mask, int (B, Q) → query vectors, float32 (B, V)."""

    @abstractmethod
    def encode_product(
        self,
        title_ids: Tensor,
        title_mask: Tensor,
        has_title: Tensor,
        image: Tensor,
        has_image: Tensor,
    ) -> Tensor:
        """One vector a product, float32 (B, V).

        `title_ids`, `title_mask`: int (B, T); `image`: float32 (B, 3, H, W), normalised by
        `spec.image`; `has_title`, `has_image`: float32 (B, 1), 1 where the modality is there.
        """

    def release(self) -> Release:
        """The identity and sizes of what would be exported from this object now."""
        spec = self.spec
        return Release(
            family=spec.family,
            vector_dim=spec.vector_dim,
            vocabulary=spec.vocabulary,
            query=spec.query.spec,
            title=spec.title.spec,
            image=spec.image,
            hashes={
                "weights": hash_of_weights(self.named_state(), spec.architecture),
                "code": hash_of_code(self),
                "query_tokenizer": _sha256(spec.query.tokenizer_json),
                "title_tokenizer": _sha256(spec.title.tokenizer_json),
            },
        )

    def named_state(self) -> list[tuple[str, Tensor]]:
        """Parameters and buffers in the order of their names."""
        return sorted(self.state_dict().items())


def hash_of_weights(state: Iterable[tuple[str, Tensor]], architecture: str) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights, and the architecture."""
    digest = hashlib.sha256(architecture.encode())
    for name, tensor in state:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def hash_of_code(towers: nn.Module) -> str:
    """SHA-256 over what the source files of the towers' own classes do, their base classes too.

    The same weights under another formula are another model. Comments, docstrings and layout do
    not count. Raises CheckpointError for classes without a file.
    """
    modules = {base.__module__ for part in towers.modules() for base in type(part).__mro__}
    digest = hashlib.sha256()
    for name in sorted(n for n in modules if n.partition(".")[0] not in LIBRARIES):
        try:
            source = inspect.getsource(sys.modules[name])
        except (OSError, TypeError) as exc:
            raise CheckpointError(
                f"module {name}: has no source file, and the code is part of a release's "
                "identity; define the towers in a .py file"
            ) from exc
        digest.update(json.dumps(_meaning(ast.parse(source))).encode())
    return digest.hexdigest()


def _meaning(node: object) -> object:
    """A syntax tree as JSON, without docstrings and empty fields (each Python has others)."""
    if isinstance(node, list):
        return [_meaning(item) for item in node if not _is_remark(item)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {
        name: _meaning(value) for name, value in ast.iter_fields(node) if value not in (None, [])
    }
    return [type(node).__name__, fields]


def _is_remark(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def unit(x: Tensor) -> Tensor:
    """L2 norm over the last axis; a zero row stays zero."""
    return F.normalize(x, dim=-1, eps=1e-6)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
