"""Who is trained on, who is chosen by, who is reported on: by group, and by a hash.

Products that share a title or a picture are one group and stay on one side; a picture of very many
titles is a placeholder and ties nobody. Sides and held-out combinations follow from a hash of the
content, so that they are the same on every machine and for every copy of the data.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from towers.learning.catalog import ProductData

SIDES = (("train", 0.7), ("dev", 0.1), ("test", 0.2))
MOST_TITLES = 20
"""Of one picture: with more it says "no photo", not "the same product"."""
HELD_OUT = 0.5
"""Share of the full attribute combinations that no training query names."""


def fraction_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def keys_of(titles: Sequence[str], images: Sequence[bytes]) -> list[list[bytes]]:
    """For each product its title and its picture's hash, of those that it has."""
    plain = [title.lower().strip().encode() for title in titles]
    pictures = [hashlib.sha256(image).digest() if image else b"" for image in images]
    titles_of: dict[bytes, set[bytes]] = defaultdict(set)
    for title, picture in zip(plain, pictures, strict=True):
        titles_of[picture].add(title)
    shared = {picture for picture, of in titles_of.items() if len(of) > MOST_TITLES}
    return [
        [key for key in (title, picture) if key and key not in shared]
        for title, picture in zip(plain, pictures, strict=True)
    ]


def groups_of(titles: Sequence[str], images: Sequence[bytes]) -> list[int]:
    """The group of each product: the smallest row that it is tied to by title or picture."""
    parent = list(range(len(titles)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[bytes, int] = {}
    for row, keys in enumerate(keys_of(titles, images)):
        for key in keys:
            a, b = sorted((root(first.setdefault(key, row)), root(row)))
            parent[b] = a
    return [root(row) for row in range(len(titles))]


def sides_of(data: ProductData) -> dict[str, list[int]]:
    """Rows of each side."""
    sides: dict[str, list[int]] = {name: [] for name, _ in SIDES}
    for row, group in enumerate(groups_of(data.titles, data.images)):
        at = fraction_of(data.titles[group].lower().strip() or data.ids[group])
        for name, share in SIDES:
            if at < share or name == SIDES[-1][0]:
                sides[name].append(row)
                break
            at -= share
    return sides


def is_held_out(values: Sequence[str]) -> bool:
    """Whether no training query may name all three of these attribute values."""
    return fraction_of("|".join(sorted(value.lower() for value in values))) < HELD_OUT


def names_held_out(named: Sequence[tuple[str, str]]) -> bool:
    """Whether three of these (column, value), of three columns, are a held-out combination."""
    return any(
        len({column for column, _ in three}) == 3 and is_held_out([value for _, value in three])
        for three in combinations(named, 3)
    )
