"""Engines by the real TensorRT-RTX compiler, without a GPU: what it takes, and what it must not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from rich.console import Console

from deploy.engines.builder import Engine, build, find_runtime
from deploy.engines.cache import Origin, cached, is_whole
from deploy.engines.check import check_engines, graph_of
from deploy.engines.profiles import Profile, Range, check_profiles, profiles_of
from export.publish import publish
from retrieval_contract import models
from retrieval_contract.errors import EngineError
from retrieval_contract.release import Release
from tests import clip_family
from tests.conftest import ROOT
from tests.one_replica import one_replica
from towers.checkpoint import load_towers

RUNTIME = find_runtime(["tensorrt_rtx"])
QUERY, PRODUCT = models.QUERY_TOWER, models.PRODUCT_TOWER


@pytest.fixture(scope="module")
def release(tiny_release: Path) -> Release:
    return Release.load(tiny_release)


@pytest.fixture(scope="module")
def graph(tiny_release: Path, release: Release) -> bytes:
    """The query tower in FP16."""
    return graph_of(tiny_release, QUERY, release.version)


@pytest.fixture(scope="module")
def engine(graph: bytes, release: Release) -> Engine:
    return build(RUNTIME, graph, profiles_of(QUERY, release), architecture="SM89")


def full_graph(tiny_release: Path, release: Release) -> onnx.ModelProto:
    version = tiny_release / "model_repository" / QUERY.name / str(release.version)
    return onnx.load(version / models.ONNX_FILE)


# ── what is built ────────────────────────────────────────────────────────────────────────


def test_the_shipped_towers_compile_for_every_architecture(release_folder: Path) -> None:
    checked = check_engines(release_folder, RUNTIME, ["SM80", "SM120"])
    assert [(c.tower, c.architecture) for c in checked] == [
        (tower, sm) for tower in ("query_tower", "product_tower") for sm in ("SM80", "SM120")
    ]
    assert not [c.error for c in checked if c.error]
    attention = {c.tower: c.engine.attention_layers for c in checked}
    assert attention == {"query_tower": 3, "product_tower": 6}
    for one in checked:
        said = one.as_json()
        assert said["fused_attention"] == one.engine.attention_layers
        assert said["half_share"] == 1.0
        assert one.engine.facts.activation_bytes > 0


@pytest.mark.parametrize("family", clip_family.FAMILIES)
def test_clip_families_compile(family: str, tmp_path: Path) -> None:
    for part in clip_family.parts(family):
        part.save_pretrained(tmp_path / "checkpoint")
    towers = load_towers(str(tmp_path / "checkpoint"))
    home = publish(towers, tmp_path / "releases", Console(quiet=True))
    for one in check_engines(home, RUNTIME, ["SM89"]):
        assert one.engine.facts.fused_attention == one.engine.attention_layers >= 2


def test_the_command_ends_with_one_line_of_json(tiny_release: Path) -> None:
    command = [sys.executable, "-m", "deploy.engines", "check"]
    command += ["--release", tiny_release, "--sm", "SM86"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"] is True
    assert [(e["tower"], e["sm"]) for e in report["engines"]] == [
        ("query_tower", "86"),
        ("product_tower", "86"),
    ]
    refused = subprocess.run([*command[:-1], "SM1"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "expected one of ['SM75'" in refused.stderr
    missing = [*command[:4], "--release", tiny_release / "nowhere"]
    refused = subprocess.run(missing, cwd=ROOT, capture_output=True, text=True)
    assert "not found" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_engine_that_is_not_as_it_must_be_leaves_the_report_of_the_others(
    tiny_release: Path, release: Release, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(tiny_release, tmp_path / "release"))
    home = broken / "model_repository" / QUERY.name / str(release.version)
    (home / models.HALF_FILE).unlink()
    shutil.copy(home / models.ONNX_FILE, home / models.HALF_FILE)
    command = [sys.executable, "-m", "deploy.engines", "check", "--release", str(broken)]
    done = subprocess.run([*command, "--sm", "SM86"], cwd=ROOT, capture_output=True, text=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, report["ok"]) == (1, False), done.stderr
    query, product = report["engines"]
    assert "build from the FP16 graph" in query["error"]
    assert (query["tower"], query["half_share"]) == ("query_tower", None)
    assert (product["error"], product["half_share"]) == (None, 1.0)
    assert "query_tower, SM86: expected at least 80%" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_builds_are_the_same_bytes(engine: Engine, graph: bytes, release: Release) -> None:
    again = build(RUNTIME, graph, profiles_of(QUERY, release), architecture="SM89")
    assert hashlib.sha256(again.plan).digest() == hashlib.sha256(engine.plan).digest()


def test_timings_are_kept_and_taken_up(graph: bytes, release: Release, tmp_path: Path) -> None:
    """Of use on a GPU alone; here it must not get in the way."""
    timings, profiles = tmp_path / "cache" / "timings", profiles_of(QUERY, release)[:1]
    plans = [
        build(RUNTIME, graph, profiles, architecture="SM89", timing_cache=timings).plan
        for _ in range(2)
    ]
    assert [path.name for path in timings.parent.iterdir()] == ["timings"]
    assert plans[0] == plans[1]
    timings.write_bytes(b"not timings")
    kept = build(RUNTIME, graph, profiles, architecture="SM89", timing_cache=timings).plan
    assert kept == plans[0]
    assert timings.read_bytes() != b"not timings", "what is broken is written anew"


def test_progress_is_told(graph: bytes, release: Release) -> None:
    said: list[tuple[str, int, int]] = []
    profiles = profiles_of(QUERY, release)[:1]
    build(RUNTIME, graph, profiles, architecture="SM89", told=lambda *step: said.append(step))
    assert said
    assert all(0 <= done <= total for _, done, total in said)


# ── planted faults ───────────────────────────────────────────────────────────────────────


def test_a_graph_that_a_runtime_optimised_is_refused(
    tiny_release: Path, release: Release, tmp_path: Path
) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(full_graph(tiny_release, release).SerializeToString(), options)
    optimised = Path(options.optimized_model_filepath).read_bytes()
    with pytest.raises(EngineError, match=r"parser refused the graph.*after surgery"):
        build(RUNTIME, optimised, profiles_of(QUERY, release), architecture="SM89")


def test_a_broken_graph_is_refused(release: Release) -> None:
    with pytest.raises(EngineError, match="parser refused"):
        build(RUNTIME, b"not a graph", profiles_of(QUERY, release), architecture="SM89")


def test_a_sequence_past_the_position_table_is_fatal(tiny_release: Path, release: Release) -> None:
    """The compiler only warns; 64 positions are all that this encoder has."""
    model = onnx.load_from_string(graph_of(tiny_release, QUERY, release.version))
    long = {t.name: Range((1, 1), (1, 16), (4, 200)) for t in QUERY.inputs}
    with pytest.raises(EngineError, match=r"expected shapes from .* got \(4, 200\)"):
        check_profiles([Profile("long", long)], QUERY, release)
    with pytest.raises(EngineError):
        build(RUNTIME, model.SerializeToString(), [Profile("long", long)], architecture="SM89")


# ── profiles ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", models.TOWERS, ids=lambda m: m.name)
def test_profiles_follow_the_contract(model: models.Model, release: Release) -> None:
    profiles = profiles_of(model, release)
    check_profiles(profiles, model, release)
    assert [p.name for p in profiles] == ["single", "typical", "bulk"]
    rows = [next(iter(p.inputs.values())).opt[0] for p in profiles]
    assert rows == [1, model.batch.opt, model.batch.max]


def changed(profile: Profile, name: str, shapes: Range) -> Profile:
    return replace(profile, inputs=dict(profile.inputs) | {name: shapes})


def test_profiles_that_the_compiler_would_swallow_are_refused(release: Release) -> None:
    single, typical, bulk = profiles_of(QUERY, release)
    ids = bulk.inputs["query_ids"]
    unknown = replace(bulk, inputs=dict(bulk.inputs) | {"queri_ids": ids})
    missing = replace(bulk, inputs={"query_ids": ids})
    other_batch = changed(bulk, "query_mask", replace(ids, opt=(64, 32), max=(64, 32)))
    unordered = changed(bulk, "query_mask", replace(ids, min=(1, 32), opt=(1, 16)))
    too_many = changed(bulk, "query_mask", replace(ids, max=(129, 32)))
    for profile, message in (
        (unknown, "expected the inputs"),
        (missing, "expected the inputs"),
        (other_batch, "one batch size for all inputs"),
        (unordered, "min <= opt <= max"),
        (too_many, "expected shapes from"),
    ):
        with pytest.raises(EngineError, match=message):
            check_profiles([single, typical, profile], QUERY, release)
    with pytest.raises(EngineError, match="a profile that takes 128 rows"):
        check_profiles([single], QUERY, release)


# ── the cache ────────────────────────────────────────────────────────────────────────────


ORIGIN = Origin("release", "query_tower", "graph", "tensorrt_rtx", "1.7.1.116", "SM89", "profiles")


def test_an_engine_is_built_once_and_then_found(tmp_path: Path, engine: Engine) -> None:
    built: list[int] = []

    def make() -> Engine:
        built.append(1)
        return engine

    plan = cached(ORIGIN, tmp_path, make)
    assert plan.read_bytes() == engine.plan
    assert cached(ORIGIN, tmp_path, make) == plan
    assert len(built) == 1
    facts = json.loads((plan.parent / "engine.json").read_text())
    assert facts["facts"]["half_share"] == 1.0
    assert facts["origin"]["gpu"] == "SM89"
    assert [profile["name"] for profile in facts["profiles"]] == ["single", "typical", "bulk"]
    assert facts["profiles"][2]["inputs"]["query_ids"]["max"] == [128, 32]
    assert facts["attention_layers"] == facts["facts"]["fused_attention"] == 2
    assert facts["seconds"] > 0


@pytest.mark.parametrize("field", Origin.__dataclass_fields__)
def test_another_origin_is_another_engine(tmp_path: Path, engine: Engine, field: str) -> None:
    """Another version, another GPU, other weights under the same name: none is taken for this."""
    first = cached(ORIGIN, tmp_path, lambda: engine)
    other = replace(ORIGIN, **{field: "another"})
    second = cached(other, tmp_path, lambda: replace(engine, plan=b"another"))
    assert first != second
    assert (first.read_bytes(), second.read_bytes()) == (engine.plan, b"another")


def test_an_engine_file_that_was_cut_or_swapped_is_built_again(
    tmp_path: Path, engine: Engine
) -> None:
    plan = cached(ORIGIN, tmp_path, lambda: engine)
    for damage in (
        lambda: plan.write_bytes(engine.plan[:-100]),
        lambda: plan.write_bytes(engine.plan[::-1]),
        lambda: (plan.parent / "engine.json").write_text("{"),
        plan.unlink,
    ):
        damage()
        assert not is_whole(plan.parent, ORIGIN)
        assert cached(ORIGIN, tmp_path, lambda: engine).read_bytes() == engine.plan
    moved = replace(ORIGIN, gpu="SM120")  # a folder copied under another name
    plan.parent.rename(tmp_path / moved.folder)
    assert not is_whole(tmp_path / moved.folder, moved)


def test_a_failed_build_leaves_what_was_there(tmp_path: Path) -> None:
    def fail() -> Engine:
        raise EngineError("no memory")

    with pytest.raises(EngineError, match="no memory"):
        cached(ORIGIN, tmp_path, fail)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_eight_replicas_on_one_volume_build_once(
    tmp_path: Path, graph: bytes, release: Release
) -> None:
    with get_context("spawn").Pool(8) as pool:
        hashes = pool.starmap(one_replica, [(ORIGIN, tmp_path, graph, release)] * 8)
    assert len(set(hashes)) == 1
    assert len(list(tmp_path.glob("built-*"))) == 1
