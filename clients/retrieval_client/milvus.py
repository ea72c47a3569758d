"""One connection to Milvus, Lite or a server, shared by all who read and write."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from pymilvus import MilvusClient

from retrieval_client.capabilities import Backend
from retrieval_client.connect import milvus_client
from retrieval_client.deadline import Deadline
from retrieval_client.settings import Settings
from retrieval_client.translate import milvus_errors
from retrieval_contract.errors import CatalogUnavailable, DeadlineExceeded

CALLS = 256
"""Searches under way at once, of one connection."""
T = TypeVar("T")


class Milvus:
    """Opened on first use; safe between threads.

    Raises CatalogUnavailable when nobody answers, CatalogError for the rest.
    """

    def __init__(self, settings: Settings) -> None:
        self.uri = settings.milvus
        self.timeout_s = settings.timeout_s
        self.write_timeout_s = settings.push_timeout_s
        self._settings = settings
        self._opening = threading.Lock()
        self._client: MilvusClient | None = None
        self._backend: Backend | None = None
        self._calls = ThreadPoolExecutor(CALLS, thread_name_prefix="milvus")

    def close(self) -> None:
        """Close the connection. Milvus Lite holds its lock until the process ends."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        if self._client:
            self._client.close()
            self._client = None

    @property
    def lite(self) -> bool:
        """Whether this is a folder, and not a server."""
        return self.uri.endswith(".db")

    @property
    def exists(self) -> bool:
        """False where a store of Milvus Lite is not there yet."""
        return not self.lite or Path(self.uri).exists()

    def make(self) -> None:
        """The place for a store of Milvus Lite, where there is none yet."""
        if self.lite:
            Path(self.uri).parent.mkdir(parents=True, exist_ok=True)

    def within(self, deadline: Deadline, what: str, call: Callable[[], T]) -> T:
        """The result of calls for the purpose `what`; DeadlineExceeded at its end.

        pymilvus keeps no deadline by itself while a server is away: it repeats the call, and
        sleeps up to three seconds past its timeout. What is left behind here ends by then.
        """

        def asked() -> T:
            with self.errors(what, deadline):
                return call()

        if self.lite:  # this process itself: never away, and slow to open where it holds much
            return asked()
        under_way = self._calls.submit(asked)
        try:
            return under_way.result(deadline.left_s)
        except Late as exc:
            under_way.cancel()  # where it has not begun: nobody waits for it any more
            raise DeadlineExceeded(
                f"Milvus at {self.uri}, {what}: no answer within {deadline.seconds:g} s; see that "
                "it runs, or raise the deadline (--timeout-s)"
            ) from exc

    def errors(self, what: str, deadline: Deadline | None = None) -> AbstractContextManager[None]:
        """Inside: calls for the purpose `what`; their errors become ours (`milvus_errors`)."""
        return milvus_errors(self.uri, what, deadline)

    @property
    def client(self) -> MilvusClient:
        """The open connection."""
        with self._opening:
            if not self._client:
                with self.errors("connect"):
                    self._client = self._open()
            return self._client

    def _open(self) -> MilvusClient:
        try:
            return milvus_client(self._settings)
        except Exception as exc:
            if self.lite and self.exists and not os.access(self.uri, os.W_OK):
                raise CatalogUnavailable(
                    f"Milvus Lite at {self.uri}: expected a folder that can be written, to read "
                    "it as well; got one that cannot: change that, or copy it elsewhere (--milvus)"
                ) from exc
            if self.lite:  # one message of pymilvus covers every cause
                raise CatalogUnavailable(
                    f"Milvus Lite at {self.uri}: cannot be opened ({exc}); another process "
                    "may hold it, or the path is not a catalog: close that process, or give "
                    "another path (--milvus)"
                ) from exc
            raise

    @property
    def backend(self) -> Backend:
        """What it is, and so what it can do."""
        return self.backend_by(Deadline(self.timeout_s))

    def backend_by(self, deadline: Deadline) -> Backend:
        """The same; asked once, within the deadline of who needs it first."""
        if self._backend is None:
            self._backend = self.within(
                deadline,
                "version",
                lambda: Backend.of(self.client.get_server_version(timeout=deadline.left_s)),
            )
        return self._backend
