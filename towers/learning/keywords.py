"""Keyword Enhancement: what the keywords of a query and of a product say about each other.

In a batch every other product counts as a negative of a query, although many are what the query
asks for. A query's keywords tell which: the attribute values that it names, or its words. What
they say acts on the loss alone; nothing of it is served.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from towers.learning.encoders import Encoders
from towers.learning.examples import Examples
from towers.learning.queries import is_value
from towers.learning.words import words_of

SAYS_NOTHING = {"for", "in", "wear"}
RAREST = 3
"""Words of fewer titles than this decide nothing about other products."""


class Keywords(Protocol):
    """Which products of a batch hold every keyword of its queries."""

    def held(self, draw: int, rows: Tensor) -> Tensor:
        """Rows (B,) → bool (B queries, B products); false where a query has no keyword."""


class NoKeywords:
    """In-batch negatives as they fall."""

    def held(self, draw: int, rows: Tensor) -> Tensor:
        """See Keywords."""
        return torch.zeros(len(rows), len(rows), dtype=torch.bool)


class AttributeKeywords:
    """Keywords are attribute values, of the query and of the product.

    The judgements of generated queries are made of the same attributes: gains by this form are
    to be read beside those of TitleKeywords.
    """

    def __init__(self, examples: Examples, columns: list[str]) -> None:
        self.codes, self.asked = [], []
        named = [[dict(query.attributes) for query in draw] for draw in examples.draws]
        for column in columns:
            values, codes = np.unique(
                np.array(examples.data.attributes[column]), return_inverse=True
            )
            place = {value: at for at, value in enumerate(values.tolist()) if is_value(value)}
            self.codes.append(torch.from_numpy(codes.reshape(-1)))
            # What a query does not name is -1, never the code of the empty value.
            self.asked.append(
                torch.tensor([[place.get(of.get(column, ""), -1) for of in draw] for draw in named])
            )

    def held(self, draw: int, rows: Tensor) -> Tensor:
        """See Keywords."""
        all_held = torch.ones(len(rows), len(rows), dtype=torch.bool)
        any_asked = torch.zeros(len(rows), 1, dtype=torch.bool)
        for codes, asked in zip(self.codes, self.asked, strict=True):
            wanted = asked[draw, rows].unsqueeze(1)  # (B, 1), −1 where not asked for
            all_held &= (wanted < 0) | (wanted == codes[rows])
            any_asked |= wanted >= 0
        return all_held & any_asked


class TitleKeywords:
    """Keywords are words: those of the query, and those of the product's whole title."""

    def __init__(self, examples: Examples) -> None:
        titles = [set(words_of(title)) for title in examples.data.titles]
        count = Counter(word for words in titles for word in words)
        known = sorted(word for word, times in count.items() if times >= RAREST)
        self.place = {word: at for at, word in enumerate(known)}
        self.titles = torch.zeros(len(titles), len(known), dtype=torch.bool)
        for row, words in enumerate(titles):
            self.titles[row, [self.place[word] for word in words if word in self.place]] = True
        self.queries = [[self._places(query.text) for query in draw] for draw in examples.draws]

    def _places(self, text: str) -> list[int]:
        """Of its words; none at all where one of them is in no title."""
        words = set(words_of(text)) - SAYS_NOTHING
        return [self.place[w] for w in words] if words <= self.place.keys() else []

    def held(self, draw: int, rows: Tensor) -> Tensor:
        """See Keywords."""
        asked = torch.zeros(len(rows), len(self.place))
        for at, row in enumerate(rows.tolist()):
            asked[at, self.queries[draw][row]] = 1.0
        count = asked.sum(1, keepdim=True)  # (B, 1)
        return (asked @ self.titles[rows].float().T >= count) & (count > 0)


class Prototypes:
    """Every value of every attribute as a query of its own."""

    def __init__(self, examples: Examples, encoders: Encoders, columns: list[str]) -> None:
        self.features, self.codes, self.named = [], [], []
        for column in columns:
            values, codes = np.unique(
                np.array(examples.data.attributes[column]), return_inverse=True
            )
            self.features.append(encoders.queries([value.lower() for value in values.tolist()]))
            self.codes.append(torch.from_numpy(codes.reshape(-1)))
            self.named.append(torch.tensor([is_value(value) for value in values.tolist()]))

    def loss(self, rows: Tensor, scores: list[Tensor]) -> Tensor:
        """`scores`: for each attribute (B, values) → mean cross entropy of the right values."""
        losses = [torch.zeros(())]
        for of_values, codes, named in zip(scores, self.codes, self.named, strict=True):
            right = codes[rows]
            says = named[right]  # products whose value says something
            if says.any():
                of_named = of_values.masked_fill(~named, -1e4)
                losses.append(F.cross_entropy(of_named[says], right[says]))
        return torch.stack(losses).sum() / max(1, len(scores))


def keywords_of(form: str, examples: Examples, columns: list[str]) -> Keywords:
    """`form`: "attributes", "titles" or "none"; KeyError for another."""
    forms = {
        "attributes": lambda: AttributeKeywords(examples, columns),
        "titles": lambda: TitleKeywords(examples),
        "none": NoKeywords,
    }
    return forms[form]()
