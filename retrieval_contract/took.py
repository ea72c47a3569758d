"""What a Python model's process spent on one run, for callers who ask (`models.EXPLAIN`).

Triton's statistics cannot tell tokenizer from tower where both are one model.
"""

from __future__ import annotations

from typing import NamedTuple


class Took(NamedTuple):
    """Seconds of one run, in the order of `models.TIMINGS`."""

    wait_s: float = 0.0
    """Inside the process, before the run began."""
    tokenize_s: float = 0.0
    tower_s: float = 0.0
    model_s: float = 0.0
    """From when the process had the request until its answer was ready: all of the above, too."""
