"""Whose shared memory is whose: a name is held while its server runs, and what nobody holds goes.

A launcher that is killed tidies nothing up, and /dev/shm may outlive its container (an `emptyDir`
of a pod). The kernel lets go of a lock when its last holder ends, in whichever PID namespace.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from deploy.stubs import SHARED_MEMORY, sweep

PREFIX = "retrieval-triton-"
"""Of all our names of shared memory, and of the temporary folders that are called the same."""


def claim(name: str) -> int:
    """Hold a name; the handle, to be inherited by whoever uses that memory."""
    path = _lock_of(name)
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # somebody swept it in the moment before we held it


def let_go(name: str, handle: int) -> None:
    """What was claimed; its memory is swept before."""
    _lock_of(name).unlink(missing_ok=True)
    os.close(handle)


def sweep_orphans() -> None:
    """Remove shared memory and temporary folder of each name of ours that nobody holds."""
    for path in SHARED_MEMORY.glob(f".{PREFIX}*.lock"):
        with contextlib.suppress(OSError):  # another user's, or held, or swept by another
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid == os.getuid():
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    name = path.name.removeprefix(".").removesuffix(".lock")
                    sweep(name)
                    shutil.rmtree(Path(tempfile.gettempdir()) / name, ignore_errors=True)
                    path.unlink()
            finally:
                os.close(handle)


def _lock_of(name: str) -> Path:
    """A hidden file, which is no region of that name."""
    return SHARED_MEMORY / f".{name}.lock"
