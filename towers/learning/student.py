"""A query encoder with fewer layers, taught by the one that the heads were trained on.

    L = (1 − cos(student, teacher)) + KL(softmax(s t pᵀ) ‖ softmax(s q pᵀ))

over queries of every kind: t and q are the teacher's and the student's vectors, p the vectors of
some products, titles on other subjects among them, s the scale of the training. The second term is
what ranking feels (after Hinton et al., arXiv 1503.02531). Layers are taken evenly from the
teacher; the word embeddings are shared with the title encoder and stay.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_contract.preprocess import TextPreprocessor
from towers.learning.training import Told, keep
from towers.make import Make
from towers.two_towers import unit

KEPT_EVERY = 100
PRODUCTS = 2048
SORTED = 32
"""Batches whose texts are sorted by length together: less padding."""


@dataclass(frozen=True)
class Lesson:
    """How a student is taught."""

    layers: int = 3
    rounds: int = 4
    general: float = 3.0
    """Short texts on other subjects for each query drawn from the catalog."""
    batch: int = 256
    learning_rate: float = 4e-4
    scale: float = 25.0
    seed: int = 0


def evenly(total: int, kept: int) -> list[int]:
    """`kept` of so many layers, the first and the last among them."""
    return [0] if kept == 1 else [round(i * (total - 1) / (kept - 1)) for i in range(kept)]


def with_query_layers(teacher: Make, layers: int) -> Make:
    """The same towers; of the query encoder's layers only so many are left."""
    config = replace(teacher.config, query_layers=layers)
    student = Make(config, teacher.spec.title.tokenizer_json).eval()
    kept = evenly(len(teacher.query_text.bert.encoder.layer), layers)
    place = {f"query_text.bert.encoder.layer.{old}.": new for new, old in enumerate(kept)}
    state = {}
    for name, tensor in teacher.state_dict().items():
        prefix = ".".join(name.split(".")[:5]) + "."
        if prefix in place:
            name = name.replace(prefix, f"query_text.bert.encoder.layer.{place[prefix]}.")
        elif name.startswith("query_text.bert.encoder.layer."):
            continue
        state[name] = tensor
    student.load_state_dict(state)
    return student


class Teaching:
    """One run over `texts`, whose teacher's unit vectors (N, V) are `taught`."""

    def __init__(
        self, student: Make, texts: Sequence[str], taught: Tensor, products: Tensor, lesson: Lesson
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.student, self.texts, self.taught = student.to(self.device), texts, taught
        self.products, self.lesson = products, lesson
        side = student.spec.query
        self.preprocess = TextPreprocessor(side.tokenizer_json, side.spec, required=False)
        student.requires_grad_(False)
        self.learns = [*student.query_text.bert.encoder.parameters()]
        self.learns += student.heads.query_head.parameters()
        for parameter in self.learns:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.learns, lr=lesson.learning_rate, weight_decay=0.01)
        self.total = sum(1 for _ in self._batches())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lesson.learning_rate, total_steps=self.total + 1, pct_start=0.1
        )
        self.step = 0

    def _batch(self) -> int:
        return min(self.lesson.batch, len(self.texts))

    def run(self, folder: Path | None = None, told: Told = lambda step, loss: None) -> Make:
        """Teach to the end; kept and taken up as with Trainer.run, but by steps."""
        path = self._path(folder) if folder else None
        if path and path.is_file():
            self._take_up(torch.load(path, weights_only=True, map_location=self.device))
        for number, rows in enumerate(self._batches()):
            if number < self.step:
                continue
            loss = self._learn(rows, torch.Generator().manual_seed(number))
            self.step += 1
            if path and (self.step % KEPT_EVERY == 0 or self.step == self.total):
                keep(path, self._state())
            told(self.step, loss)
        return self.student.cpu().eval()

    def _path(self, folder: Path) -> Path:
        digest = hashlib.sha256(json.dumps([asdict(self.lesson), list(self.texts)]).encode())
        digest.update(self.taught.numpy().tobytes())
        return folder / f"student-{digest.hexdigest()[:24]}.pt"

    def _batches(self) -> Iterator[list[int]]:
        rng, size = random.Random(self.lesson.seed), self._batch()
        for _ in range(self.lesson.rounds):
            order = rng.sample(range(len(self.texts)), len(self.texts))
            for start in range(0, len(order), SORTED * size):
                chunk = sorted(
                    order[start : start + SORTED * size], key=lambda row: len(self.texts[row])
                )
                batches = [chunk[at : at + size] for at in range(0, len(chunk), size)]
                rng.shuffle(batches)
                yield from (batch for batch in batches if len(batch) == size)

    def _learn(self, rows: list[int], chance: torch.Generator) -> float:
        batch = self.preprocess([self.texts[row].encode() for row in rows])
        ids, mask = (torch.from_numpy(x).to(self.device) for x in (batch.ids, batch.mask))
        with torch.autocast(self.device.type, torch.bfloat16):
            features = self.student.query_text(ids, mask)
        vectors = unit(self.student.heads.query(features.float()))
        taught = self.taught[rows].to(self.device)
        some = torch.randint(len(self.products), (PRODUCTS,), generator=chance)
        products = self.products[some].to(self.device)
        scores = self.lesson.scale * vectors @ products.T
        wanted = self.lesson.scale * taught @ products.T
        loss = (1 - (vectors * taught).sum(1)).mean() + F.kl_div(
            scores.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learns, 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def _take_up(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
