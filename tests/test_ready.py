"""What a server starts with: engines for the GPU at hand, or the processor, and why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.engines import __main__ as command
from deploy.engines.__main__ import find_ready
from deploy.engines.builder import find_runtime
from deploy.engines.ready import (
    Gpu,
    Missing,
    build_beside,
    gpu_at_hand,
    origin_of,
    overlay,
    prepare,
    prepared_apart,
    timings_of,
)
from deploy.server import check_release, triton
from retrieval_client import Encoder, Settings
from retrieval_contract import models
from retrieval_contract.errors import DeployError, EngineError
from retrieval_contract.models import Target
from retrieval_contract.release import Release
from tests.conftest import ROOT

RUNTIME = find_runtime(["tensorrt_rtx"])
GPU = Gpu("NVIDIA L4, 8.9, 580.1", "SM89")
"""Compiled for, not run: the RTX compiler needs to be told the architecture."""


@pytest.fixture(scope="module")
def cache(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With both engines in it."""
    made = tmp_path_factory.mktemp("engines")
    prepare(tiny_release, made, RUNTIME, GPU, Missing.WAIT)
    return made


def test_waiting_builds_and_gives_a_release_with_plans(tiny_release: Path, cache: Path) -> None:
    said: list[str] = []
    ready = prepare(
        tiny_release, cache, RUNTIME, GPU, Missing.WAIT, lambda phase, *steps: said.append(phase)
    )
    assert not said, "nothing is built twice"
    assert ready.target is Target.GPU
    release = Release.load(ready.release)
    assert release == Release.load(tiny_release)
    assert check_release(ready.release, Target.GPU) == release
    plan = ready.release / "model_repository" / "query_tower" / str(release.version) / "model.plan"
    facts = json.loads((plan.resolve().parent / "engine.json").read_text())
    assert facts["origin"]["release_id"] == release.release_id
    assert facts["origin"]["gpu"] == "NVIDIA L4, 8.9, 580.1 SM89"
    assert facts["bytes"] == plan.stat().st_size


@pytest.mark.parametrize("missing", [Missing.CPU, Missing.FAIL])
def test_engines_that_are_there_are_used_whatever_the_flag(
    tiny_release: Path, cache: Path, missing: Missing
) -> None:
    assert prepare(tiny_release, cache, RUNTIME, GPU, missing).target is Target.GPU


def test_another_gpu_has_no_engine_yet(tiny_release: Path, cache: Path) -> None:
    other = replace(GPU, name="NVIDIA A10, 8.6, 580.1")
    ready = prepare(tiny_release, cache, RUNTIME, other, Missing.CPU)
    assert (ready.release, ready.target) == (tiny_release, Target.CPU)
    assert "no engine of query_tower, product_tower for NVIDIA A10" in ready.why
    with pytest.raises(EngineError, match=r"no engine of .*build them first"):
        prepare(tiny_release, cache, RUNTIME, other, Missing.FAIL)


def test_without_a_gpu_only_the_processor_is_left(tiny_release: Path, tmp_path: Path) -> None:
    ready = prepare(tiny_release, tmp_path, RUNTIME, None, Missing.CPU)
    assert (ready.release, ready.target) == (tiny_release, Target.CPU)
    assert ready.why.startswith("no GPU")
    for missing in (Missing.WAIT, Missing.FAIL):
        with pytest.raises(EngineError, match="serve on the processor: --missing cpu"):
            prepare(tiny_release, tmp_path, RUNTIME, None, missing)
    with pytest.raises(EngineError, match="expected a TensorRT"):
        prepare(tiny_release, tmp_path, None, GPU, Missing.WAIT)


def test_a_damaged_engine_is_built_again(tiny_release: Path, cache: Path) -> None:
    ready = prepare(tiny_release, cache, RUNTIME, GPU, Missing.FAIL)
    version = str(Release.load(tiny_release).version)
    plan = ready.release / "model_repository" / "query_tower" / version / "model.plan"
    whole = plan.read_bytes()
    plan.resolve().write_bytes(whole[:1000])
    with pytest.raises(EngineError, match="no engine of query_tower for"):
        prepare(tiny_release, cache, RUNTIME, GPU, Missing.FAIL)
    again = prepare(tiny_release, cache, RUNTIME, GPU, Missing.WAIT)
    assert again.release == ready.release
    assert plan.read_bytes() == whole


def test_a_release_of_links_is_served_as_the_release_itself(
    tiny_release: Path, cache: Path
) -> None:
    """By the real server, on the target that it has."""
    ready = prepare(tiny_release, cache, RUNTIME, GPU, Missing.WAIT)
    with (
        triton(ready.release) as server,
        Encoder(Settings(triton=server.grpc_address)) as encoder,
    ):
        encoded = encoder.encode_queries(["red shoes"])
        assert encoded.served.release_id == Release.load(tiny_release).release_id
        assert np.isclose(np.linalg.norm(encoded.vectors[0]), 1.0, atol=1e-5)


def test_an_overlay_that_another_replica_made_is_taken(tiny_release: Path, cache: Path) -> None:
    ready = prepare(tiny_release, cache, RUNTIME, GPU, Missing.WAIT)
    repository = ready.release / "model_repository"
    version = str(Release.load(tiny_release).version)
    plans = {
        m.name: (repository / m.name / version / "model.plan").resolve() for m in models.TOWERS
    }
    assert overlay(tiny_release, Release.load(tiny_release), plans, cache) == ready.release


