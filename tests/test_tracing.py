"""Spans from the client through Triton, at a collector of our own; and none of it can harm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy import local
from deploy.tracing import trace_flags
from retrieval_client import Encoder, Settings
from retrieval_client.settings import traces_wanted
from retrieval_client.tracing import LAST_SPANS_S
from retrieval_contract.errors import DeployError
from tests.collector import Collector, collecting, silent
from tests.conftest import ROOT
from tests.serving import FREE_PORTS


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """One for the server and its clients."""
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def traced(
    collector: Collector, release_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[local.Server]:
    """A server that sends its spans there."""
    log = (tmp_path_factory.mktemp("traced") / "server.log").open("w")
    with local.triton(release_folder, log=log, otel_url=collector.url) as server:
        yield server


@pytest.fixture(scope="module")
def milvus(release_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small catalog, which no process holds: the searches are processes of their own."""
    store = str(tmp_path_factory.mktemp("milvus") / "catalog.db")
    code = (
        "import sys; from pathlib import Path; from benchmarks.ledger import *; "
        "fill(Settings(milvus=sys.argv[1]), Release.load(Path(sys.argv[2])), 20)"
    )
    subprocess.run([sys.executable, "-c", code, store, release_folder], cwd=ROOT, check=True)
    return store


@pytest.fixture
def filled(traced: local.Server, milvus: str) -> Settings:
    """That server and that catalog."""
    return Settings(triton=traced.grpc_address, milvus=milvus)


def search(settings: Settings, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retrieval_client", "search", "red dress"]
    command += ["--triton", settings.triton, "--milvus", settings.milvus]
    return subprocess.run(
        command,
        cwd=ROOT / "clients",
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_one_trace_from_the_client_through_triton(filled: Settings, collector: Collector) -> None:
    for attempt in range(3):  # on a busy machine the command may end without its last spans
        collector.spans.clear()
        done = search(filled, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=collector.url)
        assert done.returncode == 0, done.stderr
        try:
            found = collector.named("search", "encode", "milvus", "InferRequest", "query_encoder")
            break
        except AssertionError:
            if attempt == 2:
                raise
    whole, encode, milvus = found["search"], found["encode"], found["milvus"]
    request, model = found["InferRequest"], found["query_encoder"]
    assert len({span.trace for span in (whole, encode, milvus, request, model)}) == 1
    assert (whole.parent, encode.parent, milvus.parent) == ("", whole.id, whole.id)
    assert (request.parent, model.parent) == (encode.id, request.id)
    assert {"REQUEST_START", "QUEUE_START", "REQUEST_END"} <= set(model.events)
    assert whole.start_ns <= encode.start_ns <= model.start_ns
    assert model.end_ns <= encode.end_ns <= milvus.start_ns <= whole.end_ns
    assert whole.service == "retrieval"


def test_requests_of_nobody_who_traces_leave_no_span(
    filled: Settings, collector: Collector
) -> None:
    """Such as the launcher's own. A last request with a parent shows that all had been sent."""
    before = len(collector.spans)
    assert search(filled).returncode == 0
    with Encoder(filled) as encoder:
        encoder.encode_queries(["red dress"])
    assert search(filled, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=collector.url).returncode == 0
    end = time.monotonic() + 20
    while len(collector.spans) < before + 6 and time.monotonic() < end:
        time.sleep(0.05)
    assert len({span.trace for span in collector.spans[before:]}) == 1


def test_a_collector_that_is_away_harms_nothing(
    release_folder: Path, milvus: str, tmp_path: Path
) -> None:
    """First it hangs, then it is gone: answers, the command's end and the server's stop are as
    they are without one."""
    with (tmp_path / "log").open("w") as log, ExitStack() as hanging:
        url = hanging.enter_context(silent())
        with local.triton(release_folder, log=log, otel_url=url) as server:
            settings = Settings(triton=server.grpc_address, milvus=milvus)
            started = time.monotonic()
            assert search(settings).returncode == 0
            plain_s = time.monotonic() - started
            for _ in range(2):
                started = time.monotonic()
                done = search(settings, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=url)
                assert done.returncode == 0, done.stderr
                assert "red dress" in done.stdout
                assert done.stderr == ""
                # Two more seconds for a busy machine: a sender that is waited for takes ten.
                assert time.monotonic() - started < 2 * plain_s + LAST_SPANS_S + 2
                hanging.close()
            stopping = time.monotonic()
    assert server.process.returncode == 0
    assert time.monotonic() - stopping < 15


# ── what switches it on ──────────────────────────────────────────────────────────────────
def test_without_a_provider_nothing_is_traced() -> None:
    code = (
        "import sys, retrieval_client; from retrieval_client.tracing import *; "
        "assert not any(name.startswith('opentelemetry') for name in sys.modules); "
        "assert spans_of_application() is no_span and traceparent() is None"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "clients").returncode == 0


def test_spans_of_the_application_are_used_and_only_sampled_ones_passed_on() -> None:
    code = """
import sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from retrieval_client.tracing import no_span, spans_of_application, traceparent
assert spans_of_application() is no_span, "the API alone is no provider"
never = len(sys.argv) > 1
trace.set_tracer_provider(TracerProvider(sampler=ALWAYS_OFF) if never else TracerProvider())
assert traceparent() is None
with spans_of_application()("search") as span:
    print(traceparent())
"""
    for args in ([], ["off"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            cwd=ROOT / "clients",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert (done.stdout.strip() == "None") is bool(args), done.stdout


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_standard_variables_decide(env: dict[str, str], wanted: bool) -> None:
    assert traces_wanted(env) is wanted


@pytest.mark.parametrize("url", ["", "localhost:4318", "http://:4318/v1/traces", "http://host:1"])
def test_an_address_that_is_none_is_told_so(url: str) -> None:
    with pytest.raises(DeployError, match="--otel-url: expected http://host:port/v1/traces, got"):
        trace_flags(url)


def test_the_launcher_takes_the_address(release_folder: Path) -> None:
    command = [sys.executable, "-m", "deploy.local", "--release", str(release_folder)]
    done = subprocess.run(
        [*command, *FREE_PORTS, "--otel-url", "nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: --otel-url: expected http://host:port/v1/traces, got")


def test_no_address_is_no_flag() -> None:
    assert trace_flags(None) == []
