"""python -m benchmarks.overload: past the load that a server carries, and search beside ingestion.

Three questions, asked through the client library as applications use it, latencies counted from
when a call was due:

* overload: callers of several clients come at three times the rate that the server can answer. How
  many are answered in their time, against that rate; is everybody else refused, and how soon? Who
  only finds his time over was neither.
* stalls: bursts and steady load, mostly of requests that nobody merges: of ten calls a client makes
  two. How many take longer than STALL_S?
* bulk: searches at a steady rate, alone and while a push saturates the server. Their p99?

The last line is one JSON object with a key for each.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from benchmarks.cores import apart
from benchmarks.inflight import keep_calling
from benchmarks.program import print_report
from benchmarks.workload import built_in_queries, queries_from_csv
from deploy.rendered.catalog import write_rendered_catalog
from deploy.server import LATEST, Server, triton
from retrieval_client.channel import channel_to
from retrieval_client.encoder import Encoder
from retrieval_client.settings import Settings
from retrieval_client.sources import Source
from retrieval_client.wire import request_from_rows
from retrieval_contract import models
from retrieval_contract.door import Lane
from retrieval_contract.errors import ServerBusy

DEADLINE_S, PATIENT_S = 0.5, 5.0
"""Past what can be carried, and where everybody should be answered."""
OFFERED = 3.0
"""Times the capacity."""
CALLERS = 128
"""Of the closed loop that measures the capacity."""
STALL_S = 0.4
BURST, PAUSE_S = 10, 0.02
STEADY = 0.5
"""Of the capacity, where nothing should ever wait."""
BULK_ROWS, BULK_IN_FLIGHT = 32, 4
SEARCHES_PER_S = 50.0
"""Beside a push."""
CLIENTS = 4
"""Past the capacity: none of them knows what the others ask for."""
THREADS, PRODUCTS = 1024, 256
SLACK_S = 0.05
"""Beyond its deadline, before a call counts as hanging: threads of a busy machine wake late."""

ANSWERED, REFUSED = "answered", ServerBusy.__name__
console = Console(stderr=True)


@dataclass
class Calls:
    """What became of each call, by the name of its error, and its seconds since it was due."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    lateness_s: float = 0.0
    """Of the generator itself, at worst."""

    def add(self, outcome: str, seconds: float) -> None:
        """One call; several threads may add at once."""
        self.seconds.setdefault(outcome, []).append(seconds)

    @property
    def all(self) -> list[float]:
        """Seconds of all calls."""
        return list(itertools.chain.from_iterable(self.seconds.values()))

    @property
    def counts(self) -> dict[str, int]:
        """Calls by outcome."""
        return {name: len(found) for name, found in self.seconds.items()}

    @property
    def failed(self) -> int:
        """Calls that were not answered, for whatever reason."""
        return len(self.all) - self.counts.get(ANSWERED, 0)

    @classmethod
    def sum(cls, parts: Iterable[Calls]) -> Calls:
        """Of several generators."""
        whole = cls()
        for part in parts:
            for outcome, found in part.seconds.items():
                whole.seconds.setdefault(outcome, []).extend(found)
            whole.lateness_s = max(whole.lateness_s, part.lateness_s)
        return whole

    def percentile_ms(self, percent: float, outcome: str = ANSWERED) -> float:
        """Infinite when there was none."""
        found = self.seconds.get(outcome)
        return float(np.percentile(found, percent)) * 1e3 if found else float("inf")

    def mark(self, percent: float, outcome: str) -> float | None:
        """The same for JSON, in which nothing is infinite: None when there was none."""
        found = self.percentile_ms(percent, outcome)
        return round(found, 1) if math.isfinite(found) else None


def call(ask: Callable[[float], object], due: float, deadline_s: float, calls: Calls) -> None:
    """`ask` with the seconds that are left; its time began when it was due."""
    try:
        ask(max(deadline_s - (time.perf_counter() - due), 1e-3))
        outcome = ANSWERED
    except Exception as exc:  # whatever it is, this caller has no answer
        outcome = type(exc).__name__
    calls.add(outcome, time.perf_counter() - due)


def query(encoder: Encoder, text: str, timeout_s: float) -> object:
    """One search's text, and its vector."""
    return encoder.encode_queries([text], timeout_s=timeout_s).vector(0)


def arrivals(rate: float, seconds: float, seed: int = 0) -> Iterator[float]:
    """Poisson, at `rate` a second: waits for each, and gives the moment when it was due."""
    rng, due = random.Random(seed), time.perf_counter()
    end = due + seconds
    while (due := due + rng.expovariate(rate)) < end:
        if (early := due - time.perf_counter()) > 0:
            time.sleep(early)
        yield due


