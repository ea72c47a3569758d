"""Watches a Triton that never watches itself, and starts it again when it is beyond mending.

Triton 2.51 does not start a dead Python model again, and goes on calling itself and the model
ready. So the processes are counted and real inferences are asked for; what has died is loaded anew,
and what hangs is killed first: a process that has not got on for long by its own account
(`pulse.py`), and all of a model that neither answers nor gets on. Where that does not help, or the
server itself has ended, all of it is started again on the same ports, with growing pauses, a few
times and no more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from deploy.instance import Instance
from deploy.own_http import ALIVE, Done
from deploy.stubs import SHARED_MEMORY, Stub, kill, stubs_of, sweep
from retrieval_contract import models
from retrieval_contract.errors import DeployError, ReleaseMismatch, RetrievalError, ServerError
from retrieval_contract.pulse import still_s
from retrieval_contract.tensors import Ensemble

EVERY_S = 0.5
"""Between two looks."""
ASK_S = 2.0
"""What a probe may take before it counts as unanswered."""
HUNG_S = 15.0
"""So long unanswered, and nobody else answered meanwhile: it hangs. A queue is no hang, and nor is
work that gets on."""
LOAD_S = 30.0
RELOADS = 3
"""Attempts to load one model again, in a row, before the whole server is started again."""
SCARCE = 8 * 2**20
"""Bytes of shared memory: with less, requests of a few pictures begin to fail."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Restarts:
    """At most `most` in `within_s`; the first at once, then a pause that doubles."""

    most: int = 5
    within_s: float = 600.0
    pause_s: float = 1.0

    def pause_after(self, recent: int) -> float:
        """Before the next start, when there were so many."""
        return self.pause_s * 2 ** (recent - 1) if recent else 0.0


