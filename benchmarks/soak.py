"""Hours in minutes: does a server under steady load grow? Memory, file handles, shared memory.

It is looked after as in service, by a launcher in a process of its own: what that takes is counted,
and nothing of ours.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from benchmarks.overload import ANSWERED, PATIENT_S, Calls, arrivals, call, capacity, offer
from deploy.server import LOOPBACK, choose_ports
from deploy.stubs import regions
from retrieval_client.encoder import Encoder
from retrieval_client.settings import Settings
from retrieval_contract.errors import DeployError, ServerError

READY_S = 120.0
PRODUCTS_PER_S = 0.5
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
    release: Path,
    texts: Sequence[str],
    products: Sequence[tuple[str, bytes]],
    seconds: float,
    warm_s: float,
    log: IO[str] = sys.stderr,
) -> dict[str, object]:
    """Serve queries at LOAD of the capacity, and a product now and then; what grew after the first
    `warm_s` seconds. `ended`: the launcher, or the server that it first had."""
    with (
        launched(release, log) as kept,
        Encoder(Settings(triton=kept.grpc_address)) as encoder,
        ThreadPoolExecutor(1) as beside,
    ):
        rate = LOAD * capacity(kept, texts, 2.0)
        with watching(kept) as samples:
            pushed = beside.submit(push_slowly, encoder, products, seconds)
            queries = offer([encoder], texts, rate, seconds, PATIENT_S)
            calls = Calls.sum([queries, pushed.result()])
        ended = kept.process.poll() is not None or children_of(kept.process.pid) != [kept.server]
    rows = np.array([sample for sample in samples if sample[0] >= warm_s])
    growth = {
        name: growth_of(rows[:, 0], rows[:, 1 + at])
        for at, name in enumerate(("memory_bytes", "file_handles", "shared_memory_bytes"))
    }
    return {
        "seconds": seconds,
        "trials": len(calls.all),
        "answered": calls.counts.get(ANSWERED, 0),
        "products": pushed.result().counts.get(ANSWERED, 0),
        "failed": calls.failed,
        "outcomes": calls.counts,
        "ended": ended,
        "grew": [name for name, line in growth.items() if line.found],
        "per_hour": {name: round(line.per_hour, 1) for name, line in growth.items()},
        "interval": {name: [round(g.low, 1), round(g.high, 1)] for name, g in growth.items()},
    }


def push_slowly(encoder: Encoder, products: Sequence[tuple[str, bytes]], seconds: float) -> Calls:
    """PRODUCTS_PER_S with their pictures, for so long."""
    calls, drawn = Calls(), itertools.cycle(products)
    for due in arrivals(PRODUCTS_PER_S, seconds):
        title, picture = next(drawn)
        ask = partial(encoder.encode_products, [title], [picture])
        call(lambda left, ask=ask: ask(timeout_s=left).vector(0), due, PATIENT_S, calls)
    return calls


@dataclass(frozen=True)
class Kept:
    """A launcher, the server that it started (its process, and so its group), where that listens,
    and the name of its shared memory."""

    process: subprocess.Popen[bytes]
    server: int
    grpc_address: str
    shm_prefix: str


@contextmanager
def launched(release: Path, log: IO[str] = sys.stderr) -> Iterator[Kept]:
    """`python -m deploy.local`, once it serves; DeployError when it does not."""
    ports = choose_ports(LOOPBACK)
    flags = [f"--{name}-port={port}" for name, port in asdict(ports).items()]
    address, end = f"{LOOPBACK}:{ports.grpc}", time.monotonic() + READY_S
    with (
        tempfile.TemporaryDirectory() as place,
        Encoder(Settings(triton=address)) as encoder,
        subprocess.Popen(
            [sys.executable, "-m", "deploy.local", "--release", str(release), *flags],
            env=os.environ | {"TMPDIR": place},
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            while True:
                with suppress(ServerError):
                    encoder.served()
                    break
                if process.poll() is not None or time.monotonic() > end:
                    raise DeployError(f"{address}: nothing serves; look at the log of this run")
                time.sleep(0.1)
            (server,) = children_of(process.pid)
            (scratch,) = Path(place).glob("retrieval-triton-*")
            yield Kept(process, server, address, scratch.name)
        finally:
            process.terminate()


class watching:
    """While the block runs: seconds, bytes resident, handles, bytes in /dev/shm; every EVERY_S."""

    def __init__(self, kept: Kept) -> None:
        self.kept, self.samples = kept, list[tuple[float, float, float, float]]()
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
            ours = self.kept.process.pid, *processes_of(self.kept.server)
            for process in (Path(f"/proc/{pid}") for pid in ours):
                with suppress(OSError):  # it ended meanwhile
                    memory += int((process / "statm").read_text().split()[1]) * page
                    handles += len(list((process / "fd").iterdir()))
            shared = 0
            for region in regions(self.kept.shm_prefix):
                with suppress(OSError):
                    shared += region.stat().st_size
            self.samples.append((time.monotonic() - start, memory, handles, shared))


def processes_of(group: int) -> list[int]:
    """Everything in a process group."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                found.append(int(process.name))
    return found


def children_of(parent: int) -> list[int]:
    """Of all threads of a process, proc(5); none where it has ended."""
    with suppress(OSError):
        tasks = Path(f"/proc/{parent}/task").glob("*/children")
        return sorted(int(pid) for task in tasks for pid in task.read_text().split())
    return []


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
