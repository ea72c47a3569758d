"""Short versions of what `make chaos` does for an hour."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import chaos, overload
from benchmarks.arrangements import ARRANGEMENTS, arranged
from benchmarks.chaos import ROWS, House, Row, none_of
from benchmarks.faults import Load
from benchmarks.ingest import WRONG
from benchmarks.soak import growth_of
from benchmarks.workload import built_in_queries
from deploy.server import LOOPBACK, choose_ports, triton
from export.config_from_contract import config_from_text
from retrieval_client import Settings
from retrieval_contract.errors import ServerUnavailable
from tests.conftest import ROOT, TWO_CORES

SHORT = {"fuzz": 0.02, "overload": 0.05, "stalls": 0.04, "bulk": 0.1, "soak": 0.01}
"""Of the whole; kills and restarts are in test_supervisor.py and test_replicas.py."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[TWO_CORES] * (name == "overload")) for name in SHORT]
)
def test_a_short_row(name: str, release_folder: Path, tmp_path: Path) -> None:
    """Counts must be right here as well; rates are judged by the whole run, on a quiet machine."""
    command = [sys.executable, "-m", "benchmarks.chaos", "--release", str(release_folder)]
    command += ["--row", name, "--scale", str(SHORT[name]), "--log", str(tmp_path / "log")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = json.loads(done.stdout.splitlines()[-1])
    counts = said["rows"][name]
    assert said["ok"] == counts["kept"] == (done.returncode == 0), done.stderr[-2000:]
    assert counts["trials"] > 0
    if name == "fuzz":
        assert counts["trials"] == 200
        assert counts["kept"], counts
        assert len(counts["outcomes"]) >= 4, "few kinds of answers to hostile bytes: too tame"
    if name == "overload":
        outcomes = counts["outcomes"]
        assert outcomes["answered"] > 0
        assert outcomes["ServerBusy"] > 0
        assert set(outcomes) <= {"answered", "ServerBusy", "DeadlineExceeded"}
        # Of a machine with other work, whose threads wake late.
        assert counts["unanswered"] < 0.05 * counts["trials"], counts
        assert counts["hanging"] < 0.05 * counts["trials"], counts
    if name == "stalls":
        assert counts["trials"] >= 150
        assert counts["failed"] == 0
        # One burst is left to a machine that has other work; the rejected arrangements mostly stall
        # several.
        assert counts["stalled"] <= overload.BURST, "the batcher sleeps"
    if name == "bulk":
        assert counts["pushed"] > 0
        assert counts["failed"] == 0
    if name == "soak":
        assert counts["answered"] > counts["products"] > 0
        assert not counts["failed"]
        assert not counts["ended"]
        assert set(counts["per_hour"]) == {"memory_bytes", "file_handles", "shared_memory_bytes"}


LOAD = {"answered": 5, "wrong": 0, "late_failures": 0, "failed": 0}
GOOD: dict[str, dict[str, object]] = {
    "stub_kills": LOAD,
    "server_kills": LOAD,
    "rolling_restarts": LOAD,
    "fuzz": LOAD | {"crashes": 0},
    "overload": {"goodput": 0.95, "unanswered": 0, "hanging": 0},
    "stalls": {"trials": 5, "failed": 0, "stalled": 0},
    "bulk": {"p99_ratio": 1.5, "failed": 0, "pushed": 32},
    "soak": {"answered": 5, "products": 5, "grew": [], "failed": 0, "ended": False},
    "promotions": {"promotions": 5, "errors": 0, "mixed": 0},
    "second_push": {"encoded": 5, "encoded_again": 0, "time_ratio": 0.02},
    "push_rate": {"ratio": 0.95},
    "million_rows": {"grew_mb": 120, "rows": 9, "there": 9},
    "outages": {"answered": 5, "wrong": 0, "hanging": 0},
    "hostile": {"stored": 5, "read": 0, "missed": 0, "harmed": 0},
    "storage": {"trials": 5, "lost": 0, "unclear": 0, "unseen": 0},
}
KILLS = {"checks": 5, "failed_runs": 0, **dict.fromkeys(WRONG, 0)}
GOOD |= dict.fromkeys(("push_kills_lite", "push_kills_server", "milvus_kills"), KILLS)
BAD = dict.fromkeys(
    ("answered", "products", "pushed", "trials", "promotions", "encoded", "stored", "checks"), 0
)
BAD |= {"goodput": 0.5, "p99_ratio": 4.0, "grew": ["memory_bytes"], "ended": True}
BAD |= {"time_ratio": 0.2, "ratio": 0.5, "grew_mb": 900, "there": 8, "rows": 10}
MAY_FAIL = {"stub_kills": {"failed"}, "server_kills": {"failed"}}
"""A kill costs what was being computed."""


@pytest.mark.parametrize("name", ROWS)
def test_each_count_of_a_row_can_break_it(name: str) -> None:
    kept, good = ROWS[name].kept, GOOD[name]
    assert kept(good)
    for count in good.keys() - MAY_FAIL.get(name, {"late_failures"}):
        assert not kept(good | {count: BAD.get(count, 1)}), count


def test_a_row_that_raises_is_broken_and_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(house: House, size: int) -> dict[str, int]:
        raise subprocess.TimeoutExpired("a program", 5)

    rows = {
        "raises": Row(1, breaks, lambda counts: True),
        "says nothing": Row(1, lambda house, size: {}, none_of("wrong")),
        "works": Row(1, lambda house, size: {"wrong": 0}, none_of("wrong")),
    }
    monkeypatch.setattr(chaos, "ROWS", rows)
    (tmp_path / "products.jsonl").write_text('{"id": "1", "title": "a shirt"}\n')
    flags = ["--products", str(tmp_path / "products.jsonl"), "--log", str(tmp_path / "log")]
    monkeypatch.setattr(sys, "argv", ["chaos", *flags])
    with pytest.raises(SystemExit, match="True"):
        chaos.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not said["ok"]
    assert [row["kept"] for row in said["rows"].values()] == [False, False, True]
    assert "TimeoutExpired: Command 'a program'" in said["rows"]["raises"]["error"]
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_vector_that_is_none_is_wrong() -> None:
    load, over = Load(Settings()), threading.Event()

    def ask() -> np.ndarray:
        over.set()
        return np.array([np.nan])

    load._keep_asking(ask, np.zeros(1), over)
    assert (load.wrong, len(load.answered)) == (1, 1)


def test_a_rejected_arrangement_breaks_its_row(release_folder: Path, tmp_path: Path) -> None:
    """Triton's own bound on its queue stalls bursts of requests, not those of a client."""
    release = arranged(release_folder, ARRANGEMENTS["max_queue_size"], tmp_path)
    with (tmp_path / "log").open("w") as log, triton(release, log=log) as server:
        counts = overload.stalls(server, built_in_queries(), 200)
    assert counts["stalled"] > 0
    assert not ROWS["stalls"].kept(counts)


def test_a_push_that_fails_fails_its_row() -> None:
    nobody = SimpleNamespace(grpc_address=f"{LOOPBACK}:{choose_ports(LOOPBACK).grpc}")
    with pytest.raises(ServerUnavailable), overload.pushing(nobody, [("a shirt", b"")]) as pushed:
        assert pushed() == 0


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
