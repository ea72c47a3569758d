"""Several servers of one release: each can be asked by itself, and one may stand in for another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from retrieval_client.channel import channel_to
from retrieval_client.deadline import Deadline
from retrieval_client.settings import Settings
from retrieval_contract.errors import DeadlineExceeded, ServerUnavailable

LOOK_S = 0.5
"""What one of several replicas may take to say what it serves, before the others are asked."""
LATELY_S = 1.0
"""While some are away, all are asked again what they serve, so often at most."""
PATIENCE_S = 3.0
"""How long a refused request is sent again: longer than a channel takes to connect anew."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2e-3, 50e-3

Answer = TypeVar("Answer")
Ask = Callable[[GRPCInferenceServiceStub, str, Deadline], Answer]


class Replicas:
    """The servers behind one channel, one by one. gRPC shares the connections between both."""

    def __init__(self, settings: Settings) -> None:
        self._channels = {
            address: channel_to(settings.override(triton=address)) for address in settings.replicas
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

    def asked_lately(self) -> bool:
        """Whether all have been asked within LATELY_S."""
        return time.monotonic() < self._asked + LATELY_S

    def ask(self, ask: Ask[Answer], deadline: Deadline) -> dict[str, Answer]:
        """What each says, by address; raises what the last raised when nobody can be asked."""
        self._asked = time.monotonic()
        answers: dict[str, Answer] = {}
        for number, (address, channel) in enumerate(self._channels.items(), 1):
            patience = Deadline(min(deadline.left_s, LOOK_S)) if self.several else deadline
            try:
                answers[address] = ask(GRPCInferenceServiceStub(channel), address, patience)
            except (ServerUnavailable, DeadlineExceeded):
                if number == len(self._channels) and not answers:
                    raise
        return answers


class Patience:
    """Pauses between attempts: none before the first, then growing ones, until it is spent."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._pause_s = 0.0
        self._end: float | None = None

    def wait(self) -> bool:
        """Whether to try again, after the pause that is due."""
        now = time.monotonic()
        self._end = self._end or now + PATIENCE_S
        if now + self._pause_s >= min(self._end, now + self._deadline.left_s):
            return False
        time.sleep(self._pause_s)
        self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        return True
