"""python3 -m deploy.container: how the serve image starts.

Says whether the image's versions belong together, makes engines for the GPU at hand or takes them
from the cache, and keeps Triton running on what came of that: a model or server that dies or hangs
is started again. SIGTERM drains. Arguments that it does not know are Triton's.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploy.engines.__main__ import add_missing_flag
from deploy.engines.ready import Missing, prepared_apart
from deploy.instance import Instance, kept_flags
from deploy.orphans import PREFIX
from deploy.own_http import OwnHttp
from deploy.query_cache import add_cache_flag
from deploy.security import check_dates, new_key, read_key
from deploy.server import LOOPBACK, check_release
from deploy.stopping import Stopped, listen, reap
from deploy.supervisor import HUNG_S, Supervisor, say
from deploy.tuning import Profile, add_profile_flag, lay_over, profile_from
from deploy.versions import TRITON_HOME, check_versions
from retrieval_contract.errors import DeployError, RetrievalError
from retrieval_contract.models import Target
from retrieval_contract.probes import Probes

EVERYWHERE = "0.0.0.0"
READY_S = 900.0
"""As long as the image's health check gives it."""
REAP_S = 1.0


def triton_command(release: Path, target: Target, more: Sequence[str]) -> list[str]:
    """Triton over one release folder."""
    return [
        str(TRITON_HOME / "bin" / "tritonserver"),
        f"--model-repository={release / 'model_repository'}",
        f"--model-config-name={target}",
        *more,
    ]


def fitted(release: Path, profile: Profile) -> tuple[Path, list[str]]:
    """A release's repository with its configs as a profile says, and Triton's flags for it.

    Laid over links in a temporary folder, which ends with the container.
    """
    home = Path(tempfile.mkdtemp(prefix="retrieval-"))
    source = (release / "model_repository").resolve()
    repository = shutil.copytree(source, home / "model_repository", copy_function=os.symlink)
    return home, lay_over(profile, repository)


def keep(instance: Instance, hung_s: float) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code. DeployError when it cannot be kept alive."""
    supervisor = None
    try:
        instance.start()
        say("Triton is started, with the right vectors")
        supervisor = Supervisor(instance, say, hung_s)
        supervisor.start()
        while not supervisor.wait(REAP_S):
            reap(instance.process.pid)
    except Stopped:
        pass
    finally:
        if supervisor is not None:
            supervisor.stop()
        code = instance.stop()
    return code if code >= 0 else 128 - code


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python3 -m deploy.container", description=__doc__)
    top.add_argument("--release", type=Path, default=Path("/release"))
    top.add_argument("--cache", type=Path, default=Path("/cache"), help="of engines; keep it")
    top.add_argument("--target", choices=[Target.GPU, Target.CPU], default=Target.GPU)
    add_missing_flag(top)
    add_profile_flag(top)
    add_cache_flag(top)
    top.add_argument("--tag", default=os.environ.get("TRITON_TAG", ""), help="of NVIDIA's image")
    top.add_argument(
        "--http-address",
        help="of HTTP and metrics, which have no TLS; default: any, and loopback with "
        "--grpc-use-ssl",
    )
    top.add_argument("--grpc-address", default=EVERYWHERE, help="of clients")
    top.add_argument("--grpc-port", type=int, default=8001)
    top.add_argument("--grpc-server-cert", type=Path, help="PEM, beside --grpc-use-ssl=true")
    top.add_argument("--http-port", type=int, default=8000)
    top.add_argument("--metrics-port", type=int, default=8002)
    top.add_argument("--allow-http", default="true", help="no other than true: it is watched so")
    top.add_argument("--control-key-file", type=Path, help="as that of deploy.local")
    top.add_argument("--hung-s", type=float, default=HUNG_S, help="then a silent model is killed")
    return top


def in_the_clear_at(args: argparse.Namespace, more: Sequence[str]) -> str:
    """Where HTTP and metrics listen: who encrypts gRPC must not be passed by on their ports."""
    encrypted = any(flag.startswith("--grpc-use-ssl") for flag in more)
    return str(args.http_address or (LOOPBACK if encrypted else EVERYWHERE))


def from_inside(address: str) -> str:
    """Where we reach what listens there."""
    return LOOPBACK if address == EVERYWHERE else address


def own_http(args: argparse.Namespace, more: Sequence[str], key: str, cached: bool) -> OwnHttp:
    """How to ask the server that these flags start, from inside its container."""
    asked_at = from_inside(in_the_clear_at(args, more))
    return OwnHttp(asked_at, args.http_port, args.metrics_port, key, cached)


def instance_of(args: argparse.Namespace, more: Sequence[str]) -> Instance:
    """What these flags ask for, not yet started; DeployError when it could not be watched."""
    if args.allow_http.lower() not in ("true", "1"):
        raise DeployError(
            f"--allow-http={args.allow_http}: expected HTTP, by which the server is watched; "
            f"keep it to this container with --http-address={LOOPBACK}"
        )
    if not (binary := TRITON_HOME / "bin" / "tritonserver").is_file():
        raise DeployError(f"{binary}: not found; run this in the image")
    release, target = args.release, Target(args.target)
    if target is Target.GPU:
        ready = prepared_apart(release, args.cache, Missing(args.missing))
        release, target = ready.release, ready.target
    check_release(release, target)
    key = read_key(args.control_key_file) if args.control_key_file else new_key()
    shm_prefix = f"{PREFIX}{secrets.token_hex(4)}-"
    listening = [f"--{name}-address={in_the_clear_at(args, more)}" for name in ("http", "metrics")]
    listening += [f"--http-port={args.http_port}", f"--metrics-port={args.metrics_port}"]
    listening += [f"--grpc-address={args.grpc_address}", f"--grpc-port={args.grpc_port}"]
    if args.grpc_server_cert:
        check_dates(args.grpc_server_cert, sys.stderr)
        listening.append(f"--grpc-server-cert={args.grpc_server_cert}")
    flags = [*kept_flags(shm_prefix, key), *listening, *more]
    probes, profile = Probes.load(release), profile_from(args)
    if profile:
        release, fitting = fitted(release, profile)
        flags += fitting
    return Instance(
        triton_command(release, target, flags),
        os.environ,
        shm_prefix,
        own_http(args, more, key, cached=bool(profile and profile.query_cache_mb)),
        [(from_inside(args.grpc_address), args.grpc_port)],
        probes,
        sys.stderr,
        READY_S,
        gpu=target is Target.GPU,
    )


def main() -> None:
    """Command line: serve until SIGTERM."""
    args, more = parser().parse_known_args()
    listen()
    try:
        print(check_versions(args.tag, args.target == Target.GPU), file=sys.stderr)
        sys.stderr.flush()
        raise SystemExit(keep(instance_of(args, more), args.hung_s))
    except Stopped as exc:  # before there was a server
        raise SystemExit(128 + exc.args[0]) from None
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
    except OSError as exc:  # no Triton here, or a cache that cannot be written
        raise SystemExit(
            f"error: {exc}; run this in the image, with a release that user {os.getuid()} may read "
            "and a --cache where he may write"
        ) from exc


if __name__ == "__main__":
    main()
