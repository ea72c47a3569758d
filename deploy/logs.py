"""The server's log on its way to ours."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
from collections import deque
from typing import IO

# Without a GPU Triton complains about CUDA on every start; it means nothing here.
HARMLESS = re.compile(
    r"CudaDriverHelper|unable to create stream|libcuda\.so|CUDA driver|"
    r"no CUDA-capable|Unable to allocate pinned|pinned memory pool"
)
NOTHING = re.compile(r"(?!)")

# The lines that say why a start failed, out of the tables around them.
TELLING = re.compile(r"^E\d{4}|^error|UNAVAILABLE")


class LastWords:
    """Passes the server's log on, without the noise, and keeps its end for error messages."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        log: IO[str],
        telling: re.Pattern[str] = TELLING,
        *,
        gpu: bool = False,
    ) -> None:
        """`gpu`: the server needs one, so that nothing is noise."""
        self._tells = telling.search
        self._noise = NOTHING if gpu else HARMLESS
        self._telling: deque[str] = deque(maxlen=20)
        self._raw: deque[str] = deque(maxlen=20)
        self._pump = threading.Thread(target=self._run, args=(process, log), daemon=True)
        self._pump.start()

    def _run(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if self._noise.search(line):
                    continue
                self._raw.append(line)
                if self._tells(line):
                    self._telling.append(line)
                # The log was closed first, or takes no more: whoever stopped reading here would
                # close Triton's pipe, and end it.
                with contextlib.suppress(ValueError, OSError):
                    print(line, end="", file=log, flush=True)

    def read(self) -> str:
        """The telling lines, else the last ones: what the dynamic linker says tells, too."""
        self._pump.join(1.0)  # a server that has exited may still have words in the pipe
        return "".join(tuple(self._telling or self._raw))
