"""One deadline over several calls."""

from __future__ import annotations

import time

from retrieval_contract.errors import ContractError, DeadlineExceeded

SMALLEST_S = 1e-3
"""A spent deadline is passed on as this: the next call then fails by itself, at once."""
LARGEST_S = 86_400.0
"""A day: what waits for longer, or for ever, waits so long; locks cannot take more."""


class Deadline:
    """Seconds from now; `left_s` is what a call may still take."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ends = time.monotonic() + seconds
        """On the clock of `time.monotonic`."""

    @classmethod
    def of(cls, seconds: float | None, default_s: float) -> Deadline:
        """What a caller gave, be it 0; the default where that is nothing. ContractError for NaN."""
        wanted = default_s if seconds is None else seconds
        if wanted != wanted:
            raise ContractError(f"timeout_s: expected seconds, got {wanted}; give a number")
        return cls(min(wanted, LARGEST_S))

    def check(self, what: str) -> None:
        """DeadlineExceeded where nothing is left for `what`."""
        if self.passed:
            raise DeadlineExceeded(
                f"{what}: no time left of {self.seconds:g} s; raise the deadline"
            )

    @property
    def left_s(self) -> float:
        """Seconds left, never less than SMALLEST_S."""
        return max(self.ends - time.monotonic(), SMALLEST_S)

    @property
    def passed(self) -> bool:
        """Whether nothing is left."""
        return time.monotonic() >= self.ends
