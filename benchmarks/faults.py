"""Faults under load: processes that are killed, servers that are restarted; who noticed?

Callers never stop asking, and know what the answers are. Each scenario says how many of them
failed, how long after the fault, and whether anybody ever got a wrong vector.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from deploy.local import supervised
from deploy.server import LOOPBACK, Ports, Server, choose_ports, triton
from deploy.stubs import stubs_of
from deploy.supervisor import HUNG_S, Restarts
from retrieval_client.encoder import Encoder
from retrieval_client.settings import Settings
from retrieval_contract.probes import probe_pictures

BACK_S = 5.0
"""After the death of a model's process, and so long, no request may fail any more."""
SERVER_BACK_S = 15.0
"""After the death of the whole server."""
CALM_S = 1.0
"""Watched after that, and before the next fault."""
TIMEOUT_S = 5.0
FAR = 1e-4
"""A value of a vector that is off by more is wrong."""


@dataclass(frozen=True)
class Outcome:
    """Of `trials` faults. `late_failures`: requests that failed when all had to be well again.

    `back_s`: of each fault, how long after it the last request failed; 0 where none did.
    """

    trials: int
    answered: int
    failed: int
    wrong: int
    late_failures: int
    back_s: list[float]
    errors: list[str]
    """The first few, as callers saw them."""


@dataclass
class Load:
    """Threads that share a client and never stop asking, for queries and products."""

    settings: Settings
    failed: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    slowest_s: float = 0.0
    wrong: int = 0

    @contextmanager
    def running(self) -> Iterator[Load]:
        """While the block runs."""
        over = threading.Event()
        with Encoder(self.settings) as encoder:
            asks = self._asks(encoder)
            right = [ask() for ask in asks]
            threads = [
                threading.Thread(target=self._keep_asking, args=(*pair, over))
                for pair in zip(asks, right, strict=True)
            ]
            for thread in threads:
                thread.start()
            try:
                yield self
            finally:
                over.set()
                for thread in threads:
                    thread.join()

    def _asks(self, encoder: Encoder) -> Sequence[Callable[[], np.ndarray]]:
        picture = probe_pictures()[0]
        texts = ["red shoes", "navy blue shirt for men", "a watch"]
        return [
            *(lambda text=text: encoder.encode_queries([text]).vectors for text in texts),
            lambda: encoder.encode_products(["a red shirt"], [picture]).vectors,
        ]

    def _keep_asking(
        self, ask: Callable[[], np.ndarray], right: np.ndarray, over: threading.Event
    ) -> None:
        while not over.is_set():
            start = time.monotonic()
            try:
                vectors = ask()
            except Exception as exc:  # whatever it is, somebody has no answer
                self.failed.append(time.monotonic())
                self.errors.append(f"{type(exc).__name__}: {exc}")
                time.sleep(0.05)
                continue
            self.answered.append(time.monotonic())
            self.slowest_s = max(self.slowest_s, self.answered[-1] - start)
            self.wrong += not (np.abs(vectors - right).max() <= FAR)  # and NaN is no answer

    def calm_s(self) -> float:
        """For how long nobody has failed, and somebody was answered."""
        since = max(self.failed, default=0.0)
        return max(self.answered[-1] - since, 0.0)

    def outcome(self, faults: Sequence[float], back_s: float) -> Outcome:
        """What these faults did, which happened at those times."""
        late, lasted = 0, []
        for at, until in zip(faults, [*faults[1:], float("inf")], strict=True):
            after = [moment - at for moment in self.failed if at <= moment < until]
            late += sum(seconds > back_s for seconds in after)
            lasted.append(round(max(after, default=0.0), 2))
        counts = (len(self.answered), len(self.failed), self.wrong)
        return Outcome(len(faults), *counts, late, lasted, self.errors[:5])


@contextmanager
def kept(
    release: Path, log: IO[str] = sys.stderr, restarts: Restarts | None = None
) -> Iterator[Server]:
    """A server that is looked after, as `python -m deploy.local` does."""
    with triton(release, log=log) as server, supervised(server, HUNG_S, restarts):
        yield server


def stub_kills(release: Path, trials: int, log: IO[str] = sys.stderr) -> Outcome:
    """Kill one model's process after the other while callers ask."""
    with (
        kept(release, log) as server,
        Load(Settings(triton=server.grpc_address, timeout_s=TIMEOUT_S)).running() as load,
    ):
        models = sorted({stub.model for stub in stubs_of(server.process.pid)})
        killed = []
        for trial in range(trials):
            time.sleep(CALM_S)
            model = models[trial % len(models)]
            victim = next(stub for stub in stubs_of(server.process.pid) if stub.model == model)
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(time.monotonic())
            time.sleep(BACK_S + CALM_S)
    return load.outcome(killed, BACK_S)


def server_kills(release: Path, trials: int, log: IO[str] = sys.stderr) -> Outcome:
    """End the server itself while callers ask, by SIGKILL and SIGABRT in turn.

    The supervisor never tires here, and makes no pauses: they would add to `back_s`.
    """
    with (
        kept(release, log, Restarts(most=trials + 1, pause_s=0.0)) as server,
        Load(Settings(triton=server.grpc_address, timeout_s=TIMEOUT_S)).running() as load,
    ):
        killed = []
        for trial in range(trials):
            time.sleep(CALM_S)
            victim = server.process.pid
            os.kill(victim, (signal.SIGKILL, signal.SIGABRT)[trial % 2])
            killed.append(time.monotonic())
            end = killed[-1] + SERVER_BACK_S
            while time.monotonic() < end:
                if server.process.pid != victim and load.calm_s() > CALM_S:
                    break
                time.sleep(0.1)
            time.sleep(CALM_S)
    return load.outcome(killed, SERVER_BACK_S)


def rolling_restart(release: Path, times: int, log: IO[str] = sys.stderr) -> Outcome:
    """Drain and restart each of two replicas in turn, so many times; nobody may fail."""
    with ExitStack() as stack:
        replicas = [Replica(release, choose_ports(LOOPBACK), log) for _ in range(2)]
        for replica in replicas:
            stack.callback(replica.stop)
            replica.start()
        both = ",".join(replica.address for replica in replicas)
        load = stack.enter_context(Load(Settings(triton=both, timeout_s=TIMEOUT_S)).running())
        restarts = []
        for _ in range(times):
            for replica in replicas:
                time.sleep(CALM_S)
                restarts.append(time.monotonic())
                replica.stop()
                replica.start()
        time.sleep(CALM_S)
    return load.outcome(restarts, 0.0)


@dataclass
class Replica:
    """One server on ports that it keeps over restarts."""

    release: Path
    ports: Ports
    log: IO[str]
    running: ExitStack = field(default_factory=ExitStack)

    @property
    def address(self) -> str:
        """For clients."""
        return f"{LOOPBACK}:{self.ports.grpc}"

    def start(self) -> None:
        """Returns when it is ready."""
        self.running.enter_context(triton(self.release, ports=self.ports, log=self.log))

    def stop(self) -> None:
        """Returns when it has drained and is gone."""
        self.running.close()
