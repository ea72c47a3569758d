"""What heads are trained on: features of products in several conditions, and of drawn queries."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from retrieval_contract.errors import SourceError
from towers.learning.catalog import ProductData
from towers.learning.encoders import Advance, Encoders
from towers.learning.queries import QueryMaker, TrainingQuery, spoil
from towers.learning.views import blank_picture, colour_column, without_words
from towers.learning.words import words_of

GENERAL_WORDS = (1, 12)


@dataclass(frozen=True)
class Examples:
    """N products, D text width, F picture features, M general texts; features are float32."""

    data: ProductData
    titles: Tensor
    """(3, N, D): as they are, without colour words, their first word alone."""
    pictures: Tensor
    """(N, F)"""
    blank: Tensor
    """(F,): a picture that shows nothing."""
    has_title: Tensor
    has_picture: Tensor
    """1/0, (N, 1)."""
    draws: list[list[TrainingQuery]]
    queries: Tensor
    """(draws, N, D): in each draw, one query a product."""
    pieces: list[str]
    general_queries: Tensor
    general_titles: Tensor
    """(M, D): texts on whatever subject, and M short `pieces` of them as queries."""

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def fingerprint(self) -> str:
        """Of the products, the drawn queries, the general texts and the encoders that saw them."""
        drawn = [[(query.text, query.attributes) for query in draw] for draw in self.draws]
        texts = [self.data.ids, self.data.titles, self.data.attributes, drawn, self.pieces]
        digest = hashlib.sha256(json.dumps(texts).encode())
        for features in (self.titles, self.pictures, self.general_titles):
            digest.update(features.numpy().tobytes())
        return digest.hexdigest()


def cut_titles(data: ProductData) -> tuple[list[str], list[str]]:
    """Titles without the words of any colour, and titles cut to their first word."""
    column = colour_column(data)
    values = set(data.attributes[column]) if column else set()
    colours = {word for value in values for word in words_of(value)}
    plain = [without_words(title, colours) for title in data.titles]
    return plain, [(title.split() or [""])[0] for title in data.titles]


def general_texts(
    vocabulary: Sequence[str], titles: Sequence[str], count: int, seed: int
) -> list[str]:
    """`count` texts that keep the heads honest about everything else: titles of other catalogs,
    and words of the tokenizer's vocabulary at random."""
    rng = random.Random(seed)
    words = sorted(word for word in vocabulary if word.isalpha() and word.isascii())
    texts = [title for title in titles if title.strip()]
    texts = rng.sample(texts, min(len(texts), count // 2))
    while words and len(texts) < count:
        texts.append(" ".join(rng.choices(words, k=rng.randint(*GENERAL_WORDS))))
    return texts


def general_queries(
    vocabulary: Sequence[str], titles: Sequence[str], count: int, seed: int
) -> list[str]:
    """`count` short texts as somebody might ask on any subject: pieces of titles of other catalogs
    and random words, as many of these as of those, now and then mistyped."""
    rng = random.Random(seed)
    random_words = general_texts(vocabulary, [], count, seed)
    there = [title for title in titles if title.strip()]
    sources = [texts for texts in (there, random_words) if texts]
    pieces = [
        piece_of(rng.choice(rng.choice(sources)), rng) for _ in range(count if sources else 0)
    ]
    return [spoil(piece.split(), rng) for piece in pieces]


def piece_of(text: str, rng: random.Random) -> str:
    """One to four words in a row, as somebody would look for it."""
    words = text.lower().split()
    length = rng.randint(1, min(4, len(words)))
    start = rng.randint(0, len(words) - length)
    return " ".join(words[start : start + length])


def make_examples(
    data: ProductData,
    encoders: Encoders,
    columns: Sequence[str],
    draws: int,
    general: Sequence[str],
    seed: int,
    progress: Callable[[str, int], Advance],
) -> Examples:
    """Encode everything once; `progress(what, rows)` gives the callback that counts them.

    Products that say nothing to ask them by are left out; SourceError where none is left.
    """
    rng = random.Random(seed)
    every = QueryMaker(data, columns)
    data = data.select([row for row in range(len(data)) if every.can_ask(row)])
    if not len(data):
        raise SourceError(
            f"{data.name}: expected products with a title or an attribute to ask by, got none to "
            "train on; add titles, name columns by --attribute, or give more products"
        )
    maker = QueryMaker(data, columns)
    drawn = [[maker.draw(row, rng) for row in range(len(data))] for _ in range(draws)]
    variants = (data.titles, *cut_titles(data))
    rows = len(data)
    advance = progress("titles", 3 * rows)
    titles = torch.stack([encoders.titles(texts, advance) for texts in variants])
    pictures = encoders.pictures(data.images, progress("pictures", rows))
    advance = progress("queries", draws * rows)
    queries = [encoders.queries([query.text for query in draw], advance) for draw in drawn]
    pieces = [piece_of(text, rng) for text in general]
    nothing = titles[0, :0]
    return Examples(
        data,
        titles,
        pictures,
        encoders.pictures([blank_picture()])[0],
        (titles[0].abs().sum(1, keepdim=True) > 0).float(),
        (pictures.abs().sum(1, keepdim=True) > 0).float(),
        drawn,
        torch.stack(queries),
        pieces,
        encoders.queries(pieces, progress("general pieces", len(general))) if general else nothing,
        encoders.titles(general, progress("general texts", len(general))) if general else nothing,
    )
