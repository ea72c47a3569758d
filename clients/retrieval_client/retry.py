"""When to ask a full or silent server again: later, at random, and seldom.

A full server is not helped by callers who ask twice. So every call earns a part of a further
attempt, and once these are spent, refusals go straight to the caller (a retry budget, as in chapter
22 of Google's "Site Reliability Engineering" and gRPC's proposal A6).
"""

from __future__ import annotations

import random
import threading
import time

from retrieval_client.deadline import Deadline

EARNED, MOST = 0.1, 10.0
"""Further attempts that one call earns; so many can be saved up."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 50e-3, 1.0


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
