"""What is looked for: a text, a picture, a product that is there, or several of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from retrieval_client.collection import Collection, Consistency
from retrieval_client.deadline import Deadline
from retrieval_client.encoder import Encoded, Encoder
from retrieval_client.handshake import Served
from retrieval_client.records import VECTOR, check_id
from retrieval_contract.errors import ContractError, ItemError, Reason, ReleaseMismatch

TEXT_WEIGHT = 0.55
"""As `benchmarks.mixed` finds it best."""


@dataclass(frozen=True)
class Query:
    """A text, an `image` (a JPEG, PNG or WebP file), a product's id that others shall be `like`.

    Each becomes a vector: a text by the query encoder, an image as a product without a title, an
    id by what is stored. Of several together it is the sum of unit vectors, scaled to norm 1: the
    text's with `text_weight` (0 to 1), the others' with equal parts of the rest. A product is never
    found by its own id. With none of them it is an empty text, which the server refuses.
    """

    text: str = ""
    image: bytes = field(default=b"", repr=False)
    like: str = ""
    text_weight: float = TEXT_WEIGHT

    def __post_init__(self) -> None:
        if not 0 <= self.text_weight <= 1:
            raise ContractError(f"text_weight: expected 0 to 1, got {self.text_weight}")

    @classmethod
    def of(cls, query: str | Query) -> Query:
        """A text is a query for it."""
        return cls(query) if isinstance(query, str) else query

    @property
    def weights(self) -> dict[Part, float]:
        """What it is made of, and how much each part counts; they add up to 1."""
        others = [
            part for part, there in ((Part.IMAGE, self.image), (Part.LIKE, self.like)) if there
        ]
        if not others:
            return {Part.TEXT: 1.0}
        of_text = {Part.TEXT: self.text_weight} if self.text else {}
        rest = 1 - sum(of_text.values())
        return of_text | {part: rest / len(others) for part in others}


class Part(Enum):
    """What a query may be made of."""

    TEXT = auto()
    IMAGE = auto()
    LIKE = auto()


def encode(
    queries: Sequence[Query],
    encoder: Encoder,
    collection: Collection,
    consistency: Consistency,
    deadline: Deadline,
) -> Encoded:
    """Vectors to search `collection` with, one a query or its error.

    Raises ReleaseMismatch when the server is of another release by now.
    """
    if not any(query.image or query.like for query in queries):
        texts = [query.text for query in queries]
        return _of(collection, encoder, encoder.encode_queries(texts, timeout_s=deadline.left_s))
    weights = [query.weights for query in queries]
    rows = {part: [row for row, w in enumerate(weights) if part in w] for part in Part}
    found: dict[Part, Encoded] = {}
    if rows[Part.TEXT]:
        texts = [queries[row].text for row in rows[Part.TEXT]]
        found[Part.TEXT] = encoder.encode_queries(texts, timeout_s=deadline.left_s)
    if rows[Part.IMAGE]:
        images = [queries[row].image for row in rows[Part.IMAGE]]
        found[Part.IMAGE] = encoder.encode_products(
            [""] * len(images), images, timeout_s=deadline.left_s
        )
    if rows[Part.LIKE]:
        ids = [queries[row].like for row in rows[Part.LIKE]]
        found[Part.LIKE] = stored(ids, collection, consistency, deadline)
    for encoded in found.values():
        _of(collection, encoder, encoded)
    return _sum(weights, rows, found)


def _of(collection: Collection, encoder: Encoder, encoded: Encoded) -> Encoded:
    """What was encoded, if it is of the collection's release."""
    if encoded.served.release_id != collection.info.release_id:
        raise ReleaseMismatch(
            f"Triton at {encoder.address}: expected release {collection.info.release_id}, it "
            f"serves {encoded.served.release_id} by now"
        )
    return encoded


def stored(
    ids: Sequence[str], collection: Collection, consistency: Consistency, deadline: Deadline
) -> Encoded:
    """The vectors that a collection has of these products; an id that it has not is refused."""
    errors = [_error_of(product_id) for product_id in ids]
    good = sorted({i for i, error in zip(ids, errors, strict=True) if error is None})
    rows = collection.of_ids(good, [VECTOR.name], consistency, deadline)
    vectors = np.zeros((len(ids), collection.info.vector_dim), np.float32)
    for at, product_id in enumerate(ids):
        if product_id in rows:
            vectors[at] = rows[product_id][VECTOR.name]
            if not np.isfinite(vectors[at]).all():
                vectors[at] = 0
                errors[at] = ItemError(
                    Reason.INTERNAL, f"the stored vector of {product_id!r} is damaged: run an audit"
                )
        elif errors[at] is None:
            errors[at] = ItemError(
                Reason.UNKNOWN_ID, f"expected the id of a product that is there, got {product_id!r}"
            )
    served = Served(collection.info.release_id, collection.info.vector_dim)
    return Encoded(vectors, errors, served)


def _error_of(product_id: str) -> ItemError | None:
    try:
        check_id(product_id)
    except ItemError as error:
        return error
    return None


def _sum(
    weights: Sequence[Mapping[Part, float]],
    rows: Mapping[Part, Sequence[int]],
    found: Mapping[Part, Encoded],
) -> Encoded:
    """Weighted sums of norm 1; zero where a part was refused."""
    served = next(iter(found.values())).served
    vectors = np.zeros((len(weights), served.vector_dim), np.float32)
    errors: list[ItemError | None] = [None] * len(weights)
    for part, encoded in found.items():
        for row, vector, error in zip(rows[part], encoded.vectors, encoded.errors, strict=True):
            vectors[row] += np.float32(weights[row][part]) * vector
            errors[row] = errors[row] or error
    vectors[[error is not None for error in errors]] = 0
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    requests = tuple(request for encoded in found.values() for request in encoded.requests)
    return Encoded(vectors / np.where(norms > 0, norms, 1), errors, served, requests)
