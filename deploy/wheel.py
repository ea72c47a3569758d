"""The `nvidia-pytriton` wheel in the server environment: where it is, and whether it can load."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from retrieval_contract.errors import DeployError

ROOT = Path(__file__).parent.parent
SERVER_PYTHON = ROOT / ".venv-server" / "bin" / "python"

# Asked of the server environment's interpreter, whose paths we cannot know.
PROBE = """
import json, pathlib, sys, sysconfig
site = pathlib.Path(sysconfig.get_paths()["purelib"])
print(json.dumps({"site": str(site), "version": f"3.{sys.version_info[1]}",
                  "libdir": sysconfig.get_config_var("LIBDIR") or ""}))
"""


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
    try:
        found = json.loads(subprocess.check_output([python, "-c", PROBE], text=True))
    except (OSError, subprocess.CalledProcessError, ValueError) as exc:
        raise DeployError(
            f"{python}: does not run Python; give another --server-python ({exc})"
        ) from exc
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
    """Slim distributions lack libraries that Triton loads: say so before it dies of it."""
    env = os.environ | {"LD_LIBRARY_PATH": wheel.libraries}
    for program, packages in (
        (wheel.triton / "bin" / "tritonserver", "libstdc++6 zlib1g"),
        (wheel.stub, f"libpython{version}"),  # it comes apart from the interpreter
    ):
        listing = subprocess.run(["ldd", program], env=env, capture_output=True, text=True)
        lines = [line.split() for line in listing.stdout.splitlines() if "=> not found" in line]
        if lines:
            raise DeployError(
                f"{program.name} of Triton's wheel lacks {[line[0] for line in lines]}; "
                f"on Debian and Ubuntu: apt-get install {packages}"
            )
