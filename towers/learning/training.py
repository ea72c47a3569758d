"""The heads' training: contrastive, on features that were computed once.

    L = ½ (CE(s q pᵀ) + CE(s p qᵀ))      over a batch, s learned, negatives that the keywords say
                                         are none count `held` of one: log(held) is added to them
      + prototypes · CE(s p kᵀ)          each product among all values k of each attribute
      + general · 100 |q_g t_gᵀ − x_g y_gᵀ|² (a mean): other subjects keep their similarities

The first line is InfoNCE (van den Oord et al., arXiv 1807.03748) in CLIP's symmetric form (Radford
et al., arXiv 2103.00020). Modalities are spoiled and dropped at random, with flags that say so.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from towers.heads import Heads
from towers.learning.examples import Examples
from towers.learning.keywords import Keywords, Prototypes
from towers.two_towers import hash_of_weights, unit

Told = Callable[[int, float], None]
HOTTEST = 100.0
NOTHING = 1e-30
GENERAL_BATCH, GENERAL_SCALE = 256, 100.0
SMALLEST_BATCH, STEPS = 32, 16


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what heads come out; shares and weights are in [0, 1]."""

    fusion: str = "modal_adaptation"
    keywords: str = "attributes"
    epochs: int = 24
    batch: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    temperature: float = 0.05
    colour_cut: float = 0.1
    first_word: float = 0.05
    blank: float = 0.05
    dropped: float = 0.1
    prototypes: float = 0.5
    general: float = 1.0
    held: float = 0.135
    neighbours: int = 0
    dropout: float = 0.2
    head_width: int = 384
    vector_dim: int = 384
    seed: int = 0


def new_heads(recipe: Recipe, examples: Examples) -> Heads:
    """Untrained; the picture's features are standardised over the examples."""
    torch.manual_seed(recipe.seed)
    width, features = examples.titles.shape[-1], examples.pictures.shape[-1]
    heads = Heads(recipe.fusion, width, features, recipe.head_width, recipe.vector_dim)
    there = examples.pictures[examples.has_picture[:, 0] > 0]
    if len(there) > 1:
        heads.image_head.mean.copy_(there.mean(0))
        heads.image_head.std.copy_(there.std(0) + 1e-4)
    return heads


def run_name(recipe: Recipe, examples: Examples, start: Heads | None = None) -> str:
    """The file that a run is kept in; other recipes, examples and starts have others."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    digest.update(examples.fingerprint.encode())
    if start is not None:
        digest.update(hash_of_weights(start.state_dict().items(), "heads").encode())
    return f"heads-{digest.hexdigest()[:24]}.pt"


def keep(path: Path, state: dict[str, Any]) -> None:
    """Whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Rates rise for a twentieth of all steps, and fall to nothing as half a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1.0, (n + 1) / (steps / 20)) * (1 + math.cos(math.pi * n / steps)) / 2,
    )


