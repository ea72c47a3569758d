"""Source rows, checked and hashed: what can be said of a product before any server is asked."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from retrieval_client.records import TITLE, check_id
from retrieval_client.sources import SourceRow
from retrieval_contract.errors import ItemError, Reason
from retrieval_contract.preprocess import open_image, text_from_bytes

THUMBNAIL_PX = (120, 160)
MAX_ATTRIBUTE_BYTES = 60_000
MAX_DEPTH = 64
"""Of lists and objects in each other; JSON readers give up at different depths."""
INTEGERS = range(-(2**63), 2**64)
"""What JSON of Milvus holds."""
MAX_TITLE_CHARS = 4000
"""Of the catalog; the release's own, lower bound is the server's to enforce."""
BATCH_BYTES = 16_000_000
"""A look-up, a request or a write also ends here: a row may weigh megabytes."""


@dataclass(frozen=True)
class Reject:
    """One row that was not stored."""

    id: str
    code: str
    detail: str

    @classmethod
    def of(cls, product_id: str, error: ItemError) -> Reject:
        """From the item's own error."""
        return cls(product_id, error.reason, error.detail)

    def to_json(self) -> str:
        """One line of a rejects file, in ASCII: an id may hold what no encoding takes."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Candidate:
    """A row that passed the checks that need no server.

    `content`: hash of what its vector is made from; `row_hash`: of all that is stored of it.
    """

    id: str
    title: str
    image: bytes
    attributes: dict[str, Any]
    content: str
    row_hash: str

    @property
    def weight(self) -> int:
        """Bytes that matter."""
        return len(self.image) + len(self.title)

    def content_hash(self, release_id: str) -> str:
        """As stored beside a vector of this release."""
        return f"{release_id}:{self.content}"


def candidate_from_row(row: SourceRow, thumbnails: bool) -> Candidate:
    """Check one row and hash it; raises ItemError."""
    if row.problem is not None:
        raise row.problem
    check_id(row.id)
    title = text_from_bytes(row.title, MAX_TITLE_CHARS)
    if len(title.encode()) > TITLE.max_bytes:
        raise ItemError(Reason.TOO_LONG, "the title has more bytes than the catalog holds")
    if not title and not row.image:
        raise ItemError(Reason.NOTHING_TO_ENCODE, "expected a title or an image, got neither")
    content = hash_of(title.encode(), row.image)
    more = _json_of(row.attributes).encode()
    row_hash = hash_of(content.encode(), more, str(thumbnails).encode())
    return Candidate(row.id, title, row.image, row.attributes, content, row_hash)


def is_good_id(product_id: str) -> bool:
    """Whether a row may be stored under it."""
    try:
        check_id(product_id)
    except ItemError:
        return False
    return True


def hash_of(*parts: bytes) -> str:
    """128 bits over parts, none of which can pass for a piece of its neighbour; 32 hex digits."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()


def _json_of(attributes: dict[str, Any]) -> str:
    try:
        text = json.dumps(attributes, sort_keys=True, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (ValueError, TypeError, RecursionError) as exc:
        raise ItemError(Reason.BAD_ATTRIBUTES, f"expected JSON values ({exc})") from exc
    if size > MAX_ATTRIBUTE_BYTES:
        raise ItemError(
            Reason.BAD_ATTRIBUTES,
            f"expected at most {MAX_ATTRIBUTE_BYTES} bytes of JSON, got {size}",
        )
    if problem := _unfit(attributes):
        raise ItemError(Reason.BAD_ATTRIBUTES, problem)
    return text


def _unfit(value: Any, depth: int = 0) -> str:
    """Why Milvus would refuse a JSON value, and all the rows beside it; "" if it would not."""
    if isinstance(value, int) and value not in INTEGERS:
        return f"expected integers of 64 bits, got {str(value)[:40]}"
    if not isinstance(value, dict | list):
        return ""
    if depth == MAX_DEPTH:
        return f"expected at most {MAX_DEPTH} lists and objects in each other, got more"
    inner = value.values() if isinstance(value, dict) else value
    return next(filter(None, (_unfit(each, depth + 1) for each in inner)), "")


def thumbnail(image: bytes) -> bytes:
    """A small JPEG for result pages, at most THUMBNAIL_PX (width, height)."""
    picture = open_image(image, THUMBNAIL_PX)
    picture.thumbnail(THUMBNAIL_PX)
    picture.info.clear()  # a comment would be written along, or would be too long to write
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def batched(items: Iterable[Candidate], size: int) -> Iterator[list[Candidate]]:
    """Consecutive lists that end at `size` items or BATCH_BYTES, whichever comes first."""
    batch: list[Candidate] = []
    weight = 0
    for item in items:
        batch.append(item)
        weight += item.weight
        if len(batch) >= size or weight >= BATCH_BYTES:
            yield batch
            batch, weight = [], 0
    if batch:
        yield batch
