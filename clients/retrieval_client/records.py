"""One product as a record of Milvus: its fields, what may be one, and how a found one is read."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retrieval_contract import models
from retrieval_contract.errors import ContractError, ItemError, Reason
from retrieval_contract.models import Field
from retrieval_contract.tensors import Array

ID, TITLE, CONTENT_HASH, ROW_HASH, CHECKSUM, BUCKET, ATTRIBUTES, THUMBNAIL, VECTOR, WORDS = (
    models.PRODUCTS.fields
)
NORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ProductRow:
    """One row to store; `vector` is float32 (vector_dim,), unit norm; `thumbnail` a JPEG."""

    id: str
    title: str
    content_hash: str
    vector: Array
    attributes: Mapping[str, Any] = field(default_factory=dict)
    thumbnail: bytes = b""
    row_hash: str = ""


@dataclass(frozen=True)
class Route:
    """One of several ways on which a product was found.

    `rank` counts from 1 and `score` is the route's own: a cosine, or BM25. `share` is its part of
    the hit's score; the shares of a hit add up to 1.
    """

    name: str
    rank: int
    score: float
    share: float


@dataclass(frozen=True)
class Hit:
    """One found product; `score` is the cosine, -1 to 1, or where there are `routes` what they
    come to together, 0 to 1."""

    id: str
    score: float
    title: str
    attributes: dict[str, Any]
    thumbnail: bytes = field(default=b"", repr=False)
    routes: tuple[Route, ...] = ()


def field_parameters(declared: Field, vector_dim: int) -> dict[str, int | bool]:
    """Milvus's parameters of a declared field."""
    if declared.size:
        return {"dim": vector_dim}
    return {"max_length": declared.max_bytes} if declared.max_bytes else {}


def stored_from_row(row: ProductRow) -> dict[str, Any]:
    """Field → value, of every field that is written."""
    stored = {
        ID.name: row.id,
        TITLE.name: row.title,
        CONTENT_HASH.name: row.content_hash,
        ROW_HASH.name: row.row_hash,
        BUCKET.name: bucket_of(row.id),
        ATTRIBUTES.name: stored_attributes(row.attributes),
        THUMBNAIL.name: base64.b64encode(row.thumbnail).decode(),
        VECTOR.name: row.vector,
    }
    return stored | {CHECKSUM.name: checksum_of(stored)}


CHECKED = [field.name for field in (TITLE, ATTRIBUTES, THUMBNAIL, BUCKET, VECTOR, CHECKSUM)]
"""Fields of a row that `is_as_written` looks at, besides its id."""


def checksum_of(stored: Mapping[str, Any]) -> int:
    """CRC-32 of what decides where a row is found, and what is said and shown of it."""
    return zlib.crc32(stored[THUMBNAIL.name].encode(), _checksum_without_photo(stored))


def _checksum_without_photo(stored: Mapping[str, Any]) -> int:
    """What rows have that an earlier version wrote."""
    said = json.dumps([stored[TITLE.name], stored[ATTRIBUTES.name]], sort_keys=True)
    return zlib.crc32(np.asarray(stored[VECTOR.name], "<f4").tobytes(), zlib.crc32(said.encode()))


def is_as_written(stored: Mapping[str, Any]) -> bool:
    """Whether a stored row's id and CHECKED fields are, bit for bit, what was given to Milvus; the
    photo in a row of an earlier version must be one."""
    if stored[BUCKET.name] != bucket_of(stored[ID.name]):
        return False
    photo, checksum = stored[THUMBNAIL.name], stored[CHECKSUM.name]
    if checksum == checksum_of(stored):
        return True
    return bool(checksum == _checksum_without_photo(stored) and photo_of(photo))


def photo_of(thumbnail: str) -> bytes:
    """The JPEG in the stored text; none where that is damaged, which an audit says."""
    try:
        return base64.b64decode(thumbnail, validate=True)
    except ValueError:
        return b""


def stored_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Without nulls: to one backend such an attribute exists, and to the other it does not."""
    return {name: value for name, value in attributes.items() if value is not None}


def bucket_of(product_id: str) -> int:
    """The same for the same id, everywhere; evenly spread."""
    digest = hashlib.blake2b(product_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % models.BUCKETS


def check_id(product_id: str) -> None:
    """ItemError unless the id can be stored and found again on every Milvus."""
    size = len(product_id.encode("utf-8", "surrogatepass"))
    if not product_id or not product_id.isprintable():
        raise ItemError(Reason.BAD_ID, "expected a non-empty id without control characters")
    if size > ID.max_bytes:
        raise ItemError(Reason.BAD_ID, f"expected at most {ID.max_bytes} bytes, got {size}")


def id_filter(ids: Sequence[str]) -> str:
    """A filter for ids, quoted here: pymilvus pastes ids into filters as they are."""
    return f"{ID.name} in [{', '.join(map(quoted, ids))}]"


def quoted(value: str) -> str:
    """For a filter. JSON without \\u escapes is read alike by Milvus Lite and the server."""
    return json.dumps(value, ensure_ascii=False)


def check_vectors(ids: Sequence[str], vectors: Array, dim: int) -> None:
    """ContractError naming the first row that is not a finite unit vector of `dim` numbers.

    Milvus Lite stores NaN and any norm without a word.
    """
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ContractError(
            f"vectors: expected (rows, {dim}), got {vectors.shape}; encode with "
            "the release of the collection"
        )
    if len(vectors) == 1 and abs(math.sqrt(vectors[0] @ vectors[0]) - 1) < NORM_TOLERANCE:
        return  # of a lone search, which feels what NumPy costs besides
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < NORM_TOLERANCE))  # NaN is wrong, too
    if len(wrong):
        raise ContractError(
            f"{ids[wrong[0]]}: expected a unit vector, got norm {norms[wrong[0]]:.4g}"
        )


def hit_from_milvus(hit: Mapping[str, Any]) -> Hit:
    """One search result. Of a hundred a millisecond: each look at pymilvus's costs."""
    entity = hit["entity"]
    thumbnail = entity.get(THUMBNAIL.name)
    return Hit(
        id=hit[ID.name] if ID.name in hit else entity[ID.name],
        score=float(hit["distance"]),
        title=entity.get(TITLE.name) or "",
        attributes=dict(entity.get(ATTRIBUTES.name) or {}),
        thumbnail=photo_of(thumbnail) if thumbnail else b"",
    )
