"""ProductSearch for asyncio: the same face, awaited.

Every search runs in a thread, as those of other callers do, because threads share requests
(`coalesce.py`): that gains more than a loop without threads would save. The threads are its own:
the loop's default pool has few, for everybody.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TypeVar, Unpack

from retrieval_client.deadline import Deadline
from retrieval_client.finding import Hits
from retrieval_client.options import OptionFields, Options
from retrieval_client.query import Query
from retrieval_client.search import ProductSearch
from retrieval_client.settings import Settings
from retrieval_client.shadow import Shadow
from retrieval_contract.errors import DeadlineExceeded, ItemError, RetrievalError

THREADS = 64
"""Searches that are under way at once; further ones wait for a thread, within their deadline."""
GRACE_S = 0.25
"""A search ends by its own deadline; who awaits one that does not is let go so much later."""
CLOSED = "search: it was closed meanwhile; make another one"

Result = TypeVar("Result")


class AsyncProductSearch:
    """As ProductSearch, for one event loop or several.

    Awaiting can be cancelled: a search that waits for a thread is then never made, one under way
    ends by its deadline at the latest, and nobody gets its answer.
    """

    def __init__(self, settings: Settings, *, threads: int = THREADS) -> None:
        self.search = ProductSearch(settings)
        self._threads = ThreadPoolExecutor(threads, "search")

    async def __aenter__(self) -> AsyncProductSearch:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, at once; who still awaits gets an error."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.search.close(wait=False)

    @property
    def shadow(self) -> Shadow:
        """As ProductSearch.shadow."""
        return self.search.shadow

    async def connect(self) -> None:
        """As ProductSearch.connect."""
        await self._in_thread(self._deadline(None), self.search.connect)

    async def __call__(
        self,
        query: str | Query,
        *,
        timeout_s: float | None = None,
        **options: Unpack[OptionFields],
    ) -> Hits:
        """As ProductSearch.__call__."""
        (found,) = await self.many([query], timeout_s=timeout_s, **options)
        if isinstance(found, ItemError):
            raise found
        return found

    async def many(
        self,
        queries: Sequence[str | Query],
        *,
        timeout_s: float | None = None,
        **options: Unpack[OptionFields],
    ) -> list[Hits | ItemError]:
        """As ProductSearch.many."""
        Options(**options)  # what is wrong is said before anybody waits
        deadline = self._deadline(timeout_s)
        return await self._in_thread(
            deadline, partial(self.search.within, deadline, queries, **options)
        )

    def _deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline.of(timeout_s, self.search.settings.timeout_s)

    async def _in_thread(self, deadline: Deadline, call: Callable[[], Result]) -> Result:
        """The result; the current span goes along."""
        context = contextvars.copy_context()
        try:
            under_way = self._threads.submit(context.run, call)
        except RuntimeError as exc:
            raise RetrievalError(CLOSED) from exc
        try:
            async with asyncio.timeout(deadline.left_s + GRACE_S):
                return await asyncio.wrap_future(under_way)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if under_way.cancelled() and not (task and task.cancelling()):  # not the caller: we
                raise RetrievalError(CLOSED) from None
            raise
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"search: no answer within {deadline.seconds} s; raise the deadline, or ask less "
                "at once"
            ) from exc
