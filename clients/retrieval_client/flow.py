"""Rows → vectors with several requests under way: what a push and a bulk encode have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from retrieval_client.encoder import Encoded, Encoder
from retrieval_client.patience import Patient
from retrieval_client.rows import Candidate
from retrieval_client.window import MOST, Window
from retrieval_contract.errors import ReleaseMismatch, ServerBusy

REQUEST_ROWS = 32
"""Products in one request: the batch that the product tower is tuned for."""

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Flow:
    """As many requests under way as make it faster, each repeated while the server is away."""

    def __init__(self, patiently: Patient, timeout_s: float) -> None:
        """`timeout_s`: of one request."""
        self.window = Window()
        self._patiently, self._timeout_s = patiently, timeout_s

    def in_order(
        self, requests: Iterable[Request], call: Callable[[Request], Answer]
    ) -> Generator[Answer, None, None]:
        """The answers, in the order of the requests; `call` runs in threads of its own.

        Close it when not all of it is wanted.
        """
        waiting: deque[Future[Answer]] = deque()
        pool = ThreadPoolExecutor(MOST, thread_name_prefix="encode")
        try:
            for request in requests:
                waiting.append(pool.submit(call, request))
                while len(waiting) > self.window.size:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            # Ctrl-C and errors wait for nobody: what is under way ends with the encoders.
            self._patiently.stop()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def encode(self, encoder: Encoder, release_id: str, rows: Sequence[Candidate]) -> Encoded:
        """One request; ReleaseMismatch when another release answers than the one wanted."""
        titles, images = [row.title for row in rows], [row.image for row in rows]

        def encode() -> Encoded:
            try:
                return encoder.encode_products(titles, images, timeout_s=self._timeout_s)
            except ServerBusy:
                self.window.refused()
                raise

        encoded = self._patiently(encode)
        if encoded.served.release_id != release_id:
            raise ReleaseMismatch(
                f"the server changed from release {release_id} to {encoded.served.release_id}; "
                "what was kept so far is of the first: run it again"
            )
        self.window.answered(len(rows))
        return encoded