class Supervisor(threading.Thread):
    """Looks after one server until `stop` is called, or until it gives up.

    `say` gets one line for each thing that was mended, or could not be.
    """

    def __init__(
        self,
        instance: Instance,
        say: Say,
        hung_s: float = HUNG_S,
        restarts: Restarts | None = None,
    ) -> None:
        super().__init__(name="supervisor", daemon=True)
        self.instance, self.http = instance, instance.http
        self.say, self.hung_s, self.restarts = say, hung_s, restarts or Restarts()
        self._over, self._ended = threading.Event(), threading.Event()
        self._failure: RetrievalError | None = None
        self._starts: list[float] = []
        self._scarce = False
        self._forget()

    def stop(self) -> None:
        """Mend and start nothing more; whoever stops the server need not wait for the thread."""
        self._over.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it is over by then; raises DeployError or ReleaseMismatch when it gave up."""
        ended = self._ended.wait(timeout_s)
        if self._failure is not None:
            raise self._failure
        return ended

    def run(self) -> None:
        """See the class."""
        try:
            while not self._over.is_set():
                self._watch()
                if not self._over.is_set():
                    self._start_again()
        except RetrievalError as exc:
            self._failure = exc
        except Exception as exc:  # ours: nobody must take it for a server that is looked after
            self._failure = DeployError(f"the supervisor itself failed: {exc!r}")
            raise
        finally:
            self._ended.set()
            # The kernel stops a server whose starter has ended (--pdeathsig): that was us.
            while self.instance.process.poll() is None:
                time.sleep(EVERY_S)

    # ── the whole server ─────────────────────────────────────────────────────────────────
    def _watch(self) -> None:
        """Mend models until the server has ended."""
        process = self.instance.process
        while not self._over.wait(EVERY_S) and process.poll() is None:
            try:
                self._kill_stuck()
                self._revive_dead()
                for ensemble in models.ENSEMBLES:
                    self._judge(ensemble)
            except _Lost as lost:
                self.say(f"{lost}; the whole server is started again")
                self.instance.kill()
            self._look_at_memory()

    def _start_again(self) -> None:
        """Raises DeployError when that has been tried often enough."""
        code = self.instance.process.wait()
        self.say(f"Triton is gone ({_ended_by(code)}); its last words stand above")
        failed = 0
        while True:
            now = time.monotonic()
            self._starts = [at for at in self._starts if now - at < self.restarts.within_s]
            tries = max(len(self._starts), failed)  # a start that fails may take minutes
            if tries >= self.restarts.most:
                raise DeployError(
                    f"Triton: started again {tries} times, and gone again; given up. Its last "
                    f"words:\n{self.instance.words.read()}"
                )
            if self._over.wait(self.restarts.pause_after(len(self._starts))):
                return
            self.instance.kill()  # stubs that outlived it, and all their shared memory
            self._starts.append(time.monotonic())
            try:
                self.instance.start()
            except ReleaseMismatch:
                self.instance.kill()  # who gives other vectors must not go on answering
                raise
            except (DeployError, OSError) as exc:  # of the latter: no memory to start a process
                self.say(f"Triton cannot be started again yet: {exc}")
                failed += 1
                continue
            self._forget()
            took = time.monotonic() - self._starts[-1]
            self.say(f"Triton is started again, with the right vectors, in {took:.1f} s")
            return

    def _forget(self) -> None:
        """What was known of the processes that are gone."""
        self.expected = Counter(stub.model for stub in stubs_of(self.instance.process.pid))
        self._unanswered: dict[str, _Silence] = {}
        self._killed: set[str] = set()
        """Ensembles that have not answered since something of them was killed."""
        self._stuck: set[Stub] = set()
        """Processes that had not got on for long at the last look."""
        self._reloads: Counter[str] = Counter()
        """Failed ones, in a row."""

    # ── single models ────────────────────────────────────────────────────────────────────
    def _kill_stuck(self) -> None:
        """Single processes: beside one that hangs its copies may answer. Two looks must find it
        so: what was paused, and we with it, gets on at once when that is over."""
        before, stubs = self._stuck, stubs_of(self.instance.process.pid)
        self._stuck = {stub for stub in stubs if still_s(stub.pid) > self.hung_s}
        for stub in self._stuck & before:
            if self._over.is_set():
                return
            for ensemble in models.ENSEMBLES:
                if stub.model in self._parts(ensemble):
                    self._unanswered.pop(ensemble.name, None)
                    self._killed.add(ensemble.name)
            self._kill(stub)

    def _kill(self, stub: Stub) -> None:
        self.say(f"{stub.model} hangs: killed")
        kill(stub)

    def _parts(self, ensemble: Ensemble) -> list[str]:
        """The models that it runs on, or that it is."""
        return [self.http.behind(ensemble), *(step.name for step in ensemble.steps)]

    def _revive_dead(self) -> None:
        alive = Counter(stub.model for stub in stubs_of(self.instance.process.pid))
        for model in self.expected - alive:
            if not self._over.is_set() and self.instance.process.poll() is None:
                self._reload(model, "a process of it had died")

    def _judge(self, ensemble: Ensemble) -> None:
        """Ask; a model that is silent for long and gets nothing done is killed. It is asked once
        more before: what was paused, and we with it, gets on at once when that is over."""
        name = ensemble.name
        try:
            self.http.encode(ensemble, ALIVE[ensemble], ASK_S)
            self._unanswered.pop(name, None)
            self._killed.discard(name)
            return
        except ServerError:
            pass  # too late, or "not healthy" of a process that is there but stands still
        done = self._done(ensemble)
        silence = self._unanswered.setdefault(name, _Silence(done))
        if done.more_than(silence.done) if done and silence.done else done is not silence.done:
            self._unanswered[name] = _Silence(done)
        elif time.monotonic() - silence.since > self.hung_s and not self._over.is_set():
            if not silence.long:
                silence.long = True
                self._judge(ensemble)
                return
            del self._unanswered[name]
            if done is None:
                raise _Lost("Triton answers nothing, not even what it has done")
            if name in self._killed:
                raise _Lost(f"{name} stays silent, though what it runs on was loaded again")
            self._killed.add(name)
            for stub in stubs_of(self.instance.process.pid):
                if stub.model in self._parts(ensemble):
                    self._kill(stub)

    def _done(self, ensemble: Ensemble) -> Done | None:
        """As the server counts; None when it does not even say that."""
        try:
            return self.http.done(ensemble, ASK_S)
        except ServerError:
            return None

    def _reload(self, model: str, why: str) -> None:
        """Unload, wait until it is gone, load; then what is made of it."""
        start, group = time.monotonic(), self.instance.process.pid
        old = [stub for stub in stubs_of(group) if stub.model == model]
        self.instance.scarred = True
        try:
            self.http.unload(model, LOAD_S)
            while self.http.ready(model, ASK_S) and time.monotonic() < start + LOAD_S:
                if self._over.wait(0.02):
                    return
            self.http.load(model, LOAD_S)
            for name in self.http.ensembles:  # what it is a part of comes back with it, or not
                if not self.http.ready(name, ASK_S):
                    self.http.load(name, LOAD_S)
        except ServerError as exc:
            if self._over.is_set() or self.instance.process.poll() is not None:
                return
            self.say(f"{model}: {why}; cannot be loaded again yet: {exc}")
            self._reloads[model] += 1
            if self._reloads[model] >= RELOADS:
                raise _Lost(f"{model} cannot be loaded again") from exc
            return
        for stub in old:  # of a model with a dead process Triton forgets the others
            kill(stub)
        del self._reloads[model]
        sweep(self.instance.shm_prefix, group)
        self.say(f"{model}: {why}; loaded again in {time.monotonic() - start:.1f} s")

    def _look_at_memory(self) -> None:
        """Say once when shared memory runs out: large requests fail then, and others go on."""
        space = os.statvfs(SHARED_MEMORY)
        free, size = (blocks * space.f_frsize for blocks in (space.f_bavail, space.f_blocks))
        if free < SCARCE and not self._scarce:
            self.say(
                f"{SHARED_MEMORY} is full ({free >> 20} MiB of {size >> 20} MiB are left): "
                'requests that need more fail with "Failed to increase the shared memory pool '
                'size", others go on. Triton keeps what it once took until it is started again; '
                "give it more (docker run --shm-size)"
            )
        self._scarce = free < SCARCE


@dataclass
class _Silence:
    """Of an ensemble."""

    done: Done | None
    """When it began, or when it last got on."""
    since: float = field(default_factory=time.monotonic)
    long: bool = False
    """And asked once more for that."""


def say(line: str) -> None:
    """To our log, beside the server's; a log that takes no more costs the line alone."""
    with contextlib.suppress(OSError):
        print(f"supervisor: {line}", file=sys.stderr, flush=True)


class _Lost(Exception):
    """Loading single models again does not help."""


def _ended_by(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
