"""Several servers behind one client: one drains, vanishes, or is of another release."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from benchmarks.faults import rolling_restart
from deploy.instance import PING_MS
from deploy.server import LOOPBACK, Server, choose_ports
from deploy.server import triton as start_triton
from retrieval_client import Encoder, Settings
from retrieval_client.channel import CHANNEL_OPTIONS, target_of
from retrieval_client.handshake import Served
from retrieval_client.replicas import AT_ONCE
from retrieval_client.retry import EARNED, MOST
from retrieval_client.wire import request_from_rows
from retrieval_contract import models
from retrieval_contract.errors import (
    DeadlineExceeded,
    ReleaseMismatch,
    RetrievalError,
    ServerDraining,
    ServerUnavailable,
)
from retrieval_contract.tensors import Array
from tests.conftest import photo

SILENT_S = 8.0
"""A connection that is silent for so long is left: two seconds until the ping, four for it."""


def test_addresses_become_one_target() -> None:
    assert target_of(("localhost:1",)) == "localhost:1"
    assert target_of(("127.0.0.1:1", "localhost:2")) == "ipv4:127.0.0.1:1,127.0.0.1:2"
    assert target_of(("[::1]:1", "[::2]:2")) == "ipv6:[::1]:1,[::2]:2"
    with pytest.raises(RetrievalError, match="all IPv4 or all IPv6"):
        target_of(("127.0.0.1:1", "[::1]:2"))
    with pytest.raises(RetrievalError, match="expected host:port, got 'here'"):
        target_of(("127.0.0.1:1", "here"))
    assert Settings(triton=" a:1, b:2,a:1,").replicas == ("a:1", "b:2")
    with pytest.raises(RetrievalError, match="expected host:port"):
        Settings(triton=" , ")
    with (
        pytest.raises(RetrievalError, match="tls_name: expected one beside several"),
        Encoder(Settings(triton="127.0.0.1:1,127.0.0.1:2", tls_ca="ca.pem")),
    ):
        pass


def test_a_rolling_restart_loses_no_request(tiny_release: Path) -> None:
    found = rolling_restart(tiny_release, 1)
    assert (found.failed, found.wrong) == (0, 0), found
    assert found.answered > 500


def test_one_that_is_away_is_not_needed(triton: Server) -> None:
    nobody = f"{LOOPBACK}:{choose_ports(LOOPBACK).grpc}"
    for order in ((nobody, triton.grpc_address), (triton.grpc_address, nobody)):
        with Encoder(Settings(triton=",".join(order))) as encoder:
            for _ in range(10):
                assert encoder.encode_queries(["red shoes"]).errors == [None]


def test_nobody_is_said_before_the_deadline() -> None:
    two = ",".join(f"{LOOPBACK}:{choose_ports(LOOPBACK).grpc}" for _ in range(2))
    with Encoder(Settings(triton=two, timeout_s=20)) as encoder:
        start = time.monotonic()
        with pytest.raises(ServerUnavailable, match="make serve"):
            encoder.encode_queries(["red shoes"])
        assert time.monotonic() - start < 10


class Away(grpc.GenericRpcHandler):
    """A server that is always stopping, and counts what it was asked."""

    def __init__(self) -> None:
        self.asked = Counter[str]()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(partial(self.refuse, details.method))

    def refuse(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.asked[method.rpartition("/")[2]] += 1
        context.abort(grpc.StatusCode.UNAVAILABLE, "Server is stopping")
        return b""


def test_callers_of_servers_that_are_all_away_make_no_storm() -> None:
    """Each asks two of them by name at once; what they may ask after that is spent together."""
    away, callers = Away(), 16
    with ThreadPoolExecutor(32) as workers, ThreadPoolExecutor(callers) as pool, ExitStack() as on:
        servers = [grpc.server(workers, handlers=(away,)) for _ in range(2)]
        ports = [server.add_insecure_port(f"{LOOPBACK}:0") for server in servers]
        for server in servers:
            server.start()
            on.callback(lambda server=server: server.stop(None).wait())
        both = Settings(triton=",".join(f"{LOOPBACK}:{port}" for port in ports), timeout_s=10)
        with Encoder(both) as encoder:
            texts = [[f"{n}"] * 20 for n in range(callers)]  # too many to travel together
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Encoder, "served", lambda *_: Served("0" * 16, 8))
                calls = [pool.submit(encoder.encode_queries, each) for each in texts]
                assert {type(call.exception()) for call in calls} == {ServerDraining}
    asked = away.asked["ModelInfer"]
    assert callers * (1 + AT_ONCE) <= asked <= callers * (1 + AT_ONCE + EARNED) + MOST


def test_replicas_of_two_releases_are_a_mismatch(triton: Server, tiny_release: Path) -> None:
    """When one changes under a client, and for whoever comes then."""
    ports, dims = choose_ports(LOOPBACK), triton.release.vector_dim
    both = Settings(triton=f"{triton.grpc_address},{LOOPBACK}:{ports.grpc}")
    with Encoder(both) as encoder:

        def keep_asking() -> None:
            for _ in range(400):  # the channel finds the new one within a second
                assert encoder.encode_queries(["red shoes"]).vectors.shape == (1, dims)
                time.sleep(0.01)

        assert encoder.encode_queries(["red shoes"]).vectors.shape == (1, dims)
        with start_triton(tiny_release, ports=ports) as other:
            with pytest.raises(ReleaseMismatch, match="everywhere") as said:
                keep_asking()
            with Encoder(both) as late, pytest.raises(ReleaseMismatch, match="everywhere"):
                late.encode_queries(["red shoes"])
    assert triton.release.release_id in str(said.value)
    assert other.release.release_id in str(said.value)


# ── half-open: a peer that vanishes without a word ───────────────────────────────────────
class Way:
    """TCP to a server; what is frozen stays open and carries nothing any more."""

    def __init__(self, address: str, at_port: int = 0) -> None:
        host, _, port = address.rpartition(":")
        self.target = (host, int(port))
        self.listener = socket.create_server((LOOPBACK, at_port))
        self.address = f"{LOOPBACK}:{self.listener.getsockname()[1]}"
        self.frozen: set[socket.socket] = set()
        self.open: list[socket.socket] = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.target)
                self.open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self.carry, args=(source, sink), daemon=True).start()

    def carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if source not in self.frozen:
                    sink.sendall(data)
            sink.close()

    def freeze(self) -> None:
        """What is open now; later connections are carried."""
        self.frozen |= set(self.open)


@contextmanager
def way_to(server: Server) -> Iterator[Way]:
    way = Way(server.grpc_address)
    try:
        yield way
    finally:
        way.listener.close()
        for end in way.open:
            end.close()


def asked(encoder: Encoder, timeout_s: float) -> tuple[float, Array | None]:
    """How long it took, and what came before the deadline."""
    start = time.monotonic()
    try:
        vectors = encoder.encode_queries(["red shoes"], timeout_s=timeout_s).vectors
    except (DeadlineExceeded, ServerUnavailable):
        vectors = None
    return time.monotonic() - start, vectors


def until_well(way: Way, address: str) -> list[float]:
    """Freeze what has carried calls; when calls missed their deadline, until many did not."""
    missed, well = [], 0
    with Encoder(Settings(triton=address)) as encoder:
        right = encoder.encode_queries(["red shoes"]).vectors
        while well < 20:  # the channel has found all addresses
            well += asked(encoder, 1.0)[1] is not None
        way.freeze()
        frozen, well = time.monotonic(), 0
        while well < 20 and time.monotonic() < frozen + 15:
            seconds, vectors = asked(encoder, timeout_s=1.0)
            assert seconds < 1.5, "past its deadline"
            if vectors is None:
                missed.append(time.monotonic() - frozen)
                well = 0
            else:
                assert np.abs(vectors - right).max() < 1e-5
                well += 1
            time.sleep(0.02)
    return missed


def test_a_connection_that_died_silently_is_left(triton: Server) -> None:
    """Nobody waits past a deadline; in seconds there is a new one, or the other replica.

    Beside another replica callers may not even notice: the half of their time that is left is its.
    """
    with way_to(triton) as one, way_to(triton) as two, ThreadPoolExecutor() as pool:
        addresses = [one.address, f"{two.address},{triton.grpc_address}"]
        found = list(pool.map(until_well, [one, two], addresses))
    alone, with_another = found
    assert alone, "nobody was on that connection"
    assert max([*alone, *with_another]) < SILENT_S, found


def test_who_has_time_is_answered_by_the_other(triton: Server) -> None:
    """Also who was on the connection that died."""
    with way_to(triton) as way:
        both = f"{way.address},{triton.grpc_address}"
        with Encoder(Settings(triton=both, timeout_s=SILENT_S + 4)) as encoder:
            for _ in range(20):
                encoder.encode_queries(["red shoes"])
            way.freeze()
            start = time.monotonic()
            texts = [[f"red shoes {n}"] * 20 for n in range(4)]  # too many to travel together
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(encoder.encode_queries, texts))
            assert time.monotonic() - start > 1, "nobody was on that connection"
    assert all(encoded.errors == [None] * 20 for encoded in found)


def test_a_long_call_is_not_cut_off_by_its_own_pings(triton: Server) -> None:
    """Here it pings more often and does not slow down, so that minutes are seconds."""
    usual = dict(CHANNEL_OPTIONS)
    options = usual | {"grpc.keepalive_time_ms": 600, "grpc.http2.max_pings_without_data": 0}
    assert PING_MS < 600 < usual["grpc.keepalive_time_ms"]
    pictures = [photo(size=(4000, 4000))] * 64
    rows = {models.TITLE.name: [b""] * len(pictures), models.IMAGE.name: pictures}
    request = request_from_rows(models.PRODUCT_ENCODER, rows)
    with (
        grpc.insecure_channel(triton.grpc_address) as others,
        grpc.insecure_channel(triton.grpc_address, [*options.items()]) as channel,
    ):
        ahead = [GRPCInferenceServiceStub(others).ModelInfer.future(request) for _ in range(2)]
        time.sleep(0.2)
        assert GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60).outputs
        assert all(call.result().outputs for call in ahead)
