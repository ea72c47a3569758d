"""python -m deploy.milvus: the real Milvus server of the `milvus` wheel, on this machine.

Milvus 2.3.5 listens on nine ports of every interface and asks nobody who they are. So it runs in a
network namespace that holds a loopback interface and nothing else, and one port of the host's
127.0.0.1 leads to it (`room.py`). With `--run` a command runs inside, with nothing in between.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from deploy.beside import add_run_flag, in_terminal, run_beside
from deploy.logs import LastWords
from deploy.milvus_files import INNER_PORT, locked, write_config
from deploy.milvus_wheel import MILVUS_FOLDER, Binary, find_binary
from deploy.security import Tls
from retrieval_client import Settings
from retrieval_client.connect import milvus_client
from retrieval_client.translate import milvus_errors
from retrieval_contract.errors import CatalogError, DeployError

LOOPBACK = "127.0.0.1"
DATA = MILVUS_FOLDER.parent / "build" / "milvus"
READY_S = 120.0
ASK_S = 5.0
"""What one question may take while it starts."""
SESSION_TTL_S = 10
"""After a restart the server cannot read before the lease of its predecessor ran out. A server
that gets no processor for so long ends itself."""
ROOT_TOKEN = "root:Milvus"
"""Of a new server that asks for names."""
NOTE = "/tmp/milvus/server_id_{}"
"""All that it leaves outside its data folder, beside /run/milvus/standalone.pid."""
TELLING = re.compile(r"^panic|^fatal error|\[(PANIC|FATAL)\]|Error: ")
"""Lines that say why it ended: Go prints the stack of every goroutine after them."""
WAYS = ((), ("--map-root-user",))
"""To a namespace: as root, and as anybody where the kernel lets users have their own."""


def namespace() -> list[str]:
    """What to start a program with that shall see no network; DeployError if that is refused.

    Containers commonly refuse: Docker's default profile forbids unshare(2).
    """
    program, said = shutil.which("unshare"), "unshare(1) of util-linux is not installed"
    for way in WAYS if program else ():
        command = [str(program), *way, "--net"]
        tried = subprocess.run([*command, "true"], capture_output=True, text=True)
        if tried.returncode == 0:
            return command
        said = tried.stderr.strip()
    raise DeployError(
        "Milvus: expected a network namespace of its own, since it listens on every interface and "
        f"asks nobody who they are; got: {said}. Allow it (Docker: --cap-add SYS_ADMIN; elsewhere: "
        "user namespaces, or run as root), or use Milvus Lite"
    )


@dataclass
class MilvusServer:
    """A Milvus over one data folder, that can be killed and started again on the same port.

    `access` is how it is asked whether it is ready; with a token in it the server asks everybody
    for one. Whatever was acknowledged survives a kill: it is in the system's page cache.
    """

    data: Path
    port: int
    log: IO[str]
    session_ttl_s: int
    binary: Binary
    namespace: list[str]
    tls: Tls | None
    access: Settings
    pid: int = field(default=0, init=False)
    """Of the server itself, as the host counts."""
    _room: subprocess.Popen[str] | None = field(default=None, init=False)
    _words: LastWords | None = field(default=None, init=False)

    @property
    def uri(self) -> str:
        """For clients outside."""
        return f"http{'s' if self.tls else ''}://{LOOPBACK}:{self.port}"

    @property
    def inner_uri(self) -> str:
        """For clients that `inside` started."""
        return self.uri.replace(f":{self.port}", f":{INNER_PORT}")

    @property
    def inside(self) -> list[str]:
        """What to start a command with, so that it runs in the server's namespace."""
        users = [] if len(self.namespace) == 2 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self.pid), *users, "--net"]

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._room is not None and self._room.poll() is None

    def start(self) -> None:
        """Returns when every loaded collection answers a query; DeployError with its last words."""
        if self.running:
            raise DeployError(f"Milvus over {self.data} runs already; kill() it first")
        self.pid = 0
        with locked(self.data) as lock, _listener(self.port) as listener:
            token = bool(self.access.milvus_token)
            configs = write_config(self.data, self.session_ttl_s, self.tls, token)
            self.port = listener.getsockname()[1]
            fds = (listener.fileno(), lock)
            libraries = f"LD_LIBRARY_PATH={self.binary.libraries}"
            server = ["env", libraries, str(self.binary.program), "run", "standalone"]
            room = [sys.executable, "-I", str(Path(__file__).with_name("room.py"))]
            self._room = subprocess.Popen(
                [*self.namespace, *room, *map(str, fds), str(INNER_PORT), *server],
                cwd=self.data,
                # Not ours: it takes any variable for a setting that is spelled like one.
                env={
                    "PATH": os.environ["PATH"],
                    "DEPLOY_MODE": "STANDALONE",
                    "MILVUSCONF": str(configs),
                },
                stdin=subprocess.PIPE,  # its end tells them that we are gone
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=fds,
                start_new_session=True,
            )
        assert self._room.stdout is not None
        first = self._room.stdout.readline()
        self._words = LastWords(self._room, self.log, TELLING)
        if not first.strip().isdigit():
            raise DeployError(f"Milvus: cannot be started: {first}{self.last_words()}")
        self.pid = int(first)
        self._wait_ready()

    def kill(self) -> None:
        """SIGKILL, as it is always stopped: 2.3.5 does not end on SIGTERM."""
        if self._room is None:
            return
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid or self._room.pid, signal.SIGKILL)
        self.wait()
        assert self._room.stdin is not None
        self._room.stdin.close()
        with contextlib.suppress(OSError):
            Path(NOTE.format(self.pid)).unlink()

    def restart(self) -> None:
        """Kill it if it runs, and start it over the same data, on the same port."""
        self.kill()
        self.start()

    def wait(self) -> int:
        """Until it has ended; the exit code, as a shell's."""
        return self._room.wait() if self._room else 0

    def last_words(self) -> str:
        """The end of its log."""
        return self._words.read() if self._words else ""

    def _wait_ready(self) -> None:
        end, problem = time.monotonic() + READY_S, ""
        while time.monotonic() < end:
            if not self.running:
                raise DeployError(
                    f"Milvus ended with code {self.wait()} while starting; its last words:\n"
                    f"{self.last_words()}"
                )
            try:
                with _pymilvus_silent(), milvus_errors(self.uri, "ready"):
                    self._ask()
                return
            except CatalogError as exc:
                problem = str(exc)
                time.sleep(0.2)
        raise DeployError(
            f"Milvus was not ready after {READY_S:.0f} s ({problem}); its last words:\n"
            f"{self.last_words()}"
        )

    def _ask(self) -> None:
        """It calls itself healthy long before it can read: so each collection is read."""
        client = milvus_client(replace(self.access, milvus=self.uri))
        try:
            for name in client.list_collections(timeout=ASK_S):
                if client.get_load_state(name, timeout=ASK_S)["state"].name != "NotLoad":
                    client.query(
                        name,
                        filter="",
                        output_fields=["count(*)"],
                        consistency_level="Strong",
                        timeout=ASK_S,
                    )
        finally:
            client.close()


