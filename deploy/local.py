"""python -m deploy.local: the real Triton of the `nvidia-pytriton` wheel, on this machine.

Serves one release folder with the towers on ONNX Runtime in the wheel's only backend, Python.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from deploy.logs import LastWords
from deploy.security import Tls, control_flags, new_key, own_settings, read_key
from deploy.stopping import DRAIN_S, SIGNALS, stop, undisturbed
from deploy.supervisor import HUNG_S, Supervisor
from deploy.tracing import trace_flags
from deploy.wheel import ROOT, SERVER_PYTHON, Wheel, find_wheel
from retrieval_client.encoder import Encoder
from retrieval_client.settings import Settings
from retrieval_contract import models
from retrieval_contract.errors import DeployError, ReleaseMismatch, RetrievalError
from retrieval_contract.models import Target
from retrieval_contract.probes import Probes
from retrieval_contract.release import Release

LATEST = ROOT / "build" / "releases" / "latest"
LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S = 120.0
COMMAND_STOP_S = 5.0
"""What a `--run` command gets between SIGTERM and SIGKILL."""
TOWER_FILES = {
    Target.GPU: [models.PLAN_FILE],
    Target.CPU: [models.ONNX_FILE],
    Target.LOCAL: [models.PYTHON_FILE, models.ONNX_FILE],
}


@dataclass(frozen=True)
class Ports:
    """TCP ports of one server."""

    grpc: int
    http: int
    metrics: int


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, what it serves, and its process."""

    host: str
    ports: Ports
    release: Release
    triton: str
    process: subprocess.Popen[str]
    settings: Settings
    control_key: str = field(repr=False)

    @property
    def grpc_address(self) -> str:
        """`host:port` for clients."""
        return f"{self.host}:{self.ports.grpc}"


def check_release(folder: Path, target: Target) -> Release:
    """Read the release and see that every model file is there; DeployError naming what is not."""
    release = Release.load(folder)
    for path in _files(folder / "model_repository", str(release.version), target):
        if not path.exists():
            raise DeployError(
                f"{path}: not found; the release is not whole, build it again "
                "with `python -m export repository`"
            )
    return release


def _files(repository: Path, version: str, target: Target) -> Iterator[Path]:
    """Everything that a server of that target reads; the folder of an ensemble's version, too."""
    for part in (*models.MODELS, *models.ENSEMBLES):
        config, names = "config.pbtxt", []
        if part in models.TOWERS:
            config, names = f"configs/{target}.pbtxt", TOWER_FILES[target]
        elif part in models.MODELS:
            names = [models.PYTHON_FILE, models.TOKENIZER_FILE]
        elif part in models.IN_ONE and target is Target.LOCAL:
            config, names = f"configs/{target}.pbtxt", [models.PYTHON_FILE]
        home = repository / part.name
        yield from (home / config, home / version)
        yield from (home / version / name for name in names)


def choose_ports(host: str, grpc: int = 0, http: int = 0, metrics: int = 0) -> Ports:
    """Free ports where 0 is given; DeployError when a given one is taken."""
    chosen: list[int] = []
    with contextlib.ExitStack() as held:  # hold all of them, so that no two are the same
        for name, port in (("gRPC", grpc), ("HTTP", http), ("metrics", metrics)):
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as exc:
                raise DeployError(
                    f"{name} port {port} on {host}: {exc.strerror}; stop what listens there or "
                    f"choose another (0 = any free one)"
                ) from exc
            chosen.append(probe.getsockname()[1])
    return Ports(*chosen)


def command(
    wheel: Wheel,
    backends: Path,
    repository: Path,
    host: str,
    ports: Ports,
    target: Target,
    shm_prefix: str,
    security: Sequence[str] = (),
) -> list[str]:
    """The server's command line; `security` is what `deploy/security.py` says."""
    flags: dict[str, object] = {
        "model-repository": repository,
        "model-config-name": target,
        "backend-directory": backends,
        "cache-directory": wheel.triton / "caches",
        "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        "allow-gpu-metrics": "false",
        "pinned-memory-pool-byte-size": 0,
        "exit-timeout-secs": DRAIN_S,
        # So that a model that has died can be loaded again, by who has the control key.
        "model-control-mode": "explicit",
        "load-model": "*",
    }
    for protocol in ("grpc", "http", "metrics"):
        flags[f"{protocol}-address"] = host
        flags[f"{protocol}-port"] = getattr(ports, protocol)
    # Should we be killed outright, the kernel stops the server: it must not keep the ports.
    bound = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    binary = str(wheel.triton / "bin" / "tritonserver")
    settings = [f"--{name}={value}" for name, value in flags.items()]
    return [*bound, binary, "--disable-auto-complete-config", *settings, *security]


