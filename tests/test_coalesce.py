"""Concurrent calls in few requests: everyone's own answer, deadline and error."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from retrieval_client import coalesce
from retrieval_client.coalesce import Coalescer
from retrieval_client.deadline import Deadline
from retrieval_contract.errors import (
    DeadlineExceeded,
    RequestRefused,
    ServerBusy,
    ServerUnavailable,
)

Send = Callable[[list[int], Deadline], Sequence[int]]


class Doubler:
    """Doubles numbers, slowly; remembers what it was sent."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds, self.sent = seconds, []  # type: ignore[var-annotated]
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    def __call__(self, items: list[int], deadline: Deadline) -> list[int]:
        with self.lock:
            self.sent.append(items)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        time.sleep(min(self.seconds, deadline.left_s))
        with self.lock:
            self.under_way -= 1
        if deadline.passed:
            raise DeadlineExceeded("late")
        return [2 * item for item in items]


def ask(merged: Coalescer[int, list[int]], items: Sequence[int], seconds: float = 5.0) -> list[int]:
    return list(merged(items, Deadline(seconds)))


def test_a_lone_caller_is_sent_at_once() -> None:
    send = Doubler(0.0)
    merged = Coalescer(send, most=16)
    assert [ask(merged, [n]) for n in range(3)] == [[0], [2], [4]]
    assert send.sent == [[0], [1], [2]]


def test_everybody_gets_their_own_and_few_requests_are_sent() -> None:
    send = Doubler()
    merged = Coalescer(send, most=16)
    with ThreadPoolExecutor(32) as pool:
        asked = [[n, n + 1] if n % 3 else [n] for n in range(400)]
        found = list(pool.map(lambda items: ask(merged, items), asked))
    assert found == [[2 * n for n in items] for items in asked]
    assert sum(map(len, send.sent)) == sum(map(len, asked)), "nothing twice, nothing lost"
    assert max(map(len, send.sent)) <= 16
    assert len(send.sent) < 150
    assert send.most_under_way <= 2


def test_nobody_is_held_once_all_are_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalesce, "GATHER_STEP_S", 1.0)
    monkeypatch.setattr(coalesce, "GATHER_S", 1.0)
    send, rounds = Doubler(), 20
    merged, together = Coalescer(send, most=16), threading.Barrier(8)

    def keep_asking(n: int) -> None:
        together.wait()
        for _ in range(rounds):
            assert ask(merged, [n]) == [2 * n]

    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(keep_asking, range(8)))
    took = time.monotonic() - start
    assert [len(items) for items in send.sent[2:-2]] == [8] * (len(send.sent) - 4)
    assert took < 4.0, "a step at the start and at the end, when somebody has gone, and no others"


def test_who_has_no_time_left_waits_no_longer() -> None:
    merged = Coalescer(Doubler(1.5), most=16)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, merged, [1])
        time.sleep(0.05)
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.1 s"):
            ask(merged, [2], 0.1)
        assert time.monotonic() - start < 1
        assert first.result() == [2]
        assert ask(merged, [3]) == [6], "whoever gave up is not in anybody's way"


def test_the_impatient_do_not_cost_the_others() -> None:
    send = Doubler(0.3)
    merged = Coalescer(send, most=16)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, merged, [1])
        time.sleep(0.05)
        impatient = pool.submit(ask, merged, [2], 0.4)
        patient = pool.submit(ask, merged, [3], 5.0)
        assert first.result() == [2]
        with pytest.raises(DeadlineExceeded):
            impatient.result()
        assert patient.result() == [6]
    assert send.sent == [[1], [2, 3], [3]]


def test_a_stream_of_the_impatient_does_not_keep_the_patient_waiting() -> None:
    merged, stop = Coalescer(Doubler(0.1), most=16), threading.Event()

    def hurry(seconds: float) -> None:
        while not stop.is_set():
            with contextlib.suppress(DeadlineExceeded, ServerBusy):
                ask(merged, [1], seconds)

    with ThreadPoolExecutor(13) as pool:
        hasty = [pool.submit(hurry, 0.04 + n / 200) for n in range(12)]
        time.sleep(0.02)
        try:
            assert ask(merged, [2], 3.0) == [4]
        finally:
            stop.set()
        for each in hasty:
            each.result()


