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
GLIBC = (2, 35)  # of Triton's wheel: manylinux_2_35


def problems():
    """Sentences, each naming what was expected, what was found, and what to do."""
    found = machine_problems()
    version = "%d.%d" % sys.version_info[:2]
    if sys.version_info[:2] not in SUPPORTED:
        wanted = ["%d.%d" % pair for pair in SUPPORTED]
        found.append(
            "Python: expected %s (%s), got %s; install one and run `make demo PYTHON=python%s`"
            % (" or ".join(wanted), WHY, version, wanted[0])
        )
        return found  # what this Python lacks does not matter
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        found.append(
            "venv: not installed; on Debian and Ubuntu: apt-get install python%s-venv" % version
        )
    if not has_shared_python():
        found.append(
            "libpython: expected the shared library of this Python, which Triton's stub loads; "
            "on Debian and Ubuntu: apt-get install libpython%s" % version
        )
    return found


def machine_problems():
    """What no other Python can mend: the processor, the system, its C library."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return [
            "machine: expected Linux on x86-64 (Triton's wheel exists for no other), got %s on %s"
            % (platform.system(), platform.machine())
        ]
    name = c_library()
    if name.startswith("glibc ") and version_of(name) >= GLIBC:
        return []
    return [
        "C library: expected glibc %d.%d or newer, which Triton's wheel is built for, got %s; "
        "use a newer system, such as Debian 12 or Ubuntu 22.04" % (*GLIBC, name or "another")
    ]


def c_library():
    """Such as "glibc 2.36"; empty where the library is not GNU's."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):
        return ""


def version_of(name):
    """(2, 36) of "glibc 2.36"."""
    return tuple(int(number) for number in name.split()[1].split(".")[:2])


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