class Trainer:
    """One run."""

    def __init__(
        self,
        recipe: Recipe,
        examples: Examples,
        keywords: Keywords,
        prototypes: Prototypes,
        start: Heads | None = None,
    ) -> None:
        self.recipe, self.examples = recipe, examples
        self.keywords, self.prototypes = keywords, prototypes
        self.name = run_name(recipe, examples, start)
        self.heads = copy.deepcopy(start).cpu() if start else new_heads(recipe, examples)
        for module in self.heads.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = recipe.dropout
        self.scale = torch.nn.Parameter(torch.tensor(math.log(1 / recipe.temperature)))
        # A small catalog gets smaller batches, or an epoch of it would be one step.
        self.batch = min(recipe.batch, max(SMALLEST_BATCH, len(examples) // STEPS), len(examples))
        self.steps = len(examples) // self.batch
        self.optimizer = torch.optim.AdamW(
            [*self.heads.parameters(), self.scale],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
        )
        self.schedule = warm_cosine(self.optimizer, recipe.epochs * self.steps)
        self.epoch = 0

    def run(self, folder: Path | None = None, told: Told = lambda epoch, loss: None) -> Heads:
        """Train to the end; `told(epochs done, loss)` after each epoch, once it is kept.

        A run of the same recipe on the same examples that was cut, or finished, is taken up from
        `folder`.
        """
        path = folder / self.name if folder else None
        if path and path.is_file():
            self._take_up(torch.load(path, weights_only=True))
        while self.epoch < self.recipe.epochs:
            loss = self._run_epoch()
            self.epoch += 1
            if path:
                keep(path, self._state())
            told(self.epoch, loss)
        return self.heads.eval()

    def _state(self) -> dict[str, Any]:
        state = {
            "epoch": self.epoch,
            "heads": self.heads.state_dict(),
            "scale": self.scale.detach(),
        }
        if self.epoch < self.recipe.epochs:
            state["optimizer"] = self.optimizer.state_dict()
            state["schedule"] = self.schedule.state_dict()
        return state

    def _take_up(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.heads.load_state_dict(state["heads"])
        self.scale.data = state["scale"]
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])

    def _run_epoch(self) -> float:
        # Seeded by the epoch: a run that was cut and taken up draws what it would have drawn.
        seed = self.recipe.seed * 100_003 + self.epoch
        torch.manual_seed(seed)  # dropout
        chance = torch.Generator().manual_seed(seed)
        self.heads.train()
        order = self._order(chance)
        losses = []
        for start in range(0, self.steps * self.batch, self.batch):
            loss = self._loss(order[start : start + self.batch], chance)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    def _order(self, chance: torch.Generator) -> Tensor:
        """Of the rows: at random, or by groups of neighbours under the current model."""
        order = torch.randperm(len(self.examples), generator=chance)
        if not self.recipe.neighbours or not self.epoch:
            return order
        vectors = self._vectors()
        left = torch.ones(len(order), dtype=torch.bool)
        groups = []
        for row in order.tolist():
            if left[row]:
                near = (vectors @ vectors[row]).masked_fill(~left, -2.0)
                group = near.topk(min(self.recipe.neighbours, int(left.sum()))).indices
                left[group] = False
                groups.append(group)
        mixed = torch.randperm(len(groups), generator=chance).tolist()
        return torch.cat([groups[at] for at in mixed])

    @torch.no_grad()
    def _vectors(self) -> Tensor:
        e = self.examples
        self.heads.eval()
        vectors = unit(self.heads.product(e.titles[0], e.has_title, e.pictures, e.has_picture))
        self.heads.train()
        return vectors

    def _loss(self, rows: Tensor, chance: torch.Generator) -> Tensor:
        draw = self.epoch % len(self.examples.draws)
        scale = self.scale.exp().clamp(max=HOTTEST)
        products = unit(self.heads.product(*self._spoiled(rows, chance)))
        queries = unit(self.heads.query(self.examples.queries[draw, rows]))
        right = torch.arange(len(rows))
        held = self.keywords.held(draw, rows) & ~torch.eye(len(rows), dtype=torch.bool)
        scores = scale * queries @ products.T + held * math.log(max(self.recipe.held, NOTHING))
        loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
        if self.recipe.prototypes:
            values = [unit(self.heads.query(v)) for v in self.prototypes.features]
            loss = loss + self.recipe.prototypes * self.prototypes.loss(
                rows, [scale * products @ v.T for v in values]
            )
        if self.recipe.general and len(self.examples.general_titles):
            loss = loss + self.recipe.general * self._general_loss(chance)
        return loss

    def _spoiled(self, rows: Tensor, chance: torch.Generator) -> tuple[Tensor, ...]:
        """Title features, their flags, picture features, their flags: some cut, blank or gone."""
        e, recipe, count = self.examples, self.recipe, len(rows)
        u = torch.rand(count, generator=chance)
        cut = (u < recipe.colour_cut).long()
        first = ((u >= recipe.colour_cut) & (u < recipe.colour_cut + recipe.first_word)).long()
        titles = e.titles[cut + 2 * first, rows]
        blank = torch.rand(count, 1, generator=chance) < recipe.blank
        pictures = torch.where(blank, e.blank, e.pictures[rows])
        u = torch.rand(count, 1, generator=chance)
        no_title = (u < recipe.dropped) & (e.has_picture[rows] > 0)
        no_picture = (u > 1 - recipe.dropped) & (e.has_title[rows] > 0)
        return (
            titles,
            e.has_title[rows] * ~no_title,
            pictures,
            e.has_picture[rows] * ~no_picture,
        )

    def _general_loss(self, chance: torch.Generator) -> Tensor:
        e = self.examples
        rows = torch.randint(len(e.general_titles), (GENERAL_BATCH,), generator=chance)
        queries, titles = e.general_queries[rows], e.general_titles[rows]
        there = torch.ones(len(rows), 1)
        nothing = torch.zeros(len(rows), e.pictures.shape[1])
        products = unit(self.heads.product(titles, there, nothing, 0 * there))
        now = unit(self.heads.query(queries)) @ products.T
        before = unit(queries) @ unit(titles).T
        return (now - before).square().mean() * GENERAL_SCALE
