"""Hours in minutes: does a server under steady load grow? Memory, file handles, shared memory."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from benchmarks.overload import ANSWERED, PATIENT_S, capacity, offer
from deploy.server import Server, triton
from retrieval_client.encoder import Encoder
from retrieval_client.settings import Settings

LOAD = 0.8
"""Of the capacity."""
EVERY_S = 2.0
BLOCKS = 10
"""The samples are drawn again in so many blocks: neighbours in time resemble each other."""
DRAWS = 1000
SMALLEST = 1e-3
"""Of the start: half a megabyte of a server of 500."""


@dataclass(frozen=True)
class Growth:
    """Of one quantity, a straight line through its samples: start, slope an hour, and its interval.

    The interval holds 95 % of the slopes when blocks of samples are drawn again.
    """

    start: float
    hours: float
    per_hour: float
    low: float
    high: float

    @property
    def found(self) -> bool:
        """Whether the line rises for certain, and by more than a thousandth in all."""
        return self.low > 0 and self.per_hour * self.hours > SMALLEST * self.start


def soak(
    release: Path, texts: Sequence[str], seconds: float, warm_s: float, log: IO[str] = sys.stderr
) -> dict[str, object]:
    """Serve at LOAD of the capacity; what grew after the first `warm_s` seconds."""
    with triton(release, log=log) as server, Encoder(settings_of(server)) as encoder:
        rate = LOAD * capacity(server, texts, 2.0)
        with watching(server) as samples:
            calls = offer([encoder], texts, rate, seconds, PATIENT_S)
        ended = server.process.poll() is not None
    rows = np.array([sample for sample in samples if sample[0] >= warm_s])
    growth = {
        name: growth_of(rows[:, 0], rows[:, 1 + at])
        for at, name in enumerate(("memory_bytes", "file_handles", "shared_memory_bytes"))
    }
    return {
        "seconds": seconds,
        "trials": len(calls.all),
        "answered": calls.counts.get(ANSWERED, 0),
        "failed": calls.failed,
        "outcomes": calls.counts,
        "ended": ended,
        "grew": [name for name, line in growth.items() if line.found],
        "per_hour": {name: round(line.per_hour, 1) for name, line in growth.items()},
        "interval": {name: [round(g.low, 1), round(g.high, 1)] for name, g in growth.items()},
    }


def settings_of(server: Server) -> Settings:
    """Of a client to it."""
    return Settings(triton=server.grpc_address)


class watching:
    """While the block runs: seconds, bytes resident, handles, bytes in /dev/shm; every EVERY_S."""

    def __init__(self, server: Server) -> None:
        self.server, self.samples = server, list[tuple[float, float, float, float]]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> list[tuple[float, float, float, float]]:
        self._thread.start()
        return self.samples

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        start, page = time.monotonic(), os.sysconf("SC_PAGE_SIZE")
        while not self._over.wait(EVERY_S):
            memory, handles = 0, 0
            for process in processes_of(self.server.process.pid):
                with suppress(OSError):  # it ended meanwhile
                    memory += int((process / "statm").read_text().split()[1]) * page
                    handles += len(list((process / "fd").iterdir()))
            shared = 0
            for region in Path("/dev/shm").glob(f"{self.server.instance.shm_prefix}*"):
                with suppress(OSError):
                    shared += region.stat().st_size
            self.samples.append((time.monotonic() - start, memory, handles, shared))


def processes_of(group: int) -> list[Path]:
    """/proc/<pid> of everything in a process group."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                found.append(process)
    return found


def growth_of(seconds: np.ndarray, values: np.ndarray, seed: int = 0) -> Growth:
    """The line of least squares, and a block bootstrap of its slope (Künsch 1989)."""
    slope, start = np.polyfit(seconds, values, 1)
    rng = np.random.default_rng(seed)
    blocks = np.array_split(np.arange(len(values)), BLOCKS)
    slopes = []
    rest = values - (slope * seconds + start)
    for _ in range(DRAWS):
        drawn = np.concatenate([rest[blocks[at]] for at in rng.integers(0, BLOCKS, BLOCKS)])
        drawn = np.resize(drawn, len(values))
        slopes.append(np.polyfit(seconds, slope * seconds + start + drawn, 1)[0])
    low, high = np.percentile(slopes, [2.5, 97.5])
    at_first, hours = float(slope * seconds[0] + start), float(seconds[-1] - seconds[0]) / 3600
    return Growth(at_first, hours, float(slope) * 3600, float(low) * 3600, float(high) * 3600)
