"""The processes of Triton's Python models, and the shared memory that they leave: proc(5)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STUB = "triton_python_backend_stub"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Stub:
    """One process of a Python model."""

    pid: int
    model: str


def stubs_of(group: int) -> list[Stub]:
    """The Python models' processes in a process group; a zombie is none."""
    found = []
    for process in _members(group):
        with contextlib.suppress(OSError):  # it ended meanwhile
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


def sweep(prefix: str, group: int | None = None) -> list[Path]:
    """Remove the shared memory of this name that no process of the group holds; what it was.

    A stub that is killed leaves its region, and so does a server. No group: nobody is left.
    """
    held = _held(group) if group is not None else set()
    orphans = sorted(set(regions(prefix)) - held)
    for region in orphans:
        region.unlink(missing_ok=True)
    return orphans


def regions(prefix: str) -> Iterator[Path]:
    """Shared memory of this name, and of no other."""
    return SHARED_MEMORY.glob(f"{prefix}*")


def _held(group: int) -> set[Path]:
    held = set()
    for process in _members(group):
        with contextlib.suppress(OSError):
            maps = (process / "maps").read_text()
            held |= {Path(name) for name in re.findall(rf"{SHARED_MEMORY}/\S+", maps)}
    return held


def _members(group: int) -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.getpgid(int(process.name)) == group:
                yield process
