"""The protocol that every model of this bundle implements: one query and one product tower."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retrieval_contract.release import ImageSpec, Release, TextSpec


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
    """Subclass this to serve your own model: a spec and two functions.

    B = batch, Q/T = padded tokens, V = `spec.vector_dim`. Vectors need not be normalised and
    refused rows need no care: the exported graphs see to both. A row's vector must not depend
    on the other rows of its batch nor on its own padding.
    """

    spec: TowersSpec

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


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
