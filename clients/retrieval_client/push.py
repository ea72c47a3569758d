"""Source rows → vectors → catalog: bad rows are set aside by id, the rest goes in."""

from __future__ import annotations

import hashlib
import io
import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, TypeVar

from retrieval_client.catalog import TITLE, Catalog, ProductRow, check_id
from retrieval_client.encoder import Encoded, Encoder
from retrieval_client.settings import Settings
from retrieval_client.sources import SourceRow
from retrieval_contract.errors import (
    CatalogUnavailable,
    DeadlineExceeded,
    ItemError,
    Reason,
    ReleaseMismatch,
    ServerUnavailable,
)
from retrieval_contract.preprocess import open_image, text_from_bytes

REQUEST_ROWS = 32
"""Products in one request: the batch that the product tower is tuned for."""
REQUESTS_IN_FLIGHT = 4
"""Enough to keep decoding and tower busy at once; more only queues."""
WRITE_ROWS = 1024
LOOK_UP_ROWS = 512
THUMBNAIL_PX = (120, 160)
MAX_ATTRIBUTE_BYTES = 60_000
MAX_TITLE_CHARS = 4000
"""Of the catalog; the release's own, lower bound is the server's to enforce."""
AWAY = (ServerUnavailable, DeadlineExceeded, CatalogUnavailable)

