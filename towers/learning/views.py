"""The ways in which one catalog is looked at: as it is, cut, and with parts missing or spoiled."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

from PIL import Image

from towers.learning.catalog import ProductData
from towers.learning.split import fraction_of, is_held_out
from towers.learning.words import words_of

COLOUR_LOST, FIRST_WORD_ONLY, BLANK = 0.25, 0.15, 0.15
"""Shares of the uneven catalog: titles without colour words, cut to one word, blank pictures."""


def colour_column(data: ProductData) -> str | None:
    """The attribute that holds colours, by its name."""
    names = (
        name for name in data.attributes if "colour" in name.lower() or "color" in name.lower()
    )
    return next(names, None)


def names_colour(title: str, colour: str) -> bool:
    """Whether the title holds every word of the colour."""
    return set(words_of(colour)) <= set(words_of(title))


def all_products(data: ProductData) -> ProductData:
    """As it is."""
    return data


def colour_not_in_title(data: ProductData) -> ProductData | None:
    """The catalog cut to products whose title leaves the colour to the picture."""
    column = colour_column(data)
    if column is None:
        return None
    colours = data.attributes[column]
    rows = [r for r, t in enumerate(data.titles) if not names_colour(t, colours[r])]
    return data.select(rows)


def unseen_combination(data: ProductData) -> ProductData | None:
    """Queries by three attribute values that no training query names together."""
    kept = [
        q for q in data.queries if len(q.attributes) == 3 and is_held_out([*q.attributes.values()])
    ]
    return replace(data, queries=kept) if kept else None


def no_image(data: ProductData) -> ProductData:
    """Every picture missing, and flagged so."""
    return replace(data, images=[b""] * len(data))


def no_title(data: ProductData) -> ProductData | None:
    """Every title missing, and flagged so."""
    return replace(data, titles=[""] * len(data)) if any(data.images) else None


def uneven(data: ProductData) -> ProductData | None:
    """Products of unequal quality: some titles and pictures are spoiled, unflagged.

    Which ones follows from a hash of the id, so that every system and machine sees the same.
    """
    column = colour_column(data)
    if column is None or not any(data.images):
        return None
    colours = {word for value in set(data.attributes[column]) for word in words_of(value)}
    blank = blank_picture()
    titles, images = [], []
    for product_id, title, image in zip(data.ids, data.titles, data.images, strict=True):
        at = fraction_of(f"title {product_id}")
        if at < COLOUR_LOST:
            title = without_words(title, colours)
        elif at < COLOUR_LOST + FIRST_WORD_ONLY:
            title = (title.split() or [""])[0]
        titles.append(title)
        images.append(blank if fraction_of(f"picture {product_id}") < BLANK else image)
    return replace(data, titles=titles, images=images)


def without_words(title: str, words: set[str]) -> str:
    """The title without its words of that kind; whole where nothing would be left."""
    return " ".join(w for w in title.split() if not words & set(words_of(w))) or title


def blank_picture() -> bytes:
    """A white JPEG."""
    buffer = io.BytesIO()
    Image.new("RGB", (60, 80), "white").save(buffer, "JPEG")
    return buffer.getvalue()


View = Callable[[ProductData], ProductData | None]
VIEWS: dict[str, View] = {
    "all": all_products,
    "colour_not_in_title": colour_not_in_title,
    "unseen_combination": unseen_combination,
    "no_image": no_image,
    "no_title": no_title,
    "uneven": uneven,
}
