"""Source rows → vectors → catalog: bad rows are set aside by id, the rest goes in."""

from __future__ import annotations

import hashlib
import io
import json
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
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
BATCH_BYTES = 16_000_000
"""A look-up, a request or a write also ends here: a row may weigh megabytes."""
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
        """One line of a rejects file, in ASCII: an id may hold what no encoding takes."""
        return json.dumps(asdict(self))


@dataclass
class PushReport:
    """What a push did; counts are rows."""

    read: int = 0
    encoded: int = 0
    stored: int = 0
    unchanged: int = 0
    rejects: list[Reject] = field(default_factory=list)

    @property
    def settled(self) -> int:
        """Rows of which is known what becomes of them."""
        return self.encoded + self.unchanged + len(self.rejects)


@dataclass(frozen=True)
class Candidate:
    """A row that passed the checks that need no server."""

    id: str
    title: str
    image: bytes
    attributes: dict[str, Any]
    content_hash: str

    @property
    def weight(self) -> int:
        """Bytes that matter."""
        return len(self.image) + len(self.title)


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
        self._weight = 0
        self._stopped = threading.Event()

    def run(
        self,
        rows: Iterable[SourceRow],
        progress: Callable[[PushReport], None] = lambda report: None,
        on_reject: Callable[[Reject], None] = lambda reject: None,
    ) -> PushReport:
        """Store every good row; calls `progress` as rows are settled, `on_reject` for each bad one.

        Pushing the same source twice stores nothing the second time. Waits `retry_s` for a
        server that is away; what was stored before an error stays, and a further run goes on.
        """
        self._on_reject = on_reject
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
            except BaseException:
                # Ctrl-C and errors must not wait for calls that are being repeated. What was
                # encoded is stored by the next run.
                self._stopped.set()
                for future in waiting:
                    future.cancel()
                raise
        self._write()
        if self.report.stored:
            self._patiently(self.catalog.flush)
        progress(self.report)
        return self.report

    def _requests(self, rows: Iterable[SourceRow], release_id: str) -> Iterator[list[Candidate]]:
        """Checked rows whose stored hash differs, in requests."""
        return batched(self._changed(rows, release_id), REQUEST_ROWS)

    def _changed(self, rows: Iterable[SourceRow], release_id: str) -> Iterator[Candidate]:
        for candidates in batched(self._checked(rows, release_id), LOOK_UP_ROWS):
            ids = [candidate.id for candidate in candidates]
            stored = self._patiently(partial(self.catalog.stored_hashes, ids))
            for candidate in candidates:
                if stored.get(candidate.id) == candidate.content_hash:
                    self.report.unchanged += 1
                else:
                    yield candidate

    def _checked(self, rows: Iterable[SourceRow], release_id: str) -> Iterator[Candidate]:
        for row in rows:
            self.report.read += 1
            try:
                yield candidate_from_row(row, release_id, self.thumbnails, self._seen)
            except ItemError as exc:
                self._reject(row.name, exc)

    def _reject(self, name: str, error: ItemError) -> None:
        reject = Reject.of(name, error)
        self.report.rejects.append(reject)
        self._on_reject(reject)

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
                self._reject(row.id, error)
                continue
            self.report.encoded += 1
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
            self._weight += len(pictures[i]) + len(row.title) + len(json.dumps(row.attributes))
        if len(self._ready) >= WRITE_ROWS or self._weight >= BATCH_BYTES:
            self._write()

    def _write(self) -> None:
        self._patiently(lambda: self.catalog.upsert(self._ready))
        self.report.stored += len(self._ready)
        self._ready, self._weight = [], 0

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
                if self._stopped.wait(pause * random.uniform(0.5, 1.0)):
                    raise
                pause = min(pause * 2, 5.0)


def candidate_from_row(
    row: SourceRow, release_id: str, thumbnails: bool, seen: set[bytes]
) -> Candidate:
    """Check one row and hash it; raises ItemError. `seen` collects digests of ids."""
    if row.problem is not None:
        raise row.problem
    check_id(row.id)
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
    digest = hashlib.blake2b(row.id.encode(), digest_size=16).digest()
    if digest in seen:  # asked last: a row that is refused for itself takes no id away
        detail = "an earlier row of this source has this id; give each product its own"
        raise ItemError(Reason.DUPLICATE_ID, detail)
    seen.add(digest)
    return Candidate(row.id, title, row.image, row.attributes, content.hexdigest())


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
    return text


def thumbnail(image: bytes) -> bytes:
    """A small JPEG for result pages, at most THUMBNAIL_PX (width, height)."""
    picture = open_image(image, THUMBNAIL_PX)
    picture.thumbnail(THUMBNAIL_PX)
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
