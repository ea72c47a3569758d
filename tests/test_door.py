"""The queue before a model: who is let in, in which order, and what becomes of late work."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from deploy.server import Server
from deploy.server import triton as serving
from retrieval_client import Encoder, Settings
from retrieval_client.channel import channel_to
from retrieval_client.coalesce import Coalescer
from retrieval_client.deadline import Deadline
from retrieval_client.retry import MOST, Backoff, RetryBudget
from retrieval_client.translate import triton_errors
from retrieval_client.wire import request_from_rows
from retrieval_contract import models
from retrieval_contract.door import HOLD_S, TRAFFIC, Busy, Door, Lane
from retrieval_contract.errors import (
    AccessDenied,
    BadCompany,
    DeadlineExceeded,
    RequestRefused,
    RetrievalError,
    ServerBusy,
    ServerDraining,
    ServerUnavailable,
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def door_of(clock: Clock, most: int = 10, seconds_per_row: float = 0.1) -> Door[str]:
    """One that has already seen a full batch."""
    door: Door[str] = Door(most, 64, clock)
    door.enter("first", most, Lane.INTERACTIVE)
    door.take()
    clock.now += most * seconds_per_row
    door.done()
    return door


def test_who_cannot_begin_in_half_his_time_is_refused_at_once() -> None:
    door = door_of(Clock())
    for n in range(5):
        door.enter(f"{n}", 1, Lane.INTERACTIVE, 1.0)
    door.enter("on the edge", 1, Lane.INTERACTIVE, 1.01)
    with pytest.raises(Busy, match="got 6 rows ahead, which take 0"):
        door.enter("too late", 1, Lane.INTERACTIVE, 1.0)
    door.enter("has time", 1, Lane.INTERACTIVE, 2.0)


def test_what_is_being_computed_counts_until_it_is_done() -> None:
    clock = Clock()
    door = door_of(clock)
    door.enter("long", 10, Lane.INTERACTIVE)
    door.take()
    with pytest.raises(Busy):
        door.enter("behind it", 1, Lane.INTERACTIVE, 1.9)
    clock.now += 0.5
    door.enter("behind half of it", 1, Lane.INTERACTIVE, 1.1)


def test_a_request_larger_than_its_time_is_let_into_an_empty_house() -> None:
    """And computed there: later would be no better, and the pace may be wrong."""
    clock = Clock()
    door = door_of(clock)
    door.enter("large", 10, Lane.INTERACTIVE, 0.5)
    assert door.take() == (["large"], [])
    clock.now += 1.0
    door.done()
    for name, time_s in (("first", 0.3), ("second", 1.0)):
        door.enter(name, 4, Lane.INTERACTIVE, time_s)
    assert door.take() == (["second"], ["first"]), "the first would have cost the second its time"
    clock.now += 0.4
    door.done()
    door.enter("past its time", 1, Lane.INTERACTIVE, 0.1)
    clock.now += 0.2
    assert door.take() == ([], ["past its time"])


def test_small_batches_say_nothing_of_a_queue() -> None:
    """One row took a second, and others are let in all the same: together they are faster."""
    clock = Clock()
    door: Door[str] = Door(10, 64, clock)
    for n in range(3):
        door.enter(f"{n}", 1, Lane.INTERACTIVE)
        door.take()
        clock.now += 1.0
        door.done()
    for n in range(10):
        door.enter(f"many {n}", 1, Lane.INTERACTIVE, 0.5)


def test_a_process_that_stood_still_learns_its_pace_again() -> None:
    """Its last batch took 25 s, so none of many is let in: small ones must tell that it is over."""
    clock = Clock()
    door = door_of(clock, seconds_per_row=2.5)
    door.enter("0", 1, Lane.INTERACTIVE)
    with pytest.raises(Busy):
        door.enter("second of a burst", 1, Lane.INTERACTIVE, 1.0)
    for n in range(50):
        door.take()
        clock.now += 0.01
        door.done()
        door.enter(f"{n + 1}", 1, Lane.INTERACTIVE)
    for n in range(9):
        door.enter(f"burst {n}", 1, Lane.INTERACTIVE, 1.0)


def test_without_times_the_queue_still_ends() -> None:
    door: Door[int] = Door(2, queue_batches=3)
    for n in range(2 * 3 + 1):
        door.enter(n, 1, Lane.INTERACTIVE)
    with pytest.raises(Busy):
        door.enter(-1, 1, Lane.INTERACTIVE)


def test_interactive_goes_first_and_shares_no_batch_with_bulk() -> None:
    door = door_of(Clock(), most=3)
    for n in range(4):
        door.enter(f"bulk {n}", 1, Lane.BULK)
    door.enter("search", 1, Lane.INTERACTIVE)
    assert door.take() == (["search"], [])
    door.done()
    assert door.take() == (["bulk 0", "bulk 1", "bulk 2"], [])


def test_bulk_ahead_makes_no_search_wait() -> None:
    door = door_of(Clock())
    door.enter("bulk", 10, Lane.BULK)
    door.enter("search", 1, Lane.INTERACTIVE, 0.1)
    with pytest.raises(Busy):
        door.enter("more bulk", 1, Lane.BULK, 1.0)


def test_late_work_is_handed_out_as_such() -> None:
    clock = Clock()
    door = door_of(clock)
    door.enter("impatient", 1, Lane.INTERACTIVE, 0.5)
    door.enter("patient", 1, Lane.INTERACTIVE, 5.0)
    clock.now += 1.0
    assert door.take() == (["patient"], ["impatient"])


def test_a_closed_door_gives_out_who_is_inside_and_then_nobody() -> None:
    door: Door[str] = Door(10, 64)
    door.enter("inside", 1, Lane.INTERACTIVE)
    door.close()
    assert door.take() == (["inside"], [])
    assert door.take() is None


def test_holding_is_short_and_only_while_something_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("retrieval_contract.door.HOLD_S", 1.0)
    door: Door[str] = Door(10, 64)
    start = time.monotonic()
    door.hold()
    assert time.monotonic() - start < 0.9
    door.enter("one", 1, Lane.INTERACTIVE)
    door.take()
    door.hold()
    assert 1.0 <= time.monotonic() - start < 5
    assert HOLD_S < 0.01


# ── on the real server ───────────────────────────────────────────────────────────────────


def ask(stub: GRPCInferenceServiceStub, texts: list[bytes], time_s: float, lane: Lane) -> Future:
    request = request_from_rows(models.QUERY_ENCODER, {models.QUERY.name: texts})
    request.parameters["timeout"].int64_param = int(time_s * 1e6)
    request.parameters[TRAFFIC].string_param = lane
    return stub.ModelInfer.future(request, timeout=60)


def test_past_its_load_the_server_answers_some_and_refuses_the_rest(triton: Server) -> None:
    """Forty requests of 128 texts, each with little time, at once."""
    with channel_to(Settings(triton=triton.grpc_address)) as channel:
        stub = GRPCInferenceServiceStub(channel)
        texts = [b"red shoes number %d" % n for n in range(128)]
        ask(stub, texts, 60, Lane.INTERACTIVE).result()
        start = time.monotonic()
        ask(stub, texts, 60, Lane.INTERACTIVE).result()
        took = time.monotonic() - start
        calls = [ask(stub, texts, 4 * took, Lane.INTERACTIVE) for _ in range(40)]
        codes = [call.code() for call in calls]
        details = {call.details() for call in calls if call.code() is not grpc.StatusCode.OK}
    assert codes.count(grpc.StatusCode.OK) >= 1
    assert codes.count(grpc.StatusCode.UNAVAILABLE) >= 20
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert all(text.startswith(("busy: ", "late: ")) for text in details)


def test_a_search_overtakes_bulk_on_the_same_model(triton: Server) -> None:
    with channel_to(Settings(triton=triton.grpc_address)) as channel:
        stub = GRPCInferenceServiceStub(channel)
        order: list[str] = []
        texts = [b"a bulk text of some more words number %d" % n for n in range(128)]
        calls = [ask(stub, texts, 60, Lane.BULK) for _ in range(8)]
        for n, call in enumerate(calls):
            call.add_done_callback(lambda _, n=n: order.append(f"bulk {n}"))
        search = ask(stub, [b"red shoes"], 60, Lane.INTERACTIVE)
        search.add_done_callback(lambda _: order.append("search"))
        assert search.result().outputs
        for call in calls:
            call.result()
        deadline = time.monotonic() + 5
        while len(order) < 9 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert order.index("search") <= 3, order


def test_refusals_are_told_apart() -> None:
    class Refused(grpc.RpcError):
        def __init__(self, code: grpc.StatusCode, details: str) -> None:
            self.code, self.details = lambda: code, lambda: details

    unavailable, internal = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for code, said, kind in [
        (unavailable, "busy: expected to begin within 1 s", ServerBusy),
        (unavailable, "in ensemble 'query_encoder', busy: expected", ServerBusy),
        (unavailable, "Exceeds maximum queue size", ServerBusy),
        (unavailable, "late: could not be computed in its time", DeadlineExceeded),
        (unavailable, "Server is stopping, scheduler for model has stopped", ServerDraining),
        (unavailable, "This protocol is restricted, expecting header", AccessDenied),
        (internal, "Stub process 'm_0_0' is not healthy.", ServerUnavailable),
        (unavailable, "failed to connect to all addresses", ServerUnavailable),
        (invalid, "incomplete string data for inference input 'query', expecting", BadCompany),
        (invalid, "expected 2 strings for inference input 'query', got 1", BadCompany),
        (invalid, "unexpected shape for input 'query'", RequestRefused),
    ]:
        with pytest.raises(RetrievalError) as caught, triton_errors("here", "that"):
            raise Refused(code, said)
        assert type(caught.value) is kind, said


def test_a_request_without_time_is_not_sent(triton: Server) -> None:
    with Encoder(Settings(triton=triton.grpc_address)) as encoder:
        encoder.encode_products(["a shirt"], [b""])
        with pytest.raises(DeadlineExceeded, match=r"expected 0\.005 s and more .* of 0\.004 s"):
            encoder.encode_products(["a shirt"], [b""], timeout_s=0.004)


def test_a_text_that_may_be_late_is_left_and_not_cancelled() -> None:
    """Triton 2.51 may die of what is cancelled; with time enough there is nothing to leave, and a
    plain call is cheaper."""
    waits: list[float] = []

    class Left:
        def add_done_callback(self, done: object) -> None:
            pass

        def done(self) -> bool:
            return False

        def cancel(self) -> None:
            raise AssertionError("cancelled")

    class Asked:
        def ModelInfer(self, request: object, timeout: float, metadata: object) -> str:
            return "answered"

        def future(self, request: object, timeout: float, metadata: object) -> Left:
            waits.append(timeout)
            return Left()

    with Encoder(Settings(triton="127.0.0.1:1")) as encoder:
        encoder._stub = stub = Asked()
        stub.ModelInfer.__func__.future = partial(Asked.future, stub)
        request = pb.ModelInferRequest(model_name=models.QUERY_ENCODER.name)
        assert encoder._infer(request, Deadline(1.0), None) == "answered"
        encoder._usual_s, start = 0.2, time.monotonic()
        with pytest.raises(DeadlineExceeded):
            encoder._infer(request, Deadline(0.3), None)
        assert 0.3 <= time.monotonic() - start < 2
    assert len(waits) == 2
    assert min(waits) > 5, "the server is given time to end by itself"


def test_a_retry_budget_ends_a_storm() -> None:
    budget = RetryBudget()
    assert sum(budget.spend() for _ in range(100)) == MOST
    for _ in range(25):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 2


def test_nobody_backs_off_past_his_deadline() -> None:
    start = time.monotonic()
    backoff = Backoff(Deadline(0.2), RetryBudget())
    while backoff.wait():
        pass
    assert time.monotonic() - start < 1


def test_a_client_refuses_what_its_own_queue_cannot_answer_in_time() -> None:
    def slowly(items: list[int], deadline: Deadline) -> np.ndarray:
        time.sleep(0.02 * len(items))
        return np.array(items)

    coalescer: Coalescer[int, np.ndarray] = Coalescer(slowly, 8)
    coalescer([*range(8)], Deadline(5))
    with ThreadPoolExecutor(64) as pool:
        calls = [pool.submit(coalescer, [n], Deadline(0.4)) for n in range(64)]
    kinds = [type(call.exception()) for call in calls]
    assert kinds.count(ServerBusy) >= 20
    assert kinds.count(type(None)) >= 5
    assert coalescer([7], Deadline(5)).tolist() == [7], "and the queue is empty again"


def test_what_waits_is_answered_before_the_server_stops(
    release_folder: Path, tmp_path: Path
) -> None:
    texts = [f"red shoes number {n}" for n in range(128)]
    with (
        (tmp_path / "log").open("w") as log,
        serving(release_folder, log=log) as server,
        channel_to(Settings(triton=server.grpc_address)) as channel,
        Encoder(Settings(triton=server.grpc_address)) as encoder,
    ):
        wanted = encoder.encode_queries(texts).vectors
        stub = GRPCInferenceServiceStub(channel)
        stub.ServerLive(pb.ServerLiveRequest())
        calls = [ask(stub, [t.encode() for t in texts], 60, Lane.BULK) for _ in range(10)]
        time.sleep(0.05)
        stopping = threading.Thread(target=server.process.terminate)
        stopping.start()
        for call in calls:
            found = np.frombuffer(call.result().raw_output_contents[0], np.float32)
            np.testing.assert_allclose(found.reshape(128, -1), wanted, atol=1e-5)
        stopping.join()
