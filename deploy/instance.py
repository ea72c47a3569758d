"""One Triton over one release, that can be started again and again on the same ports."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from deploy import stopping
from deploy.logs import LastWords
from deploy.orphans import claim, let_go, sweep_orphans
from deploy.own_http import OwnHttp, check_release_of
from deploy.security import control_flags
from deploy.stubs import sweep
from retrieval_contract.errors import DeployError, ReleaseMismatch, ServerError
from retrieval_contract.probes import Probes

READY_S = 120.0
PING_MS = 500
"""Clients look every two seconds whether a server that computes for them is still there: Triton
would close the connection at the third look in five minutes."""
ASK_S = 10.0
"""What the golden probes may take on a server that has just started."""


def kept_flags(shm_prefix: str, control_key: str) -> list[str]:
    """What a server needs that is looked after: a model that died is loaded by who has the key."""
    return [
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--model-control-mode=explicit",
        "--load-model=*",
        f"--exit-timeout-secs={stopping.DRAIN_S}",
        "--disable-auto-complete-config",
        f"--grpc-http2-min-recv-ping-interval-without-data={PING_MS}",
        *control_flags(control_key),
    ]


@dataclass
class Instance:
    """How the server is started, and the process that it is now.

    `doors` are further addresses and ports that must be open before it is ready. `shm_prefix` is
    the name of its shared memory, which no other server has.
    """

    args: Sequence[str]
    env: Mapping[str, str]
    shm_prefix: str
    http: OwnHttp
    doors: Sequence[tuple[str, int]]
    probes: Probes
    log: IO[str]
    ready_s: float = READY_S
    gpu: bool = False
    """Whether it needs one: then what CUDA complains of is no noise."""
    scarred: bool = field(default=False, init=False)
    """A model of the present process was loaded again."""
    words: LastWords = field(init=False)
    _process: subprocess.Popen[str] | None = field(default=None, init=False)
    _claim: int | None = field(default=None, init=False)
    """Held by the server as well: should we be killed, it still drains."""
    _over: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def process(self) -> subprocess.Popen[str]:
        """The present one, or the last; DeployError when none was started."""
        if self._process is None:
            raise DeployError("Triton was not started; call start()")
        return self._process

    def start(self) -> None:
        """Returns once the server has given the golden probes of its release.

        It leads a process group of its own, so Ctrl-C reaches us first and it can drain. What
        others left who were killed is removed before. Raises DeployError with its last words,
        ReleaseMismatch when it gives other vectors.
        """
        with self._lock:
            if self._over:
                raise DeployError("Triton was stopped meanwhile; start it anew")
            if self._claim is None:
                sweep_orphans()
                self._claim = claim(self.shm_prefix)
            # Should we be killed outright, the kernel stops it: it must not keep the ports.
            bound = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
            self._process = subprocess.Popen(
                [*bound, *self.args],
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                pass_fds=(self._claim,),
            )
            self.words = LastWords(self._process, self.log, gpu=self.gpu)
            self.scarred = False
        self._wait_ready()

    def _wait_ready(self) -> None:
        end, problem = time.monotonic() + self.ready_s, ""
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise DeployError(
                    f"Triton exited with code {self.process.returncode} while starting; its "
                    f"last words:\n{self.words.read()}"
                )
            try:
                check_release_of(self.http, self.probes, ASK_S)
                self.http.probe(self.probes, ASK_S)
                for door in self.doors:
                    socket.create_connection(door, timeout=1.0).close()
                return
            except ReleaseMismatch:
                raise  # waiting does not make other weights right
            except (ServerError, OSError) as exc:
                problem = str(exc)
                time.sleep(0.2)
        raise DeployError(
            f"Triton was not ready after {self.ready_s:.0f} s ({problem}); its last "
            f"words:\n{self.words.read()}"
        )

    def kill(self) -> None:
        """The server and its stubs at once; what they held in shared memory goes, too."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        sweep(self.shm_prefix)

    def stop(self, tidy: Callable[[], object] = lambda: None) -> int:
        """Drain, end, leave nothing, and start no more; the exit code. `tidy` is not disturbed."""
        with self._lock:
            self._over = True
        if self._process is None:
            self._let_go()
            return 0
        with stopping.undisturbed(self._process):
            stopping.stop(self._process, self.scarred)
            sweep(self.shm_prefix)
            tidy()
            self._let_go()
        return 0 if self.scarred else self._process.returncode

    def _let_go(self) -> None:
        if self._claim is not None:
            let_go(self.shm_prefix, self._claim)
            self._claim = None
