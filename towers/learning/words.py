"""Text → words that are compared: plurals folded, `t-shirt` and its kin one word."""

from __future__ import annotations

import re
from functools import lru_cache

import snowballstemmer

WORD = re.compile(r"[^\W_]+")
HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
T_SHIRT = re.compile(r"\b(t|tee) shirt")
POSSESSIVE = re.compile(r"['’]s?\b")
_stem = lru_cache(maxsize=None)(snowballstemmer.stemmer("english").stemWord)


def words_of(text: str) -> list[str]:
    """Lower-case stems in order: "Men's T-Shirts" → ["men", "tshirt"].

    Hyphens between letters join, possessives go, stems are Porter2's (Snowball).
    """
    text = POSSESSIVE.sub("", text.lower())
    text = T_SHIRT.sub("tshirt", HYPHEN.sub("", text))
    return [_stem(word) for word in WORD.findall(text)]
