"""Who may talk to the server, and about what: Triton's flags for TLS and for its controls.

Triton encrypts gRPC alone; its HTTP and metrics ports have no TLS, so they belong on loopback or
behind a proxy (docs/serving.md).
"""

from __future__ import annotations

import re
import secrets
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from retrieval_contract.errors import DeployError

CONTROLS = ("model-repository", "shared-memory", "trace", "logging")
"""What changes the server or reads its memory; inference, health and metadata stay open."""
HEADER = "control"
"""gRPC callers send `triton-grpc-protocol-control`, HTTP callers `control`."""
CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
VALIDITY = re.compile(rb"(?:\x17\x0d\d{12}Z|\x18\x0f\d{14}Z){2}", re.DOTALL)
"""Of RFC 5280, in DER: from when and until when, each with a year of two digits, or of four."""
SOON = timedelta(days=14)


@dataclass(frozen=True)
class Tls:
    """PEM files: the server's certificate and key; with `root`, callers need one signed by it."""

    cert: Path
    key: Path
    root: Path | None = None

    def flags(self, log: IO[str]) -> list[str]:
        """Triton's; DeployError when a file is not there, or as `check_dates` says."""
        for path in filter(None, (self.cert, self.key, self.root)):
            if not path.is_file():
                raise DeployError(f"{path}: not found; give a PEM file")
        check_dates(self.cert, log)
        flags = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={self.cert.resolve()}",
            f"--grpc-server-key={self.key.resolve()}",
        ]
        if self.root:
            flags += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.root.resolve()}"]
        return flags


def check_dates(cert: Path, log: IO[str]) -> None:
    """DeployError when a certificate, or one of its chain, has expired or cannot be read.

    Triton would start with it all the same, and no client would be served. One that will expire
    SOON is said.
    """
    try:
        chain = CERTIFICATE.findall(cert.read_text("utf-8"))
        if not chain:
            raise ValueError("expected a certificate, got none")
        end = min(_until(ssl.PEM_cert_to_DER_cert(found)) for found in chain)
    except (OSError, ValueError) as exc:
        raise DeployError(f"{cert}: {exc}; give certificates in PEM") from exc
    if end < datetime.now(UTC):
        raise DeployError(f"{cert}: expired at {end:%Y-%m-%d %H:%M} UTC; give a renewed one")
    if end < datetime.now(UTC) + SOON:
        print(
            f"{cert}: expires at {end:%Y-%m-%d %H:%M} UTC; renew it and start again",
            file=log,
            flush=True,
        )


def _until(der: bytes) -> datetime:
    """A certificate's last moment; ValueError where there is none."""
    if not (found := VALIDITY.search(der)):
        raise ValueError("expected a certificate with dates, got none")
    digits = re.findall(rb"\d+", found[0])[-1].decode()
    form = "%y%m%d%H%M%S" if len(digits) == 12 else "%Y%m%d%H%M%S"
    return datetime.strptime(digits, form).replace(tzinfo=UTC)


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
