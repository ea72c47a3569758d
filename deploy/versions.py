"""python3 -m deploy.versions: whether an image holds what this project was written against.

Run when the image is built and when it starts. The table is NVIDIA's release notes and Triton's
repository as of September 2026; TensorRT's row was inferred (11.3 is the first of CUDA 13.4), so
the library itself is asked, and ONNX Runtime's as well. Drivers: minor version compatibility,
docs.nvidia.com/deploy/cuda-compatibility.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from retrieval_contract.errors import DeployError

TRITON_HOME = Path("/opt/tritonserver")
BINDINGS = "tensorrt_cu13_bindings"
MAJORS = range(15, 7, -1)
"""Of TensorRT's library, whose name holds it: another than the table's must be seen, too."""


@dataclass(frozen=True)
class Versions:
    """What belongs together; empty: not found."""

    triton: str = ""
    cuda: str = ""
    tensorrt: str = ""
    onnxruntime: str = ""
    driver: str = ""


TABLE: Mapping[str, Versions] = {
    "26.09-py3": Versions("2.73.0", "13.4", "11.3", "1.27", "580"),
}
"""Container tag → versions; of runtime and driver the lowest."""
LOWEST = ("onnxruntime", "driver")
UNSEEN = ("driver",)
"""What an image may lack: it comes with the GPU, so not while the image is built."""


@dataclass(frozen=True)
class Finding:
    """One part of the verdict."""

    part: str
    wanted: str
    found: str
    may_lack: bool = True

    @property
    def ok(self) -> bool:
        """Whether it is as wanted, or may be lacking, and is."""
        if not self.found:
            return self.may_lack
        found, wanted = _numbers(self.found), _numbers(self.wanted)
        if self.part in LOWEST:
            return found >= wanted
        return found[: len(wanted)] == wanted

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "DIFFERS"
        if not self.found:
            verdict = "not to be seen here" if self.ok else "NOT FOUND"
        at_least = ">= " if self.part in LOWEST else ""
        return f"{self.part:<12} {at_least + self.wanted:<10} {self.found or '-':<14} {verdict}"


def _numbers(version: str) -> tuple[int, ...]:
    """`11.3.0.99+cuda13` → (11, 3, 0, 99)."""
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def verdict(tag: str, found: Versions, bindings: str = "", in_image: bool = False) -> list[Finding]:
    """What is found beside the table's row of that tag; `bindings`: of TensorRT's Python module.

    In an image all but the driver must be found. Raises DeployError for a tag that the table does
    not have.
    """
    if tag not in TABLE:
        raise DeployError(
            f"Triton image {tag}: expected one of {sorted(TABLE)}; see that the tests pass with "
            "it, and give it a row in deploy/versions.py"
        )
    wanted, have = asdict(TABLE[tag]), asdict(found)
    findings = [
        Finding(name, wanted[name], have[name], not in_image or name in UNSEEN)
        for name in (field.name for field in fields(Versions))
    ]
    if found.tensorrt:  # an engine's builder and its runtime are one library
        findings.append(Finding("its bindings", found.tensorrt, bindings, not in_image))
    return findings


def look(home: Path = TRITON_HOME) -> Versions:
    """What this machine, or image, holds."""
    return Versions(
        triton=os.environ.get("TRITON_SERVER_VERSION", ""),
        cuda=os.environ.get("CUDA_VERSION", ""),
        tensorrt=_tensorrt(),
        onnxruntime=_onnxruntime(home / "backends" / "onnxruntime" / "libonnxruntime.so"),
        driver=next(iter(nvidia_smi("driver_version")), ""),
    )


def _tensorrt() -> str:
    """As `libnvinfer` itself says, of whatever major: 110300 is 11.3.0 (NvInferVersion.h)."""
    for major in MAJORS:
        try:
            number = int(ctypes.CDLL(f"libnvinfer.so.{major}").getInferLibVersion())
        except (OSError, AttributeError):
            continue
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return ""


class _OrtApiBase(ctypes.Structure):
    """As in onnxruntime_c_api.h."""

    _fields_: ClassVar = [
        ("get_api", ctypes.c_void_p),
        ("get_version_string", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    ]


def _onnxruntime(library: Path) -> str:
    """As the library itself says; in NVIDIA's image its name does not."""
    try:
        api_base = ctypes.CDLL(str(library)).OrtGetApiBase
    except (OSError, AttributeError):
        return ""
    api_base.restype = ctypes.POINTER(_OrtApiBase)
    said: bytes = api_base().contents.get_version_string()
    return said.decode()


def nvidia_smi(fields: str) -> list[str]:
    """`nvidia-smi --query-gpu=<fields>`, a line for each GPU; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def bindings_version() -> str:
    """Of TensorRT's Python module, without importing it."""
    for name in (BINDINGS, "tensorrt"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def check_versions(tag: str, gpu: bool = True) -> str:
    """The verdict to read; DeployError with it where something differs, of the driver only where
    `gpu` is to be used."""
    findings = verdict(tag, look(), bindings_version(), TRITON_HOME.is_dir())
    text = "\n".join([f"Triton image {tag}", *map(str, findings)])
    differing = {finding.part for finding in findings if not finding.ok}
    if differing - set(UNSEEN):
        raise DeployError(
            f"{text}\nuse the image of the table, or see that the tests pass with this one and "
            "change deploy/versions.py (TensorRT's bindings: --build-arg TENSORRT_VERSION=...)"
        )
    if differing and gpu:
        raise DeployError(
            f"{text}\nupdate the GPU's driver, or serve on the processor: --target cpu"
        )
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python3 -m deploy.versions", description=__doc__)
    parser.add_argument("--tag", required=True, help="of NVIDIA's Triton image, such as 26.09-py3")
    try:
        print(check_versions(parser.parse_args().tag))
    except DeployError as exc:
        raise SystemExit(f"error: {exc}") from exc


if __name__ == "__main__":
    main()
