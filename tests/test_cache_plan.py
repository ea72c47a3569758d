"""What a cache is worth: the simulation by hand, and the prediction beside the real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from benchmarks.cache_plan import entry_bytes, hit_rate, lookups, parser, stream_of
from deploy.query_cache import MEBIBYTE
from deploy.server import Server, triton
from deploy.tuning import Profile
from retrieval_client import Encoder, Settings
from retrieval_contract.release import Release
from tests.conftest import ROOT

METRICS_S = 2.5
"""Triton counts anew every two seconds."""


@pytest.mark.parametrize(
    ("keys", "entries", "hits"),
    [
        ("aaaa", 1, 3),
        ("abab", 1, 0),
        ("abab", 2, 2),
        ("abcab", 2, 0),
        ("abcab", 3, 2),
        ("abaca", 2, 2),  # `a` was used last when `c` came: `b` went
        ("", 3, 0),
    ],
)
def test_what_was_used_least_recently_goes_first(keys: str, entries: int, hits: int) -> None:
    rate = hit_rate([key.encode() for key in keys], entries)
    assert rate == pytest.approx(hits / max(1, len(keys)))


def test_a_log_is_taken_as_it_is_and_a_vocabulary_is_drawn_from(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("at,query\n1,red\n2,blue\n3,red\n")
    assert stream_of(parser().parse_args([str(log)])) == ["red", "blue", "red"]
    drawn = stream_of(parser().parse_args([str(log), "--zipf", "1", "--requests", "50"]))
    assert len(drawn) == 50
    assert set(drawn) == {"red", "blue"}


def metric(server: Server, name: str) -> float:
    url = f"http://{server.host}:{server.ports.metrics}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    (found,) = re.findall(rf"^nv_cache_{name} ([\d.]+)$", text, re.M)
    return float(found)


def test_an_answer_takes_the_memory_that_is_said(release_folder: Path, tmp_path: Path) -> None:
    """A cache is filled past its end with texts of two lengths: so many answers it holds."""
    expected = MEBIBYTE // entry_bytes(Release.load(release_folder))
    with (
        (tmp_path / "log").open("w") as log,
        triton(release_folder, log=log, profile=Profile(query_cache_mb=1)) as server,
        Encoder(Settings(triton=server.grpc_address)) as encoder,
    ):
        encoder.served()
        for n in range(expected + 50):
            encoder.encode_queries([f"{n} " + "long" * 20 * (n % 2)])
        assert lookups(server) == (0, expected + 50)
        time.sleep(METRICS_S)
        assert metric(server, "num_misses") == expected + 50
        assert metric(server, "num_entries") == pytest.approx(expected, rel=0.01)
        assert metric(server, "num_evictions") == pytest.approx(50, abs=10)


def test_the_prediction_is_what_the_server_does(release_folder: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.cache_plan", "--release", str(release_folder)]
    command += ["--requests", "2500", "--size-mb", "1", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["hit_rate"]["1"] < said["hit_rate"]["4"]
    found = said["check"]
    assert (found["size_mb"], found["predicted"]) == (1, said["hit_rate"]["1"])
    assert abs(found["predicted"] - found["measured"]) < 0.03
    assert found["ratio"] > 1.5, "some ten times as many on a machine that has nothing else to do"


def test_a_file_that_is_no_log_is_said(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("text\nred\n")
    command = [sys.executable, "-m", "benchmarks.cache_plan", str(tmp_path / "log.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "expected a column 'query'" in done.stderr
