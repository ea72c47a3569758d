"""The binary of the `milvus` wheel: `make setup` unpacks it (58 MB to fetch, 246 MB on disk).

    python -m deploy.milvus_wheel FOLDER

FOLDER is where `pip install --target` put the wheel. Only the binary and its libraries are used;
the wheel's Python would start it on the machine's own network.
"""

from __future__ import annotations

import lzma
import sys
from dataclasses import dataclass
from pathlib import Path

from retrieval_contract.errors import DeployError

ROOT = Path(__file__).parent.parent
MILVUS_FOLDER = ROOT / ".venv-milvus"
PACKED = ".lzma"


@dataclass(frozen=True)
class Binary:
    """The server's program; its libraries lie beside it."""

    program: Path

    @property
    def libraries(self) -> Path:
        """For LD_LIBRARY_PATH, of the server alone."""
        return self.program.parent


def find_binary(folder: Path = MILVUS_FOLDER) -> Binary:
    """DeployError when it is not there, or not unpacked."""
    program = _binaries(folder) / "milvus"
    if not program.exists():
        raise DeployError(f"{folder}: no Milvus server there; run `make setup`")
    return Binary(program)


def unpack(folder: Path) -> Binary:
    """Unpack what the wheel carries packed, and keep no second copy of it."""
    for packed in sorted(_binaries(folder).glob(f"*{PACKED}")):
        half_done = packed.with_suffix(".part")
        half_done.write_bytes(lzma.decompress(packed.read_bytes()))
        half_done.chmod(0o755)
        half_done.rename(packed.with_suffix(""))
        packed.unlink()
    return find_binary(folder)


def _binaries(folder: Path) -> Path:
    return folder / "milvus" / "data" / "bin"


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
