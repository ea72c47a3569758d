"""Which core works for whom, so that what is measured does not pay for who measures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from retrieval_contract.errors import RetrievalError


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """This thread alone, for a while; gRPC's stay where they are."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin(group: int, cores: Collection[int]) -> None:
    """Every thread of a process group; what they start later inherits it."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.getpgid(int(process.name)) == group:
                _pin_threads(process, cores)


def _pin_threads(process: Path, cores: Collection[int]) -> None:
    for thread in (process / "task").iterdir():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(thread.name), cores)


def core_to_serve() -> int:
    """One core; this process works on the others henceforth. RetrievalError for a single one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RetrievalError("expected two cores, one for the server and one to ask; got one")
    _pin_threads(Path("/proc/self"), cores[1:])  # those of gRPC, too
    return cores[0]


@contextmanager
def apart(group: int) -> Iterator[None]:
    """For a while a server, by its process group, has one core, and this process the others."""
    before = os.sched_getaffinity(0)
    pin(group, [core_to_serve()])
    try:
        yield
    finally:
        _pin_threads(Path("/proc/self"), before)
        pin(group, before)
