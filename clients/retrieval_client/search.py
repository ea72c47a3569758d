"""Text → vector → hits, with one deadline over both."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from retrieval_client.catalog import Catalog, Hit
from retrieval_client.deadline import Deadline
from retrieval_client.encoder import Encoded, Encoder
from retrieval_client.ledger import Laps, Timed
from retrieval_client.settings import Settings
from retrieval_client.tracing import Span, spans_of_application
from retrieval_contract.errors import DeadlineExceeded, ItemError


class ProductSearch:
    """Search one catalog with the release it was filled by; refuses any other.

    Where the application has set a tracer provider of OpenTelemetry, each search is a span.
    """

    def __init__(self, settings: Settings, *, explain: bool = False) -> None:
        """`explain`: what `timed` needs; it costs the server a little."""
        self.settings = settings
        self.encoder = Encoder(settings, explain=explain)
        self.catalog = Catalog(settings)
        self._span = spans_of_application()

    def __enter__(self) -> ProductSearch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.encoder.close()
        self.catalog.close()

    def __call__(
        self,
        query: str,
        *,
        limit: int = 10,
        timeout_s: float | None = None,
        thumbnails: bool = False,
    ) -> list[Hit]:
        """The `limit` best products for one text, best first.

        Raises ItemError for a bad query, and what Encoder and Catalog raise.
        """
        (found,) = self.many([query], limit=limit, timeout_s=timeout_s, thumbnails=thumbnails)
        if isinstance(found, ItemError):
            raise found
        return found

    def many(
        self,
        queries: Sequence[str],
        *,
        limit: int = 10,
        timeout_s: float | None = None,
        thumbnails: bool = False,
    ) -> list[list[Hit] | ItemError]:
        """One result list a query, encoded and searched together; a bad query gets its error."""
        deadline = Deadline(timeout_s or self.settings.timeout_s)
        return self._many(queries, limit, deadline, thumbnails, self._span)[0]

    def connect(self) -> None:
        """Both handshakes, now instead of with the first search; raises what that would."""
        served = self.encoder.served()
        self.catalog.check(served.release_id, served.vector_dim)

    def timed(
        self,
        queries: Sequence[str],
        *,
        limit: int = 10,
        timeout_s: float | None = None,
        thumbnails: bool = False,
    ) -> tuple[list[list[Hit] | ItemError], Timed]:
        """As `many`, and where its time went; see `ledger.ledgers`."""
        laps, deadline = Laps(), Deadline(timeout_s or self.settings.timeout_s)
        found, encoded = self._many(queries, limit, deadline, thumbnails, laps)
        return found, Timed(laps.seconds, encoded.requests)

    def _many(
        self, queries: Sequence[str], limit: int, deadline: Deadline, thumbnails: bool, span: Span
    ) -> tuple[list[list[Hit] | ItemError], Encoded]:
        with span("search"):
            with span("encode"):
                encoded = self.encoder.encode_queries(queries, timeout_s=deadline.left_s)
            with span("milvus"):
                return self._hits(encoded, limit, deadline, thumbnails), encoded

    def _hits(
        self, encoded: Encoded, limit: int, deadline: Deadline, thumbnails: bool
    ) -> list[list[Hit] | ItemError]:
        collection = self.catalog.check(
            encoded.served.release_id, encoded.served.vector_dim, deadline
        )
        if deadline.passed:
            raise DeadlineExceeded(f"search: no time left of {deadline.seconds} s; raise it")
        good = [row for row, error in enumerate(encoded.errors) if error is None]
        found: list[list[Hit] | ItemError] = [error or [] for error in encoded.errors]
        if good:
            hits = self.catalog.search(
                encoded.vectors[good],
                limit=limit,
                thumbnails=thumbnails,
                collection=collection,
                deadline=deadline,
            )
            for row, of_row in zip(good, hits, strict=True):
                found[row] = of_row
        return found
