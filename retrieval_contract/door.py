"""The queue in front of a model's work: two lanes, bounded in time, and late work is dropped.

Triton's own queue takes everything, and its bounds and priorities can stall its batcher for half a
second (docs/decisions.md). So its queue stays plain, requests come straight here, and who cannot be
answered within his time is told so at once instead of after it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

TRAFFIC = "traffic"
"""The request parameter that names a lane."""
PATIENCE_S = 60.0
"""The time of a request that names none."""
SHARE = 0.5
"""Of its time that a request may be expected to wait here: the rest is the way to us and back."""
QUEUE = "queue_batches"
"""The config parameter that says how many batches may wait, whatever their time: what waits here
takes memory."""
UNSAID_BATCHES = 64
"""Of a release that was made before its configs said so."""
HOLD_S = 5e-3
"""Who lets in requests pauses so long while a batch is computed: the next come in one parcel."""
MEMORY = 0.9
"""What the pace still knows of a batch after the next one."""

Item = TypeVar("Item")


class Lane(StrEnum):
    """Who goes first: somebody is waiting for a search, nobody for an ingestion."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


class Refusal(StrEnum):
    """Why a request was not computed; the first word of the error that its caller gets."""

    BUSY = "busy"
    LATE = "late"


class Busy(Exception):
    """It could not be answered in time."""


@dataclass(frozen=True)
class Visit(Generic[Item]):
    """One request: its rows, and until when (monotonic seconds) an answer is of use."""

    item: Item
    rows: int
    ends: float


class Pace:
    """Seconds a row when there is a queue; 0 while nobody knows.

    Batches of at least half of `most_rows` tell. A smaller one costs more a row than a queue of
    many will, and who judged by it would refuse what can be answered: it may only lower the pace.
    That it must: after a batch during which the process stood still, nobody would form a large one
    again.
    """

    def __init__(self, most_rows: int) -> None:
        self._least = most_rows / 2
        self._spent_s, self._rows = 0.0, 0.0

    def took(self, rows: int, seconds: float) -> None:
        """One more batch."""
        if rows >= self._least or seconds < rows * self.seconds_per_row:
            self._spent_s = self._spent_s * MEMORY + seconds
            self._rows = self._rows * MEMORY + rows

    @property
    def seconds_per_row(self) -> float:
        """Late batches weigh more than early ones."""
        return self._spent_s / self._rows if self._rows else 0.0


class Door(Generic[Item]):
    """Lets requests in or refuses them, and hands out batches of at most `most_rows`; no more than
    `queue_batches` of these wait.

    Safe between threads: any number enter, one takes, computes, and says `done`.
    """

    def __init__(
        self, most_rows: int, queue_batches: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._longest, self._clock = most_rows, most_rows * queue_batches, clock
        self._lanes: dict[Lane, deque[Visit[Item]]] = {lane: deque() for lane in Lane}
        self._rows = dict.fromkeys(Lane, 0)
        self._pace = Pace(most_rows)
        self._under_way, self._began = 0, 0.0
        self._changed = threading.Condition()
        self._closed = False

    def enter(self, item: Item, rows: int, lane: Lane, time_s: float = PATIENCE_S) -> None:
        """Queue a request; Busy when what is ahead of it takes longer than its time allows."""
        now = self._clock()
        with self._changed:
            ahead = self._rows[Lane.INTERACTIVE]
            ahead += self._rows[lane] if lane is Lane.BULK else 0
            wait = max(0.0, (ahead + self._under_way) * self._pace.seconds_per_row)
            if self._under_way:
                wait = max(0.0, wait - (now - self._began))
            if wait > time_s * SHARE or ahead > self._longest:
                raise Busy(
                    f"expected to begin within {time_s * SHARE:.3g} s, got {ahead} rows ahead, "
                    f"which take {wait:.3g} s; try again later"
                )
            self._lanes[lane].append(Visit(item, rows, now + time_s))
            self._rows[lane] += rows
            self._changed.notify_all()

    def hold(self) -> None:
        """Wait while a batch is computed, HOLD_S at most."""
        with self._changed:
            if self._under_way:
                self._changed.wait(HOLD_S)

    def take(self) -> tuple[list[Item], list[Item]] | None:
        """Wait for requests: those to compute now, those whose time has passed; None once closed.

        The interactive lane goes first, and a batch holds one lane alone.
        """
        with self._changed:
            while not any(self._lanes.values()):
                if self._closed:
                    return None
                self._changed.wait()
            now, rows = self._clock(), 0
            taken: list[Item] = []
            late: list[Item] = []
            for lane, queue in self._lanes.items():
                while queue and rows + queue[0].rows <= self._most:
                    visit = queue.popleft()
                    self._rows[lane] -= visit.rows
                    # The batch grows with it: would it still be answered in time? Who is alone
                    # takes nobody's, and only what is computed can correct the pace.
                    alone = not rows and not any(self._rows.values())
                    needs = 0.0 if alone else (rows + visit.rows) * self._pace.seconds_per_row
                    if visit.ends < now + needs:
                        late.append(visit.item)
                    else:
                        taken.append(visit.item)
                        rows += visit.rows
                if taken:
                    break
            self._under_way, self._began = rows, now
            return taken, late

    def done(self) -> None:
        """What was taken is computed."""
        with self._changed:
            if self._under_way:
                self._pace.took(self._under_way, self._clock() - self._began)
            self._under_way = 0
            self._changed.notify_all()

    def close(self) -> None:
        """`take` gives None when all who entered have been handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
