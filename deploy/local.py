"""python -m deploy.local: the real Triton of the `nvidia-pytriton` wheel, on this machine.

Serves one release folder (`build/releases/<id>`) with the towers on ONNX Runtime in Triton's
Python backend, the only backend that the wheel has. Loopback and free ports by default.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from retrieval_client.encoder import Encoder
from retrieval_client.settings import Settings
from retrieval_contract import models
from retrieval_contract.errors import DeployError, RetrievalError
from retrieval_contract.models import Target
from retrieval_contract.release import Release

ROOT = Path(__file__).parent.parent
SERVER_PYTHON = ROOT / ".venv-server" / "bin" / "python"
LATEST = ROOT / "build" / "releases" / "latest"
LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S = 120.0
DRAIN_S = 30
"""What Triton gives requests in flight after SIGTERM; 10 s later it is killed."""

# Without a GPU Triton complains about CUDA on every start; it means nothing here.
HARMLESS = re.compile(
    r"CudaDriverHelper|unable to create stream|libcuda\.so|CUDA driver|"
    r"no CUDA-capable|Unable to allocate pinned|pinned memory pool"
)

# The lines that say why a start failed, out of the tables around them.
TELLING = re.compile(r"^E\d{4}|^error|UNAVAILABLE")

# Asked of the server environment's interpreter, whose paths we cannot know.
PROBE = """
import json, pathlib, sys, sysconfig
site = pathlib.Path(sysconfig.get_paths()["purelib"])
print(json.dumps({"site": str(site), "version": f"3.{sys.version_info[1]}",
                  "libdir": sysconfig.get_config_var("LIBDIR") or ""}))
"""


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

    @property
    def grpc_address(self) -> str:
        """`host:port` for clients."""
        return f"{self.host}:{self.ports.grpc}"


@dataclass(frozen=True)
class Wheel:
    """The server environment: its interpreter and what the wheel put beside it."""

    python: Path
    site: Path
    stub: Path
    libraries: str

    @property
    def triton(self) -> Path:
        """Triton's folder inside the wheel."""
        return self.site / "pytriton" / "tritonserver"


def find_wheel(python: Path) -> Wheel:
    """Locate Triton through the server environment's interpreter; DeployError when it is not."""
    if not python.exists():
        raise DeployError(
            f"{python}: no server environment there; run `make setup` or give --server-python"
        )
    found = json.loads(subprocess.check_output([python, "-c", PROBE], text=True))
    site = Path(found["site"])
    triton = site / "pytriton" / "tritonserver"
    if not (triton / "bin" / "tritonserver").exists():
        raise DeployError(
            f"{python}: the package nvidia-pytriton is not installed there; run `make setup`"
        )
    stub = triton / "python_backend_stubs" / found["version"] / "triton_python_backend_stub"
    if not stub.exists():
        have = sorted(p.name for p in stub.parent.parent.iterdir())
        raise DeployError(
            f"Python {found['version']}: Triton's wheel has stubs for {have} only; "
            "make the server environment with one of those"
        )
    wheel = Wheel(python, site, stub, f"{site}/nvidia_pytriton.libs:{found['libdir']}")
    _check_libraries(wheel, found["version"])
    return wheel


def _check_libraries(wheel: Wheel, version: str) -> None:
    """Distributions ship libpython apart from python: say so before the stub dies of it."""
    env = os.environ | {"LD_LIBRARY_PATH": wheel.libraries}
    listing = subprocess.run(["ldd", wheel.stub], env=env, capture_output=True, text=True)
    missing = [line.split()[0] for line in listing.stdout.splitlines() if "not found" in line]
    if missing:
        raise DeployError(
            f"Triton's Python stub lacks {missing}; on Debian and Ubuntu: "
            f"apt-get install libpython{version}"
        )


def check_release(folder: Path, target: Target) -> Release:
    """Read the release and see that every model file is there; DeployError naming what is not."""
    release = Release.load(folder)
    repository = folder / "model_repository"
    for part in (*models.MODELS, *models.ENSEMBLES):
        version = repository / part.name / str(release.version)
        tower = part in models.TOWERS
        needed = [
            version,
            repository / part.name / (f"configs/{target}.pbtxt" if tower else "config.pbtxt"),
        ]
        if part in models.MODELS and not (tower and target is Target.GPU):
            needed.append(version / "model.py")
        if tower:
            needed.append(version / ("model.plan" if target is Target.GPU else "model.onnx"))
        for path in needed:
            if not path.exists():
                raise DeployError(
                    f"{path}: not found; the release is not whole, build it again "
                    "with `python -m export repository`"
                )
    return release


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
) -> list[str]:
    """The server's command line."""
    flags: dict[str, object] = {
        "model-repository": repository,
        "model-config-name": target,
        "backend-directory": backends,
        "cache-directory": wheel.triton / "caches",
        "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        "allow-gpu-metrics": "false",
        "pinned-memory-pool-byte-size": 0,
        "exit-timeout-secs": DRAIN_S,
    }
    for protocol in ("grpc", "http", "metrics"):
        flags[f"{protocol}-address"] = host
        flags[f"{protocol}-port"] = getattr(ports, protocol)
    # Should we be killed outright, the kernel stops the server: it must not keep the ports.
    bound = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    binary = str(wheel.triton / "bin" / "tritonserver")
    settings = [f"--{name}={value}" for name, value in flags.items()]
    return [*bound, binary, "--disable-auto-complete-config", *settings]