def test_links_into_what_was_mounted_elsewhere_are_not_taken(
    tiny_release: Path, cache: Path, tmp_path: Path
) -> None:
    """The same volume and release at other places: what lies there leads nowhere."""
    moved = Path(shutil.copytree(cache, tmp_path / "cache", symlinks=True))
    release = Path(shutil.copytree(tiny_release, tmp_path / tiny_release.name, symlinks=True))
    for place in (cache, moved):
        ready = prepare(release, place, RUNTIME, GPU, Missing.FAIL)
        (plan,) = ready.release.glob("model_repository/query_tower/*/model.plan")
        assert plan.resolve().is_relative_to(place.resolve())
        assert (ready.release / "release.json").resolve().is_relative_to(release.resolve())


def test_timings_are_of_one_gpu(tiny_release: Path, cache: Path) -> None:
    facts = Release.load(tiny_release)
    names = {
        timings_of(origin_of(tiny_release, facts, model, RUNTIME, gpu))
        for gpu in (GPU, replace(GPU, name="NVIDIA A10, 8.6, 580.1"))
        for model in models.TOWERS
    }
    assert len(names) == 2
    (written,) = cache.glob("timings-*")
    assert written.name in names


def test_a_cache_that_cannot_be_written_is_said_before_the_work(
    tiny_release: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "cache"
    taken.touch()
    for missing in Missing:
        with pytest.raises(DeployError, match=rf"--cache {taken}: expected a folder .*another"):
            prepare(tiny_release, taken, RUNTIME, GPU, missing)


# ── the decision, where nvidia-smi names a GPU ───────────────────────────────────────────


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path]]:
    """A GPU is named, though none is here, and TensorRT-RTX stands in for what serves.

    What is built beside is only noted.
    """
    beside: list[tuple[Path, Path]] = []
    monkeypatch.setattr(command, "SERVED", ("tensorrt_rtx",))
    monkeypatch.setattr(command, "gpu_at_hand", lambda: GPU)
    monkeypatch.setattr(command, "build_beside", lambda *given: beside.append(given))
    return beside


def test_with_a_gpu_waiting_builds_and_falling_back_builds_beside(
    tiny_release: Path, tmp_path: Path, visible: list[tuple[Path, Path]]
) -> None:
    with pytest.raises(EngineError, match="build them first"):
        find_ready(tiny_release, tmp_path, Missing.FAIL)
    assert not visible
    fallen = find_ready(tiny_release, tmp_path, Missing.CPU)
    assert (fallen.release, fallen.target) == (tiny_release, Target.CPU)
    assert visible == [(tiny_release, tmp_path)]
    built = find_ready(tiny_release, tmp_path, Missing.WAIT)
    assert built.target is Target.GPU
    for missing in Missing:  # from now on all is there
        assert find_ready(tiny_release, tmp_path, missing) == built
    assert len(visible) == 1


def test_without_tensorrt_nothing_is_built_beside(
    tiny_release: Path,
    tmp_path: Path,
    visible: list[tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "SERVED", ("no_such_module",))
    assert find_ready(tiny_release, tmp_path, Missing.CPU).why.startswith("no TensorRT")
    assert not visible
    assert "expected one of the Python modules ['no_such_module']" in capsys.readouterr().err


def test_what_builds_beside_waits_for_its_engines(
    tiny_release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """A process of its own; without a GPU it says what it came for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    process = build_beside(tiny_release, tmp_path / "cache")
    assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
    assert process.wait(120) == 1
    said = capfd.readouterr().err
    assert "error: expected a GPU" in said
    assert Release.load(tiny_release).release_id in said


def run(
    tmp_path: Path, tiny_release: Path, missing: str, path: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.engines", "prepare", "--release", str(tiny_release)]
    command += ["--cache", str(tmp_path / "cache"), "--missing", missing]
    env = os.environ | {"PATH": path}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_the_command_says_what_to_serve(tiny_release: Path, tmp_path: Path) -> None:
    done = run(tmp_path, tiny_release, "cpu", str(tmp_path))  # a PATH without nvidia-smi
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["release"], said["target"]) == (str(tiny_release), "cpu")
    refused = run(tmp_path, tiny_release, "wait", str(tmp_path))
    assert refused.returncode == 1
    assert "error: expected a GPU" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_gpu_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    one, other = "NVIDIA L4, 8.9, 580.95.05", "NVIDIA T4, 7.5, 580.95.05"
    tool.write_text(f"#!/bin/sh\necho '{one}'; echo '{one}'\n")
    tool.chmod(0o755)
    assert gpu_at_hand() == Gpu(one)
    tool.write_text(f"#!/bin/sh\necho '{one}'; echo '{other}'\n")
    with pytest.raises(EngineError, match=f"GPUs of one kind, .* got {one}; {other}: give each"):
        gpu_at_hand()
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_at_hand() is None


def test_who_is_stopped_while_engines_are_built_takes_the_build_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT swallows what a signal raises in it; so it builds in a process of its own."""
    building = tmp_path / "building"
    code = f"import pathlib, os, time; pathlib.Path({str(building)!r}).write_text(str(os.getpid()))"
    command = [sys.executable, "-c", f"{code}; time.sleep(60)"]
    monkeypatch.setattr("deploy.engines.ready._prepare_command", lambda *asked: command)

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 3.0)
        with pytest.raises(KeyboardInterrupt):
            prepared_apart(tmp_path, tmp_path, Missing.WAIT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not Path(f"/proc/{int(building.read_text())}").exists()


def test_why_no_engine_could_be_made_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match=r"exit code 1 .*; why stands above"):
        prepared_apart(tmp_path / "nowhere", tmp_path, Missing.WAIT)
    assert "release.json" in capfd.readouterr().err
