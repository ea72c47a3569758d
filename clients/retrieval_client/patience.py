"""Waiting for a server that is away, by those who have time: pushes and builds."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from retrieval_contract.errors import (
    AccessDenied,
    CatalogUnavailable,
    DeadlineExceeded,
    ServerUnavailable,
)

AWAY = (ServerUnavailable, DeadlineExceeded, CatalogUnavailable)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0

T = TypeVar("T")


class Patient:
    """Repeats calls while their server is away, at growing, random intervals, for `retry_s`; not
    where it refuses us.

    Only for calls that may be repeated without harm: encoding, upserts, deletes, reads.
    """

    def __init__(self, retry_s: float) -> None:
        self.retry_s = retry_s
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Nobody waits any more: the next failure is raised."""
        self._stopped.set()

    def __call__(self, call: Callable[[], T]) -> T:
        """The result; raises what the last attempt raised."""
        end = time.monotonic() + self.retry_s
        pause = FIRST_PAUSE_S
        while True:
            try:
                return call()
            except AWAY as exc:
                if isinstance(exc, AccessDenied) or time.monotonic() + pause > end:
                    raise
                if self._stopped.wait(pause * random.uniform(0.5, 1.0)):
                    raise
                pause = min(pause * 2, LONGEST_PAUSE_S)
