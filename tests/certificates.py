"""Certificates for tests, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(*arguments: str, cwd: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)


def authority(folder: Path, name: str) -> None:
    """`name`.pem and `name`.key, which sign others'."""
    openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
        *("-subj", f"/CN={name}"),
        cwd=folder,
    )


def certificate(
    folder: Path,
    name: str,
    authority: str,
    *,
    days: int = 2,
    names: str = "IP:127.0.0.1,IP:127.0.0.2",
) -> None:
    """`name`.pem and `name`.key for these names, signed by `authority`; of negative days it has
    expired."""
    openssl(
        *("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr"),
        *("-subj", f"/CN={name}"),
        cwd=folder,
    )
    (folder / "names").write_text(f"subjectAltName={names}\n")
    openssl(
        *("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem"),
        *("-CAkey", f"{authority}.key", "-CAcreateserial", "-days", str(days), "-extfile", "names"),
        *("-out", f"{name}.pem"),
        cwd=folder,
    )
