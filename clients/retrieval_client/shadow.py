"""A share of the live queries, asked of the candidate as well, in the background.

It has its own connections, its own deadline and a short queue: what does not fit is left out and
counted. A live answer waits for nothing here, and nothing that goes wrong here is raised.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, Full, Queue

from retrieval_client.catalog import INFO_TTL_S, Catalog, Role
from retrieval_client.changes import overlap_of
from retrieval_client.deadline import Deadline
from retrieval_client.finding import Finder, Hits
from retrieval_client.fleet import Encoders
from retrieval_client.options import Options
from retrieval_client.query import Query, encode
from retrieval_client.settings import Settings
from retrieval_contract.door import Lane
from retrieval_contract.errors import ItemError, RetrievalError

WAITING = 64
"""Searches that may wait for the candidate."""
REMEMBERED = 10_000
"""Latest searches whose times are compared."""
IDLE_S = 0.5

Answers = Sequence[Hits | ItemError]


@dataclass(frozen=True)
class ShadowReport:
    """Searches. `asked`: offered to the candidate; `left_out`: for want of room, or of a candidate.

    `overlap`: mean share of hits that both releases have; `latency_ratio`: median of the
    candidate's time over median of the live one's, for the same searches. None where none were
    answered. `last_error`: what the candidate failed with last.
    """

    asked: int
    answered: int
    failed: int
    left_out: int
    overlap: float | None
    latency_ratio: float | None
    last_error: str


@dataclass(frozen=True)
class Offer:
    """One live search and its answer, which took `live_s`."""

    queries: Sequence[Query]
    options: Options
    answers: Answers
    live_s: float


class Shadow:
    """`settings.shadow` percent of what is offered; safe between threads, and never in the way."""

    def __init__(self, settings: Settings) -> None:
        self._share = settings.shadow / 100
        self._settings = settings.override(traffic=Lane.BULK)
        self._queue: Queue[Offer] = Queue(WAITING)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._asked = self._failed = self._left_out = self._busy = 0
        self._overlaps: deque[float] = deque(maxlen=REMEMBERED)
        self._times: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._answered, self._error = 0, ""

    def offer(
        self, queries: Sequence[Query], options: Options, answers: Answers, live_s: float
    ) -> None:
        """One live search that was answered; returns at once."""
        if not self._share or random.random() >= self._share:
            return
        with self._lock:
            self._asked += 1
            if self._thread is None and not self._over.is_set():
                self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
                self._thread.start()
            try:
                self._queue.put_nowait(Offer(queries, options, answers, live_s))
                self._busy += 1
            except Full:
                self._left_out += 1

    def report(self, wait_s: float = 0.0) -> ShadowReport:
        """What was found so far; waits up to `wait_s` for what is under way."""
        end = time.monotonic() + wait_s
        while self._busy and time.monotonic() < end:
            time.sleep(0.01)
        with self._lock:
            live, ours = zip(*self._times, strict=True) if self._times else ((), ())
            return ShadowReport(
                self._asked,
                self._answered,
                self._failed,
                self._left_out,
                round(statistics.fmean(self._overlaps), 4) if self._overlaps else None,
                round(statistics.median(ours) / statistics.median(live), 3) if live else None,
                self._error,
            )

    def close(self, *, wait: bool = True) -> None:
        """Ask no more; `wait` until what is under way has ended, by its deadline."""
        self._over.set()
        if self._thread and wait:
            self._thread.join(self._settings.timeout_s + IDLE_S)

    def _work(self) -> None:
        with Encoders(self._settings) as encoders, Catalog(self._settings) as catalog:
            while not self._over.is_set():
                try:
                    offer = self._queue.get(timeout=IDLE_S)
                except Empty:
                    continue
                try:
                    self._follow(offer, encoders, catalog)
                except Exception as exc:  # whatever it is, it is no matter of the live search's
                    with self._lock:
                        self._failed += 1
                        self._error = f"{type(exc).__name__}: {exc}"
                    if isinstance(exc, RetrievalError):  # the candidate went, or its server
                        catalog.forget()
                        encoders.forget()
                finally:
                    with self._lock:
                        self._busy -= 1

    def _follow(self, offer: Offer, encoders: Encoders, catalog: Catalog) -> None:
        """Ask the candidate what was asked live, and compare."""
        deadline = Deadline(self._settings.timeout_s)
        candidate = catalog.find(Role.CANDIDATE, max_age_s=INFO_TTL_S, deadline=deadline)
        if candidate is None:
            with self._lock:
                self._left_out += 1
            return
        encoder = encoders.for_collection(candidate.info, deadline)
        good = [row for row, hits in enumerate(offer.answers) if not isinstance(hits, ItemError)]
        queries = [offer.queries[row] for row in good]
        if not queries:
            return
        start = time.perf_counter()
        encoded = encode(queries, encoder, candidate, offer.options.consistency, deadline)
        for error in filter(None, encoded.errors):
            raise error
        find = Finder(candidate, candidate.search, offer.options)
        found = find(queries, encoded.vectors, deadline)
        took_s = time.perf_counter() - start
        with self._lock:
            self._answered += 1
            self._times.append((offer.live_s, took_s))
            for row, hits in zip(good, found, strict=True):
                live = offer.answers[row]
                assert not isinstance(live, ItemError)
                self._overlaps.append(overlap_of(live, hits))