def test_who_comes_back_to_the_front_does_not_lead_before_the_leader_has_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two leaders of the same callers: the second would find nobody left, not even itself."""
    send = Doubler(0.3)
    merged = Coalescer(send, most=16)
    monkeypatch.setattr(merged, "_gather", lambda mine: time.sleep(0.2))
    with ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(ask, merged, [1])]
        time.sleep(0.05)
        impatient = pool.submit(ask, merged, [2], 0.4)
        calls.append(pool.submit(ask, merged, [3], 5.0))
        assert calls[0].result() == [2]
        time.sleep(0.05)  # those two are under way: so many more that one of them leads as well
        calls += [pool.submit(ask, merged, [number], 5.0) for number in range(4, 13)]
        with pytest.raises(DeadlineExceeded):
            impatient.result()
        assert [call.result() for call in calls[1:]] == [[2 * n] for n in range(3, 13)]
    assert send.sent[:2] == [[1], [2, 3]]
    assert sorted(send.sent[2]) == list(range(3, 13))
    assert (merged._ahead, merged._under_way) == (0, 0)


def test_who_has_no_room_in_his_own_request_lets_another_lead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request that was cut short puts its callers back in front, while the next leader waits for
    the interpreter; sent in their time, he would wait past his own, and count for two."""

    def send(items: list[str], deadline: Deadline) -> list[str]:
        time.sleep(min(9 if "hasty" in items else 0.3, deadline.left_s))
        if deadline.passed:
            raise DeadlineExceeded("late")
        return items

    monkeypatch.setattr(Coalescer, "_gather", lambda self, mine: time.sleep(0.15))
    merged: Coalescer[str, list[str]] = Coalescer(send, 4, refuse=False)
    with ThreadPoolExecutor(7) as pool:

        def go(item: str, seconds: float) -> Future[list[str]]:
            try:
                return pool.submit(merged, [item], Deadline(seconds))
            finally:
                time.sleep(0.01)

        first, hasty, cut = go("first", 5), go("hasty", 0.35), go("cut", 3)
        others = [go(name, 1.2) for name in ("leader", "b", "c")]
        time.sleep(0.5)  # he has taken, and is appointed again if he waits himself
        others.append(go("d", 1.2))
        assert [call.result() for call in others] == [["leader"], ["b"], ["c"], ["d"]]
        assert (first.result(), cut.result()) == (["first"], ["cut"])
        with pytest.raises(DeadlineExceeded):
            hasty.result()
        assert go("later", 2).result() == ["later"], "nobody is appointed any more"


def test_who_could_be_answered_too_late_is_told_before_his_time_is_over() -> None:
    """Whom it is too late for when it is his turn; the last one is let in, to see whether it is."""
    merged = Coalescer(Doubler(0.2), most=8)
    merged._usual_s = 0.5
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, merged, [1])
        time.sleep(0.05)
        began = time.monotonic()
        waiting = [pool.submit(ask, merged, [n], 0.8) for n in (2, 3, 4)]
        for refused in waiting[:2]:
            with pytest.raises(ServerBusy, match=r"left of 0\.8 s"):
                refused.result()
        assert time.monotonic() - began < 0.8
        assert (first.result(), waiting[2].result()) == ([2], [8])


def test_who_leads_at_the_end_of_his_time_has_had_his_turn() -> None:
    """Else the next turn is one too many."""
    merged: Coalescer[int, list[int]] = Coalescer(Doubler(), most=8)
    call = coalesce._Call([1], Deadline(1.0))
    merged._join(call)
    merged._give_up(call)
    assert call.leads
    assert call.turn.locked()


def test_an_error_at_the_end_of_somebodys_time_is_not_everybodys() -> None:
    """A server that is away is asked again until the time is up: whose time?"""

    def send(items: list[int], deadline: Deadline) -> list[int]:
        time.sleep(min(0.1, deadline.left_s))
        if deadline.passed:
            raise ServerUnavailable("away")
        return items

    merged: Coalescer[int, list[int]] = Coalescer(send, most=16)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, merged, [1])
        time.sleep(0.03)
        patient = pool.submit(ask, merged, [2])
        time.sleep(0.01)
        hasty = pool.submit(ask, merged, [3], 0.12)
        assert (first.result(), patient.result()) == ([1], [2])
        with pytest.raises((ServerUnavailable, DeadlineExceeded)):
            hasty.result()


