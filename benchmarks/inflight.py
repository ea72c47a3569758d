"""Closed loops: so many requests in flight, or so many callers of one client."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import grpc
import numpy as np
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from deploy.server import Server
from retrieval_client.channel import channel_to
from retrieval_client.encoder import Encoder
from retrieval_client.settings import Settings
from retrieval_client.wire import request_from_rows
from retrieval_contract.errors import RetrievalError
from retrieval_contract.tensors import Ensemble

TIMEOUT_S = 30.0
WARM_S = 0.3


@dataclass(frozen=True)
class Answered:
    """Good answers between `start` and `end`: when each came, and after how long, in seconds.

    Those that were under way at either are among them; `all_rows` counts the warm-up's as well.
    """

    rows_each: int
    start: float
    end: float
    came: Sequence[float]
    latencies_s: Sequence[float]
    all_rows: int
    failed: int

    @property
    def rows_per_s(self) -> float:
        """An answer counts as much as of its time lay between `start` and `end`.

        Answers come in clumps, as large as a batch or a request: counted whole, there would be
        one too many, or too few, of them.
        """
        came, took = np.array(self.came), np.array(self.latencies_s)
        inside = np.minimum(came, self.end) - np.maximum(came - took, self.start)
        return self.rows_each * float((inside / took).sum()) / (self.end - self.start)

    def percentile_ms(self, percent: float) -> float:
        """Of the latencies; infinite when nothing was answered."""
        found = self.latencies_s
        return float(np.percentile(found, percent)) * 1e3 if found else float("inf")


def keep_in_flight(
    server: Server,
    ensemble: Ensemble,
    rows: Iterator[tuple[bytes, ...]],
    in_flight: int,
    rows_each: int,
    seconds: float,
) -> Answered:
    """Send a request for each that is answered, for so many seconds after a short warm-up."""
    names = [tensor.name for tensor in ensemble.inputs]
    done: queue.SimpleQueue[tuple[grpc.Future, float]] = queue.SimpleQueue()
    came, latencies, failed, answered = [], [], 0, 0
    with channel_to(Settings(triton=server.grpc_address)) as channel:
        stub = GRPCInferenceServiceStub(channel)

        def send() -> None:
            columns = zip(*itertools.islice(rows, rows_each), strict=True)
            request = request_from_rows(ensemble, dict(zip(names, columns, strict=True)))
            sent = time.perf_counter()
            call = stub.ModelInfer.future(request, timeout=TIMEOUT_S)
            call.add_done_callback(lambda call: done.put((call, sent)))

        for _ in range(in_flight):
            send()
        start = time.perf_counter() + WARM_S
        end = start + seconds
        while in_flight:
            call, sent = done.get()
            now, answered = time.perf_counter(), answered + 1
            if call.exception() is not None:
                failed += 1
            elif now > start:
                came.append(now)
                latencies.append(now - sent)
            if now < end:
                send()
            else:
                in_flight -= 1
    return Answered(rows_each, start, end, came, latencies, answered * rows_each, failed)


def keep_calling(
    server: Server,
    rows: Iterator[tuple[bytes, ...]],
    callers: int,
    seconds: float,
    clients: int = 1,
) -> Answered:
    """So many threads that share so many Encoders and ask for one text at a time, after a short
    warm-up."""
    came: list[tuple[float, float]] = []
    failures: list[RetrievalError] = []
    counts: list[int] = []
    start = time.perf_counter() + WARM_S
    end, lock = start + seconds, threading.Lock()

    def call(encoder: Encoder) -> None:
        took, count = [], 0
        while (now := time.perf_counter()) < end:
            with lock:
                (text,) = next(rows)
            try:
                encoder.encode_queries([text.decode()], timeout_s=TIMEOUT_S).vector(0)
            except RetrievalError as exc:
                failures.append(exc)
                continue
            count += 1
            if (then := time.perf_counter()) > start:
                took.append((then, then - now))
        came.extend(took)
        counts.append(count)

    with ExitStack() as connected:
        settings = Settings(triton=server.grpc_address)
        encoders = [connected.enter_context(Encoder(settings)) for _ in range(clients)]
        threads = [
            threading.Thread(target=call, args=(encoder,))
            for encoder in itertools.islice(itertools.cycle(encoders), callers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    answers = [t for t, _ in came], [s for _, s in came]
    return Answered(1, start, end, *answers, sum(counts), len(failures))
