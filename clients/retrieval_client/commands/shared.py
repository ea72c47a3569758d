"""What the commands have in common."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.console import Console

from retrieval_contract.errors import RetrievalError

EXIT_ERROR, EXIT_REFUSED = 1, 3
console = Console(stderr=True)
"""For people; stdout is for results."""


@contextmanager
def rejects_file(path: Path | None) -> Iterator[IO[str]]:
    """Opened before the first row, so that nothing refused can be lost; gone if nothing was.

    Without a path they are not kept, as of a dry run, which must leave the last push's. A device, a
    pipe, and what a link leads to are somebody else's, and stay. RetrievalError where another
    command writes there.
    """
    place = path or Path(os.devnull)
    ours = not place.is_symlink() and (place.is_file() or not place.exists())
    with place.open("a" if ours else "w", encoding="ascii") as file:
        if ours:
            _lock(file)
            file.truncate(0)
        try:
            yield file
        finally:
            file.flush()
            if ours and not os.fstat(file.fileno()).st_size:
                place.unlink(missing_ok=True)


def _lock(file: IO[str]) -> None:
    """Until it is closed, or this process ends; nothing where files cannot be locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise RetrievalError(
            f"{file.name}: expected to write refused rows there, got another command that does; "
            "give another file (--rejects)"
        ) from exc
    except OSError:
        pass