def test_an_error_is_everybodys_and_the_next_request_is_sent() -> None:
    def send(items: list[int], deadline: Deadline) -> list[int]:
        time.sleep(0.05)
        if 13 in items:
            raise RequestRefused("thirteen")
        return items

    merged: Coalescer[int, list[int]] = Coalescer(send, most=16)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, merged, [1])
        time.sleep(0.02)
        both = [pool.submit(ask, merged, [n]) for n in (13, 14)]
        assert first.result() == [1]
        for call in both:
            with pytest.raises(RequestRefused, match="thirteen"):
                call.result()
    assert ask(merged, [2]) == [2]


def test_a_leader_that_is_interrupted_leaves_the_others_served() -> None:
    started = threading.Event()

    def send(items: list[int], deadline: Deadline) -> list[int]:
        started.set()
        time.sleep(0.1)
        if items == [1]:
            raise KeyboardInterrupt
        return items

    merged: Coalescer[int, list[int]] = Coalescer(send, most=16)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, merged, [1])
        started.wait()
        second = pool.submit(ask, merged, [2], 2.0)
        assert second.result() == [2]
        with pytest.raises(KeyboardInterrupt):
            first.result()


@pytest.fixture
def interrupts() -> Iterator[None]:
    """A background job of a shell, and all that it starts, ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_soon() -> threading.Timer:
    """As by Ctrl-C: a signal, which ends a wait of the main thread."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    return timer


@pytest.mark.usefixtures("interrupts")
def test_who_is_interrupted_while_waiting_is_not_waited_for() -> None:
    send = Doubler(0.3)
    merged = Coalescer(send, most=16)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, merged, [1])
        time.sleep(0.05)
        timer = interrupted_soon()
        second = pool.submit(lambda: time.sleep(0.05) or ask(merged, [3], 2.0))
        with pytest.raises(KeyboardInterrupt):
            ask(merged, [2])
        timer.join()
        assert (first.result(), second.result()) == ([2], [6])
    assert send.sent == [[1], [3]]
    assert (ask(merged, [4]), merged._ahead, merged._under_way) == ([8], 0, 0)


@pytest.mark.usefixtures("interrupts")
def test_who_is_interrupted_while_gathering_leaves_the_lead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coalesce, "GATHER_STEP_S", 1.0)
    monkeypatch.setattr(coalesce, "GATHER_S", 1.0)
    merged = Coalescer(Doubler(), most=16)
    merged._shared, merged._all = True, 16  # as after a request of many
    timer = interrupted_soon()
    with pytest.raises(KeyboardInterrupt):
        ask(merged, [1])
    timer.join()
    assert (ask(merged, [2], 2.0), merged._ahead, merged._under_way) == ([4], 0, 0)


def test_who_is_interrupted_with_others_in_hand_hands_them_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = Doubler(0.3)
    merged = Coalescer(send, most=16)
    take = merged._take

    def interrupted(batch: list[object]) -> None:
        take(batch)  # type: ignore[arg-type]
        if len(batch) > 1:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(merged, "_take", interrupted)
    with ThreadPoolExecutor(3) as pool:
        calls = []
        for number in (1, 2, 3):
            calls.append(pool.submit(ask, merged, [number], 2.0))
            time.sleep(0.05)
        assert (calls[0].result(), calls[2].result()) == ([2], [6])
        with pytest.raises(KeyboardInterrupt):
            calls[1].result()
    assert (merged._ahead, merged._under_way) == (0, 0)


def test_half_a_request_of_callers_need_not_wait_for_the_first() -> None:
    send = Doubler(0.2)
    merged = Coalescer(send, most=4)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(ask, merged, [n]) for n in range(3)]
        assert [call.result() for call in calls] == [[0], [2], [4]]
    assert send.most_under_way == 2
