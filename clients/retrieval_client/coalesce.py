"""Calls that come while others are under way travel together.

A request has a fixed price (wire, queue, a process to wake) that a short text does not: many
callers in one request pay it once. A lone caller is sent at once, and whoever comes meanwhile goes
with the next request. That one is held only while callers keep coming: those whom one answer has
released ask again within moments of each other, and the first of them must not travel alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from retrieval_client.deadline import Deadline
from retrieval_contract.door import MEMORY, SHARE, Pace
from retrieval_contract.errors import DeadlineExceeded, RetrievalError, ServerBusy

GATHER_STEP_S, GATHER_S = 0.5e-3, 10e-3
"""A request that follows a shared one is held for steps in which somebody came, so long at most."""

Item = TypeVar("Item")
Results = TypeVar("Results", bound="Sliceable")


class Sliceable(Protocol):
    """Results of several items, of which each caller gets a slice."""

    def __getitem__(self: Results, part: slice) -> Results: ...


def taken() -> threading.Lock:
    """A lock that somebody else will release."""
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class _Call(Generic[Item, Results]):
    """One caller's items, and what has become of them."""

    items: Sequence[Item]
    deadline: Deadline
    results: Results | None = None
    error: RetrievalError | None = None
    leads: bool = False
    cut: bool = False
    """Whether a request was given up, for somebody else's deadline, before it answered this."""
    turn: threading.Lock = field(default_factory=taken)
    """Released when there is something to do: to lead, or to take what came."""
    batch: list[_Call[Item, Results]] = field(default_factory=list)
    """Those whom it leads."""

    @property
    def done(self) -> bool:
        """Answered or failed."""
        return self.results is not None or self.error is not None


