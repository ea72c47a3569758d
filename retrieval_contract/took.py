"""What a Python model's process spent on one run, for callers who ask (`models.EXPLAIN`).

Triton's statistics cannot tell tokenizer from tower where both are one model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple


class Took(NamedTuple):
    """Seconds of one run, in the order of `models.TIMINGS`."""

    wait_s: float = 0.0
    """Inside the process, before the run began."""
    tokenize_s: float = 0.0
    tower_s: float = 0.0
    model_s: float = 0.0
    """From when the process had the request until its answer was ready: all of the above, too."""


@dataclass
class Stopwatch:
    """Started when the process has a request; the model adds what each stage took."""

    wait_s: float = 0.0
    tokenize_s: float = 0.0
    tower_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def took(self) -> Took:
        """Until now."""
        model_s = time.perf_counter() - self.began
        return Took(self.wait_s, self.tokenize_s, self.tower_s, model_s)
