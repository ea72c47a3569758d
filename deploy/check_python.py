"""Say readably, before anything is installed, whether this machine can run the project.

Runs on any Python 3, with the standard library alone.
"""

import ctypes
import os
import platform
import sys
import sysconfig

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
    if not has_shared_python():
        found.append(
            "libpython: expected the shared library of this Python, which Triton's stub loads; "
            "on Debian and Ubuntu: apt-get install libpython%d.%d" % sys.version_info[:2]
        )
    return found


def has_shared_python():
    """Distributions ship `libpython3.x.so` apart from the interpreter."""
    name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
    for place in (name, os.path.join(sysconfig.get_config_var("LIBDIR") or "", name)):
        try:
            ctypes.CDLL(place)
            return True
        except OSError:
            pass
    return False


if __name__ == "__main__":
    sys.exit("\n".join("error: " + problem for problem in problems()) or 0)