@contextlib.contextmanager
def triton(
    release_folder: Path = LATEST,
    *,
    server_python: Path = SERVER_PYTHON,
    target: Target = Target.LOCAL,
    host: str = LOOPBACK,
    ports: Ports | None = None,
    log: IO[str] = sys.stderr,
) -> Iterator[Server]:
    """Run Triton over a release until the block ends; yields once a real inference worked.

    The server leads a process group of its own, so Ctrl-C reaches us first and requests in
    flight are finished; whatever it leaves (stubs, shared memory) is removed. Raises
    DeployError when it cannot start, with the lines of its log that say why.
    """
    wheel = find_wheel(server_python)
    release = check_release(release_folder, target)
    ports = ports or choose_ports(host)
    with tempfile.TemporaryDirectory(prefix="retrieval-triton-") as scratch:
        shm_prefix = Path(scratch).name
        backends = _backends(wheel, Path(scratch))
        # The stub finds its packages as `python3` on PATH would.
        env = os.environ | {
            "LD_LIBRARY_PATH": wheel.libraries,
            "PATH": f"{wheel.python.parent}:{os.environ['PATH']}",
        }
        env.pop("PYTHONPATH", None)
        args = command(
            wheel,
            backends,
            (release_folder / "model_repository").resolve(),
            host,
            ports,
            target,
            shm_prefix,
        )
        process = subprocess.Popen(
            args,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        tail = _pump(process, log)
        try:
            version = _wait_ready(process, f"{host}:{ports.grpc}", tail)
            yield Server(host, ports, release, version, process)
        finally:
            stop(process)
            for region in Path("/dev/shm").glob(f"{shm_prefix}*"):
                region.unlink(missing_ok=True)


def _backends(wheel: Wheel, scratch: Path) -> Path:
    """Triton wants the stub inside the backend's folder, the wheel keeps one per Python."""
    backend = shutil.copytree(wheel.triton / "backends" / "python", scratch / "python")
    stub = shutil.copy(wheel.stub, backend)
    Path(stub).chmod(0o755)
    return scratch


def _pump(process: subprocess.Popen[str], log: IO[str]) -> list[str]:
    """Pass the server's log on, without the noise; keeps the telling lines for error messages."""
    tail: list[str] = []

    def run() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if HARMLESS.search(line):
                    continue
                if TELLING.search(line):
                    tail.append(line)
                    del tail[:-20]
                with contextlib.suppress(ValueError):  # the log was closed first: drop the rest
                    print(line, end="", file=log, flush=True)

    threading.Thread(target=run, daemon=True).start()
    return tail


def _wait_ready(process: subprocess.Popen[str], address: str, tail: list[str]) -> str:
    """Wait for a real inference through both steps; returns "triton <version>"."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    problem = ""
    while time.monotonic() < deadline:
        if process.poll() is not None:
            time.sleep(0.2)  # let the pump read the last words
            raise DeployError(
                f"Triton exited with code {process.returncode} while starting; its "
                f"last words:\n{''.join(tail)}"
            )
        try:
            with Encoder(Settings(triton=address)) as encoder:
                encoder.encode_queries(["ready"])
                return encoder.server_version()
        except RetrievalError as exc:
            problem = str(exc)
            time.sleep(0.2)
    raise DeployError(
        f"Triton was not ready after {READY_TIMEOUT_S:.0f} s ({problem}); its last "
        f"words:\n{''.join(tail)}"
    )


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, let requests in flight finish, then make sure that nothing is left."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DRAIN_S + 10)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # stubs that outlived the server, or all of it
    process.wait()


def _raise_interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Command line: serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    parser.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    parser.add_argument("--server-python", type=Path, default=SERVER_PYTHON)
    parser.add_argument("--host", default=LOOPBACK, help="address to listen on")
    parser.add_argument("--grpc-port", type=int, default=8001, help="0 = any free one")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        help="run this command beside the server (address in RETRIEVAL_TRITON), then stop",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        ports = choose_ports(args.host, args.grpc_port, args.http_port, args.metrics_port)
        with triton(
            args.release, server_python=args.server_python, host=args.host, ports=ports
        ) as server:
            _announce(server)
            if args.run:
                env = os.environ | {"RETRIEVAL_TRITON": server.grpc_address}
                raise SystemExit(subprocess.run(args.run, env=env).returncode)
            code = server.process.wait()
            raise DeployError(f"Triton exited by itself with code {code}; see its log above")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc


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
