"""Texts and products → vectors, through Triton's ensembles over gRPC."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from retrieval_client.channel import channel_to
from retrieval_client.coalesce import Coalescer
from retrieval_client.deadline import Deadline
from retrieval_client.handshake import Served, describe
from retrieval_client.ledger import RequestTimes, Statistics, took_from_reply
from retrieval_client.replicas import Replicas, Turns
from retrieval_client.retry import Backoff, Beside, RetryBudget
from retrieval_client.settings import Settings
from retrieval_client.spelling import query_bytes, text_bytes
from retrieval_client.tracing import traceparent
from retrieval_client.translate import triton_errors
from retrieval_client.wire import arrays_from_reply, request_from_rows
from retrieval_contract import models
from retrieval_contract.door import TRAFFIC
from retrieval_contract.errors import (
    ContractError,
    DeadlineExceeded,
    ItemError,
    ReleaseMismatch,
    ServerBusy,
    ServerError,
    ServerUnavailable,
)
from retrieval_contract.probes import Probes
from retrieval_contract.release import version_of
from retrieval_contract.tensors import Array, Ensemble

SHARED_ROWS, SHARED_BYTES = 16, 4096
"""What one caller may add to a request that callers share; more travels alone."""
UNCACHED = replace(models.QUERY_ENCODER, name=models.QUERY_UNCACHED)
"""The same behind the cache, of a server that has one."""

LEAST_S = 5e-3
"""With less time a request is not sent: Triton 2.51 may die of what is cancelled as it arrives
(triton-inference-server/server, issues 7368 and 8034)."""
CROWDED, RECENT = 10.0, 0.2
"""A text with less time than so many usual attempts may be late: it is asked so that it can be left
(`Beside`); of the usual attempt the last one makes so much."""
COUNTED_S = 5e-3
"""Between two looks at statistics that lag."""


@dataclass(frozen=True)
class Encoded:
    """`vectors`: float32 (rows, vector_dim), unit norm, zero where `errors[row]` says why.

    `requests`: what each request took, of an Encoder that explains.
    """

    vectors: Array
    errors: list[ItemError | None]
    served: Served
    requests: tuple[RequestTimes, ...] = ()

    def __getitem__(self, part: slice) -> Encoded:
        """Some of the rows."""
        return Encoded(self.vectors[part], self.errors[part], self.served, self.requests)

    def vector(self, row: int) -> Array:
        """One vector (vector_dim,); raises the row's ItemError if it was refused."""
        if (error := self.errors[row]) is not None:
            raise error
        vector: Array = self.vectors[row]
        return vector


