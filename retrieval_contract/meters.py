"""What Triton's own metrics cannot know, beside them on its metrics port.

Only Triton's Python stub imports this file. There a metric is a message to another process and
back, some 20 to 40 µs: a run adds to numbers of its own, and a thread tells Triton twice a second.
Processes of one model (its instances) add to the same metrics, and a process that is started
again goes on from where the dead one was; the warm-up of each start counts.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from retrieval_contract.door import Refusal
from retrieval_contract.errors import ItemError
from retrieval_contract.models import PICTURES, QUERY_MASK, RUNS, TITLE_MASK
from retrieval_contract.release import RELEASE_PARAMETER
from retrieval_contract.tensors import Array

EVERY_S = 0.5
"""Between two tellings."""
ROWS = "retrieval_rows_total"
TOKENS, PADDING = "retrieval_tokens_total", "retrieval_padding_tokens_total"
ITEMS_REFUSED = "retrieval_items_refused_total"
REQUESTS_REFUSED = "retrieval_requests_refused_total"
RELEASE_INFO = "retrieval_release_info"
COUNTERS = {
    RUNS: "Runs of this model's computation; a merged batch may be cut into several",
    ROWS: "Rows in these runs",
    TOKENS: "Text tokens in these runs, padding not counted",
    PADDING: "Padded positions in these runs: computed for nothing",
    PICTURES: "Pictures decoded, or refused, in these runs",
    ITEMS_REFUSED: "Rows that got an item_status instead of a vector, by its reason",
    REQUESTS_REFUSED: "Whole requests that were turned away, by reason",
}

Key = tuple[str, str]
"""A counter and a reason, which is empty for counters that have none."""


class Meters:
    """One model's counters; safe to call from any thread, and cheap in all of them."""

    def __init__(self, model: str, release_id: str, on_step: Callable[[], None]) -> None:
        """`on_step` is told of each run and picture."""
        self.model, self._on_step = model, on_step
        self._lock, self._over = threading.Lock(), threading.Event()
        self._metrics: dict[Key, Any] = {}
        self._told: Counter[Key] = Counter()
        self._families = {
            name: pb_utils.MetricFamily(name, text, pb_utils.MetricFamily.COUNTER)
            for name, text in COUNTERS.items()
        }
        self._info = pb_utils.MetricFamily(
            RELEASE_INFO, "1 for the release that a model serves", pb_utils.MetricFamily.GAUGE
        )
        self._release = self._info.Metric(labels={"model": model, RELEASE_PARAMETER: release_id})
        self._release.set(1)
        names = [RUNS, ROWS, TOKENS, PADDING, PICTURES]
        reasons = [(REQUESTS_REFUSED, reason) for reason in Refusal]
        # Known from the start: a counter that appears with its first count hides that count.
        self._counts: Counter[Key] = Counter(
            dict.fromkeys([*((n, "") for n in names), *reasons], 0)
        )
        self._thread = threading.Thread(target=self._tell_often, name="meters", daemon=True)
        self._thread.start()

    def ran(self, feed: Mapping[str, Array]) -> None:
        """A run over these inputs, masks int32 (rows, tokens)."""
        mask = next(feed[m.name] for m in (QUERY_MASK, TITLE_MASK) if m.name in feed)
        self.prepared(mask, ())

    def prepared(self, mask: Array, status: Iterable[str]) -> None:
        """A run that had, or made, rows of this mask; `status` says which it refused."""
        self._on_step()
        tokens = int(mask.sum())
        with self._lock:
            self._counts[RUNS, ""] += 1
            self._counts[ROWS, ""] += len(mask)
            self._counts[TOKENS, ""] += tokens
            self._counts[PADDING, ""] += mask.size - tokens
        self.refused_items(status)

    def looked_at_picture(self) -> None:
        """One more of the run that is going on; many large ones take it minutes."""
        self._on_step()
        self._add(PICTURES, "")

    def refused_items(self, status: Iterable[str]) -> None:
        """Those of some rows' statuses that are not empty."""
        for problem in filter(None, status):
            self._add(ITEMS_REFUSED, ItemError.from_status(problem).reason)

    def refused_request(self, reason: Refusal) -> None:
        """A request was turned away whole."""
        self._add(REQUESTS_REFUSED, reason)

    def close(self) -> None:
        """Tell what is left, and no more."""
        self._over.set()
        self._thread.join()

    def _add(self, name: str, reason: str) -> None:
        with self._lock:
            self._counts[name, reason] += 1

    def _tell_often(self) -> None:
        while not self._over.is_set():
            self._tell()
            self._over.wait(EVERY_S)
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            counts = Counter(self._counts)
        for key, count in counts.items():
            if key not in self._metrics:
                name, reason = key
                labels = {"model": self.model} | ({"reason": reason} if reason else {})
                self._metrics[key] = self._families[name].Metric(labels=labels)
            if new := count - self._told[key]:
                self._metrics[key].increment(new)
            self._told[key] = count
