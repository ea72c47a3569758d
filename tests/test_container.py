"""How the serve image starts: versions that belong together, then Triton on what can be served."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import container, versions
from deploy.stopping import DRAIN_S
from deploy.versions import Versions, look, verdict
from retrieval_contract.errors import DeployError
from retrieval_contract.models import Target
from tests.conftest import ROOT

TAG = "26.09-py3"
AS_WANTED = Versions("2.73.0", "13.4.1", "11.3.0", "1.27.0", "580.95.05")


def faults(found: Versions, bindings: str = "") -> list[str]:
    """The parts that the verdict objects to."""
    return [finding.part for finding in verdict(TAG, found, bindings) if not finding.ok]


def test_versions_that_belong_together() -> None:
    assert faults(AS_WANTED, "11.3.0.99") == []
    newer = Versions("2.73.0", "13.4.1", "11.3.2", "1.31.0", "610.1")
    assert faults(newer, "11.3.2.1") == []
    assert faults(Versions("2.73.0")) == [], "no driver is seen while an image is built"


@pytest.mark.parametrize(
    ("found", "part"),
    [
        (Versions(triton="2.51.0"), "triton"),
        (Versions(cuda="12.9.0"), "cuda"),
        (Versions(tensorrt="11.2.1"), "tensorrt"),
        (Versions(onnxruntime="1.9.0"), "onnxruntime"),
        (Versions(driver="575.57.08"), "driver"),
    ],
)
def test_one_that_differs_is_named(found: Versions, part: str) -> None:
    assert faults(found) == [part]


def test_a_builder_of_another_version_than_the_runtime_is_named() -> None:
    assert faults(AS_WANTED, "11.3.1.2") == ["its bindings"]


def test_an_unknown_image_has_no_verdict() -> None:
    with pytest.raises(
        DeployError, match=r"Triton image 99\.01-py3: expected one of \['26\.09-py3"
    ):
        verdict("99.01-py3", Versions())


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like /opt/tritonserver whose server says how it was started."""
    home = tmp_path / "tritonserver"
    (home / "bin").mkdir(parents=True)
    (home / "backends" / "onnxruntime").mkdir(parents=True)
    (home / "backends" / "onnxruntime" / "libonnxruntime.so.1.27.0").touch()
    server = home / "bin" / "tritonserver"
    server.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    server.chmod(0o755)
    monkeypatch.setenv("TRITON_SERVER_VERSION", "2.73.0")
    monkeypatch.setenv("CUDA_VERSION", "13.4.1.005")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return home


def test_what_an_image_holds_is_seen(image: Path, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.95.05\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = look(image)
    assert (found.triton, found.cuda, found.onnxruntime) == ("2.73.0", "13.4.1.005", "1.27.0")
    assert found.driver == "580.95.05"
    assert faults(found) == []


def start(image: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The image's entry point, with another home for Triton."""
    code = (
        "import pathlib, sys; from deploy import container, versions; "
        f"container.TRITON_HOME = pathlib.Path({str(image)!r}); sys.argv[0] = 'container'; "
        "container.main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)


def test_it_becomes_triton_on_the_processor(image: Path, tmp_path: Path) -> None:
    done = start(image, f"--tag={TAG}", "--target=cpu", f"--release={tmp_path}", "--log-verbose=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"--model-repository={tmp_path}/model_repository",
        "--model-config-name=cpu",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={DRAIN_S}",
        "--log-verbose=1",
    ]
    assert "triton       2.73.0     2.73.0         ok" in done.stderr


def test_without_a_gpu_the_flag_decides(image: Path, release_folder: Path, tmp_path: Path) -> None:
    where = [f"--tag={TAG}", f"--release={release_folder}", f"--cache={tmp_path / 'cache'}"]
    served = start(image, *where, "--missing=cpu")
    assert "--model-config-name=cpu" in served.stdout.splitlines(), served.stderr
    refused = start(image, *where)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "error: expected a GPU" in refused.stderr


def test_an_image_that_differs_does_not_start(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_SERVER_VERSION", "2.51.0")
    done = start(image, f"--tag={TAG}", "--target=cpu", f"--release={tmp_path}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "triton       2.73.0     2.51.0         DIFFERS" in done.stderr
    assert "Traceback" not in done.stderr


def test_outside_the_image_it_says_so(tmp_path: Path) -> None:
    done = start(tmp_path, f"--tag={TAG}", "--target=cpu")
    assert done.returncode == 1
    assert "run this in the image" in done.stderr


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


def test_the_targets_are_those_with_a_config() -> None:
    assert container.triton_command(Path("/r"), Target.GPU, [])[1:3] == [
        "--model-repository=/r/model_repository",
        "--model-config-name=gpu",
    ]
    assert set(versions.TABLE) == {TAG}
