"""When, and how, to ask a full or silent server again: later, at random, and seldom.

A full server is not helped by callers who ask twice. So every call earns a part of a further
attempt, and once these are spent, refusals go straight to the caller (a retry budget, as in chapter
22 of Google's "Site Reliability Engineering" and gRPC's proposal A6).
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import grpc

from retrieval_client.deadline import Deadline
from retrieval_contract.errors import DeadlineExceeded

EARNED, MOST = 0.1, 10.0
"""Further attempts that one call earns; so many can be saved up."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 50e-3, 1.0
LINGER_S = 10.0
"""So long a server may go on with what nobody waits for, before it is told."""


class RetryBudget:
    """Shared by all calls of a client; safe between threads."""

    def __init__(self) -> None:
        self._saved = MOST
        self._lock = threading.Lock()

    def earn(self) -> None:
        """One more call."""
        with self._lock:
            self._saved = min(self._saved + EARNED, MOST)

    def spend(self) -> bool:
        """Whether a further attempt may be made."""
        with self._lock:
            if self._saved < 1:
                return False
            self._saved -= 1
            return True


class Backoff:
    """Pauses of one call, each drawn between nothing and a bound that doubles ("full jitter")."""

    def __init__(self, deadline: Deadline, budget: RetryBudget) -> None:
        self._deadline, self._budget = deadline, budget
        self._bound_s = FIRST_PAUSE_S

    def wait(self) -> bool:
        """Whether to ask again, after the pause that is due; not where no time would be left."""
        pause = random.uniform(0, self._bound_s)
        if pause >= self._deadline.left_s or not self._budget.spend():
            return False
        time.sleep(pause)
        self._bound_s = min(2 * self._bound_s, LONGEST_PAUSE_S)
        return True


class Beside:
    """Attempts at one answer, of which an unanswered one goes on beside the next.

    What takes long may be lost or just slow, and nobody says which. So the first good answer is
    taken, to whichever attempt it is. Dearer than a plain call by a thread's wake-ups (0.15 ms).
    What nobody waits for any more is left to end by itself: Triton 2.51 may die of what is
    cancelled (triton-inference-server/server, issues 7368 and 8034).
    """

    def __init__(self, send: Any, deadline: Deadline) -> None:
        """`send`: a method of a gRPC stub, for one request and one reply."""
        self._send, self._deadline = send, deadline
        self._calls: list[Any] = []
        self._ended = threading.Event()

    def __call__(self, request: Any, *, timeout: float, metadata: Any) -> Any:
        """As `send`, and raises what it raises; but DeadlineExceeded gives nothing up."""
        leave_s = self._deadline.left_s + LINGER_S
        call = self._send.future(request, timeout=leave_s, metadata=metadata)
        self._calls.append(call)
        call.add_done_callback(lambda ended: self._ended.set())  # without one gRPC would cancel it
        return self.wait(call, Deadline(timeout))

    @property
    def slow(self) -> Any:
        """An attempt that is not answered yet; None where there is none."""
        return next((call for call in self._calls if not call.done()), None)

    def wait(self, latest: Any, patience: Deadline) -> Any:
        """The first good answer there is; raises what became of the latest attempt."""
        while True:
            self._ended.clear()
            for call in self._calls:
                if call.done() and call.code() is grpc.StatusCode.OK:
                    return call.result()
            if latest.done():
                return latest.result()
            if not self._ended.wait(patience.left_s):
                raise DeadlineExceeded(
                    f"no answer within {patience.seconds:g} s; raise the deadline"
                )