class Encoder:
    """A connection to Triton, one server or replicas; safe to share between threads, and meant so.

    Short queries of many threads travel together (`coalesce.py`).

    The handshake (release id, names, dtypes, dims of both ensembles) happens on first use and
    again after every failure. Requests name the release's own version of the model, so a server
    that came back with another release refuses them instead of answering. What one replica
    refuses, because it drains or is gone, is sent again to the others.
    """

    def __init__(self, settings: Settings, *, explain: bool = False) -> None:
        """`explain`: ask the server what each request took (`ledger.py`)."""
        self.address = settings.triton
        self._settings = settings
        self._explain = explain
        self.timeout_s = settings.timeout_s
        self._channel = channel_to(settings)
        self._stub = GRPCInferenceServiceStub(self._channel)
        self._replicas = Replicas(settings)
        self._budget = RetryBudget()
        self._traffic = settings.traffic
        self._usual_s = 0.0
        """What an attempt takes lately."""
        self._served: Served | None = None
        self._shared: Coalescer[bytes, Encoded] = Coalescer(
            self._encode_queries, models.QUERY_ENCODER.batch.max
        )

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()
        self._replicas.close()

    def served(self, deadline: Deadline | None = None) -> Served:
        """The handshake, or what it found while the connection has lasted.

        Raises ReleaseMismatch when the two ensembles, or replicas, are of different releases,
        ContractError when they are not this contract's, ServerError and its kinds when nobody
        answers.
        """
        # Held in a local: a lost connection may clear the field at any moment.
        served = self._served
        if served is None:
            served = self._handshake(deadline or Deadline(self.timeout_s))
        return served

    def _handshake(self, deadline: Deadline) -> Served:
        """Both ensembles of every replica that answers; what they all say."""
        described = {
            f"{ensemble.name} at {address}": served
            for address, each in self._replicas.ask(describe, deadline).items()
            for ensemble, served in zip(models.ENSEMBLES, each, strict=True)
        }
        if len(set(described.values())) > 1:
            self._served = None
            raise ReleaseMismatch(
                f"Triton at {self.address}: expected one release, got {described}; serve one "
                "release folder, everywhere"
            )
        queries = (s for name, s in described.items() if name.startswith(models.QUERY_ENCODER.name))
        found = replace(next(iter(described.values())), cached=all(s.cached for s in queries))
        self._served = found
        return found

    def server_version(self) -> str:
        """Such as "triton 2.51.0"."""
        deadline = Deadline(self.timeout_s)
        with triton_errors(self.address, "metadata"):
            reply = self._stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=deadline.left_s)
        return f"{reply.name} {reply.version}"

    def statistics(self) -> Statistics:
        """What Triton has counted since it started."""
        deadline = Deadline(self.timeout_s)
        with triton_errors(self.address, "statistics"):
            request = pb.ModelStatisticsRequest()
            return Statistics.from_reply(
                self._stub.ModelStatistics(request, timeout=deadline.left_s)
            )

    def statistics_since(self, before: Statistics, queries: int, products: int = 0) -> Statistics:
        """What it has counted of so many requests of each: it counts moments after it answers.

        Others' requests in between count as well.
        """
        deadline = Deadline(self.timeout_s)
        wanted = {models.QUERY_ENCODER.name: queries, models.PRODUCT_ENCODER.name: products}
        while True:
            found = self.statistics() - before
            there = all(found.requests.get(name, 0) >= count for name, count in wanted.items())
            if there or deadline.passed:
                return found
            time.sleep(COUNTED_S)

    def probe(self, probes: Probes) -> float:
        """Ask every replica for a release's golden probes; the lowest cosine, 1 where all is exact.

        Raises ReleaseMismatch when one is of another release, or gives other vectors.
        """
        lowest = []
        for address in self._settings.replicas:
            with Encoder(self._settings.override(triton=address)) as alone:
                lowest.append(alone._probe(probes))
        return min(lowest)

    def _probe(self, probes: Probes) -> float:
        """Of one server."""
        served = self.served()
        if served.release_id != probes.release_id:
            raise ReleaseMismatch(
                f"Triton at {self.address}: expected release {probes.release_id}, it serves "
                f"{served.release_id}; give the folder of that one"
            )
        queries = self.encode_queries(probes.queries, fresh=True)
        products = self.encode_products(probes.titles, probes.images)
        if error := next((e for e in (*queries.errors, *products.errors) if e), None):
            raise ReleaseMismatch(f"Triton at {self.address}: it refused a golden probe: {error}")
        return probes.check(queries.vectors, products.vectors)

    def encode_queries(
        self, queries: Sequence[str], *, timeout_s: float | None = None, fresh: bool = False
    ) -> Encoded:
        """Texts → vectors (len(queries), vector_dim), in as few requests as the contract allows.

        A bad text gets an entry in `errors`; the others are answered. Before a server that
        remembers answers a lone text travels alone, so that it can be one of them; `fresh` goes
        past that memory.
        """
        texts, deadline = [query_bytes(q) for q in queries], Deadline.of(timeout_s, self.timeout_s)
        if fresh:
            cached = self.served(deadline).cached
            return self._encode_queries(texts, deadline, UNCACHED if cached else None)
        served = self._served
        alone = served is not None and served.cached and len(texts) == 1
        if alone or not 0 < len(texts) <= SHARED_ROWS or sum(map(len, texts)) > SHARED_BYTES:
            return self._encode_queries(texts, deadline)
        return self._shared(texts, deadline)

    def _encode_queries(
        self, texts: Sequence[bytes], deadline: Deadline, ensemble: Ensemble | None = None
    ) -> Encoded:
        columns, ensemble = {models.QUERY.name: texts}, ensemble or models.QUERY_ENCODER
        return self._encode(ensemble, models.QUERY_VECTOR.name, columns, deadline)

    def encode_products(
        self, titles: Sequence[str], images: Sequence[bytes], *, timeout_s: float | None = None
    ) -> Encoded:
        """Titles ("" = missing) and image files (b"" = missing) → vectors, as `encode_queries`."""
        if len(titles) != len(images):
            raise ContractError(
                f"products: expected one image (or b'') a title, got {len(titles)} titles and "
                f"{len(images)} images"
            )
        rows = {models.TITLE.name: [text_bytes(t) for t in titles], models.IMAGE.name: list(images)}
        deadline = Deadline.of(timeout_s, self.timeout_s)
        return self._encode(models.PRODUCT_ENCODER, models.PRODUCT_VECTOR.name, rows, deadline)

    def _encode(
        self,
        ensemble: Ensemble,
        output: str,
        columns: Mapping[str, Sequence[bytes]],
        deadline: Deadline,
    ) -> Encoded:
        known = self.served(deadline)
        try:
            return self._encode_as(known, ensemble, output, columns, deadline)
        except ServerUnavailable:
            # A server that came back with another release refuses the old version by number.
            if (now := self.served(deadline)) == known:
                raise
            return self._encode_as(now, ensemble, output, columns, deadline)

    def _encode_as(
        self,
        served: Served,
        ensemble: Ensemble,
        output: str,
        columns: Mapping[str, Sequence[bytes]],
        deadline: Deadline,
    ) -> Encoded:
        dims = {t.name: t.dims({"vector_dim": served.vector_dim}) for t in ensemble.outputs}
        count = len(next(iter(columns.values())))
        parts = [np.empty((0, served.vector_dim), np.float32)]
        errors: list[ItemError | None] = []
        times: list[RequestTimes] = []
        for start in range(0, count, ensemble.batch.max):
            part = {n: rows[start : start + ensemble.batch.max] for n, rows in columns.items()}
            arrays, request_times = self._arrays(served, ensemble, part, dims, deadline)
            parts.append(arrays[output])
            times.append(request_times)
            errors += [
                ItemError.from_status(status.decode()) if status else None
                for status in arrays[models.ITEM_STATUS.name]
            ]
        return Encoded(np.concatenate(parts), errors, served, tuple(times))

    def _arrays(
        self,
        served: Served,
        ensemble: Ensemble,
        part: Mapping[str, Sequence[bytes]],
        dims: Mapping[str, tuple[int, ...]],
        deadline: Deadline,
    ) -> tuple[dict[str, Array], RequestTimes]:
        started = time.perf_counter()
        request = request_from_rows(ensemble, part)
        request.model_version = str(version_of(served.release_id))
        if self._explain:
            request.parameters[models.EXPLAIN].bool_param = True
        sent = time.perf_counter()
        reply = self._infer(request, deadline, served)
        came = time.perf_counter()
        try:
            arrays = arrays_from_reply(ensemble, reply, len(next(iter(part.values()))), dims)
        except ServerError:
            if not (served.cached and ensemble is models.QUERY_ENCODER):
                raise
            # A cache's key leaves out which outputs were asked for: whoever asks it directly for a
            # part leaves half an answer there for all. Behind it is the whole one.
            return self._arrays(served, UNCACHED, part, dims, deadline)
        took = took_from_reply(reply) if self._explain else None
        times = RequestTimes(
            ensemble, sent - started, came - sent, time.perf_counter() - came, took
        )
        return arrays, times

    def _infer(self, request: pb.ModelInferRequest, deadline: Deadline, known: Served) -> Any:
        """The answer of any replica of the release that the request names."""
        turns = Turns(self._stub, self._replicas, deadline, self._budget)
        product = request.model_name == models.PRODUCT_ENCODER.name
        if not product and deadline.left_s > CROWDED * self._usual_s:
            return self._attempts(turns, turns, request, deadline, known)
        beside = Beside(turns, deadline)
        try:
            return self._attempts(beside, turns, request, deadline, known)
        except (DeadlineExceeded, ServerUnavailable):
            if (slow := beside.slow) is None:
                raise
        with triton_errors(self.address, request.model_name):
            return beside.wait(slow, deadline)

    def _attempts(
        self,
        ask: Callable[..., Any],
        turns: Turns,
        request: pb.ModelInferRequest,
        deadline: Deadline,
        known: Served,
    ) -> Any:
        """Ask, `ask` whoever's turn it is, and again where that may help.

        The first attempt gets half of the time: a process that dies takes what it was computing
        with it, and Triton says nothing.
        """
        backoff = Backoff(deadline, self._budget)
        self._budget.earn()
        attempt = Deadline(max(deadline.left_s / 2, LEAST_S))
        request.parameters[TRAFFIC].string_param = self._traffic
        trace = traceparent()
        while True:
            if deadline.left_s < LEAST_S:
                raise DeadlineExceeded(
                    f"{request.model_name}: expected {LEAST_S:g} s and more for an answer, got "
                    f"{deadline.left_s:.2g} s left of {deadline.seconds:g} s; raise the deadline"
                )
            request.parameters["timeout"].int64_param = int(attempt.left_s * 1e6)
            try:
                with triton_errors(self.address, request.model_name), self._timed():
                    return ask(request, timeout=attempt.left_s, metadata=trace)
            except DeadlineExceeded:
                if deadline.passed or not self._budget.spend():
                    raise
                attempt = deadline
                turns.anybody()
            except ServerBusy:
                if not backoff.wait():
                    raise
            except ServerUnavailable:
                if not (self._others_serve(known, deadline) and turns.elsewhere()):
                    self._served = None  # whoever answers next may be another release
                    raise

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Inside: one attempt."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._usual_s += RECENT * (time.monotonic() - began - self._usual_s)

    def _others_serve(self, known: Served, deadline: Deadline) -> bool:
        """Whether there are other replicas, of the same release as far as they answer."""
        if not self._replicas.several:
            return False
        if self._replicas.asked_lately():
            return True
        try:
            return self._handshake(deadline) == known
        except ServerUnavailable:
            return True  # all are away, for this moment
