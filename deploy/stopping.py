"""How a server is stopped: what is in flight is answered, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

QUIET_S = 5.0
"""How long a stop waits for the server to fall quiet before it stops it all the same."""
QUIET_STEP_S, QUIET_CPU_S = 0.2, 0.02
"""Quiet is a step of so long in which the server and its stubs take no more processor time."""
DRAIN_S = 30
"""What Triton gives its queues after SIGTERM; 10 s later it is killed."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """We were asked to stop; holds the number of the signal."""


def listen() -> None:
    """From now on SIGNALS raise Stopped in the main thread, once."""
    for number in _heard():
        signal.signal(number, _raise_stopped)


def _heard() -> list[signal.Signals]:
    """SIGNALS; without that of a closed terminal where nohup has us stay, or it was heard before:
    the shell repeats it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (ignored and number is signal.SIGHUP)]


def _raise_stopped(signum: int, frame: FrameType | None) -> NoReturn:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # no second one before `undisturbed`, nor after
    raise Stopped(signum)


def reap(ours: int) -> None:
    """Let orphans go that have ended: process 1 inherits them. `ours` is waited for elsewhere."""
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid == ours:
                return
            os.waitpid(found.si_pid, 0)


def stop(process: subprocess.Popen[str], scarred: bool = False) -> None:
    """Let what is in flight be answered, SIGTERM, then make sure that nothing is left.

    Triton 2.51, once asked to stop, answers what waits for a tower, and refuses what is still in
    an ensemble's first step. So it is asked when it has fallen quiet. One that is `scarred`, since
    a model of it was loaded again, waits for what died before for all of DRAIN_S: not we.
    """
    _wait_quiet(process, QUIET_S)
    if process.poll() is None:
        process.terminate()
        if scarred:
            _wait_quiet(process, DRAIN_S)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DRAIN_S + 10)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # stubs that outlived the server, or all of it
    process.wait()


def _wait_quiet(process: subprocess.Popen[str], most_s: float) -> None:
    """Until nothing is being computed, or it has ended: callers may never stop asking."""
    end, spent = time.monotonic() + most_s, cpu_seconds(process.pid)
    while process.poll() is None and time.monotonic() < end:
        time.sleep(QUIET_STEP_S)
        before, spent = spent, cpu_seconds(process.pid)
        if spent - before < QUIET_CPU_S:
            return


def cpu_seconds(group: int) -> float:
    """Seconds of processor time that a process group has taken, proc(5)."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()  # the name may hold anything
            ticks += (int(fields[2]) == group) * (int(fields[11]) + int(fields[12]))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def undisturbed(process: subprocess.Popen[str]) -> Iterator[None]:
    """Nothing interrupts the block: a further one of SIGNALS only ends the drain at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return

    def hurry(signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    before = {number: signal.signal(number, hurry) for number in _heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python
