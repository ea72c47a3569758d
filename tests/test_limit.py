"""What serving costs over one's own process, measured on the real server in a short run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.cores import apart
from benchmarks.inflight import Answered
from benchmarks.limit import Row, best_batch, shuffled
from tests.conftest import ROOT, TWO_CORES


def test_clumps_of_answers_make_no_rate_better() -> None:
    """64 callers whose answers all come at once, every quarter of a second: 256 rows a second,
    wherever between two of them the clock starts and ends."""
    moments = [0.25 * n for n in range(1, 8) for _ in range(64)]
    for start in (0.05, 0.1, 0.24):
        came = [moment for moment in moments if moment - 0.25 < start + 1.0]
        answered = Answered(1, start, start + 1.0, came, [0.25] * len(came), 500, 0)
        assert answered.rows_per_s == pytest.approx(256.0)


def test_a_large_request_counts_as_far_as_it_got() -> None:
    answered = Answered(32, 1.0, 3.0, [1.5, 2.5, 4.5], [1.0, 1.0, 2.0], 200, 0)
    assert answered.rows_per_s == 32 * (0.5 + 1 + 0.25) / 2
    assert answered.percentile_ms(50) == pytest.approx(1000.0)
    nothing = Answered(32, 1.0, 3.0, [], [], 32, 0)
    assert (nothing.rows_per_s, nothing.percentile_ms(50)) == (0.0, float("inf"))


def test_rows_are_asked_in_a_new_order_each_time() -> None:
    rows = [(str(n).encode(),) for n in range(8)]
    drawn = shuffled(rows, 0)
    first, second = ([next(drawn) for _ in rows] for _ in range(2))
    assert sorted(first) == sorted(second) == rows
    assert first != second


def test_the_best_batch_takes_the_least_time_a_row() -> None:
    """A run has a price, and past some size its rows cost more."""

    def run(rows: Sequence[Row]) -> None:
        time.sleep(0.01 + 0.0001 * len(rows) + 0.1 * (len(rows) > 32))

    assert best_batch(run, [(b"row",)] * 128, (8, 32, 64)) == 32


@TWO_CORES
def test_a_server_is_kept_apart_from_who_asks_for_a_while() -> None:
    before = os.sched_getaffinity(0)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as server:
        try:
            with apart(server.pid):
                (core,) = os.sched_getaffinity(server.pid)
                assert os.sched_getaffinity(0) == before - {core}
            assert os.sched_getaffinity(0) == os.sched_getaffinity(server.pid) == before
        finally:
            server.kill()


@TWO_CORES
def test_the_command_measures_queries_and_products(release_folder: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.limit", "--release", str(release_folder)]
    command += ["--rounds", "1", "--seconds", "0.3", "--product-seconds", "3"]
    done = subprocess.run(
        [*command, "--batch", "16", "--in-flight", "8", "--rows", "4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert {name: list(ratios) for name, ratios in said.items()} == {
        "query": ["8"],
        "request": ["8"],
        "product": ["4"],
    }
    assert all(0.02 < ratio < 5 for ratios in said.values() for ratio in ratios.values())
