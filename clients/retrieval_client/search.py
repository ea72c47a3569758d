"""Text → vector → hits, with one deadline over both.

Each search goes from the alias to a collection, from there to a release, and to the encoder that
serves it; then it asks that same collection, whatever the alias means by then. So no answer can mix
two releases, and a promotion costs nobody an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Unpack

from retrieval_client.catalog import Catalog
from retrieval_client.collection import Collection
from retrieval_client.deadline import Deadline
from retrieval_client.encoder import Encoded, Encoder
from retrieval_client.finding import End, Finder, Hits
from retrieval_client.fleet import Encoders
from retrieval_client.ledger import Laps, Timed
from retrieval_client.options import OptionFields, Options
from retrieval_client.query import Query, encode
from retrieval_client.searches import Searches
from retrieval_client.settings import Settings
from retrieval_client.shadow import Shadow
from retrieval_client.tracing import Span, spans_of_application
from retrieval_contract.errors import (
    CollectionGone,
    ItemError,
    ReleaseMismatch,
    ServerBusy,
    ServerUnavailable,
)


class ProductSearch:
    """Search one catalog, with the release that its collection was filled by.

    Where the application has set a tracer provider of OpenTelemetry, each search is a span.
    """

    def __init__(self, settings: Settings, *, explain: bool = False) -> None:
        """`explain`: what `timed` needs; it costs the server a little."""
        self.settings = settings
        self.encoders = Encoders(settings, explain=explain)
        self.catalog = Catalog(settings)
        self.searches = Searches()
        self.shadow = Shadow(settings)
        self._span = spans_of_application()

    def __enter__(self) -> ProductSearch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self, *, wait: bool = True) -> None:
        """Close the connections; `wait` for what a shadow is asked, or leave it behind."""
        self.shadow.close(wait=wait)
        self.encoders.close()
        self.catalog.close()

    def __call__(
        self,
        query: str | Query,
        *,
        timeout_s: float | None = None,
        **options: Unpack[OptionFields],
    ) -> Hits:
        """The `limit` best products for one query, best first; `options`: see Options.

        Raises ItemError for a bad query, and what Options, Encoder and Catalog raise.
        """
        (found,) = self.many([query], timeout_s=timeout_s, **options)
        if isinstance(found, ItemError):
            raise found
        return found

    def many(
        self,
        queries: Sequence[str | Query],
        *,
        timeout_s: float | None = None,
        **options: Unpack[OptionFields],
    ) -> list[Hits | ItemError]:
        """One result list a query, encoded and searched together; a bad query gets its error."""
        return self.within(Deadline.of(timeout_s, self.settings.timeout_s), queries, **options)

    def within(
        self,
        deadline: Deadline,
        queries: Sequence[str | Query],
        **options: Unpack[OptionFields],
    ) -> list[Hits | ItemError]:
        """As `many`, by a deadline that has begun."""
        return self._many(queries, Options(**options), deadline, self._span)[0]

    @property
    def encoder(self) -> Encoder:
        """Of the release that is searched now."""
        deadline = Deadline(self.settings.timeout_s)
        return self.encoders.for_collection(self.catalog.serving(deadline).info, deadline)

    def connect(self) -> None:
        """Both handshakes, now instead of with the first search; raises what that would."""
        self.encoder.served()

    def timed(
        self,
        queries: Sequence[str | Query],
        *,
        timeout_s: float | None = None,
        **options: Unpack[OptionFields],
    ) -> tuple[list[Hits | ItemError], Timed]:
        """As `many`, and where its time went; see `ledger.ledgers`."""
        laps, deadline = Laps(), Deadline.of(timeout_s, self.settings.timeout_s)
        found, encoded = self._many(queries, Options(**options), deadline, laps)
        return found, Timed(laps.seconds, encoded.requests)

    def _many(
        self, queries: Sequence[str | Query], options: Options, deadline: Deadline, span: Span
    ) -> tuple[list[Hits | ItemError], Encoded]:
        asked = [Query.of(query) for query in queries]
        deadline.check("search")
        with span("search"):
            collection = self.catalog.serving(deadline)
            try:
                return self._once(asked, options, collection, deadline, span)
            except ServerBusy:
                raise
            except (ReleaseMismatch, CollectionGone, ServerUnavailable) as exc:
                # A promotion, and then the old pair was cleared away; or a server of another
                # release came to an address. Once more, with what is there now; compared with what
                # this search used: another one may have looked meanwhile.
                now = self.catalog.serving(deadline, max_age_s=0.0)
                if isinstance(exc, ReleaseMismatch):
                    self.encoders.forget()
                elif now.info == collection.info:
                    raise
                return self._once(asked, options, now, deadline, span)

    def _once(
        self,
        queries: Sequence[Query],
        options: Options,
        collection: Collection,
        deadline: Deadline,
        span: Span,
    ) -> tuple[list[Hits | ItemError], Encoded]:
        with span("encode"):
            encoder = self.encoders.for_collection(collection.info, deadline)
            if options.routes:  # before anything is computed for a Milvus that cannot
                collection.need_words(deadline)
            encoded = encode(queries, encoder, collection, options.consistency, deadline)
        with span("milvus"):
            hits = self._hits(queries, encoded, collection, options, deadline)
        self.shadow.offer(queries, options, hits, deadline.seconds - deadline.left_s)
        return hits, encoded

    def _hits(
        self,
        queries: Sequence[Query],
        encoded: Encoded,
        collection: Collection,
        options: Options,
        deadline: Deadline,
    ) -> list[Hits | ItemError]:
        deadline.check("search")
        good = [row for row, error in enumerate(encoded.errors) if error is None]
        found: list[Hits | ItemError] = [error or Hits([], End.ALL) for error in encoded.errors]
        if good:
            find = Finder(collection, partial(self.searches, collection), options)
            vectors = encoded.vectors
            if len(good) < len(queries):
                queries, vectors = [queries[row] for row in good], vectors[good]
            hits = find(queries, vectors, deadline)
            for row, of_row in zip(good, hits, strict=True):
                found[row] = of_row
        return found
