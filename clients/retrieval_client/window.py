"""How many requests a push keeps under way: as many as still make it faster.

Too few leave the server waiting for us; more than it can use only queue, and cost those who search.
So the window grows while the rate grows with it, and shrinks when the server says that it is full
(additive increase, multiplicative decrease, as TCP's congestion control).
"""

from __future__ import annotations

import threading
import time

FEWEST, FIRST, MOST = 2, 4, 32
GAIN = 1.03
"""A wider window must be this much faster to stay."""


class Window:
    """Counts answers; `size` is how many requests may be under way now."""

    def __init__(self, first: int = FIRST) -> None:
        self.size = first
        self._best, self._best_size = 0.0, first
        self._rows, self._answers, self._since = 0, 0, time.monotonic()
        self._lock = threading.Lock()

    def answered(self, rows: int, now: float | None = None) -> None:
        """A request of so many rows was answered."""
        with self._lock:
            now = time.monotonic() if now is None else now
            self._rows, self._answers = self._rows + rows, self._answers + 1
            if self._answers < 4 * self.size or now <= self._since:
                return
            rate = self._rows / (now - self._since)
            if rate > self._best * GAIN:
                self._best, self._best_size = rate, self.size
                self._resize(self.size + 1, now)
            else:  # not worth it: back, and a look again later, for a server may become faster
                self._best = 0.9 * self._best + 0.1 * rate
                self._resize(self._best_size if self.size != self._best_size else self.size, now)

    def refused(self, now: float | None = None) -> None:
        """The server said that it is full."""
        with self._lock:
            self._best = 0.0
            self._resize(self.size // 2, time.monotonic() if now is None else now)
            self._best_size = self.size

    def _resize(self, size: int, now: float) -> None:
        self.size = min(max(size, FEWEST), MOST)
        self._rows, self._answers, self._since = 0, 0, now