@contextlib.contextmanager
def milvus_server(
    data: Path = DATA,
    *,
    port: int = 0,
    log: IO[str] = sys.stderr,
    session_ttl_s: int = SESSION_TTL_S,
    tls: Tls | None = None,
    access: Settings | None = None,
    folder: Path = MILVUS_FOLDER,
) -> Iterator[MilvusServer]:
    """Run Milvus over a data folder until the block ends; yields once it answers queries.

    With a token in `access`, such as ROOT_TOKEN, the server asks for one. Raises DeployError when
    it is not installed, the folder is in use, or this machine has no namespaces.
    """
    server = MilvusServer(
        data.absolute(),
        port,
        log,
        session_ttl_s,
        find_binary(folder),
        namespace(),
        tls,
        access or Settings(),
    )
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def _pymilvus_silent() -> Iterator[None]:
    """It logs every failure with a traceback; while a server starts, failures are the rule."""
    logger = logging.getLogger("pymilvus")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _listener(port: int) -> socket.socket:
    """On the host's loopback; DeployError when the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
    except OSError as exc:
        listener.close()
        raise DeployError(
            f"port {port} on {LOOPBACK}: {exc.strerror}; stop what listens there or choose "
            "another (0 = any free one)"
        ) from exc
    listener.listen()
    return listener


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m deploy.milvus", description=__doc__)
    top.add_argument("--port", type=int, default=19530, help="on 127.0.0.1; 0 = any free one")
    top.add_argument("--data", type=Path, default=DATA, help="folder; made if it is not there")
    add_run_flag(top, "in the server's network (address in RETRIEVAL_MILVUS)")
    return top


def main() -> None:
    """Command line: serve until Ctrl-C or SIGTERM."""
    args = parser().parse_args()
    with in_terminal(args), milvus_server(args.data, port=args.port) as server:
        print(f"Milvus serves {server.data} at {server.uri}; Ctrl-C stops", file=sys.stderr)
        if args.run:
            address = {"RETRIEVAL_MILVUS": server.inner_uri}
            raise SystemExit(run_beside(args.run, address, server.inside))
        code = server.wait()
        raise DeployError(f"Milvus ended with code {code}:\n{server.last_words()}")


if __name__ == "__main__":
    main()
