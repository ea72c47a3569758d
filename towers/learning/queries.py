"""Queries that a catalog could be asked, made from its own products."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from towers.learning.catalog import ProductData
from towers.learning.split import names_held_out
from towers.learning.words import words_of

PHRASES = {"gender": "for {}", "baseColour": "in {}", "usage": "for {} wear", "season": "for {}"}
"""Columns whose value may be said with a word around it."""
ATTRIBUTE_SHARE = 0.6
TYPO, DROP = 0.08, 0.1
FEWEST_WORDS = 2


@dataclass(frozen=True)
class TrainingQuery:
    """A query's text and the attribute values that it names."""

    text: str
    attributes: tuple[tuple[str, str], ...] = ()


class QueryMaker:
    """Draws one query for a product. The evaluation's combinations never occur.

    `columns` are the attributes to ask by; values that say nothing are never asked for.
    """

    def __init__(self, data: ProductData, columns: Sequence[str]) -> None:
        self.data, self.columns = data, columns

    def can_ask(self, row: int) -> bool:
        """Whether the product in `row` says anything that it could be asked by."""
        return bool(self.data.titles[row].strip() or self._named(row))

    def draw(self, row: int, rng: random.Random) -> TrainingQuery:
        """One query for the product in `row`, which must be one that `can_ask`."""
        named = self._named(row)
        title = self.data.titles[row].strip()
        if named and (rng.random() < ATTRIBUTE_SHARE or not title):
            return self._of_attributes(named, rng)
        return TrainingQuery(self._of_title(title, [v for _, v in named], rng))

    def _named(self, row: int) -> list[tuple[str, str]]:
        pairs = [(name, self.data.attributes[name][row]) for name in self.columns]
        return [(name, value) for name, value in pairs if is_value(value)]

    def _of_attributes(self, named: list[tuple[str, str]], rng: random.Random) -> TrainingQuery:
        chosen = rng.sample(named, min(len(named), rng.randint(1, 3)))
        while len(chosen) > 2 and names_held_out([value for _, value in chosen]):
            chosen.pop()
        words = [_phrase(name, value, rng) for name, value in chosen]
        return TrainingQuery(spoil(" ".join(words).lower().split(), rng), tuple(chosen))

    def _of_title(self, title: str, values: list[str], rng: random.Random) -> str:
        words = title.split()
        if rng.random() < 0.5:  # a span
            length = rng.randint(min(FEWEST_WORDS, len(words)), min(6, len(words)))
            start = rng.randint(0, len(words) - length)
            words = words[start : start + length]
        else:  # keywords
            words = rng.sample(
                words, rng.randint(min(FEWEST_WORDS, len(words)), min(4, len(words)))
            )
        while len(words) > 1 and names_held_out(there := _said(words, values)):
            gone = set(words_of(rng.choice(there)))
            words = [word for word in words if not gone & set(words_of(word))] or words[:1]
        return spoil([word.lower() for word in words], rng)


def _said(words: Sequence[str], values: Sequence[str]) -> list[str]:
    """Those of the values whose every word is among these."""
    said = set(words_of(" ".join(words)))
    return [value for value in values if set(words_of(value)) <= said]


def is_value(value: str) -> bool:
    """Whether an attribute's value says something."""
    return value not in ("", "NA", "None")


def _phrase(name: str, value: str, rng: random.Random) -> str:
    value = _singular(value) if rng.random() < 0.3 else value
    pattern = PHRASES.get(name)
    return pattern.format(value) if pattern and rng.random() < 0.35 else value


def _singular(value: str) -> str:
    return value[:-1] if value.endswith("s") and not value.endswith("ss") else value


def spoil(words: list[str], rng: random.Random) -> str:
    """Sometimes a word is lost, sometimes one is mistyped."""
    if len(words) > FEWEST_WORDS and rng.random() < DROP:
        lost = rng.randrange(len(words))
        words = words[:lost] + words[lost + 1 :]
    if rng.random() < TYPO:
        at = rng.randrange(len(words))
        words = [*words[:at], mistype(words[at], rng), *words[at + 1 :]]
    return " ".join(words)


def mistype(word: str, rng: random.Random) -> str:
    """One letter lost, doubled, or two swapped; short words stay."""
    if len(word) < 5:
        return word
    at = rng.randrange(1, len(word) - 1)
    ways: list[Callable[[], str]] = [
        lambda: word[:at] + word[at + 1 :],
        lambda: word[:at] + word[at] + word[at:],
        lambda: word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    ]
    return rng.choice(ways)()
