"""The load is repeatable, checks every answer, sees a stall, and never hangs or flatters itself."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2 as config_pb
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from benchmarks import __main__ as cli
from benchmarks.rawlog import RawLog, Sample
from benchmarks.report import Plan, percentiles, verdict_of
from benchmarks.workload import (
    Workload,
    built_in_queries,
    poisson_arrivals,
    queries_from_csv,
    zipf_weights,
)
from deploy.server import LOOPBACK, Server, choose_ports
from retrieval_client import Settings
from retrieval_contract import models
from retrieval_contract.errors import ServerError, SourceError
from retrieval_contract.release import RELEASE_PARAMETER, Release
from tests.conftest import ROOT
from tests.serving import processes_of

DIM, RELEASE_ID = 8, "badbadbadbadbad0"
HARD_LIMIT_S = 60


def bench(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks`, stopped if it should ever hang."""
    command = [sys.executable, "-m", "benchmarks", "--out", str(out), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HARD_LIMIT_S)


def verdict(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last line of output."""
    assert run.stdout, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def take(stream: Iterator[Any], count: int) -> list[Any]:
    return list(itertools.islice(stream, count))


# ── what is asked, and when ──────────────────────────────────────────────────────────────
def test_the_same_seed_asks_the_same() -> None:
    queries = built_in_queries()
    first, again = (take(Workload(queries, seed=3).stream(0), 5000) for _ in range(2))
    assert first == again
    assert first != take(Workload(queries, seed=4).stream(0), 5000)
    assert first != take(Workload(queries, seed=3).stream(1), 5000)
    assert take(poisson_arrivals(9, 3), 5000) == take(poisson_arrivals(9, 3), 5000)
    assert take(poisson_arrivals(9, 3), 5) != take(poisson_arrivals(9, 4), 5)


def test_the_built_in_queries_are_distinct() -> None:
    queries = built_in_queries()
    assert len(set(queries)) == len(queries) == 300
    assert "sky blue boots" in queries
    assert "women's red dress" in queries


def test_draws_follow_zipf() -> None:
    """On the log-log line, the popular ranks fall with the exponent."""
    workload = Workload(built_in_queries(), exponent=1.0, seed=1)
    assert workload.weights.sum() == pytest.approx(1)
    assert workload.weights[0] / workload.weights[9] == pytest.approx(10)
    seen = Counter(take(workload.stream(0), 100_000))
    shares = [seen[text] for text in workload.by_rank[:20]]
    slope = np.polyfit(np.log(np.arange(1, 21)), np.log(shares), 1)[0]
    assert slope == pytest.approx(-1, abs=0.06)
    assert zipf_weights(4, 0).tolist() == [0.25] * 4


def test_arrivals_are_poisson() -> None:
    """Mean gap 1/rate; a memoryless gap has a deviation equal to its mean."""
    gaps = np.diff(take(poisson_arrivals(50, 0), 20_000))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)


def test_queries_come_from_a_catalog_folder(tmp_path: Path) -> None:
    file = tmp_path / "queries.csv"
    file.write_text("id,query\n1,red mug\n2, blue cap \n3,red mug\n4,\n", "utf-8")
    assert queries_from_csv(tmp_path) == queries_from_csv(file) == ["red mug", "blue cap"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"id\n1\n", "a column 'query'"),
        (b"query\n\n", "got none"),
        (b"query\n\xff\n", "UTF-8"),
    ],
)
def test_bad_query_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "queries.csv").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        queries_from_csv(tmp_path / "queries.csv")


# ── the verdict ──────────────────────────────────────────────────────────────────────────
def steady(count: int = 1000) -> RawLog:
    """A quiet load: 1..count ms, due over 10 s after 2 s of slow warm-up."""
    warm = [Sample(at / 10, 0, 9000, "") for at in range(20)]
    due = [Sample(2 + i / count * 10, 0, 1.0 + i, "") for i in range(count)]
    return RawLog(warmup_s=2, cpu_share=0.3, dropped=0, samples=warm + due)


def test_percentiles_are_exact_and_without_warm_up() -> None:
    found = verdict_of(steady(), Plan(8, 10), "r1", "r1")
    assert found.good
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == (500, 900, 990)
    assert (found.requests, found.rate_per_s, found.lateness_p99_ms) == (1000, 100, None)
    assert percentiles([]) == [None] * 3


def test_an_open_loop_counts_from_when_a_query_was_due() -> None:
    log = replace(steady(), samples=[Sample(3, 40.0, 5.0, "")] * 10)
    found = verdict_of(log, Plan(None, 10, rate=1), "r1", "r1")
    assert (found.p99_ms, found.service_p99_ms, found.lateness_p99_ms) == (45, 5, 40)
    assert (found.mode, found.void) == ("open", False)


LATE = [Sample(3, 80.0, 5.0, "")] * 10
COLD = [Sample(0.5, 0, 5.0, "ServerError: cold"), Sample(3, 0, 5.0, "")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cpu_share": 0.95}, "saturated: 95% of a core"),
        ({"samples": LATE}, "late: p99 80 ms"),
        ({"dropped": 3}, "3 arrivals were dropped"),
        ({"samples": []}, "no query was asked"),
        ({"samples": COLD}, "1 queries failed during the warm-up: ServerError: cold"),
    ],
)
def test_void_runs_say_why(change: dict[str, Any], reason: str) -> None:
    found = verdict_of(replace(steady(), **change), Plan(None, 10, rate=1), "r1", "r1")
    assert found.void
    assert not found.good
    assert reason in " ".join(found.reasons)


@pytest.mark.parametrize(("after", "reason"), [("r2", "to r2"), ("", "to no answer")])
def test_another_release_after_the_load_voids_it(after: str, reason: str) -> None:
    assert verdict_of(steady(), Plan(8, 10), "r1", after).reasons == [
        f"the server changed from release r1 {reason}"
    ]


def test_one_failure_is_not_good_but_not_void() -> None:
    log = replace(steady(), samples=[*steady().samples, Sample(3, 0, 1.0, "too_long: x")])
    found = verdict_of(log, Plan(8, 10), "r1", "r1")
    assert (found.failures, found.void, found.good) == (1, False, False)
    assert found.p99_ms == 990, "failures are not answers"


def test_the_raw_log_comes_back(tmp_path: Path) -> None:
    steady().write(tmp_path / "log.jsonl")
    assert RawLog.read(tmp_path / "log.jsonl") == steady()
    (tmp_path / "log.jsonl").write_text('{"warmup_s": 2}\n{"at_s"')
    with pytest.raises(SourceError, match="not a raw log"):
        RawLog.read(tmp_path / "log.jsonl")


# ── real loads ───────────────────────────────────────────────────────────────────────────
def test_a_short_load_on_the_real_server(triton: Server, release: Release, tmp_path: Path) -> None:
    run = bench(tmp_path, "--triton", triton.grpc_address, "--users", "2", "--seconds", "4")
    found = verdict(run)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (found["users"], found["seconds"], found["mode"]) == (2, 4, "closed")
    assert found["release_id"] == release.release_id
    assert (found["failures"], found["void"], found["lateness_p99_ms"]) == (0, False, None)
    assert found["requests"] > 20
    assert found["rate_per_s"] == pytest.approx(found["requests"] / 4, abs=0.01)
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"] < 4000
    assert 0 < found["cpu_share"] <= 0.8
    assert "The first 2 s were warm-up" in run.stdout
    assert {path.name for path in tmp_path.iterdir()} == set(cli.FILES)
    log = RawLog.read(tmp_path / "load.jsonl")
    assert len([s for s in log.samples if s.at_s >= 2]) == found["requests"] < len(log.samples)
    report = (tmp_path / "load.html").read_text("utf-8")
    table = (tmp_path / "load_stats.csv").read_text("utf-8")
    assert f'"num_requests": {found["requests"]},' in report, "locust leaves the warm-up out, too"
    assert f",{models.QUERY_ENCODER.name},{found['requests']},0," in table


def test_nobody_there_is_said_at_once(tmp_path: Path) -> None:
    started = time.perf_counter()
    port = choose_ports(LOOPBACK).grpc
    run = bench(tmp_path, "--triton", f"{LOOPBACK}:{port}")
    assert run.returncode == 1
    assert run.stderr.startswith("error: Triton at 127.0.0.1:")
    assert "start it with `make serve`" in run.stderr
    assert "Traceback" not in run.stderr
    assert time.perf_counter() - started < 15


def test_a_load_deletes_its_own_files_only(tmp_path: Path) -> None:
    """`--out` may be the folder of a catalog."""
    mine, theirs = ("load.html", "load_stats.csv"), ("queries.csv", "load_notes.txt")
    for name in (*mine, *theirs):
        (tmp_path / name).write_text("an earlier one")
    args = cli.parser().parse_args(["--queries", str(tmp_path / "nowhere.csv")])
    with pytest.raises(ServerError, match=r"(?s)locust ended without a result.*nowhere.csv"):
        cli.run_locust(args, Settings(), tmp_path)
    kept = {path.name for path in tmp_path.iterdir() if path.read_text() == "an earlier one"}
    assert kept == set(theirs)


def test_a_stopped_load_leaves_no_locust(tmp_path: Path) -> None:
    mark = f"--raw-log={tmp_path}"
    with misbehaving(lambda number: answer()) as address:
        command = [sys.executable, "-m", "benchmarks", "--out", str(tmp_path), "--triton", address]
        process = subprocess.Popen(command, cwd=ROOT)
        end = time.monotonic() + 30
        while not processes_of(mark):
            assert time.monotonic() < end
            time.sleep(0.1)
        process.terminate()
        assert process.wait(10) == 143
    assert not processes_of(mark)


@pytest.mark.parametrize("flags", [("--users", "0"), ("--seconds", "-1"), ("--rate", "inf")])
def test_senseless_loads_are_refused(flags: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parser().parse_args(flags)
    assert stopped.value.code == 2


def test_a_locust_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is cut to one second, which it cannot keep."""
    monkeypatch.setattr(cli, "START_AND_EXIT_S", 1 - cli.WARMUP_S - 20 - cli.SETTLE_S - 5)
    args = cli.parser().parse_args(["--seconds", "20", "--timeout-s", "5"])
    with pytest.raises(ServerError, match="locust did not end in 1 s"):
        cli.run_locust(args, Settings(triton=f"{LOOPBACK}:9", timeout_s=5), tmp_path)


# ── a server that misbehaves, which the real one cannot be made to do ────────────────────
class Misbehaving(GRPCInferenceServiceServicer):
    """Answers the contract's handshake; `reply_to` gets the number of each query, from 0."""

    def __init__(self, reply_to: Callable[[int], pb.ModelInferResponse]) -> None:
        self.reply_to, self.numbers = reply_to, itertools.count()

    def ModelConfig(self, request: Any, context: Any) -> Any:
        ensemble = next(e for e in models.ENSEMBLES if e.name == request.name)
        config = config_pb.ModelConfig(name=ensemble.name)
        config.parameters[RELEASE_PARAMETER].string_value = RELEASE_ID
        for tensors, into in ((ensemble.inputs, config.input), (ensemble.outputs, config.output)):
            for tensor in tensors:
                dims = tensor.dims({"vector_dim": DIM})
                into.add(name=tensor.name, data_type=tensor.dtype.config, dims=dims)
        return pb.ModelConfigResponse(config=config)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        return self.reply_to(next(self.numbers))


def answer(dim: int = DIM, status: bytes = b"") -> pb.ModelInferResponse:
    """One row: a vector of ones (dim,) and a status."""
    reply = pb.ModelInferResponse()
    vector, item_status = models.QUERY_VECTOR, models.ITEM_STATUS
    reply.outputs.add(name=vector.name, datatype=vector.dtype.triton, shape=[1, dim])
    reply.outputs.add(name=item_status.name, datatype=item_status.dtype.triton, shape=[1, 1])
    reply.raw_output_contents.append(np.ones(dim, np.float32).tobytes())
    reply.raw_output_contents.append(struct.pack("<I", len(status)) + status)
    return reply


@contextmanager
def misbehaving(reply_to: Callable[[int], pb.ModelInferResponse]) -> Iterator[str]:
    """Its address, until the block ends."""
    server = grpc.server(ThreadPoolExecutor(64))
    add_GRPCInferenceServiceServicer_to_server(Misbehaving(reply_to), server)
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    server.start()
    try:
        yield f"{LOOPBACK}:{port}"
    finally:
        server.stop(grace=None).wait()


def test_an_open_loop_sees_a_stall(tmp_path: Path) -> None:
    """400 ms without an answer in 3 s: every seventh arrival meets it, so the p99 must show it."""
    stalled = [0.0]

    def reply_to(number: int) -> pb.ModelInferResponse:
        if number == 300:  # in the middle of the measured time
            stalled[0] = time.perf_counter() + 0.4
        time.sleep(max(0.0, stalled[0] - time.perf_counter()))
        return answer()

    with misbehaving(reply_to) as address:
        run = bench(tmp_path, "--triton", address, "--rate", "100", "--seconds", "3")
    found = verdict(run)
    assert (found["mode"], found["users"], found["failures"]) == ("open", None, 0)
    assert found["release_id"] == RELEASE_ID
    assert found["rate_per_s"] == pytest.approx(100, rel=0.25)
    assert found["p99_ms"] > 300
    assert found["p50_ms"] < 100
    assert found["lateness_p99_ms"] < found["p99_ms"] / 2


def test_refused_rows_and_wrong_shapes_are_failures(tmp_path: Path) -> None:
    """Both come with gRPC's status OK; a load that only counts statuses would praise them."""

    def reply_to(number: int) -> pb.ModelInferResponse:
        return answer(dim=DIM - 1) if number % 2 else answer(status=b"too_long: shorten it")

    with misbehaving(reply_to) as address:
        run = bench(tmp_path, "--triton", address, "--users", "2", "--seconds", "1")
    found = verdict(run)
    assert run.returncode == 1
    assert found["requests"] == found["failures"] > 0
    assert found["p99_ms"] is None
    errors = {s.error.split(":")[0] for s in RawLog.read(tmp_path / "load.jsonl").samples}
    assert errors == {"too_long", models.QUERY_ENCODER.name}