class Coalescer(Generic[Item, Results]):
    """Merges the calls of many threads; each keeps its own deadline and gets its own results.

    `send` gets at most `most` items and the shortest deadline among their callers, and returns one
    result an item. One request is under way at a time, and a second one when half of `most` calls
    wait. Their senders are the callers themselves, so there is no thread to stop.
    """

    def __init__(
        self, send: Callable[[list[Item], Deadline], Results], most: int, *, refuse: bool = True
    ) -> None:
        """`refuse`: tell those who would wait too long so at once, as `__call__` says."""
        self._send, self._most, self._refuse = send, most, refuse
        self._under_way = 0
        self._pace, self._last_answer = Pace(most), 0.0
        self._usual_s = 0.0
        """What a request takes lately, whatever its size and whoever else asks the same server."""
        self._waiting: deque[_Call[Item, Results]] = deque()
        self._ahead = 0
        """Items of those who are not answered yet."""
        self._lock = threading.Lock()
        self._shared = False
        """Whether the last request had several callers."""
        self._all = 0
        """How many may wait, once those whom the last answer released have come back."""
        self._gathering: list[_Call[Item, Results]] = []
        self._leader: _Call[Item, Results] | None = None
        """Who has been appointed and has not taken yet: whoever waits in front travels with it."""

    def __call__(self, items: Sequence[Item], deadline: Deadline) -> Results:
        """Results of these items, at most `most`; raises what `send` raises, or DeadlineExceeded.

        Raises ServerBusy when those who wait would take more than its SHARE of the deadline, or
        an answer, when it is its turn, more than that of what is left.
        A request that fails fails for all its callers, but one that took too long for the most
        impatient of them is sent again for those who have time, with nobody who has less than
        half as much.
        """
        call: _Call[Item, Results] = _Call(items, deadline)
        try:
            self._join(call)
            while not call.done:
                if not call.turn.acquire(timeout=deadline.left_s):
                    self._give_up(call)
                if call.leads:
                    self._lead(call)
        except BaseException as exc:  # an interrupt is this thread's own: the others go on
            call.error = RetrievalError(f"interrupted: {exc!r}")
            self._leave(call)
            raise
        if call.results is None:
            raise call.error or RetrievalError("neither answered nor failed")
        return call.results

    def _join(self, call: _Call[Item, Results]) -> None:
        with self._lock:
            self._refuse_beyond(call.deadline)
            self._waiting.append(call)
            self._ahead += len(call.items)
            self._appoint()
            while self._gathering and self._enough():
                self._gathering.pop().turn.release()

    def _leave(self, call: _Call[Item, Results]) -> None:
        """Wherever it is; somebody else leads whom it would have led."""
        with self._lock:
            self._drop(call)
            if call in self._gathering:
                self._gathering.remove(call)
        if call.leads:
            self._hand_on(call)

    def _drop(self, call: _Call[Item, Results]) -> None:
        """Out of the queue, if it waits there; under the lock."""
        if call in self._waiting:
            self._waiting.remove(call)
            self._ahead -= len(call.items)

    def _refuse_beyond(self, deadline: Deadline) -> None:
        wait = self._ahead * self._pace.seconds_per_row
        if self._refuse and wait > deadline.left_s * SHARE:
            raise ServerBusy(
                f"expected an answer within {deadline.seconds} s, got {self._ahead} texts of this "
                f"client ahead, which take {wait:.3g} s; try again later, or serve with more"
            )

    def _appoint(self) -> None:
        """Let the oldest caller lead, where a request may go out; under the lock."""
        allowed = 1 if len(self._waiting) < self._most // 2 else 2
        if self._waiting and self._under_way < allowed and self._leader is None:
            self._under_way += 1
            self._leader = self._waiting[0]
            self._leader.leads = True
            self._leader.turn.release()

    def _give_up(self, call: _Call[Item, Results]) -> None:
        """Leave the queue, unless it is our turn this very moment."""
        with self._lock:
            if call.leads:
                call.turn.acquire()  # it was released this very moment
            if call.leads or call.done:
                return
            self._drop(call)
            call.error = _too_late(call)

    def _lead(self, mine: _Call[Item, Results]) -> None:
        """Send for the oldest callers, then let the oldest of those who came meanwhile lead."""
        if self._shared and not mine.batch:
            self._gather(mine)
        with self._lock:
            batch = mine.batch
            if not batch:
                self._take(batch)
                self._shared = len(batch) > 1
            if batch and mine not in batch:
                self._let_lead(batch[0], mine)
                return
        if not batch:  # nobody has time enough
            self._hand_on(mine)
            return
        items = [item for call in batch for item in call.items]
        began, start = time.monotonic(), 0
        first = min((call.deadline for call in batch), key=_ends)
        try:
            results = self._send(items, first)
            self._count(len(items), began)
            for call in batch:
                call.results = results[start : start + len(call.items)]
                start += len(call.items)
        except RetrievalError as exc:
            self._fail(batch, exc, out_of_time=isinstance(exc, DeadlineExceeded) or first.passed)
        self._hand_on(mine)

    def _let_lead(self, first: _Call[Item, Results], mine: _Call[Item, Results]) -> None:
        """Who leads travels along, or others' time would be his: he was turned away, or there is no
        room left behind those who came back to the front; under the lock."""
        first.batch, mine.batch = mine.batch, []
        mine.leads, first.leads = False, True
        first.turn.release()

    def _fail(
        self, batch: list[_Call[Item, Results]], exc: RetrievalError, out_of_time: bool
    ) -> None:
        """An error that came with the end of somebody's time is not that of those who have some."""
        for call in batch:
            if isinstance(exc, DeadlineExceeded) and call.deadline.passed:
                call.error = _too_late(call)
            elif call.deadline.passed or not out_of_time:
                # One exception that is raised in two threads mixes their traces.
                call.error = type(exc)(*exc.args)
            else:
                call.cut = True

    def _count(self, rows: int, began: float) -> None:
        """Two requests that overlap are as fast as their answers follow each other."""
        with self._lock:
            now = time.monotonic()
            self._pace.took(rows, now - max(began, self._last_answer))
            self._usual_s += (1 - MEMORY) * (now - began - self._usual_s)
            self._last_answer = now

    def _gather(self, mine: _Call[Item, Results]) -> None:
        """While callers keep coming there is nothing to be lost; woken when all have come."""
        end, before = time.monotonic() + GATHER_S, 0
        with self._lock:
            if self._enough():
                return
            self._gathering.append(mine)
        while before < (now := len(self._waiting)) and time.monotonic() < end:
            before = now
            if mine.turn.acquire(timeout=GATHER_STEP_S):
                return
        with self._lock:
            if mine in self._gathering:
                self._gathering.remove(mine)
            else:  # woken too late to notice
                mine.turn.acquire()

    def _enough(self) -> bool:
        return len(self._waiting) >= min(self._most, self._all)

    def _take(self, batch: list[_Call[Item, Results]]) -> None:
        """Those who travel together now; under the lock."""
        self._leader = None
        count, now = 0, time.monotonic()
        shortest, wanted = float("inf"), 0.0
        while self._waiting and count + len(self._waiting[0].items) <= self._most:
            left = _ends(self._waiting[0].deadline) - now
            if self._hopeless(left, count + len(self._waiting[0].items)):
                self._turn_away(self._waiting.popleft())
                continue
            shortest = min(shortest, left)
            if self._waiting[0].cut:
                wanted = max(wanted, left / 2)
            if batch and shortest < wanted:
                break  # somebody would be cut short again
            batch.append(self._waiting.popleft())
            count += len(batch[-1].items)

    def _hopeless(self, left_s: float, items: int) -> bool:
        """Whether a request of so many would take more than a SHARE of this time; under the lock.

        Who is alone takes nobody's, and only what is sent can correct what we expect.
        """
        needs_s = max(self._usual_s, items * self._pace.seconds_per_row)
        return self._refuse and self._ahead > items and needs_s > left_s * SHARE

    def _turn_away(self, call: _Call[Item, Results]) -> None:
        """Before its time is over, and without costing anybody theirs; under the lock."""
        self._ahead -= len(call.items)
        call.error = ServerBusy(
            f"expected time for an answer, got {call.deadline.left_s:.3g} s that are left of "
            f"{call.deadline.seconds} s; try again later, or serve with more"
        )
        if not call.leads:
            call.turn.release()

    def _hand_on(self, mine: _Call[Item, Results]) -> None:
        with self._lock:
            batch, mine.batch = mine.batch, []
            self._under_way -= 1
            mine.leads = False
            if self._leader is mine:  # interrupted before it took
                self._leader = None
            for call in reversed(batch):
                if call.done:
                    self._ahead -= len(call.items)
                else:
                    self._waiting.appendleft(call)
            self._all = len(self._waiting) + sum(call.done for call in batch)
            self._appoint()
            for call in batch:
                if call.done and call is not mine:
                    call.turn.release()


def _ends(deadline: Deadline) -> float:
    return deadline.ends


def _too_late(call: _Call[Item, Results]) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"no answer within {call.deadline.seconds} s, waiting included; raise the deadline"
    )
