"""The frozen encoders of a MAKE, fed by the very preprocessing that serves them.

Their pooled features are all that heads see, so each text and picture is encoded once: within a
run, and, where a folder is given, for the next one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from retrieval_contract.preprocess import ImagePreprocessor, TextPreprocessor
from towers.make import Make, TextEncoder
from towers.two_towers import TextSide, hash_of_weights

BATCH = 64
SHARD = 4096
Advance = Callable[[int], None]
Item = TypeVar("Item", str, bytes)


def no_advance(rows: int) -> None:
    """For who does not watch."""


class Encoders:
    """Texts and pictures → features, float32 (rows, D or F); a refused one is all zeros."""

    def __init__(self, towers: Make, folder: Path | None = None) -> None:
        self.towers, self.folder = towers.eval(), folder
        self.device = next(towers.parameters()).device
        self._image = ImagePreprocessor(towers.spec.image)
        self._title = _Texts(towers.title_text, towers.spec.title)
        self._query = _Texts(towers.query_text, towers.spec.query)
        self._known: dict[tuple[str, Hashable], Tensor] = {}
        spec = towers.spec
        state = [(n, t) for n, t in towers.named_state() if not n.startswith("heads.")]
        self._identity = hash_of_weights(state, repr((spec.query, spec.title, spec.image)))

    def titles(self, texts: Sequence[str], advance: Advance = no_advance) -> Tensor:
        """Mean token states by the title encoder; an empty title has none."""
        return self._remember("title", texts, texts, self._title, advance)

    def queries(self, texts: Sequence[str], advance: Advance = no_advance) -> Tensor:
        """Mean token states by the query encoder."""
        return self._remember("query", texts, texts, self._query, advance)

    def pictures(self, images: Sequence[bytes], advance: Advance = no_advance) -> Tensor:
        """Pooled features by the image encoder."""
        keys = [hashlib.sha256(image).digest() for image in images]
        return self._remember("picture", keys, images, self._pictures, advance)

    def _remember(
        self,
        kind: str,
        keys: Sequence[Hashable],
        items: Sequence[Item],
        encode: Callable[[list[Item]], Tensor],
        advance: Advance,
    ) -> Tensor:
        new = {
            key: item
            for key, item in zip(keys, items, strict=True)
            if (kind, key) not in self._known
        }
        advance(len(items) - len(new))
        order = sorted(new, key=lambda key: len(new[key]))  # like lengths together: less padding
        for start in range(0, len(order), SHARD):
            part = order[start : start + SHARD]
            features = self._kept(kind, [new[key] for key in part], encode, advance)
            self._known.update(((kind, key), row) for key, row in zip(part, features, strict=True))
        return torch.stack([self._known[kind, key] for key in keys])

    def _kept(
        self,
        kind: str,
        items: list[Item],
        encode: Callable[[list[Item]], Tensor],
        advance: Advance,
    ) -> Tensor:
        """Computed, or read from what an earlier run has kept."""
        path = self._path(kind, items) if self.folder else None
        if path and path.is_file():
            advance(len(items))
            return torch.from_numpy(np.load(path))
        parts = []
        with torch.inference_mode():
            for start in range(0, len(items), BATCH):
                parts.append(encode(items[start : start + BATCH]).float().cpu())
                advance(len(parts[-1]))
        features = torch.cat(parts).clone()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            with unfinished.open("wb") as file:
                np.save(file, features.numpy())
            unfinished.replace(path)
        return features

    def _path(self, kind: str, items: list[Item]) -> Path:
        digest = hashlib.sha256(f"{self._identity} {kind}".encode())
        for item in items:
            raw = item.encode() if isinstance(item, str) else item
            digest.update(len(raw).to_bytes(8, "little") + raw)
        return (self.folder or Path()) / f"{kind}-{digest.hexdigest()[:32]}.npy"

    def _pictures(self, images: list[bytes]) -> Tensor:
        batch = self._image(images)
        spec = self.towers.spec.image
        pixels = torch.from_numpy(batch.pixels).to(self.device).float()  # (B, H, W, 3)
        pixels = (pixels - torch.tensor(spec.mean, device=self.device)) / torch.tensor(
            spec.std, device=self.device
        )
        features = self.towers.image_features(pixels.permute(0, 3, 1, 2))
        return features * torch.from_numpy(batch.present).to(self.device)


class _Texts:
    """One text encoder with the tokenizer of its side."""

    def __init__(self, encoder: TextEncoder, side: TextSide) -> None:
        self.encoder = encoder
        self.device = next(encoder.parameters()).device
        self.preprocess = TextPreprocessor(side.tokenizer_json, side.spec, required=False)

    def __call__(self, texts: list[str]) -> Tensor:
        batch = self.preprocess([text.encode() for text in texts])
        ids, mask = (torch.from_numpy(x).to(self.device) for x in (batch.ids, batch.mask))
        return self.encoder(ids, mask) * torch.from_numpy(batch.present).to(self.device)
