"""What is compared: anything that scores every product of a catalog for every query."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import bm25s
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_contract.preprocess import ProductPreprocessor, TextPreprocessor
from towers.checkpoint import FROZEN, SHIPPED, load_make
from towers.heads import Heads
from towers.learning.catalog import ProductData
from towers.learning.encoders import Encoders, no_advance
from towers.learning.metrics import Scores
from towers.learning.words import words_of
from towers.make import Make
from towers.two_towers import TwoTowers, unit

BATCH = 64
Vectors = NDArray[np.float32]
Progress = Callable[[int], None]


class System(Protocol):
    """One way to search."""

    name: str

    def scores(
        self, data: ProductData, queries: Sequence[str], progress: Progress = lambda rows: None
    ) -> Scores:
        """Float32 (queries, products), higher is better; `progress` gets rows as they are done."""


class BM25:
    """BM25 (Lucene's variant, k1 1.5, b 0.75; bm25s) over stems: plurals and `t-shirt` folded."""

    name = "bm25"

    def scores(
        self, data: ProductData, queries: Sequence[str], progress: Progress = lambda rows: None
    ) -> Scores:
        """See System."""
        index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        # A catalog of empty titles has no vocabulary, which the library does not take.
        index.index([words_of(title) or ["\0"] for title in data.titles], show_progress=False)
        known = set(index.vocab_dict)
        rows = []
        for query in queries:
            words = [word for word in words_of(query) if word in known]
            rows.append(index.get_scores(words) if words else np.zeros(len(data), np.float32))
        progress(len(data))
        return np.stack(rows).astype(np.float32)


class TrainedHeads:
    """Heads on the features of a MAKE's encoders; `asked` encodes queries for them."""

    def __init__(
        self, name: str, heads: Heads, encoders: Encoders, asked: Callable[[Sequence[str]], Tensor]
    ) -> None:
        self.name, self.heads, self.encoders = name, heads.eval(), encoders
        self.asked = asked

    @torch.inference_mode()
    def scores(
        self, data: ProductData, queries: Sequence[str], progress: Progress = lambda rows: None
    ) -> Scores:
        """See System."""
        # A picture takes longer than a title: where there are any, they are what is counted.
        counted = (no_advance, progress) if any(data.images) else (progress, no_advance)
        titles = self.encoders.titles(data.titles, counted[0])
        pictures = self.encoders.pictures(data.images, counted[1])
        has_title = (titles.abs().sum(1, keepdim=True) > 0).float()
        has_picture = (pictures.abs().sum(1, keepdim=True) > 0).float()
        vectors = unit(self.heads.product(titles, has_title, pictures, has_picture))
        vectors = vectors * torch.maximum(has_title, has_picture)
        return (unit(self.heads.query(self.asked(queries))) @ vectors.T).numpy()


def systems_of(towers: TwoTowers, baselines: Mapping[str, Heads]) -> list[System]:
    """BM25, the pretrained text encoder, each of the baselines, and `towers` under "make".

    Baselines stand on the encoders of the shipped checkpoint, which they were trained on, and ask
    by the whole text encoder (the public one). Where `towers` are a MAKE on the same encoders,
    every product is encoded once for all of them.
    """
    shipped = load_make(SHIPPED)
    ours = isinstance(towers, Make) and same_encoders(towers, shipped)
    encoders = Encoders(towers if ours and isinstance(towers, Make) else shipped)
    width, features = shipped.heads.title_head.width, shipped.heads.image_head.features
    untrained = {"pretrained": Heads("title", width, features, 1, width)}
    systems: list[System] = [BM25()]
    for name, heads in (untrained | dict(baselines)).items():
        systems.append(TrainedHeads(name, heads, encoders, encoders.titles))
    if not isinstance(towers, Make):
        return [*systems, Towers("make", towers)]
    of_make = encoders if ours else Encoders(towers)
    return [*systems, TrainedHeads("make", towers.heads, of_make, of_make.queries)]


def same_encoders(one: Make, other: Make) -> bool:
    """Whether titles and pictures are encoded alike, but for rounding to half precision."""
    a, b = (
        {n: t for n, t in towers.named_state() if n.startswith(FROZEN)} for towers in (one, other)
    )
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and torch.equal(a[n].half(), b[n].half()) for n in a
    )


class Towers:
    """Any pair of towers, fed by the very preprocessing that serves them."""

    def __init__(self, name: str, towers: TwoTowers) -> None:
        self.name, self.towers = name, towers.eval()
        self._known: dict[tuple[str, bytes], Vectors] = {}
        spec = towers.spec
        self._text = TextPreprocessor(spec.query.tokenizer_json, spec.query.spec, required=True)
        self._product = ProductPreprocessor(spec.title.tokenizer_json, spec.title.spec, spec.image)
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(spec.image.mean).reshape(shape)
        self._std = torch.tensor(spec.image.std).reshape(shape)

    def scores(
        self, data: ProductData, queries: Sequence[str], progress: Progress = lambda rows: None
    ) -> Scores:
        """See System."""
        return self.queries(queries) @ self.products(data, progress).T

    @torch.inference_mode()
    def queries(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors, float32 (texts, V)."""
        out = np.zeros((len(texts), self.towers.spec.vector_dim), np.float32)
        for rows in by_length(texts):
            batch = self._text([texts[row].encode() for row in rows])
            ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
            out[rows] = unit(self.towers.encode_query(ids, mask)).numpy()
        return out

    @torch.inference_mode()
    def products(self, data: ProductData, progress: Progress = lambda rows: None) -> Vectors:
        """Unit vectors, float32 (products, V); zero where there is nothing to encode.

        A product that an earlier call has seen, with this title and picture, is not encoded again.
        """
        keys = [
            (title, hashlib.sha256(image).digest())
            for title, image in zip(data.titles, data.images, strict=True)
        ]
        new = [row for row, key in enumerate(keys) if key not in self._known]
        progress(len(data) - len(new))
        for part in by_length([data.titles[row] for row in new]):
            rows = [new[at] for at in part]
            vectors = self._encode(
                [data.titles[row].encode() for row in rows], [data.images[row] for row in rows]
            )
            self._known.update(
                (keys[row], vector) for row, vector in zip(rows, vectors, strict=True)
            )
            progress(len(rows))
        return np.stack([self._known[key] for key in keys])

    def _encode(self, titles: list[bytes], images: list[bytes]) -> Vectors:
        batch = self._product(titles, images).tensors
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        pixels = tensors["pixels"].permute(0, 3, 1, 2).float()
        has_title, has_image = tensors["has_title"].float(), tensors["has_image"].float()
        vectors = self.towers.encode_product(
            tensors["title_ids"],
            tensors["title_mask"],
            has_title,
            (pixels - self._mean) / self._std,
            has_image,
        )
        there = torch.maximum(has_title, has_image)
        return (unit(vectors) * there).numpy()


def by_length(texts: Sequence[str]) -> list[list[int]]:
    """Rows in batches of texts of like length: less padding."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
