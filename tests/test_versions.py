"""Whether what an image holds belongs together: the table, and real libraries that are asked."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from deploy import versions
from deploy.versions import Versions, check_versions, look, verdict
from retrieval_contract.errors import DeployError
from tests.conftest import ROOT

TAG = "26.09-py3"
AS_WANTED = Versions("2.73.0", "13.4.1", "11.3.0", "1.27.0", "580.95.05")


def faults(found: Versions, bindings: str = "", in_image: bool = False) -> list[str]:
    """The parts that the verdict objects to."""
    found_so = verdict(TAG, found, bindings, in_image)
    return [finding.part for finding in found_so if not finding.ok]


def test_versions_that_belong_together() -> None:
    assert set(versions.TABLE) == {TAG}
    assert faults(AS_WANTED, "11.3.0.99", in_image=True) == []
    newer = Versions("2.73.0", "13.4.1", "11.3.2", "1.31.0", "610.1")
    assert faults(newer, "11.3.2.1") == []
    assert faults(Versions("2.73.0")) == [], "outside the image there is nothing to see"


def test_in_an_image_only_the_driver_may_be_lacking() -> None:
    no_driver = Versions("2.73.0", "13.4.1", "11.3.0", "1.27.0")
    assert faults(no_driver, "11.3.0.99", in_image=True) == [], "none while it is built"
    assert faults(no_driver, in_image=True) == ["its bindings"]
    assert faults(Versions(), in_image=True) == ["triton", "cuda", "tensorrt", "onnxruntime"]
    lines = [str(finding) for finding in verdict(TAG, Versions(), "", in_image=True)]
    assert lines[2].split() == ["tensorrt", "11.3", "-", "NOT", "FOUND"]
    assert lines[4].endswith("not to be seen here")


@pytest.mark.parametrize(
    ("found", "part"),
    [
        (Versions(triton="2.51.0"), "triton"),
        (Versions(cuda="12.9.0"), "cuda"),
        (Versions(tensorrt="11.2.1"), "tensorrt"),
        (Versions(tensorrt="10.13.0"), "tensorrt"),
        (Versions(onnxruntime="1.9.0"), "onnxruntime"),
        (Versions(driver="575.57.08"), "driver"),
    ],
)
def test_one_that_differs_is_named(found: Versions, part: str) -> None:
    assert faults(found) == [part]


def test_a_builder_of_another_version_than_the_runtime_is_named() -> None:
    assert faults(AS_WANTED, "11.3.1.2") == ["its bindings"]


def test_an_old_driver_stops_only_who_needs_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Versions("2.73.0", "13.4.1", "11.3.0", "1.27.0", "550.54")
    monkeypatch.setattr(versions, "look", lambda: old)
    monkeypatch.setattr(versions, "bindings_version", lambda: "11.3.0.99")
    assert "DIFFERS" in check_versions(TAG, gpu=False)
    with pytest.raises(DeployError, match=r"update the GPU's driver, or .* --target cpu"):
        check_versions(TAG)


def test_an_unknown_image_has_no_verdict() -> None:
    with pytest.raises(
        DeployError, match=r"Triton image 99\.01-py3: expected one of \['26\.09-py3"
    ):
        verdict("99.01-py3", Versions())


def folder_of(package: str) -> Path:
    return Path(find_spec(package).submodule_search_locations[0])


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like /opt/tritonserver, with a real ONNX Runtime, and a driver beside it."""
    home = tmp_path / "tritonserver"
    backend = home / "backends" / "onnxruntime"
    backend.mkdir(parents=True)
    (runtime,) = (folder_of("onnxruntime") / "capi").glob("libonnxruntime.so.*")
    (backend / "libonnxruntime.so").symlink_to(runtime)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.95.05\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("TRITON_SERVER_VERSION", "2.73.0")
    monkeypatch.setenv("CUDA_VERSION", "13.4.1.005")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return home


def test_what_an_image_holds_is_seen(image: Path) -> None:
    found = look(image)
    assert (found.triton, found.cuda, found.driver) == ("2.73.0", "13.4.1.005", "580.95.05")
    assert found.onnxruntime == version("onnxruntime")
    assert faults(found) == []
    assert look(image / "nowhere").onnxruntime == ""


@pytest.mark.parametrize("major", [8, 10, 15])
def test_a_tensorrt_of_any_major_is_asked(tmp_path: Path, major: int) -> None:
    """By the real loader; the library is TensorRT-RTX's, which answers to the same call."""
    (library,) = folder_of("tensorrt_rtx_libs").glob("libtensorrt_rtx.so.*")
    (tmp_path / f"libnvinfer.so.{major}").symlink_to(library)
    code = "from deploy.versions import look; print(look().tensorrt)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    found = done.stdout.strip()
    assert version("tensorrt_rtx").startswith(found), done.stderr
    assert faults(Versions(tensorrt=found)) == ["tensorrt"]


def test_an_image_without_tensorrt_is_refused(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not to be seen here" in check_versions(TAG)
    monkeypatch.setattr(versions, "TRITON_HOME", image)
    with pytest.raises(DeployError, match=r"tensorrt +11\.3 +- +NOT FOUND(?s:.*)use the image"):
        check_versions(TAG)


def test_the_command_gives_the_verdict(image: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "deploy.versions", "--tag", TAG],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"Triton image {TAG}\n")