T = TypeVar("T")


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
        """One line of a rejects file."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass
class PushReport:
    """What a push did; counts are rows."""

    read: int = 0
    stored: int = 0
    unchanged: int = 0
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """A row that passed the checks that need no server."""

    id: str
    title: str
    image: bytes
    attributes: dict[str, Any]
    content_hash: str


class Push:
    """One push of one source into one catalog; `run` may be called once."""

    def __init__(
        self, settings: Settings, encoder: Encoder, catalog: Catalog, *, thumbnails: bool = True
    ) -> None:
        self.encoder, self.catalog, self.thumbnails = encoder, catalog, thumbnails
        self.retry_s, self.timeout_s = settings.retry_s, settings.push_timeout_s
        self.report = PushReport()
        self._seen: set[bytes] = set()
        self._ready: list[ProductRow] = []

    def run(
        self,
        rows: Iterable[SourceRow],
        progress: Callable[[PushReport], None] = lambda report: None,
    ) -> PushReport:
        """Store every good row; calls `progress` as rows are settled.

        Pushing the same source twice stores nothing the second time. Waits `retry_s` for a
        server that is away; what was stored before an error stays, and a further run goes on.
        """
        served = self.encoder.served()
        self.catalog.prepare(served.release_id, served.vector_dim)
        waiting: deque[Future[tuple[list[Candidate], Encoded, list[bytes]]]] = deque()
        with ThreadPoolExecutor(REQUESTS_IN_FLIGHT) as pool:
            try:
                for request in self._requests(rows, served.release_id):
                    waiting.append(pool.submit(self._encode, request, served.release_id))
                    if len(waiting) > REQUESTS_IN_FLIGHT:
                        self._settle(waiting.popleft())
                        progress(self.report)
                while waiting:
                    self._settle(waiting.popleft())
                    progress(self.report)
            finally:
                for future in waiting:
                    future.cancel()
        self._write()
        if self.report.stored:
            self._patiently(self.catalog.flush)
        progress(self.report)
        return self.report

    def _requests(self, rows: Iterable[SourceRow], release_id: str) -> Iterator[list[Candidate]]:
        """Checked rows whose stored hash differs, in requests."""
        pending: list[Candidate] = []
        for chunk in batched(rows, LOOK_UP_ROWS):
            candidates = list(self._checked(chunk, release_id))
            stored = self._stored([c.id for c in candidates])
            changed = [c for c in candidates if stored.get(c.id) != c.content_hash]
            self.report.unchanged += len(candidates) - len(changed)
            pending += changed
            while len(pending) >= REQUEST_ROWS:
                yield pending[:REQUEST_ROWS]
                del pending[:REQUEST_ROWS]
        if pending:
            yield pending

    def _stored(self, ids: list[str]) -> dict[str, str]:
        return self._patiently(lambda: self.catalog.stored_hashes(ids)) if ids else {}

    def _checked(self, rows: Iterable[SourceRow], release_id: str) -> Iterator[Candidate]:
        for row in rows:
            self.report.read += 1
            try:
                yield candidate_from_row(row, release_id, self.thumbnails, self._seen)
            except ItemError as exc:
                self.report.rejects.append(Reject.of(row.id, exc))

    def _encode(
        self, rows: list[Candidate], release_id: str
    ) -> tuple[list[Candidate], Encoded, list[bytes]]:
        encoded = self._patiently(
            lambda: self.encoder.encode_products(
                [row.title for row in rows], [row.image for row in rows], timeout_s=self.timeout_s
            )
        )
        if encoded.served.release_id != release_id:
            raise ReleaseMismatch(
                f"push: the server changed from release {release_id} to "
                f"{encoded.served.release_id}; rows stored so far are of the first: push again"
            )
        pictures = [
            thumbnail(row.image) if self.thumbnails and row.image and not error else b""
            for row, error in zip(rows, encoded.errors, strict=True)
        ]
        return rows, encoded, pictures

    def _settle(self, done: Future[tuple[list[Candidate], Encoded, list[bytes]]]) -> None:
        rows, encoded, pictures = done.result()
        for i, row in enumerate(rows):
            if (error := encoded.errors[i]) is not None:
                self.report.rejects.append(Reject.of(row.id, error))
                continue
            self._ready.append(
                ProductRow(
                    row.id,
                    row.title,
                    row.content_hash,
                    encoded.vectors[i],
                    row.attributes,
                    pictures[i],
                )
            )
        if len(self._ready) >= WRITE_ROWS:
            self._write()

    def _write(self) -> None:
        self._patiently(lambda: self.catalog.upsert(self._ready))
        self.report.stored += len(self._ready)
        self._ready = []

    def _patiently(self, call: Callable[[], T]) -> T:
        """Repeat a call while its server is away, at growing, random intervals, for `retry_s`.

        Every call made here may be repeated without harm: encoding and upserts are idempotent.
        """
        end = time.monotonic() + self.retry_s
        pause = 0.1
        while True:
            try:
                return call()
            except AWAY:
                if time.monotonic() + pause > end:
                    raise
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, 5.0)


def candidate_from_row(
    row: SourceRow, release_id: str, thumbnails: bool, seen: set[bytes]
) -> Candidate:
    """Check one row and hash it; raises ItemError. `seen` collects digests of ids."""
    check_id(row.id)
    digest = hashlib.blake2b(row.id.encode(), digest_size=16).digest()
    if digest in seen:
        raise ItemError(
            Reason.DUPLICATE_ID,
            "an earlier row of this source has this id; it was taken, this one not",
        )
    seen.add(digest)
    if row.problem is not None:
        raise row.problem
    title = text_from_bytes(row.title, MAX_TITLE_CHARS)
    if len(title.encode()) > TITLE.max_bytes:
        raise ItemError(Reason.TOO_LONG, "the title has more bytes than the catalog holds")
    if not title and not row.image:
        raise ItemError(Reason.NOTHING_TO_ENCODE, "expected a title or an image, got neither")
    attributes = _json_of(row.attributes)
    content = hashlib.sha256()
    for part in (release_id, title, attributes, str(thumbnails)):
        content.update(hashlib.sha256(part.encode()).digest())
    content.update(row.image)
    return Candidate(row.id, title, row.image, row.attributes, content.hexdigest())


def _json_of(attributes: dict[str, Any]) -> str:
    try:
        text = json.dumps(attributes, sort_keys=True, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (ValueError, TypeError) as exc:
        raise ItemError(Reason.BAD_ATTRIBUTES, f"expected JSON values ({exc})") from exc
    if size > MAX_ATTRIBUTE_BYTES:
        raise ItemError(
            Reason.BAD_ATTRIBUTES,
            f"expected at most {MAX_ATTRIBUTE_BYTES} bytes of JSON, got {size}",
        )
    return text


def thumbnail(image: bytes) -> bytes:
    """A small JPEG for result pages, at most THUMBNAIL_PX (width, height)."""
    picture = open_image(image, THUMBNAIL_PX)
    picture.thumbnail(THUMBNAIL_PX)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size`, the last one shorter."""
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk
