"""Source rows → vectors → every live collection: bad rows are set aside by id, the rest goes in.

It can be killed anywhere. A row is stored whole, with hashes of what it was made from, or not at
all; the next run asks the collection what it holds, and does what is left. Nothing else remembers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from retrieval_client.book import Book
from retrieval_client.catalog import Catalog
from retrieval_client.encoder import Encoded
from retrieval_client.feed import LOOK_UP_ROWS, Fed, Feed, Plan
from retrieval_client.fleet import Encoders
from retrieval_client.flow import REQUEST_ROWS, Flow
from retrieval_client.patience import Patient
from retrieval_client.rows import (
    BATCH_BYTES,
    Candidate,
    Reject,
    batched,
    candidate_from_row,
    is_good_id,
)
from retrieval_client.settings import Settings
from retrieval_client.sources import SourceRow
from retrieval_contract.errors import (
    CatalogError,
    ItemError,
    Reason,
    ReleaseMismatch,
)

PASS_SHARE = 0.25
"""A source of fewer rows than this share of the collection asks for its own; a larger one reads all
that is there in one pass, which costs less a row."""
LIVE_TTL_S = 5.0
"""How soon a push notices that a release is being built, and feeds its collection as well."""
EXAMPLES = 100


@dataclass
class PushReport:
    """What a push did, in all and by release. `rejects` are the first EXAMPLES.

    `settled`: rows of which is known what becomes of them, each once for every collection.
    """

    read: int = 0
    settled: int = 0
    fed: dict[str, Fed] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Rows of the source of which that is known, in all collections together."""
        return self.settled // max(len(self.fed), 1)

    def _sum(self, name: str) -> int:
        return sum(getattr(fed, name) for fed in self.fed.values())

    @property
    def encoded(self) -> int:
        """Rows that a server encoded."""
        return self._sum("encoded")

    @property
    def renewed(self) -> int:
        """Rows that kept their vectors."""
        return self._sum("renewed")

    @property
    def stored(self) -> int:
        """Rows that were written."""
        return self._sum("stored")

    @property
    def unchanged(self) -> int:
        """Rows that were there already."""
        return self._sum("unchanged")

    @property
    def deleted(self) -> int:
        """Rows that the source no longer has."""
        return self._sum("deleted")


@dataclass(frozen=True)
class Answer:
    """One encoded request; `pictures` are thumbnails."""

    feed: Feed
    rows: list[Candidate]
    encoded: Encoded
    pictures: list[bytes]


class Push:
    """One push of one source into one catalog; `run` may be called once."""

    def __init__(
        self, settings: Settings, encoders: Encoders, catalog: Catalog, plan: Plan | None = None
    ) -> None:
        self.encoders, self.catalog, self.plan = encoders, catalog, plan or Plan()
        self.report = PushReport()
        self._patiently = Patient(settings.retry_s)
        self._flow = Flow(self._patiently, settings.push_timeout_s)
        self._feeds: dict[str, Feed] = {}
        self._looked = float("-inf")
        self._whole = True
        self._nameless = 0

    def run(
        self,
        rows: Iterable[SourceRow],
        progress: Callable[[PushReport], None] = lambda report: None,
        on_reject: Callable[[Reject], None] = lambda reject: None,
        *,
        rows_expected: int | None = None,
    ) -> PushReport:
        """Store every good row; calls `progress` as rows are settled, `on_reject` for each bad one.

        Pushing the same source twice stores nothing the second time. Waits `retry_s` for a
        server that is away; what was stored before an error stays, and a further run goes on.
        Raises TooMuchToDelete before anything is deleted, CatalogError when the closing audit
        finds another state than the source's.
        """
        self._progress, self._on_reject = progress, on_reject
        if rows_expected is None:
            rows, rows_expected = counted(rows)
        self._prepare(rows_expected)
        with Book() as self._book:
            self._look_for_feeds()
            self._stream(rows)
            for feed in self._feeds.values():
                self.report.settled += feed.write()
            for feed in self._feeds.values() if self.plan.sync else ():
                feed.check_surplus(self._nameless)
            for feed in self._feeds.values():
                feed.finish()
        progress(self.report)
        for feed in self._feeds.values():
            if feed.fed.left and feed.fed.left.total:
                raise CatalogError(
                    f"{feed.collection.name}: expected what the source says, got {feed.fed.left}; "
                    "did another push run meanwhile? push again, or `retrieval audit SOURCE`"
                )
        return self.report

    def _prepare(self, rows_expected: int | None) -> None:
        """A first push makes the collection, for the one release that is served."""
        serving = self._patiently(self.catalog.find)
        if serving is None and not self.plan.dry:
            served = self._patiently(self.encoders.served)
            if len(served) != 1:
                raise ReleaseMismatch(
                    f"push: expected one release for a new catalog, got {', '.join(served)}; give "
                    "the address of the one to start with (--triton)"
                )
            (only,) = served.values()
            self._patiently(lambda: self.catalog.prepare(only.release_id, only.vector_dim))
        elif serving and rows_expected is not None and not self.plan.sync:
            self._whole = rows_expected >= PASS_SHARE * self._patiently(serving.count)

    def _look_for_feeds(self) -> None:
        """Every live collection, of releases that are being built or kept to go back to as well."""
        if time.monotonic() - self._looked < LIVE_TTL_S:
            return
        self._looked = time.monotonic()
        for collection in self._patiently(self.catalog.live).values():
            release_id = collection.info.release_id
            if release_id in self._feeds:
                continue
            encoder = self._patiently(partial(self.encoders.for_collection, collection.info))
            feed = self._feeds[release_id] = Feed(
                encoder,
                collection,
                self._book,
                self.plan,
                self._patiently,
                whole=self._whole,
                late=self.report.read > 0,
            )
            self.report.fed[release_id] = feed.fed

    def _stream(self, rows: Iterable[SourceRow]) -> None:
        """Encode and store, with as many requests under way as the window allows."""
        answers = self._flow.in_order(self._requests(rows), self._encode)
        with closing(answers):  # what was encoded and not settled is stored by the next run
            for answer in answers:
                self._settle(answer)

    def _requests(self, rows: Iterable[SourceRow]) -> Iterator[tuple[Feed, list[Candidate]]]:
        """Checked rows that have to be encoded, in requests."""
        for candidates in batched(self._checked(rows), LOOK_UP_ROWS):
            self._look_for_feeds()
            if not self._feeds:  # a dry run, and nothing there yet
                self.report.fed.setdefault("", Fed()).encoded += len(candidates)
            for feed in self._feeds.values():
                self.report.settled += feed.take(candidates)
                if feed.pending:  # the last request waits for more rows
                    *full, feed.pending = batched(feed.pending, REQUEST_ROWS)
                    yield from ((feed, request) for request in full)
            self._progress(self.report)
        yield from ((feed, feed.pending) for feed in self._feeds.values() if feed.pending)

    def _checked(self, rows: Iterable[SourceRow]) -> Iterator[Candidate]:
        for row in rows:
            self.report.read += 1
            try:
                candidate = candidate_from_row(row, self.plan.thumbnails)
                if not self._book.say(candidate):
                    detail = "an earlier row of this source has this id; give each product its own"
                    raise ItemError(Reason.DUPLICATE_ID, detail)
            except ItemError as exc:
                if is_good_id(row.id):
                    self._book.refuse(row.id)
                self._nameless += not row.id
                self._reject(row.name, exc)
                self.report.settled += max(len(self._feeds), 1)
            else:
                yield candidate

    def _reject(self, name: str, error: ItemError) -> None:
        reject = Reject.of(name, error)
        self.report.refused[reject.code] += 1
        if len(self.report.rejects) < EXAMPLES:
            self.report.rejects.append(reject)
        self._on_reject(reject)

    def _encode(self, request: tuple[Feed, list[Candidate]]) -> Answer:
        feed, rows = request
        try:
            encoded = self._flow.encode(feed.encoder, feed.release_id, rows)
        except ReleaseMismatch:  # to an address that was silent came another release
            self.encoders.forget()
            ours = partial(self.encoders.for_collection, feed.collection.info)
            feed.encoder = self._patiently(ours)
            encoded = self._flow.encode(feed.encoder, feed.release_id, rows)
        pictures = [
            b"" if error else feed.thumbnail(row)
            for row, error in zip(rows, encoded.errors, strict=True)
        ]
        return Answer(feed, rows, encoded, pictures)

    def _settle(self, answer: Answer) -> None:
        feed = answer.feed
        for i, row in enumerate(answer.rows):
            if (error := answer.encoded.errors[i]) is not None:
                others = self._feeds.keys() - {feed.release_id}
                if not any(self._book.is_refused(other, row.id) for other in others):
                    self._reject(row.id, error)  # once, whoever refuses it
                self._book.take_back(feed.release_id, row.id)
                self.report.settled += 1
                continue
            feed.fed.encoded += 1
            self.report.settled += feed.make_ready(
                row, answer.encoded.vectors[i], answer.pictures[i]
            )
        self.report.settled += feed.write_due()
        self._progress(self.report)


def counted(rows: Iterable[SourceRow]) -> tuple[Iterable[SourceRow], int | None]:
    """The same rows, and how many they are where they are few: CSV, JSON lines do not say."""
    rows, first, weight = iter(rows), list[SourceRow](), 0
    for row in rows:
        first.append(row)
        weight += len(row.image)
        if len(first) == LOOK_UP_ROWS or weight >= BATCH_BYTES:
            return chain(first, rows), None
    return first, len(first)
