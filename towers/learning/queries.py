"""Queries that a catalog could be asked, made from its own products."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from towers.learning.catalog import ProductData
from towers.learning.split import names_held_out
from towers.learning.words import words_of

PHRASES = {
    "gender": ["for {}"],
    "colour": ["in {}"],
    "color": ["in {}"],
    "usage": ["for {} wear"],
    "occasion": ["for {}", "for {} wear"],
    "season": ["for {}"],
    "material": ["in {}", "made of {}"],
    "fabric": ["in {}", "made of {}"],
    "brand": ["by {}", "from {}"],
}
"""What a column's name holds, and how its values may be said with a word around them."""
ATTRIBUTE_SHARE = 0.6
TYPO, DROP = 0.08, 0.1
FEWEST_WORDS = 2
SHORTEST_PLURAL = 4
NOTHING_SAID = ("na", "n/a", "nan", "none", "null", "unknown")


@dataclass(frozen=True)
class TrainingQuery:
    """A query's text and the attribute values that it names."""

    text: str
    attributes: tuple[tuple[str, str], ...] = ()


class ValuesNamed:
    """Tells which attribute values of a catalog a text names: those whose every word is in it.

    Not those that are part of a longer one that is named as well: navy blue is not blue.
    """

    def __init__(self, attributes: Mapping[str, Sequence[str]]) -> None:
        self._by_word: dict[str, list[tuple[str, str, frozenset[str]]]] = defaultdict(list)
        for column, values in attributes.items():
            for value in filter(is_value, sorted(set(values))):
                words = frozenset(words_of(value))
                self._by_word[min(words)].append((column, value, words))

    def __call__(self, words: Sequence[str]) -> list[tuple[str, str]]:
        """(column, value), in an order that depends on the words alone."""
        said = frozenset(words_of(" ".join(words)))
        there = [
            found
            for word in sorted(said)
            for found in self._by_word.get(word, ())
            if found[2] <= said
        ]
        return [(c, v) for c, v, its in there if not any(its < other for *_, other in there)]


class QueryMaker:
    """Draws one query for a product. The evaluation's combinations never occur.

    `columns` are the attributes to ask by; values that say nothing are never asked for.
    """

    def __init__(self, data: ProductData, columns: Sequence[str]) -> None:
        self.data, self.columns = data, columns
        self._values_named = ValuesNamed(data.attributes)

    def can_ask(self, row: int) -> bool:
        """Whether the product in `row` says anything that it could be asked by."""
        return bool(self.data.titles[row].strip() or self._known_of(row))

    def draw(self, row: int, rng: random.Random) -> TrainingQuery:
        """One query for the product in `row`, which must be one that `can_ask`."""
        known = self._known_of(row)
        title = self.data.titles[row].strip()
        chosen: list[tuple[str, str]] = []
        if known and (rng.random() < ATTRIBUTE_SHARE or not title):
            chosen = _choose(known, rng)
            phrases = " ".join(_phrase(name, value, rng) for name, value in chosen)
            words = phrases.lower().split()
        else:
            words = _part_of(title.lower().split(), rng)
        words = self._without_held_out(lose(words, rng), rng)
        said = set(words_of(" ".join(words)))
        left = tuple(pair for pair in chosen if set(words_of(pair[1])) <= said)
        return TrainingQuery(mistyped(words, rng), left)

    def _known_of(self, row: int) -> list[tuple[str, str]]:
        pairs = [(name, self.data.attributes[name][row]) for name in self.columns]
        return [(name, value) for name, value in pairs if is_value(value)]

    def _without_held_out(self, words: list[str], rng: random.Random) -> list[str]:
        """Values go, one by one, until no three that are left are a held-out combination."""
        while len(words) > 1 and names_held_out(there := self._values_named(words)):
            gone = set(words_of(rng.choice(there)[1]))
            left = [word for word in words if not gone & set(words_of(word))]
            words = left if 0 < len(left) < len(words) else words[:-1]
        return words


def _choose(known: list[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    chosen = rng.sample(known, min(len(known), rng.randint(1, 3)))
    return chosen[:-1] if names_held_out(chosen) else chosen


def _part_of(words: list[str], rng: random.Random) -> list[str]:
    """A span of a title, or some of its words in any order."""
    fewest = min(FEWEST_WORDS, len(words))
    if rng.random() < 0.5:
        length = rng.randint(fewest, min(6, len(words)))
        start = rng.randint(0, len(words) - length)
        return words[start : start + length]
    return rng.sample(words, rng.randint(fewest, min(4, len(words))))


def is_value(value: str) -> bool:
    """Whether an attribute's value says something."""
    return value.lower() not in NOTHING_SAID and bool(words_of(value))


def _phrase(name: str, value: str, rng: random.Random) -> str:
    value = _singular(value) if rng.random() < 0.3 else value
    patterns = next((said for part, said in PHRASES.items() if part in name.lower()), [])
    if not patterns or rng.random() >= 0.35:
        return value
    # To choose from one would use the generator, and change what the shipped towers were asked.
    pattern = rng.choice(patterns) if len(patterns) > 1 else patterns[0]
    return pattern.format(value)


def _singular(value: str) -> str:
    """Without a last s, which is no grammar: "Watche", too. Short words stay, as the size s."""
    is_plural = value.endswith("s") and not value.endswith("ss")
    return value[:-1] if is_plural and len(value.split()[-1]) >= SHORTEST_PLURAL else value


def spoil(words: list[str], rng: random.Random) -> str:
    """Sometimes a word is lost, sometimes one is mistyped."""
    return mistyped(lose(words, rng), rng)


def lose(words: list[str], rng: random.Random) -> list[str]:
    """All words, or all but one of several."""
    if len(words) > FEWEST_WORDS and rng.random() < DROP:
        lost = rng.randrange(len(words))
        return words[:lost] + words[lost + 1 :]
    return words


def mistyped(words: list[str], rng: random.Random) -> str:
    """The words as one text, now and then with a typing error."""
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