@contextlib.contextmanager
def triton(
    release_folder: Path = LATEST,
    *,
    server_python: Path = SERVER_PYTHON,
    host: str = LOOPBACK,
    ports: Ports | None = None,
    log: IO[str] = sys.stderr,
    tls: Tls | None = None,
    control_key: str | None = None,
    otel_url: str | None = None,
) -> Iterator[Server]:
    """Run Triton over a release until the block ends; yields once it gave the release's probes.

    The server leads a process group of its own, so Ctrl-C reaches us first and it can drain;
    whatever it leaves (stubs, shared memory) is removed. Raises DeployError when it cannot
    start, with the lines of its log that say why.
    """
    wheel = find_wheel(server_python)
    release = check_release(release_folder, Target.LOCAL)
    ports = ports or choose_ports(host)
    with tempfile.TemporaryDirectory(prefix="retrieval-triton-") as scratch:
        shm_prefix = Path(scratch).name
        backends = _backends(wheel, Path(scratch))
        repository = _linked(release_folder / "model_repository", Path(scratch))
        control_key = control_key or new_key()
        security = (tls.flags() if tls else []) + control_flags(control_key) + trace_flags(otel_url)
        args = command(wheel, backends, repository, host, ports, Target.LOCAL, shm_prefix, security)
        process = _start(wheel, args)
        try:
            words = LastWords(process, log)
            settings = own_settings(f"{host}:{ports.grpc}", tls)
            version = _wait_ready(process, settings, ports, words, Probes.load(release_folder))
            yield Server(host, ports, release, version, process, settings, control_key)
        finally:
            with undisturbed(process):
                stop(process)
                for region in Path("/dev/shm").glob(f"{shm_prefix}*"):
                    region.unlink(missing_ok=True)
                shutil.rmtree(scratch, ignore_errors=True)


