"""Who may talk to the server, and about what: Triton's flags for TLS and for its controls.

Triton encrypts gRPC alone; its HTTP and metrics ports have no TLS, so they belong on loopback or
behind a proxy (docs/serving.md).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from retrieval_contract.errors import DeployError

CONTROLS = ("model-repository", "shared-memory", "trace", "logging")
"""What changes the server or reads its memory; inference, health and metadata stay open."""
HEADER = "control"
"""gRPC callers send `triton-grpc-protocol-control`, HTTP callers `control`."""


@dataclass(frozen=True)
class Tls:
    """PEM files: the server's certificate and key; with `root`, callers need one signed by it."""

    cert: Path
    key: Path
    root: Path | None = None

    def flags(self) -> list[str]:
        """Triton's; DeployError when a file is not there."""
        for path in filter(None, (self.cert, self.key, self.root)):
            if not path.is_file():
                raise DeployError(f"{path}: not found; give a PEM file")
        flags = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={self.cert.resolve()}",
            f"--grpc-server-key={self.key.resolve()}",
        ]
        if self.root:
            flags += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.root.resolve()}"]
        return flags


def new_key() -> str:
    """Nobody can guess it."""
    return secrets.token_hex(32)


def control_flags(key: str) -> list[str]:
    """Controls answer to whoever knows the key.

    Triton takes the key on its command line, where users of the same machine can read it.
    """
    rule = f"{','.join(CONTROLS)}:{HEADER}={key}"
    return [f"--grpc-restricted-protocol={rule}", f"--http-restricted-api={rule}"]


def read_key(path: Path) -> str:
    """The key that a file holds, one line; DeployError when there is none."""
    try:
        key = path.read_text("utf-8").strip()
    except OSError as exc:
        raise DeployError(f"{path}: {exc.strerror}; give a file that holds the key") from exc
    if not key or len(key.split()) != 1:
        raise DeployError(f"{path}: expected one word, the key; write it there")
    return key
