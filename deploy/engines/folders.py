"""Folders that are asked for, before the work that is to fill them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from retrieval_contract.errors import DeployError


def writable(folder: Path, flag: str) -> Path:
    """The folder, made where it is missing; DeployError that names its flag where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as exc:
        raise DeployError(
            f"{flag} {folder}: expected a folder to write into, got: {exc.strerror}; give another"
        ) from exc
