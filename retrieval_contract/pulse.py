"""When a process last got on, for whoever looks after it: in the name of a thread of it, proc(5).

There it is read without asking. A process that loops, waits for ever, holds the interpreter or is
stopped answers nobody, and beside a copy that does answer nobody would miss it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

BEAT = "beat"
"""Before tenths of seconds of the machine's monotonic clock; a name has room for 15 characters."""
EVERY_S = 0.25


class Pulse:
    """Of this process: it gets on while it has nothing to do, and with each `moved` of its work."""

    def __init__(self) -> None:
        self._moved: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=BEAT, daemon=True)

    def start(self) -> None:
        """From now on others can tell."""
        self._thread.start()

    def moved(self) -> None:
        """Some work was begun, or a part of it is done."""
        self._moved = time.monotonic()

    def rest(self) -> None:
        """All work is done."""
        self._moved = None

    def close(self) -> None:
        """From now on nobody can."""
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        name = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
        with contextlib.suppress(OSError):  # where threads have no names, nobody can tell
            while not self._over.is_set():
                at = self._moved
                name.write_text(f"{BEAT} {int((time.monotonic() if at is None else at) * 10)}")
                self._over.wait(EVERY_S)


def still_s(pid: int) -> float:
    """For how long a process has not got on; 0 of one that does not say."""
    for name in Path(f"/proc/{pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
            word, _, tenths = name.read_text().partition(" ")
            if word == BEAT:
                return max(0.0, time.monotonic() - int(tenths) / 10)
    return 0.0