def _start(wheel: Wheel, args: list[str]) -> subprocess.Popen[str]:
    """The server's process, in a group of its own, its log on a pipe."""
    # The stub finds its packages as `python3` on PATH would.
    env = os.environ | {
        "LD_LIBRARY_PATH": wheel.libraries,
        "PATH": f"{wheel.python.parent}:{os.environ['PATH']}",
    }
    env.pop("PYTHONPATH", None)
    return subprocess.Popen(
        args,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _backends(wheel: Wheel, scratch: Path) -> Path:
    """Triton wants the stub inside the backend's folder, the wheel keeps one per Python."""
    backend = shutil.copytree(wheel.triton / "backends" / "python", scratch / "python")
    stub = shutil.copy(wheel.stub, backend)
    Path(stub).chmod(0o755)
    return scratch


def _linked(repository: Path, scratch: Path) -> Path:
    """The same files by links: the stub writes bytecode beside a model, and asks no environment.

    So the release stays as it was built, and may be read-only.
    """
    linked: Path = shutil.copytree(
        repository.resolve(), scratch / "model_repository", copy_function=os.symlink
    )
    return linked


def _wait_ready(
    process: subprocess.Popen[str],
    settings: Settings,
    ports: Ports,
    words: LastWords,
    probes: Probes,
) -> str:
    """Wait for the golden probes, and for the doors that open last; returns "triton <version>".

    A server that gives other vectors is not ready: ReleaseMismatch.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    problem = ""
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DeployError(
                f"Triton exited with code {process.returncode} while starting; its "
                f"last words:\n{words.read()}"
            )
        try:
            with Encoder(settings) as encoder:
                encoder.probe(probes)
                for port in (ports.http, ports.metrics):
                    host = settings.triton.rpartition(":")[0]
                    socket.create_connection((host, port), timeout=1.0).close()
                return encoder.server_version()
        except ReleaseMismatch:
            raise  # waiting does not make other weights right
        except (RetrievalError, OSError) as exc:
            problem = str(exc)
            time.sleep(0.2)
    raise DeployError(
        f"Triton was not ready after {READY_TIMEOUT_S:.0f} s ({problem}); its last "
        f"words:\n{words.read()}"
    )


class Stopped(KeyboardInterrupt):
    """We were asked to stop; holds the number of the signal."""


def _raise_stopped(signum: int, frame: FrameType | None) -> NoReturn:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # no second one before `undisturbed`, nor after
    raise Stopped(signum)


def _run_beside(server: Server, args: Sequence[str]) -> int:
    """Run a command that finds the address in its environment; its exit code as a shell's."""
    try:
        process = subprocess.Popen(args, env=os.environ | {"RETRIEVAL_TRITON": server.grpc_address})
    except OSError as exc:
        raise DeployError(f"--run {args[0]}: {exc.strerror}; give a program that starts") from exc
    try:
        code = process.wait()
    finally:
        process.terminate()
        try:
            process.wait(COMMAND_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return code if code >= 0 else 128 - code


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    top.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    top.add_argument("--server-python", type=Path, default=SERVER_PYTHON)
    top.add_argument("--host", default=LOOPBACK, help="address to listen on")
    top.add_argument("--grpc-port", type=int, default=8001, help="0 = any free one")
    top.add_argument("--http-port", type=int, default=8000)
    top.add_argument("--metrics-port", type=int, default=8002)
    top.add_argument("--tls-cert", type=Path, help="PEM, whole chain: encrypts gRPC")
    top.add_argument("--tls-key", type=Path)
    top.add_argument("--tls-root", type=Path, help="PEM: callers need a certificate of this one")
    top.add_argument("--tls-name", default="", help="in the certificate; default: --host")
    top.add_argument("--otel-url", help="OTLP/HTTP collector, for the spans of traced requests")
    top.add_argument(
        "--control-key-file",
        type=Path,
        help="opens loading, shared memory, tracing and logging to who sends the key in it",
    )
    top.add_argument("--hung-s", type=float, default=HUNG_S, help="then a silent model is killed")
    top.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        help="run this command beside the server (address in RETRIEVAL_TRITON), then stop",
    )
    return top


def main() -> None:
    """Command line: serve until Ctrl-C or SIGTERM."""
    args = parser().parse_args()
    for number in SIGNALS:
        signal.signal(number, _raise_stopped)
    try:
        ports = choose_ports(args.host, args.grpc_port, args.http_port, args.metrics_port)
        with triton(
            args.release,
            server_python=args.server_python,
            host=args.host,
            ports=ports,
            tls=tls_of(args),
            control_key=read_key(args.control_key_file) if args.control_key_file else None,
            otel_url=args.otel_url,
        ) as server:
            _announce(server)
            with supervised(server, args.hung_s):
                if args.run:
                    raise SystemExit(_run_beside(server, args.run))
                code = server.process.wait()
            raise DeployError(f"Triton exited by itself with code {code}; see its log above")
    except Stopped as exc:
        print("stopped", file=sys.stderr)
        if args.run:  # its caller must not take it for done
            raise SystemExit(128 + exc.args[0]) from None
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc


@contextlib.contextmanager
def supervised(server: Server, hung_s: float) -> Iterator[None]:
    """While the block runs, models that die or hang are loaded again."""
    supervisor = Supervisor(
        server.process,
        server.settings,
        server.control_key,
        lambda line: print(f"supervisor: {line}", file=sys.stderr, flush=True),
        hung_s,
    )
    supervisor.start()
    try:
        yield
    finally:
        supervisor.stop()


def tls_of(args: argparse.Namespace) -> Tls | None:
    """What the flags say; DeployError for one without the other."""
    if not (args.tls_cert or args.tls_key or args.tls_root):
        return None
    if not (args.tls_cert and args.tls_key):
        raise DeployError("TLS: expected --tls-cert and --tls-key, got one of them; give both")
    return Tls(args.tls_cert, args.tls_key, args.tls_root, args.tls_name)


def _announce(server: Server) -> None:
    release = server.release
    print(
        f"{server.triton} serves release {release.release_id} ({release.family}, "
        f"{release.vector_dim} dims) at",
        file=sys.stderr,
    )
    print(f"  gRPC    {server.grpc_address}", file=sys.stderr)
    print(f"  HTTP    http://{server.host}:{server.ports.http}", file=sys.stderr)
    print(f"  metrics http://{server.host}:{server.ports.metrics}/metrics", file=sys.stderr)
    print(f"  models  {', '.join(e.name for e in models.ENSEMBLES)}; Ctrl-C stops", file=sys.stderr)


if __name__ == "__main__":
    main()
