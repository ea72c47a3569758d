"""Query users for locust: gRPC to a running Triton, every answer checked.

    locust -f benchmarks/locustfile.py Shopper               closed loop
    locust -f benchmarks/locustfile.py Arrivals --rate 50    open loop, one user

`python -m benchmarks` drives this file headless, in one process, and judges the raw log that it
leaves. Locust's own tables round to whole milliseconds; the raw log does not.
"""

from __future__ import annotations

import itertools
import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import gevent
import gevent.pool
from grpc.experimental import gevent as grpc_gevent
from locust import User, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.stats import CSV_STATS_INTERVAL_SEC
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from benchmarks.rawlog import RawLog, Sample
from benchmarks.workload import Workload, built_in_queries, poisson_arrivals, queries_from_csv
from retrieval_client.channel import channel_to
from retrieval_client.settings import Settings
from retrieval_client.translate import triton_errors
from retrieval_client.wire import arrays_from_reply, request_from_rows
from retrieval_contract import models
from retrieval_contract.errors import ItemError, RetrievalError

MAX_IN_FLIGHT = 2000
FAILURE_PAUSE_S = 0.1
"""A closed loop that fails at once would flood the log; a person tries again a little later."""

# After locust's import has patched the standard library, before any channel is made.
grpc_gevent.init_gevent()


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """What this load needs beside locust's own flags."""
    parser.add_argument("--triton", help="gRPC address, host:port (RETRIEVAL_TRITON)")
    parser.add_argument("--timeout-s", type=float, help="deadline of one query, in seconds")
    parser.add_argument("--queries", type=Path, help="CSV with a column `query`, or its folder")
    parser.add_argument("--exponent", type=float, default=0.8, help="of the Zipf weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=10.0, help="arrivals a second (Arrivals)")
    parser.add_argument("--warmup-s", type=float, default=2.0, help="left out of every figure")
    parser.add_argument("--measure-s", type=float, default=math.inf, help="then stop asking")
    parser.add_argument("--raw-log", type=Path, help="where each request is written")


class Load:
    """One process's connection, queries, clock and log: made after any fork, never at import."""

    def __init__(self, environment: Environment) -> None:
        options = environment.parsed_options
        assert options is not None
        self.environment, self.options = environment, options
        self.settings = Settings.from_env().override(
            triton=options.triton, timeout_s=options.timeout_s
        )
        self.channel = channel_to(self.settings)
        self.stub = GRPCInferenceServiceStub(self.channel)
        texts = queries_from_csv(options.queries) if options.queries else built_in_queries()
        self.workload = Workload(texts, exponent=options.exponent, seed=options.seed)
        self.timers: list[gevent.Greenlet] = []

    def begin(self) -> None:
        """Start the clock of a new test; `start` and `end` are on `perf_counter`, in seconds."""
        self.start = time.perf_counter()
        self.warm = self.start + self.options.warmup_s
        self.end = self.warm + self.options.measure_s
        self.samples: list[Sample] = []
        self.dropped, self.measuring = 0, False
        self.shoppers = itertools.count()
        self.marks: list[tuple[float, float]] = []
        gevent.killall(self.timers)  # of a test before this one, in the web page
        self.timers = [gevent.spawn_later(self.options.warmup_s, self.mark)]
        if math.isfinite(self.end):
            self.timers.append(gevent.spawn_later(self.end - self.start, self.mark))

    def mark(self) -> None:
        """Note CPU and wall seconds now, to know later how busy the generator was."""
        self.marks.append((time.process_time(), time.perf_counter()))

    def ask(self, query: str, due: float) -> bool:
        """Send one query that was due at `due`, log it, and say whether the answer was good."""
        request = request_from_rows(models.QUERY_ENCODER, {models.QUERY.name: [query.encode()]})
        reply, error = None, None
        sent = time.perf_counter()
        try:
            with triton_errors(self.settings.triton, models.QUERY_ENCODER.name):
                reply = self.stub.ModelInfer(request, timeout=self.settings.timeout_s)
        except RetrievalError as exc:
            error = exc
        done = time.perf_counter()
        error = error or self._fault(reply)
        late_ms, service_ms = (sent - due) * 1e3, (done - sent) * 1e3
        sample = Sample(due - self.start, late_ms, service_ms, str(error or ""))
        self.samples.append(sample)
        if due >= self.warm:
            if not self.measuring:  # locust's own rate would count the warm-up's seconds
                self.measuring = True
                self.environment.stats.reset_all()
            self.environment.events.request.fire(
                request_type="grpc",
                name=models.QUERY_ENCODER.name,
                response_time=sample.response_ms,
                response_length=reply.ByteSize() if reply else 0,
                exception=error,
                context={},
            )
        return error is None

    def write(self) -> None:
        """Leave the raw log, when one was asked for."""
        if len(self.marks) < 2:
            self.mark()
        (cpu, wall), (cpu_end, wall_end) = self.marks[0], self.marks[-1]
        share = (cpu_end - cpu) / max(wall_end - wall, 1e-9)
        if self.options.raw_log:
            log = RawLog(self.options.warmup_s, share, self.dropped, self.samples)
            log.write(self.options.raw_log)

    def _fault(self, reply: Any) -> RetrievalError | None:
        """What is wrong with an answer: its names, types and shapes, or a refused row."""
        try:
            arrays = arrays_from_reply(models.QUERY_ENCODER, reply, 1, self.dims)
        except RetrievalError as exc:
            return exc
        status = arrays[models.ITEM_STATUS.name][0]
        return ItemError.from_status(status.decode()) if status else None

    @cached_property
    def dims(self) -> dict[str, tuple[int, ...]]:
        """Dims of each output, from the server's own config."""
        request = pb.ModelConfigRequest(name=models.QUERY_ENCODER.name)
        with triton_errors(self.settings.triton, models.QUERY_ENCODER.name):
            reply = self.stub.ModelConfig(request, timeout=self.settings.timeout_s)
        return {output.name: tuple(output.dims) for output in reply.config.output}


class Shopper(User):
    """Closed loop: asks again as soon as it is answered, so a slow server is asked less often.

    Good for throughput. A stall is seen once a user, however many would have come meanwhile:
    take the tail from `Arrivals`.
    """

    wait_time = constant(0)

    def on_start(self) -> None:
        self.load: Load = self.environment.load
        self.texts = self.load.workload.stream(next(self.load.shoppers))

    @task
    def shop(self) -> None:
        """One query and its answer."""
        now = time.perf_counter()
        if now >= self.load.end:
            raise StopUser
        if not self.load.ask(next(self.texts), now):
            gevent.sleep(FAILURE_PAUSE_S)


class Arrivals(User):
    """Open loop: Poisson arrivals at `--rate` a second, however slow the server.

    One user makes them all; each is timed from when it was due, so a stall counts for everyone
    who would have met it.
    """

    fixed_count = 1

    @task
    def arrive(self) -> None:
        """All arrivals of the test, then the last answers."""
        load: Load = self.environment.load
        texts = load.workload.stream(next(load.shoppers))
        pool = gevent.pool.Pool(MAX_IN_FLIGHT)
        for at in poisson_arrivals(load.options.rate, load.options.seed):
            due = load.start + at
            if due >= load.end:
                break
            gevent.sleep(0)  # even when behind: what was spawned must get its turn to be sent
            while (wait := due - time.perf_counter()) > 0:
                gevent.sleep(wait)
            # A full pool's spawn would block, and later arrivals would wait for earlier answers.
            if pool.free_count():
                pool.spawn(load.ask, next(texts), due)
            else:
                load.dropped += 1
        pool.join()
        raise StopUser


@events.init.add_listener
def connect(environment: Environment, **_: Any) -> None:
    """Make this process's load; asks nothing yet, because a worker's test may start meanwhile."""
    try:
        environment.load = Load(environment)
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Every test, also one restarted in the web page, has its own clock and log."""
    environment.load.begin()


@events.test_stop.add_listener
def finish(environment: Environment, **_: Any) -> None:
    """All users have stopped and all answers are in."""
    environment.load.write()
    if environment.parsed_options.csv_prefix:
        gevent.sleep(1.1 * CSV_STATS_INTERVAL_SEC)  # else the CSV files miss the last second


@events.quitting.add_listener
def disconnect(environment: Environment, **_: Any) -> None:
    """A channel left for the interpreter's exit to collect can hang it under gevent."""
    if load := getattr(environment, "load", None):
        load.channel.close()
