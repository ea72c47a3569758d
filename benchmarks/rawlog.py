"""The raw log of one load: written by the generator, judged afterwards by `report`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from retrieval_contract.errors import SourceError


@dataclass(frozen=True)
class Sample:
    """One request: when it was due (seconds from the start of the load), and how it went.

    `late_ms` is from due to sent, `service_ms` from sent to answered; `error` is empty when good.
    """

    at_s: float
    late_ms: float
    service_ms: float
    error: str

    @property
    def response_ms(self) -> float:
        """From due to answered: what a shopper waits."""
        return self.late_ms + self.service_ms


@dataclass(frozen=True)
class RawLog:
    """All requests of a load, warm-up included, and what the generator says of itself.

    `cpu_share` is CPU seconds per second of the measured time, 1 = one whole core; `dropped`
    counts arrivals that were never sent.
    """

    warmup_s: float
    cpu_share: float
    dropped: int
    samples: list[Sample]

    def write(self, path: Path) -> None:
        """JSON lines: the generator's facts first, then one line a request."""
        facts = {k: v for k, v in vars(self).items() if k != "samples"}
        lines = [json.dumps(line) for line in (facts, *map(asdict, self.samples))]
        path.write_text("\n".join(lines) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path) -> RawLog:
        """What `write` wrote; SourceError when it is not there or not whole."""
        try:
            facts, *samples = map(json.loads, path.read_text("utf-8").splitlines())
            return cls(**facts, samples=[Sample(**sample) for sample in samples])
        except (OSError, ValueError, TypeError) as exc:
            raise SourceError(f"{path}: not a raw log ({exc}); run the load again") from exc
