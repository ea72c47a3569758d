"""Several servers of one release: each can be asked by itself, and one may stand in for another."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from retrieval_client.channel import channel_to
from retrieval_client.deadline import Deadline
from retrieval_client.retry import Backoff, RetryBudget
from retrieval_client.settings import Settings
from retrieval_contract.errors import DeadlineExceeded, ServerUnavailable

LOOK_S = 0.5
"""What one of several replicas may take to say what it serves, before the others are asked."""
LATELY_S = 1.0
"""While some are away, all are asked again what they serve, so often at most."""
PATIENCE_S = 3.0
"""How long a refused request is sent again: longer than a channel takes to connect anew."""
AT_ONCE = 2
"""Attempts at replicas by name before the first pause."""

Answer = TypeVar("Answer")
Stub: TypeAlias = GRPCInferenceServiceStub
Ask = Callable[[Stub, str, Deadline], Answer]


class Replicas:
    """The servers behind one channel, one by one. gRPC shares the connections between both."""

    def __init__(self, settings: Settings) -> None:
        self._channels = {
            address: channel_to(settings.override(triton=address)) for address in settings.replicas
        }
        self._stubs = {
            address: GRPCInferenceServiceStub(channel)
            for address, channel in self._channels.items()
        }
        self._asked = float("-inf")

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.values():
            channel.close()

    @property
    def several(self) -> bool:
        """Whether one may stand in for another."""
        return len(self._channels) > 1

    def drawn(self) -> list[Stub]:
        """All of them, in an order of chance."""
        return random.sample([*self._stubs.values()], len(self._stubs))

    def asked_lately(self) -> bool:
        """Whether all have been asked within LATELY_S."""
        return time.monotonic() < self._asked + LATELY_S

    def ask(self, ask: Ask[Answer], deadline: Deadline) -> dict[str, Answer]:
        """What each says, by address; raises what the last raised when nobody can be asked."""
        self._asked = time.monotonic()
        answers: dict[str, Answer] = {}
        for number, (address, stub) in enumerate(self._stubs.items(), 1):
            patience = Deadline(min(deadline.left_s, LOOK_S)) if self.several else deadline
            try:
                answers[address] = ask(stub, address, patience)
            except (ServerUnavailable, DeadlineExceeded):
                if number == len(self._stubs) and not answers:
                    raise
        return answers


class Turns:
    """Who is asked by one call, attempt by attempt; to be called as a stub's ModelInfer.

    First whoever's turn it is; then two replicas by name at once, of which one at least is not the
    one that refused; from then on another one after each pause that the budget allows. So when all
    are away their callers come back neither in step nor many times each.
    """

    def __init__(self, stub: Stub, replicas: Replicas, deadline: Deadline, budget: RetryBudget):
        """`stub`: of the channel to all of them."""
        self._anybody = self._asked = stub
        self._replicas, self._deadline, self._budget = replicas, deadline, budget
        self._named: list[Stub] = []
        self._asked_by_name = 0

    def __call__(self, request: Any, **how: Any) -> Any:
        return self._asked.ModelInfer(request, **how)

    def future(self, request: Any, **how: Any) -> Any:
        """As a stub's, too."""
        return self._asked.ModelInfer.future(request, **how)

    def anybody(self) -> None:
        """The next attempt is whoever's turn it is."""
        self._asked = self._anybody

    def elsewhere(self) -> bool:
        """Whether to ask another one, after the pause that is due."""
        if not self._named:
            self._named = self._replicas.drawn()
            patience = Deadline(min(PATIENCE_S, self._deadline.left_s))
            self._backoff = Backoff(patience, self._budget)
        if self._asked_by_name >= AT_ONCE and not self._backoff.wait():
            return False
        self._asked = self._named[self._asked_by_name % len(self._named)]
        self._asked_by_name += 1
        return True
