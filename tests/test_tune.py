"""The tuner: what is worth having, what it refuses, and a tiny grid on the real server."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.frontier import Point, best_under, frontier, svg
from benchmarks.tune import Load as TuneLoad
from benchmarks.tune import default_grid, measurements, profile_with, settings_of
from deploy.tuning import DEFAULT, LEAST, profile_of
from retrieval_contract.errors import RetrievalError
from tests.conftest import ROOT

SLOW = Point("slow", 1, 100.0, 50.0)
QUICK = Point("quick", 1, 80.0, 10.0)
WORSE = Point("worse", 1, 70.0, 20.0)
BROKEN = Point("broken", 1, 900.0, 1.0, failed=1)
POINTS = [SLOW, QUICK, WORSE, BROKEN]


def test_the_frontier_is_what_no_other_beats_without_a_failure() -> None:
    assert frontier(POINTS) == [QUICK, SLOW]
    assert frontier([QUICK, QUICK]) == [QUICK, QUICK], "equals do not beat each other"
    assert frontier([]) == []


@pytest.mark.parametrize(
    ("limit", "best"), [(60.0, SLOW), (50.0, SLOW), (49.0, QUICK), (10.0, QUICK), (9.0, None)]
)
def test_the_best_is_within_its_limit(limit: float, best: Point | None) -> None:
    assert best_under(POINTS, limit) is best


def test_noise_buys_no_copies() -> None:
    first = Point("one copy", 1, 100.0, 10.0)
    assert best_under([first, Point("two copies", 1, 102.0, 10.0)], 20.0) is first
    more = Point("two copies", 1, 110.0, 10.0)
    assert best_under([first, more], 20.0) is more


def test_the_picture_shows_every_point() -> None:
    picture = ET.fromstring(svg(POINTS, 60.0, "a < b"))
    assert len(picture.findall("circle")) == len(POINTS)
    assert len(picture.findall("circle[@class='kept']")) == 2


def test_a_grid_is_every_combination_of_a_kinds_knobs() -> None:
    grid = ["query_encoder.instances=2,1", "query_encoder.delay_us=0,5", "product_tower.threads=3"]
    assert settings_of(grid, "query") == [
        {"query_encoder.instances": copies, "query_encoder.delay_us": delay}
        for copies in (1, 2)
        for delay in (0, 5)
    ]
    (product,) = settings_of(grid, "product")
    profile = profile_with([{}, product], 8)
    assert profile.models["product_tower"]["threads"] == 3
    assert profile.models["query_encoder"] == DEFAULT.models["query_encoder"]
    assert profile.query_cache_mb == 8
    assert DEFAULT.models["product_tower"]["threads"] == 2, "the default is left alone"


def test_a_kind_with_fewer_settings_is_measured_once_each() -> None:
    load = TuneLoad([], [], {"query": (4, 16), "product": (1,)}, {})
    settings = {"query": [{}, {}, {}], "product": [{}]}
    assert [list(measurements(settings, load, n)) for n in (0, 2)] == [
        [("query", 4), ("query", 16), ("product", 1)],
        [("query", 4), ("query", 16)],
    ]


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_the_default_grid_is_small_and_valid(cores: int) -> None:
    grid = default_grid(cores)
    assert 1 <= len(settings_of(grid, "query")) <= 4
    assert 1 <= len(settings_of(grid, "product")) <= 9


@pytest.mark.parametrize(
    "wrong", ["query_encoder.copies=1", "query_tower.threads=1", "instances", "query_encoder=1"]
)
def test_a_knob_that_is_none_is_said(wrong: str) -> None:
    with pytest.raises(RetrievalError, match=r"expected one of query_encoder\.instances, "):
        settings_of([wrong], "query")


@pytest.mark.parametrize("values", ["", "0", "1,x", "-1", "1.5"])
def test_a_value_that_is_none_is_said(values: str) -> None:
    assert LEAST["instances"] == 1
    with pytest.raises(RetrievalError, match="expected whole numbers from 1, such as"):
        settings_of([f"query_encoder.instances={values}"], "query")


def tune(release: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.tune", "--release", release, "--out", out]
    command += ["--grid", "query_encoder.instances=1,2", "--callers", "8", "--requests", "1"]
    command += ["--rounds", "1", "--seconds", "0.3", "--product-seconds", "0.5"]
    return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)


def test_a_tiny_grid_gives_a_profile_that_a_server_takes(
    release_folder: Path, tmp_path: Path
) -> None:
    done = tune(release_folder, tmp_path, "--p99-ms", "5000", "--product-p99-ms", "60000")
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert [p["setting"] for p in said["query"]["points"]] == [
        "query_encoder.instances=1",
        "query_encoder.instances=2",
    ]
    assert all(p["rows_per_s"] > 0 and not p["failed"] for p in said["query"]["points"])
    best = said["query"]["best"]["setting"].partition("=")[2]
    profile = profile_of(said["profile"])
    assert profile.models["query_encoder"]["instances"] == int(best)
    assert profile.models["product_tower"] == DEFAULT.models["product_tower"]
    assert "<svg" in (tmp_path / "frontier.html").read_text()


def test_a_limit_that_nothing_keeps_is_said(release_folder: Path, tmp_path: Path) -> None:
    done = tune(release_folder, tmp_path, "--grid", "query_encoder.instances=1", "--p99-ms=0.01")
    assert done.returncode == 1
    assert "error: query: expected a p99 of at most 0.01 ms, the least is " in done.stderr
    assert not (tmp_path / "profile.toml").exists()