def offer(
    encoders: Sequence[Encoder],
    texts: Sequence[str],
    rate: float,
    seconds: float,
    deadline_s: float = DEADLINE_S,
    seed: int = 0,
) -> Calls:
    """Calls that come at `rate` a second, whatever became of those before; clients take turns."""
    calls, drawn, turns = Calls(), itertools.cycle(texts), itertools.cycle(encoders)
    with ThreadPoolExecutor(THREADS) as pool:
        for due in arrivals(rate, seconds, seed):
            calls.lateness_s = max(calls.lateness_s, time.perf_counter() - due)
            ask = partial(query, next(turns), next(drawn))
            pool.submit(call, ask, due, deadline_s, calls)
    return calls


class Sender:
    """Requests of one text, which nobody merges, and what became of each by its status code."""

    def __init__(self, channel: grpc.Channel, texts: Sequence[str], time_s: float) -> None:
        """`time_s`: what each says that it has."""
        self._stub, self._time_s = GRPCInferenceServiceStub(channel), time_s
        self._requests = itertools.cycle([self._request(text) for text in texts])
        self._came, self._sent = threading.Semaphore(0), 0
        self._calls = Calls()

    def _request(self, text: str) -> pb.ModelInferRequest:
        request = request_from_rows(models.QUERY_ENCODER, {models.QUERY.name: [text.encode()]})
        request.parameters["timeout"].int64_param = int(self._time_s * 1e6)
        return request

    def send(self, due: float, timeout_s: float) -> None:
        """One, whose time began when it was due; waited for so long."""

        def came(reply: grpc.Future) -> None:
            code, took = reply.code(), time.perf_counter() - due
            self._calls.add(ANSWERED if code is grpc.StatusCode.OK else code.name, took)
            self._came.release()

        self._stub.ModelInfer.future(next(self._requests), timeout=timeout_s).add_done_callback(
            came
        )
        self._sent += 1

    def wait(self) -> Calls:
        """All that were sent; and none for the next time."""
        for _ in range(self._sent):
            self._came.acquire()
        self._sent, calls, self._calls = 0, self._calls, Calls()
        return calls

    def bursts(self, count: int) -> Calls:
        """So many bursts of BURST, and a pause after each."""
        found = []
        for _ in range(count):
            due = time.perf_counter()
            for _ in range(BURST):
                self.send(due, PATIENT_S)
            found.append(self.wait())
            time.sleep(PAUSE_S)
        return Calls.sum(found)

    def offer(self, rate: float, seconds: float, timeout_s: float) -> Calls:
        """At a rate, whatever became of those before."""
        for due in arrivals(rate, seconds):
            self.send(due, timeout_s)
        return self.wait()


def capacity(server: Server, texts: Sequence[str], seconds: float, clients: int = 1) -> float:
    """Answers a second to callers who wait for each answer."""
    rows = itertools.cycle([(text.encode(),) for text in texts])
    return keep_calling(server, rows, CALLERS, seconds, clients).rows_per_s


@contextmanager
def pushing(server: Server, products: Sequence[tuple[str, bytes]]) -> Iterator[Callable[[], int]]:
    """An ingestion that keeps the server's product side full; gives the count of what went in.

    Raises at its end what a push raised.
    """
    over, pushed = threading.Event(), itertools.count()

    def push() -> None:
        drawn = itertools.cycle(products)
        while not over.is_set():
            titles, images = zip(*itertools.islice(drawn, BULK_ROWS), strict=True)
            encoded = encoder.encode_products(titles, images, timeout_s=120)
            for row in range(len(titles)):
                encoded.vector(row)
                next(pushed)

    bulk = Settings(triton=server.grpc_address, traffic=Lane.BULK)
    with Encoder(bulk) as encoder, ThreadPoolExecutor(BULK_IN_FLIGHT) as pool:
        pushes = [pool.submit(push) for _ in range(BULK_IN_FLIGHT)]
        time.sleep(1)
        try:
            yield lambda: next(pushed)
        finally:
            over.set()
        for each in pushes:
            each.result()


def overload(server: Server, texts: Sequence[str], seconds: float) -> dict[str, object]:
    """Three times what it can carry for as many clients, which have a core of their own: who asks
    shall not slow down who answers."""
    with ExitStack() as connected:
        connected.enter_context(apart(server.process.pid))
        rates = [capacity(server, texts, 2.0, CLIENTS)]
        settings = Settings(triton=server.grpc_address)
        encoders = [connected.enter_context(Encoder(settings)) for _ in range(CLIENTS)]
        offer(encoders, texts, rates[0] * STEADY, 1.0)
        gc.collect()
        gc.freeze()  # else the collector looks through all modules while calls are due
        connected.callback(gc.unfreeze)
        calls = offer(encoders, texts, rates[0] * OFFERED, seconds)
        rates.append(capacity(server, texts, 2.0, CLIENTS))
    show("overload", calls)
    counts = calls.counts
    return {
        "trials": len(calls.all),
        "goodput": round(counts.get(ANSWERED, 0) / seconds / statistics.mean(rates), 3),
        "outcomes": counts,
        "unanswered": sum(n for outcome, n in counts.items() if outcome not in (ANSWERED, REFUSED)),
        "hanging": sum(took > DEADLINE_S + SLACK_S for took in calls.all),
        "refused_p99_ms": calls.mark(99, REFUSED),
        "lateness_ms": round(calls.lateness_s * 1e3, 1),
    }


