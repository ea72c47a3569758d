"""One Triton of the `nvidia-pytriton` wheel: its files, its ports, its start and its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from deploy.instance import ASK_S, Instance, kept_flags
from deploy.orphans import PREFIX
from deploy.own_http import OwnHttp
from deploy.security import Tls, new_key
from deploy.tracing import trace_flags
from deploy.tuning import Profile, lay_over
from deploy.wheel import ROOT, SERVER_PYTHON, Wheel, find_wheel
from retrieval_contract import models
from retrieval_contract.errors import DeployError
from retrieval_contract.models import Target
from retrieval_contract.probes import Probes
from retrieval_contract.release import Precision, Release

LATEST = ROOT / "build" / "releases" / "latest"
LOOPBACK = "127.0.0.1"
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
    """A running server: where it listens, what it serves, and how it is started again.

    `http_host` is the address of HTTP and metrics.
    """

    host: str
    http_host: str
    ports: Ports
    release: Release
    triton: str
    instance: Instance = field(repr=False)

    @property
    def process(self) -> subprocess.Popen[str]:
        """Its present process."""
        return self.instance.process

    @property
    def grpc_address(self) -> str:
        """`host:port` for clients."""
        return f"{self.host}:{self.ports.grpc}"


def check_release(folder: Path, target: Target) -> Release:
    """Read the release and see that every model file is there; DeployError naming what is not.

    ContractError where it cannot be served on that target.
    """
    release = Release.load(folder).for_target(target)
    for path in _files(folder / "model_repository", release, target):
        if not path.exists():
            raise DeployError(
                f"{path}: not found; the release is not whole, build it again "
                "with `python -m export repository`"
            )
    return release


def _files(repository: Path, release: Release, target: Target) -> Iterator[Path]:
    """Everything that a server of that target reads; the folder of an ensemble's version, too."""
    version, of_tower = str(release.version), TOWER_FILES[target]
    if release.precision != Precision.FP32:
        of_tower = TOWER_FILES[Target.LOCAL]
    for part in (*models.MODELS, *models.ENSEMBLES):
        config, names = "config.pbtxt", []
        if part in models.TOWERS:
            config, names = f"configs/{target}.pbtxt", of_tower
        elif part in models.MODELS:
            names = [models.PYTHON_FILE, models.TOKENIZER_FILE]
        elif part in models.IN_ONE and target is Target.LOCAL:
            config, names = f"configs/{target}.pbtxt", [models.PYTHON_FILE]
        home = repository / part.name
        yield from (home / config, home / version)
        yield from (home / version / name for name in names)


def http_host_of(host: str, tls: Tls | None, said: str | None = None) -> str:
    """Where HTTP and metrics listen: who encrypts gRPC must not be passed by on their ports."""
    return said or (LOOPBACK if tls else host)


def choose_ports(
    host: str, grpc: int = 0, http: int = 0, metrics: int = 0, http_host: str | None = None
) -> Ports:
    """Free ports where 0 is given; DeployError when a given one is taken, or for IPv6: what watches
    the server and what clients are told is IPv4."""
    chosen: list[int] = []
    other = http_host or host
    for address in (host, other):
        if ":" in address:
            raise DeployError(f"expected an IPv4 address or a name, got {address}; give another")
    with contextlib.ExitStack() as held:  # hold all of them, so that no two are the same
        for name, at, port in (
            ("gRPC", host, grpc),
            ("HTTP", other, http),
            ("metrics", other, metrics),
        ):
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((at, port))
            except OSError as exc:
                raise DeployError(
                    f"{name} port {port} on {at}: {exc.strerror}; stop what listens there or "
                    f"choose another (0 = any free one)"
                ) from exc
            chosen.append(probe.getsockname()[1])
    return Ports(*chosen)


def command(
    wheel: Wheel,
    backends: Path,
    repository: Path,
    host: str,
    http_host: str,
    ports: Ports,
    target: Target,
    more: Sequence[str],
) -> list[str]:
    """The server's command line; `more` is how it is kept, who may ask, and the profile."""
    flags: dict[str, object] = {
        "model-repository": repository,
        "model-config-name": target,
        "backend-directory": backends,
        "cache-directory": wheel.triton / "caches",
        "allow-gpu-metrics": "false",
        "pinned-memory-pool-byte-size": 0,
    }
    for protocol, address in (("grpc", host), ("http", http_host), ("metrics", http_host)):
        flags[f"{protocol}-address"] = address
        flags[f"{protocol}-port"] = getattr(ports, protocol)
    binary = str(wheel.triton / "bin" / "tritonserver")
    settings = [f"--{name}={value}" for name, value in flags.items()]
    return [binary, *settings, *more]


@contextlib.contextmanager
def triton(
    release_folder: Path = LATEST,
    *,
    server_python: Path = SERVER_PYTHON,
    host: str = LOOPBACK,
    http_host: str | None = None,
    ports: Ports | None = None,
    log: IO[str] = sys.stderr,
    tls: Tls | None = None,
    control_key: str | None = None,
    profile: Profile | None = None,
    otel_url: str | None = None,
) -> Iterator[Server]:
    """Run Triton over a release until the block ends; yields once it gave the release's probes.

    Whatever it leaves (stubs, shared memory) is removed. Raises DeployError when it cannot
    start, with the lines of its log that say why, and ReleaseMismatch when it gives other vectors.
    Without a `profile` the configs are those of the release; without an `http_host` HTTP and
    metrics listen on `host`, and with TLS, which they have not, on loopback.
    """
    wheel = find_wheel(server_python)
    release = check_release(release_folder, Target.LOCAL)
    http_host = http_host_of(host, tls, http_host)
    ports = ports or choose_ports(host, http_host=http_host)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as scratch:
        shm_prefix = Path(scratch).name
        backends = _backends(wheel, Path(scratch))
        repository = _linked(release_folder / "model_repository", Path(scratch))
        control_key = control_key or new_key()
        profile = profile or Profile()
        more = [*kept_flags(shm_prefix, control_key), *(tls.flags(log) if tls else ())]
        more += [*trace_flags(otel_url), *lay_over(profile, repository)]
        args = command(wheel, backends, repository, host, http_host, ports, Target.LOCAL, more)
        instance = Instance(
            args,
            _environment(wheel),
            shm_prefix,
            OwnHttp(
                http_host, ports.http, ports.metrics, control_key, bool(profile.query_cache_mb)
            ),
            ((host, ports.grpc), (http_host, ports.metrics)),
            Probes.load(release_folder),
            log,
        )
        try:
            instance.start()
            yield Server(host, http_host, ports, release, instance.http.version(ASK_S), instance)
        finally:
            instance.stop(lambda: shutil.rmtree(scratch, ignore_errors=True))


def _environment(wheel: Wheel) -> dict[str, str]:
    """The stub finds its packages as `python3` on PATH would."""
    env = os.environ | {
        "LD_LIBRARY_PATH": wheel.libraries,
        "PATH": f"{wheel.python.parent}:{os.environ['PATH']}",
    }
    env.pop("PYTHONPATH", None)
    return env


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
