"""`python -m deploy.local` as users and supervisors start it, and what it leaves behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

FREE_PORTS = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]


@dataclass(frozen=True)
class Serving:
    """A running `python -m deploy.local`: its log, and the folder of its temporary files."""

    process: subprocess.Popen[bytes]
    log: Path
    scratch: Path

    def said(self, pattern: str, within_s: float = 60) -> str:
        """Wait for the log to match; the pattern's group."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            over = self.process.poll() is not None
            if match := re.search(pattern, self.log.read_text()):
                return match[1]
            if over:
                break
            time.sleep(0.05)
        raise AssertionError(self.log.read_text()[-3000:])

    @property
    def address(self) -> str:
        """For clients, once the server is ready."""
        return self.said(r"gRPC +(\S+)\n")

    def pending(self) -> dict[str, int]:
        """How many requests wait in front of each model."""
        url = self.said(r"metrics (http\S+)\n")
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        found = re.findall(
            r'^nv_inference_pending_request_count{model="(\w+)".*} (\d+)', text, re.M
        )
        return {model: int(count) for model, count in found if int(count)}

    def leftovers(self) -> list[Path]:
        """Temporary files, shared memory of the same name, and the lock that holds it."""
        there = [*Path("/dev/shm").glob(f"*{self.scratch.name}*")]
        return [self.scratch] * self.scratch.exists() + there

    def processes(self) -> list[str]:
        """The server and its stubs, as far as they run."""
        return processes_of(self.scratch.name)


def processes_of(name: str) -> list[str]:
    """The command lines that hold a name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            found.append(path.read_text(errors="replace").replace("\0", " "))
    return [line for line in found if name in line]


@contextmanager
def serve(
    release: Path, log: Path, *run: str, hung_s: float | None = None, flags: Sequence[str] = ()
) -> Iterator[Serving]:
    """The command on free ports, from when it has begun; with `--run` when a command is given."""
    flags = ["--release", str(release), *FREE_PORTS, *flags]
    flags += [f"--hung-s={hung_s}"] if hung_s else []
    flags += ["--run", *run] if run else []
    with log.open("w") as output, tempfile.TemporaryDirectory() as place:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local", *flags],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": place},
            stdout=output,
            stderr=output,
        )
        try:
            while not (scratch := next(Path(place).iterdir(), None)):
                assert process.poll() is None, log.read_text()
                time.sleep(0.01)
            yield Serving(process, log, scratch)
        finally:
            process.terminate()
            process.wait(60)
