"""Short versions of what `make chaos` does for an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.arrangements import ARRANGEMENTS, arranged
from benchmarks.chaos import ROWS
from benchmarks.ingest import WRONG
from benchmarks.soak import growth_of
from export.config_from_contract import config_from_text
from tests.conftest import ROOT

SHORT = {"fuzz": 0.02, "overload": 0.05, "stalls": 0.04, "soak": 0.01}
"""Of the whole; kills and restarts are in test_supervisor.py and test_replicas.py."""


@pytest.mark.parametrize("name", SHORT)
def test_a_short_row(name: str, release_folder: Path, tmp_path: Path) -> None:
    """Counts must be right here as well; rates are judged by the whole run, on a quiet machine."""
    command = [sys.executable, "-m", "benchmarks.chaos", "--release", str(release_folder)]
    command += ["--row", name, "--scale", str(SHORT[name]), "--log", str(tmp_path / "log")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = json.loads(done.stdout.splitlines()[-1])
    counts = said["rows"][name]
    assert said["ok"] == counts["kept"] == (done.returncode == 0), done.stderr[-2000:]
    if name == "fuzz":
        assert counts["trials"] == 200
        assert counts["answered"] > 0
        assert counts["crashes"] == counts["wrong"] == 0, counts
        assert len(counts["outcomes"]) >= 4, "few kinds of answers to hostile bytes: too tame"
    if name == "overload":
        outcomes = counts["outcomes"]
        assert outcomes["answered"] > 0
        assert outcomes["ServerBusy"] > 0
        assert set(outcomes) <= {"answered", "ServerBusy", "DeadlineExceeded"}
        assert counts["hanging"] < 0.05 * counts["trials"], counts
    if name == "stalls":
        assert counts["trials"] >= 150
        # Half of the calls come in bursts; of those the rejected arrangements stall a quarter. One
        # burst in ten is left to a machine that has other work.
        assert counts["stalled"] < 0.1 * counts["trials"], "the batcher sleeps"
    if name == "soak":
        assert counts["outcomes"]["answered"] > 0
        assert set(counts["per_hour"]) == {"memory_bytes", "file_handles", "shared_memory_bytes"}


def test_every_row_says_what_it_did_and_can_fail() -> None:
    good = {"wrong": 0, "late_failures": 0, "failed": 0, "crashes": 0, "stalled": 0, "grew": []}
    good |= {"goodput": 0.95, "hanging": 0, "p99_ratio": 1.5}
    good |= dict.fromkeys((*WRONG, "failed_runs", "encoded_again", "read", "missed"), 0)
    good |= dict.fromkeys(("harmed", "unclear", "unseen"), 0)
    good |= {"errors": 0, "mixed": 0}
    good |= {"time_ratio": 0.02, "ratio": 0.95, "grew_mb": 120, "rows": 9, "there": 9}
    bad = {**good, **dict.fromkeys([name for name, count in good.items() if count == 0], 1)}
    bad |= {"time_ratio": 0.2, "ratio": 0.5, "grew_mb": 900, "there": 8}
    bad |= {"wrong": 1, "late_failures": 1, "failed": 1, "crashes": 1, "stalled": 1}
    bad |= {"goodput": 0.5, "hanging": 1, "p99_ratio": 4.0, "grew": ["memory_bytes"]}
    bad |= {"errors": 1, "mixed": 1}
    for row in ROWS.values():
        assert row.kept(good)
        assert not row.kept(bad)


def test_growth_is_found_and_noise_is_not() -> None:
    seconds = np.arange(0, 900, 2.0)
    noise = np.random.default_rng(0).normal(0, 1e6, len(seconds))
    assert not growth_of(seconds, 500e6 + noise).found
    assert not growth_of(seconds, np.full(len(seconds), 300.0)).found
    leaking = growth_of(seconds, 500e6 + noise + 1e5 * seconds)
    assert leaking.found
    assert leaking.per_hour == pytest.approx(3.6e8, rel=0.05)
    assert growth_of(seconds, 500e6 + noise + 25e6 / 3600 * seconds).found, "25 MB an hour"
    handles = growth_of(seconds, 300 + np.floor(seconds / 60))
    assert handles.found


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_an_arrangement_changes_the_batcher_and_nothing_else(
    name: str, release_folder: Path, tmp_path: Path
) -> None:
    there = "model_repository/query_encoder/configs/local.pbtxt"
    copy = arranged(release_folder, ARRANGEMENTS[name], tmp_path)
    before, after = (config_from_text((f / there).read_text()) for f in (release_folder, copy))
    changed = after.dynamic_batching != before.dynamic_batching or len(after.instance_group) > 1
    assert changed == (name not in ("nothing", "door"))
    after.dynamic_batching.CopyFrom(before.dynamic_batching)
    after.instance_group[0].count = before.instance_group[0].count
    assert after == before
    (code,) = (copy / "model_repository/query_encoder").glob("*/model.py")
    assert code.is_symlink() == (name == "door")
