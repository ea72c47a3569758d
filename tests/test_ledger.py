"""The ledger of a search: its lines are measured, and add up."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from benchmarks.ledger import fill
from deploy import local
from retrieval_client import ProductSearch, Settings
from retrieval_client.__main__ import main
from retrieval_client.channel import channel_to
from retrieval_client.ledger import LINES, RequestTimes, Statistics, Timed, ledgers
from retrieval_client.wire import request_from_rows
from retrieval_contract import models
from retrieval_contract.release import Release
from retrieval_contract.tensors import Ensemble
from retrieval_contract.took import Took
from tests.conftest import ROOT, photo

QUERIES, PRODUCTS = models.QUERY_ENCODER, models.PRODUCT_ENCODER


@pytest.fixture
def filled(settings: Settings, release: Release) -> Settings:
    """A small catalog of random vectors."""
    fill(settings, release, 50)
    return settings


def statistics(requests: int, ensemble: Ensemble = QUERIES, **sums: dict[str, float]) -> Statistics:
    counts = dict.fromkeys([ensemble.name, *(step.name for step in ensemble.steps)], requests)
    return Statistics(counts, *(sums.get(name, {}) for name in ("queue_s", "compute_s", "whole_s")))


def test_lines_add_up_where_the_model_says_what_it_took() -> None:
    """Two callers who shared one request: each waited for the whole of it."""
    shared = RequestTimes(QUERIES, 0.01, 1.0, 0.02, Took(0.05, 0.1, 0.4, 0.6))
    searches = [
        Timed({"search": total, "encode": total - 0.3, "milvus": 0.25}, [shared])
        for total in (1.4, 1.5)
    ]
    server = statistics(1, compute_s={QUERIES.name: 0.76}, queue_s={QUERIES.name: 0.04})
    for search, lines in zip(searches, ledgers(searches, server), strict=True):
        assert sum(lines.values()) == pytest.approx(search.laps["search"])
        assert lines == pytest.approx(
            {
                "coalesce": search.laps["encode"] - 1.03,
                "build": 0.01,
                "wire": 0.2,  # the call less the server's 0.8
                "queue": 0.09,  # Triton's and the process's own
                "tokenize": 0.1,
                "tower": 0.4,
                "steps": 0.0,
                "handover": 0.21,  # the server's 0.8 less the three
                "decode": 0.02,
                "milvus": 0.25,
                "unexplained": 0.05,
            }
        )


@pytest.mark.parametrize("ensemble", [QUERIES, PRODUCTS])
def test_of_an_ensemble_its_own_steps_are_read_and_never_its_own_queue(ensemble: Ensemble) -> None:
    first, tower = (step.name for step in ensemble.steps)
    server = statistics(
        2,
        ensemble,
        queue_s={ensemble.name: 99.0, first: 0.1, tower: 0.2},
        compute_s={ensemble.name: 99.0, first: 0.2, tower: 0.4},
        whole_s={ensemble.name: 1.0, first: 99.0, tower: 99.0},
    )
    search = Timed({"search": 0.7, "encode": 0.7}, [RequestTimes(ensemble, 0.0, 0.6, 0.0, None)])
    (lines,) = ledgers([search], server)
    expected = {"queue": 0.15, "tokenize": 0.1, "tower": 0.2, "steps": 0.05, "handover": 0.0}
    assert {line: lines[line] for line in expected} == pytest.approx(expected)
    assert lines["wire"] == pytest.approx(0.1)


def test_a_search_on_the_real_server_is_explained(filled: Settings) -> None:
    """Nothing of it is missing, nothing is negative, and each part that works takes time."""
    with ProductSearch(filled, explain=True) as search:
        search.connect()
        search.many(["warm"])
        before = search.encoder.statistics()
        timed = [search.timed([f"red dress {n}"])[1] for n in range(10)]
        server = search.encoder.statistics_since(before, len(timed))
    assert server.requests[QUERIES.name] == len(timed)
    means = dict.fromkeys(LINES, 0.0)
    for one, lines in zip(timed, ledgers(timed, server), strict=True):
        assert list(lines) == list(LINES)
        assert sum(lines.values()) == pytest.approx(one.laps["search"])
        assert abs(lines["unexplained"]) < 0.1 * one.laps["search"]
        assert min(lines["tokenize"], lines["tower"], lines["build"], lines["decode"]) > 0
        for line, seconds in lines.items():
            means[line] += seconds / len(timed)
    assert all(seconds >= 0 for seconds in means.values()), means
    assert means["tower"] > means["tokenize"], "a network of 12 layers takes longer than words"


def test_only_who_asks_is_told(filled: Settings) -> None:
    request = request_from_rows(QUERIES, {models.QUERY.name: [b"red dress", b"blue shirt"]})
    with channel_to(filled) as channel:
        stub = GRPCInferenceServiceStub(channel)
        plain = stub.ModelInfer(request, timeout=10)
        request.parameters[models.EXPLAIN].bool_param = True
        asked = stub.ModelInfer(request, timeout=10)
        config = stub.ModelConfig(pb.ModelConfigRequest(name=QUERIES.name), timeout=10).config
    names = [tensor.name for tensor in QUERIES.outputs]
    assert [o.name for o in plain.outputs] == names
    assert [o.name for o in asked.outputs] == [*names, models.TIMINGS.name]
    assert [o.name for o in config.output] == [*names, models.TIMINGS.name]
    assert asked.raw_output_contents[:2] == plain.raw_output_contents
    (first, second) = np.frombuffer(asked.raw_output_contents[2], np.float32).reshape(2, -1)
    assert (first == second).all(), "both rows were in one run"
    took = Took(*first.tolist())
    assert 0 < took.tokenize_s < took.model_s
    assert 0 < took.tower_s < took.model_s
    assert took.wait_s + took.tokenize_s + took.tower_s <= took.model_s


def test_an_ensemble_is_explained_by_its_steps(
    release_folder: Path, release: Release, tmp_path: Path
) -> None:
    """As on the targets `cpu` and `gpu`: without its own config for one process it is served so."""
    parts = tmp_path / "release"
    shutil.copytree(release_folder, parts, symlinks=True)
    (parts / "model_repository" / QUERIES.name / "configs" / "local.pbtxt").unlink()
    settings = Settings(milvus=str(tmp_path / "catalog.db"))
    fill(settings, release, 20)
    repository = parts / "model_repository"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.models, "IN_ONE", ())
        with (
            (tmp_path / "triton.log").open("w") as log,
            local.triton(parts, log=log) as server,
            ProductSearch(settings.override(triton=server.grpc_address), explain=True) as search,
        ):
            search.connect()
            search.many(["warm"])
            before = search.encoder.statistics()
            timed = [search.timed(["red dress"])[1] for _ in range(5)]
            counted = search.encoder.statistics_since(before, len(timed))
    assert repository.exists()
    found = ledgers(timed, counted)
    for one, lines in zip(timed, found, strict=True):
        assert one.requests[0].took is None
        assert sum(lines.values()) == pytest.approx(one.laps["search"])
        assert lines["tokenize"] > 0
        assert lines["tower"] > 0
        assert lines["steps"] > lines["tower"], "both are Python, and answer after it has counted"
    assert sum(lines["wire"] for lines in found) >= 0, "of each it is what a mean leaves"


# ── the commands ─────────────────────────────────────────────────────────────────────────
def test_the_command_explains_a_search(
    filled: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", "--explain", "--triton", filled.triton, "--milvus", filled.milvus]
    with pytest.raises(SystemExit, match="3"):
        main([*command, "--json", "red dress", "\0"])
    said = json.loads(capsys.readouterr().out)
    assert [len(one.get("hits", [])) for one in said["searches"]] == [10, 0]
    ledger = said["ledger_ms"]
    assert list(ledger) == [*LINES, "total"]
    assert sum(ledger[line] for line in LINES) == pytest.approx(ledger["total"], abs=0.01)
    assert ledger["tower"] > 0
    with pytest.raises(SystemExit, match="0"):
        main([*command, "red dress"])
    table = capsys.readouterr().out
    assert all(line in table for line in ledger)


@pytest.mark.parametrize("words", [[], ["red dress"]], ids=["alone", "beside a text"])
def test_the_command_explains_a_search_for_a_picture(
    filled: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Within its time, and what the server computed is no time on the wire."""
    (tmp_path / "picture.jpg").write_bytes(photo(size=(1500, 2000)))
    command = ["search", "--explain", "--json", "--image", str(tmp_path / "picture.jpg")]
    command += ["--triton", filled.triton, "--milvus", filled.milvus, "--timeout-s", "20"]
    start = time.monotonic()
    with pytest.raises(SystemExit, match="0"):
        main([*command, *words])
    assert time.monotonic() - start < 10, "it waited for what never comes"
    ledger = json.loads(capsys.readouterr().out)["ledger_ms"]
    assert sum(ledger[line] for line in LINES) == pytest.approx(ledger["total"], abs=0.01)
    assert ledger["steps"] > ledger["wire"], ledger
    assert (ledger["tower"] > 1) == bool(words), "of texts the process itself says it"


def test_the_benchmark_prints_both_loads(release_folder: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.ledger", "--release", str(release_folder)]
    command += ["--count", "48", "--products", "50", "--in-flight", "1", "--in-flight", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report) == ["1", "8"]
    for figures in report.values():
        assert list(figures) == ["total", *LINES]
        assert sum(figures[line]["share"] for line in LINES) == pytest.approx(1.0, abs=0.01)
        means = sum(figures[line]["mean_ms"] for line in LINES)
        assert means == pytest.approx(figures["total"]["mean_ms"], abs=0.01)
    alone, many = (figures["coalesce"]["mean_ms"] for figures in report.values())
    assert many > 5 * alone, "callers of one client wait for each other's request"
