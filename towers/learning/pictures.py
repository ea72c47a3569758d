"""The upper blocks of the picture encoder, taught what the catalog says of its pictures.

    L = mean over a title's words w of log(1 + Σ_v exp(s_v − s_w))    v: words that it has not
      + ½ Σ_a CE(s_a, the picture's value of attribute a)

ImageNet's classes leave out what shops sell by: cuts, materials, wearers, shades. The lower blocks
stay as they are and are run once. Pictures are flipped, shifted and mixed (mixup, Zhang et al.,
arXiv 1710.09412): without that the encoder knows its own catalog by heart, and heads that are
trained on the same pictures trust them too much.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrieval_contract.preprocess import ImagePreprocessor
from towers.efficientnet_lite import HEAD_CHANNELS, EfficientNetLite0
from towers.learning.catalog import ProductData
from towers.learning.encoders import Advance, no_advance
from towers.learning.queries import is_value
from towers.learning.training import Told, keep, warm_cosine
from towers.learning.words import words_of
from towers.make import Make
from towers.two_towers import hash_of_weights

BATCH = 64
NOT_THERE = -1e4


@dataclass(frozen=True)
class PictureLesson:
    """How the upper blocks are taught; shares are in [0, 1]."""

    epochs: int = 4
    batch: int = 128
    learning_rate: float = 5e-4
    head_rate: float = 2e-3
    weight_decay: float = 0.02
    mixed: float = 0.5
    dropout: float = 0.5
    rarest_word: int = 30
    seed: int = 0


@dataclass(frozen=True)
class Labels:
    """What a catalog says of M pictures."""

    words: Tensor
    """bool (M, W): frequent words of the title."""
    values: Tensor
    """(M, A): which value of each attribute, −1 where none is named."""
    sizes: list[int]
    """How many values each attribute has."""

    def __bool__(self) -> bool:
        return bool(self.words.any() or (self.values >= 0).any())


def labels_of(data: ProductData, columns: Sequence[str], rarest_word: int) -> Labels:
    """Words of fewer titles than `rarest_word` are left out."""
    titles = [set(words_of(title)) for title in data.titles]
    count = Counter(word for words in titles for word in words)
    place = {w: at for at, w in enumerate(sorted(w for w in count if count[w] >= rarest_word))}
    words = torch.zeros(len(titles), len(place), dtype=torch.bool)
    for row, of_title in enumerate(titles):
        words[row, [place[word] for word in of_title if word in place]] = True
    codes, sizes = [], []
    for column in columns:
        values = data.attributes[column]
        known = {v: at for at, v in enumerate(sorted({v for v in values if is_value(v)}))}
        codes.append(torch.tensor([known.get(value, -1) for value in values]))
        sizes.append(len(known))
    values = torch.stack(codes, 1) if codes else torch.zeros(len(titles), 0, dtype=torch.long)
    return Labels(words, values, sizes)


def maps_of(towers: Make, images: Sequence[bytes], advance: Advance = no_advance) -> Tensor:
    """Of the lower blocks, float16 (images, 112, H/16, W/16); a refused picture gets zeros."""
    prepare, spec = ImagePreprocessor(towers.spec.image), towers.spec.image
    device = next(towers.parameters()).device
    mean, std = (torch.tensor(x, device=device) for x in (spec.mean, spec.std))
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for start in range(0, len(images), BATCH):
            batch = prepare(images[start : start + BATCH])
            pixels = (torch.from_numpy(batch.pixels).to(device).float() - mean) / std
            maps, _ = towers.image_encoder.early(pixels.permute(0, 3, 1, 2))
            there = torch.from_numpy(batch.present).to(device)[:, :, None, None]
            parts.append((maps * there).half().cpu())
            advance(len(batch.pixels))
    return torch.cat(parts).clone()


class PictureTeaching:
    """One run over `maps` (M, 112, h, w), of which `labels` speak."""

    def __init__(
        self, encoder: EfficientNetLite0, maps: Tensor, labels: Labels, lesson: PictureLesson
    ) -> None:
        torch.manual_seed(lesson.seed)
        self.lesson, self.labels = lesson, labels
        self.encoder = copy.deepcopy(encoder).eval()  # its norms stay
        # Channels last: these convolutions run half as fast again on a processor.
        self.encoder.to(memory_format=torch.channels_last)
        self.maps = maps.contiguous(memory_format=torch.channels_last)
        self.device = next(encoder.parameters()).device
        self.norm = nn.LayerNorm(HEAD_CHANNELS)
        self.word = nn.Linear(HEAD_CHANNELS, labels.words.shape[1])
        self.value = nn.ModuleList(nn.Linear(HEAD_CHANNELS, size) for size in labels.sizes)
        self.heads = nn.ModuleList([self.norm, self.word, self.value]).to(self.device)
        self.learns = self.encoder.late_parameters()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.learns, "lr": lesson.learning_rate},
                {"params": self.heads.parameters(), "lr": lesson.head_rate},
            ],
            weight_decay=lesson.weight_decay,
        )
        self.batch = min(lesson.batch, len(maps))
        self.steps = len(maps) // self.batch
        self.schedule = warm_cosine(self.optimizer, lesson.epochs * self.steps)
        self.epoch = 0

    def run(self, path: Path | None = None, told: Told = lambda step, loss: None) -> dict[str, Any]:
        """Teach to the end; the encoder's weights. Kept in `path` after each epoch, and taken up.

        `told(steps done, loss)`.
        """
        if path and path.is_file():
            self._take_up(torch.load(path, weights_only=True, map_location="cpu"))
        while self.epoch < self.lesson.epochs:
            self._run_epoch(told)
            self.epoch += 1
            if path:
                keep(path, self._state())
        return self.encoder.state_dict()

    def _run_epoch(self, told: Told) -> None:
        # Seeded by the epoch: a run that was cut and taken up draws what it would have drawn.
        torch.manual_seed(self.lesson.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.maps))
        for step in range(self.steps):
            loss = self._loss(order[step * self.batch : (step + 1) * self.batch])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*self.learns, *self.heads.parameters()], 1.0)
            self.optimizer.step()
            self.schedule.step()
            told(self.epoch * self.steps + step + 1, loss.item())

    def _loss(self, rows: Tensor) -> Tensor:
        maps, share = moved(self.maps[rows].to(self.device).float()), 1.0
        shuffled = torch.randperm(len(rows))
        if torch.rand(()) < self.lesson.mixed:
            share = float(torch.distributions.Beta(0.4, 0.4).sample())
            share = max(share, 1 - share)
            maps = share * maps + (1 - share) * maps[shuffled]
        states = F.dropout(self.norm(self.encoder.late(maps)), self.lesson.dropout)
        words, values = self.word(states), [head(states) for head in self.value]
        loss = share * self._of(rows, words, values)
        if share < 1.0:
            loss = loss + (1 - share) * self._of(rows[shuffled], words, values)
        return loss

    def _of(self, rows: Tensor, words: Tensor, values: list[Tensor]) -> Tensor:
        """The loss of scores (B, W) and (B, values) against what is said of `rows`."""
        has = self.labels.words[rows].to(self.device)
        others = words.masked_fill(has, NOT_THERE).logsumexp(1, keepdim=True)
        each = (F.softplus(others - words) * has).sum(1) / has.sum(1).clamp(min=1)
        loss = each.mean()
        for column, scores in enumerate(values):
            right = self.labels.values[rows, column].to(self.device)
            if (right >= 0).any():
                loss = loss + 0.5 * F.cross_entropy(scores, right, ignore_index=-1)
        return loss

    def _state(self) -> dict[str, Any]:
        state = {"epoch": self.epoch, "encoder": self.encoder.state_dict()}
        if self.epoch < self.lesson.epochs:
            state["heads"] = self.heads.state_dict()
            state["optimizer"] = self.optimizer.state_dict()
            state["schedule"] = self.schedule.state_dict()
        return state

    def _take_up(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.encoder.load_state_dict(state["encoder"])
        for name in ("heads", "optimizer", "schedule"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])


def moved(maps: Tensor) -> Tensor:
    """Mirrored or not, and shifted by a cell at most, zeros coming in."""
    if torch.rand(()) < 0.5:
        maps = maps.flip(3)
    down, right = (int(step) for step in torch.randint(0, 3, (2,)))
    height, width = maps.shape[2:]
    return F.pad(maps, (1, 1, 1, 1))[:, :, down : down + height, right : right + width]


def run_name(towers: Make, data: ProductData, labels: Labels, lesson: PictureLesson) -> str:
    """The file that a run is kept in."""
    digest = hashlib.sha256(json.dumps([asdict(lesson), labels.sizes]).encode())
    digest.update(hash_of_weights(towers.image_encoder.state_dict().items(), "pictures").encode())
    for image in data.images:
        digest.update(hashlib.sha256(image).digest())
    for labelled in (labels.words, labels.values):
        digest.update(np.ascontiguousarray(labelled.numpy()).tobytes())
    return f"pictures-{digest.hexdigest()[:24]}.pt"


def finished(path: Path) -> dict[str, Any] | None:
    """The encoder's weights of a run that came to its end."""
    if not path.is_file():
        return None
    state = torch.load(path, weights_only=True, map_location="cpu")
    return None if "heads" in state else state["encoder"]
