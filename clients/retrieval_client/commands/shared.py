"""What the commands have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.console import Console

EXIT_ERROR, EXIT_REFUSED = 1, 3
console = Console(stderr=True)
"""For people; stdout is for results."""


@contextmanager
def rejects_file(path: Path | None) -> Iterator[IO[str]]:
    """Opened before the first row, so that nothing refused can be lost; gone if nothing was.

    Without a path they are not kept, as of a dry run, which must leave the last push's. A device, a
    pipe, and what a link leads to are somebody else's, and stay.
    """
    with (path or Path(os.devnull)).open("w", encoding="ascii") as file:
        try:
            yield file
        finally:
            file.flush()
            if path and path.is_file() and not path.is_symlink() and not path.stat().st_size:
                path.unlink()