def stalls(server: Server, texts: Sequence[str], count: int) -> dict[str, object]:
    """Half of the calls in bursts, half at a steady rate, and of these half through a client."""
    settings = Settings(triton=server.grpc_address)
    rate = capacity(server, texts, 1.0) * STEADY
    seconds = count / 2 / rate
    with (
        Encoder(settings) as encoder,
        channel_to(settings) as channel,
        ThreadPoolExecutor(1) as beside,
    ):
        sender = Sender(channel, texts, PATIENT_S)
        burst = sender.bursts(count // 2 // BURST)
        lone = beside.submit(sender.offer, rate / 2, seconds, PATIENT_S)
        merged = offer([encoder], texts, rate / 2, seconds, PATIENT_S, seed=1)
    found = [burst, Calls.sum([lone.result(), merged])]
    for name, calls in zip(("bursts", "steady"), found, strict=True):
        show(name, calls)
    took = Calls.sum(found)
    return {
        "trials": len(took.all),
        "failed": took.failed,
        "stalled": sum(s > STALL_S for s in took.all),
    }


def beside_bulk(
    server: Server,
    texts: Sequence[str],
    products: Sequence[tuple[str, bytes]],
    seconds: float,
    rate: float = SEARCHES_PER_S,
) -> dict[str, object]:
    """Search alone, and beside a push, in turns."""
    alone, beside, pushed = [], [], 0
    with Encoder(Settings(triton=server.grpc_address)) as encoder:
        for seed in range(3):
            alone.append(offer([encoder], texts, rate, seconds / 3, PATIENT_S, seed))
            with pushing(server, products) as count:
                beside.append(offer([encoder], texts, rate, seconds / 3, PATIENT_S, seed))
                pushed += count()
    for name, found in (("search alone", alone), ("search beside a push", beside)):
        show(name, *found)
    p99 = [statistics.median(calls.percentile_ms(99) for calls in f) for f in (alone, beside)]
    return {
        "trials": sum(len(calls.all) for calls in beside),
        "failed": Calls.sum(alone + beside).failed,
        "p99_ratio": round(p99[1] / p99[0], 2) if all(map(math.isfinite, p99)) else None,
        "pushed": pushed,
    }


def show(name: str, *found: Calls) -> None:
    """One row an outcome."""
    table = Table(title=name)
    for column in ("outcome", "calls", "p50 ms", "p99 ms", "max ms"):
        table.add_column(column, justify="right")
    for outcome in sorted({outcome for calls in found for outcome in calls.seconds}):
        took = [s * 1e3 for calls in found for s in calls.seconds.get(outcome, [])]
        marks = [*np.percentile(took, [50, 99]), max(took)]
        table.add_row(outcome, str(len(took)), *(f"{mark:.1f}" for mark in marks))
    console.print(table)


def products_of(source: Path) -> list[tuple[str, bytes]]:
    """The first good (title, image file)s."""
    good = (row for row in Source(source).rows() if row.problem is None)
    return [(row.title.decode(), row.image) for row in itertools.islice(good, PRODUCTS)]


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    top.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    top.add_argument("--queries", type=Path, help="CSV with a column `query`, or its folder")
    top.add_argument("--products", type=Path, help="a source; default: a catalog that is drawn")
    top.add_argument("--seconds", type=float, default=60.0, help="of overload")
    top.add_argument("--calls", type=int, default=5000, help="in bursts and at a steady rate")
    top.add_argument("--bulk-seconds", type=float, default=30.0)
    top.add_argument(
        "--bulk-rate", type=float, default=SEARCHES_PER_S, help="searches a second beside a push"
    )
    return top


def run(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """All three on one server."""
    texts = queries_from_csv(args.queries) if args.queries else built_in_queries()
    source = args.products or write_rendered_catalog(Path("build/rendered_catalog"))
    products = products_of(source)
    log_path = Path("build") / "overload.log"
    with log_path.open("w", encoding="utf-8") as log, triton(args.release, log=log) as server:
        return {
            "overload": overload(server, texts, args.seconds),
            "stalls": stalls(server, texts, args.calls),
            "bulk": beside_bulk(server, texts, products, args.bulk_seconds, args.bulk_rate),
        }


def main() -> None:
    """Command line."""
    os.environ["TOKENIZERS_PARALLELISM"] = "0"
    print_report(run, parser().parse_args())


if __name__ == "__main__":
    main()
