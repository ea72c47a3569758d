"""Watches a Triton that never watches itself.

Triton 2.51 does not start a dead Python model again, and goes on calling itself and the model
ready. So the processes are counted and real inferences are asked for; what has died is loaded anew,
and a model that neither answers nor gets on is killed first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from deploy.security import HEADER
from retrieval_client.channel import channel_to
from retrieval_client.encoder import Encoder
from retrieval_client.settings import Settings
from retrieval_contract import models
from retrieval_contract.errors import ServerError
from retrieval_contract.tensors import Ensemble

EVERY_S = 0.5
"""Between two looks."""
ASK_S = 2.0
"""What a probe may take before it counts as unanswered."""
HUNG_S = 15.0
"""So long unanswered, and nothing of that model done meanwhile: it hangs. A queue is no hang."""
LOAD_S = 30.0
STUB = "triton_python_backend_stub"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stub:
    """One process of a Python model."""

    pid: int
    model: str


def stubs_of(group: int) -> list[Stub]:
    """The Python models' processes in a process group, proc(5); a zombie is none."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.getpgid(int(process.name)) != group:
                continue
            program, _, rest = (process / "cmdline").read_bytes().partition(b"\0")
            # <repository>/<model>/<version>/model.py; one that is starting may have no words yet
            parts = Path(rest.partition(b"\0")[0].decode()).parts
            if program.endswith(STUB.encode()) and len(parts) > 2:
                found.append(Stub(int(process.name), parts[-3]))
    return found


def kill(stub: Stub) -> None:
    """At once, if it still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(stub.pid, signal.SIGKILL)


class Supervisor(threading.Thread):
    """Looks after one server process until it ends or `stop` is called.

    `say` gets one line for each thing that was mended, or could not be.
    """

    def __init__(
        self,
        process: subprocess.Popen[str],
        settings: Settings,
        control_key: str,
        say: Say,
        hung_s: float = HUNG_S,
    ) -> None:
        super().__init__(name="supervisor", daemon=True)
        self.process, self.settings, self.say, self.hung_s = process, settings, say, hung_s
        self.expected = Counter(stub.model for stub in stubs_of(process.pid))
        cache = [models.QUERY_CACHED] * (models.QUERY_UNCACHED in self.expected)
        self._ensembles = [*cache, *(ensemble.name for ensemble in models.ENSEMBLES)]
        self._metadata = [(f"triton-grpc-protocol-{HEADER}", control_key)]
        self._over = threading.Event()
        self._unanswered: dict[str, tuple[float, int]] = {}

    def stop(self) -> None:
        """Look no more; returns when the last look is over."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """See the class."""
        with channel_to(self.settings) as channel, Encoder(self.settings) as encoder:
            self.stub = GRPCInferenceServiceStub(channel)
            asks = {
                models.QUERY_ENCODER: lambda: encoder.encode_queries(
                    ["alive"], timeout_s=ASK_S, fresh=True
                ),
                models.PRODUCT_ENCODER: lambda: encoder.encode_products(
                    ["alive"], [b""], timeout_s=ASK_S
                ),
            }
            while not self._over.wait(EVERY_S) and self.process.poll() is None:
                self._revive_dead()
                for ensemble, ask in asks.items():
                    self._judge(ensemble.name, self._processes(ensemble), ask)

    def _processes(self, ensemble: Ensemble) -> list[str]:
        """The models behind an ensemble that have processes: what answers from memory does not."""
        names = [ensemble.name, *(model.name for model in ensemble.steps)]
        if ensemble is models.QUERY_ENCODER:
            names.append(models.QUERY_UNCACHED)
        return [name for name in names if name in self.expected]

    def _revive_dead(self) -> None:
        alive = Counter(stub.model for stub in stubs_of(self.process.pid))
        for model in self.expected - alive:
            self._reload(model, "a process of it had died")

    def _judge(self, ensemble: str, parts: list[str], ask: Callable[[], object]) -> None:
        """Ask; a model that is silent for long and gets nothing done is killed."""
        try:
            ask()
            self._unanswered.pop(ensemble, None)
        except (
            ServerError
        ):  # too late, or "not healthy" of a process that is there but stands still
            done = self._done(parts)
            since, before = self._unanswered.setdefault(ensemble, (time.monotonic(), done))
            if done != before:
                self._unanswered[ensemble] = (time.monotonic(), done)
            elif time.monotonic() - since > self.hung_s:
                del self._unanswered[ensemble]
                for stub in stubs_of(self.process.pid):
                    if stub.model in parts:
                        self.say(f"{stub.model} hangs: killed")
                        kill(stub)

    def _done(self, names: list[str]) -> int:
        """Requests that these models have answered well: those given up count as failures."""
        try:
            reply = self.stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=ASK_S)
        except grpc.RpcError:
            return -1
        return sum(
            model.inference_stats.success.count
            for model in reply.model_stats
            if model.name in names
        )

    def _reload(self, model: str, why: str) -> None:
        """Unload, wait until it is gone, load; then what is made of it."""
        start = time.monotonic()
        old = [stub for stub in stubs_of(self.process.pid) if stub.model == model]
        try:
            self._control("RepositoryModelUnload", pb.RepositoryModelUnloadRequest, model)
            request = pb.ModelReadyRequest(name=model)
            while self.stub.ModelReady(request, timeout=ASK_S).ready:
                if time.monotonic() - start > LOAD_S or self._over.wait(0.02):
                    break
            self._control("RepositoryModelLoad", pb.RepositoryModelLoadRequest, model)
            for name in self._ensembles:  # what it is a part of comes back with it, or not
                if not self.stub.ModelReady(pb.ModelReadyRequest(name=name)).ready:
                    self._control("RepositoryModelLoad", pb.RepositoryModelLoadRequest, name)
            for stub in old:  # of a model with a dead process Triton forgets the others
                kill(stub)
            self.say(f"{model}: {why}; loaded again in {time.monotonic() - start:.1f} s")
        except grpc.RpcError as exc:
            self.say(f"{model}: {why}; cannot be loaded again yet: {exc.details()}")

    def _control(self, method: str, request: Any, model: str) -> None:
        call = getattr(self.stub, method)
        call(request(model_name=model), metadata=self._metadata, timeout=LOAD_S)
