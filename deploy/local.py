"""python -m deploy.local: the real Triton of the `nvidia-pytriton` wheel, on this machine.

Serves one release folder (`build/releases/<id>`) with the towers on ONNX Runtime in Triton's
Python backend, the only backend that the wheel has. Loopback and free ports by default.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from deploy.beside import add_run_flag, in_terminal, run_beside
from deploy.query_cache import add_cache_flag
from deploy.security import Tls, read_key
from deploy.server import LATEST, LOOPBACK, Server, choose_ports, http_host_of, triton
from deploy.supervisor import HUNG_S, Restarts, Supervisor, say
from deploy.tuning import add_profile_flag, profile_from
from deploy.wheel import SERVER_PYTHON
from retrieval_contract import models
from retrieval_contract.errors import DeployError


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    top.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    top.add_argument("--server-python", type=Path, default=SERVER_PYTHON)
    top.add_argument("--host", default=LOOPBACK, help="address to listen on")
    top.add_argument(
        "--http-host",
        help="of HTTP and metrics, which have no TLS; default: --host, with TLS loopback",
    )
    top.add_argument("--grpc-port", type=int, default=8001, help="0 = any free one")
    top.add_argument("--http-port", type=int, default=8000)
    top.add_argument("--metrics-port", type=int, default=8002)
    top.add_argument("--tls-cert", type=Path, help="PEM, whole chain: encrypts gRPC")
    top.add_argument("--tls-key", type=Path)
    top.add_argument("--tls-root", type=Path, help="PEM: callers need a certificate of this one")
    top.add_argument(
        "--control-key-file",
        type=Path,
        help="opens loading, shared memory, tracing and logging to who sends the key in it",
    )
    top.add_argument("--otel-url", help="OTLP/HTTP collector, for the spans of traced requests")
    add_profile_flag(top)
    add_cache_flag(top)
    top.add_argument(
        "--hung-s", type=float, default=HUNG_S, help=f"then a silent model is killed; {HUNG_S}"
    )
    add_run_flag(top, "beside the server (address in RETRIEVAL_TRITON)")
    return top


def main() -> None:
    """Command line: serve until Ctrl-C or SIGTERM."""
    args = parser().parse_args()
    with in_terminal(args):
        tls = tls_of(args)
        http_host = http_host_of(args.host, tls, args.http_host)
        wanted = (args.grpc_port, args.http_port, args.metrics_port)
        with triton(
            args.release,
            server_python=args.server_python,
            host=args.host,
            http_host=http_host,
            ports=choose_ports(args.host, *wanted, http_host),
            tls=tls,
            control_key=read_key(args.control_key_file) if args.control_key_file else None,
            profile=profile_from(args),
            otel_url=args.otel_url,
        ) as server:
            _announce(server)
            with supervised(server, args.hung_s) as supervisor:
                if args.run:
                    address = {"RETRIEVAL_TRITON": server.grpc_address}
                    raise SystemExit(run_beside(args.run, address, look=supervisor.wait))
                supervisor.wait()


@contextlib.contextmanager
def supervised(
    server: Server, hung_s: float, restarts: Restarts | None = None
) -> Iterator[Supervisor]:
    """While the block runs, what dies or hangs is started again."""
    supervisor = Supervisor(server.instance, say, hung_s, restarts)
    supervisor.start()
    try:
        yield supervisor
    finally:
        supervisor.stop()


def tls_of(args: argparse.Namespace) -> Tls | None:
    """What the flags say; DeployError for one without the other."""
    if not (args.tls_cert or args.tls_key or args.tls_root):
        return None
    if not (args.tls_cert and args.tls_key):
        raise DeployError("TLS: expected --tls-cert and --tls-key, got one of them; give both")
    return Tls(args.tls_cert, args.tls_key, args.tls_root)


def _announce(server: Server) -> None:
    release = server.release
    print(
        f"{server.triton} serves release {release.release_id} ({release.family}, "
        f"{release.vector_dim} dims) at",
        file=sys.stderr,
    )
    print(f"  gRPC    {server.grpc_address}", file=sys.stderr)
    print(f"  HTTP    http://{server.http_host}:{server.ports.http}", file=sys.stderr)
    print(f"  metrics http://{server.http_host}:{server.ports.metrics}/metrics", file=sys.stderr)
    print(f"  models  {', '.join(e.name for e in models.ENSEMBLES)}; Ctrl-C stops", file=sys.stderr)


if __name__ == "__main__":
    main()
