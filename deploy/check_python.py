"""Say readably, before anything is installed, whether this machine can run the project.

Runs on any Python 3, with the standard library alone.
"""

import platform
import sys

SUPPORTED = ((3, 11), (3, 12))
WHY = "NumPy 1.26, which Triton's Python stub needs, has wheels for no other"


def problems():
    """Sentences, each naming what was expected, what was found, and what to do."""
    found = []
    if sys.version_info[:2] not in SUPPORTED:
        wanted = " or ".join("%d.%d" % version for version in SUPPORTED)
        found.append(
            "Python: expected %s (%s), got %d.%d; install one and run `make PYTHON=python%s`"
            % (wanted, WHY, *sys.version_info[:2], wanted.split()[0])
        )
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        found.append(
            "machine: expected Linux on x86-64 (Triton's wheel exists for no other), got %s on %s"
            % (platform.system(), platform.machine())
        )
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        found.append("venv: not installed; on Debian and Ubuntu: apt-get install python3-venv")
    return found


if __name__ == "__main__":
    sys.exit("\n".join("error: " + problem for problem in problems()) or 0)
