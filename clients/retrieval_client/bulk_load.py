"""Parquet shards → the collection of their release, resumable: what is stored is not written again.

Upserts, also where a server could import files: an import cannot be repeated (it doubles rows), is
seen much later than it is done, and `docs/decisions.md` has what it gained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from retrieval_client.book import Book, Differences
from retrieval_client.catalog import Catalog
from retrieval_client.collection import Collection
from retrieval_client.feed import HASHES
from retrieval_client.feed import hashes_of as hashes_of_row
from retrieval_client.fleet import Encoders
from retrieval_client.patience import Patient
from retrieval_client.records import ProductRow
from retrieval_client.rows import Candidate
from retrieval_client.settings import Settings
from retrieval_client.shards import Manifest, Shard, describe_shard, hashes_of, rows_of
from retrieval_contract.errors import CatalogError, ReleaseMismatch, SourceError


@dataclass
class Loaded:
    """What a load did; rows, but `skipped`: shards of which all was there."""

    collection: str
    stored: int = 0
    unchanged: int = 0
    skipped: int = 0
    left: Differences | None = None
    """What the closing audit found."""


class Load:
    """One load of the shards of one folder; `run` may be called once."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.read(folder)
        self._settings = settings
        self._patiently = Patient(settings.retry_s)

    def run(
        self, catalog: Catalog, progress: Callable[[Shard], None] = lambda shard: None
    ) -> Loaded:
        """Store every row that is not stored as its shard says; flush, and see for ourselves.

        Raises SourceError where a shard is not the manifest's, ReleaseMismatch where no collection
        is of their release, CatalogError when the closing audit finds another state.
        """
        for shard in self.manifest.shards:  # before anything is written
            if (found := describe_shard(self.folder / shard.name)) != shard:
                raise SourceError(
                    f"{self.folder / shard.name}: expected {shard.rows} rows, as the manifest "
                    f"says, got {found.rows}; run `retrieval bulk encode` again"
                )
        collection = self._collection(catalog)
        loaded = Loaded(collection.name)
        with Book() as book:
            self._read_all(collection, book)
            for shard in self.manifest.shards:
                self._load(shard, collection, book, loaded)
                progress(shard)
            self._patiently(collection.flush)
            self._read_all(collection, book)
            loaded.left = replace(book.differences(self.manifest.release_id), surplus=0)
        if loaded.left.total:
            raise CatalogError(
                f"{collection.name}: expected what the shards say, got {loaded.left}; did a push "
                "run meanwhile? load again"
            )
        return loaded

    def _collection(self, catalog: Catalog) -> Collection:
        """That of the shards' release, serving or not; made where the catalog is empty."""
        release_id, dim = self.manifest.release_id, self.manifest.vector_dim
        live = self._patiently(catalog.live)
        for collection in live.values():
            if (collection.info.release_id, collection.info.vector_dim) == (release_id, dim):
                return collection
        if live:
            there = ", ".join(f"{c.name} ({c.info.vector_dim} dims)" for c in live.values())
            raise ReleaseMismatch(
                f"{self.folder}: expected a collection of release {release_id} ({dim} dims), got "
                f"{there}; load into another catalog (--milvus or --collection), or encode for "
                "one of these"
            )
        with Encoders(self._settings) as encoders:
            served = self._patiently(encoders.served)
        if release_id not in served or served[release_id].vector_dim != dim:
            raise ReleaseMismatch(
                f"{self.folder}: shards of release {release_id} ({dim} dims), Triton at "
                f"{self._settings.triton} serves {', '.join(served)}; a new catalog is filled for "
                "what is served: serve that release, or encode for this one"
            )
        return self._patiently(lambda: catalog.prepare(release_id, dim))

    def _read_all(self, collection: Collection, book: Book) -> None:
        """Into the book: what the collection holds now."""

        def read() -> None:
            book.empty(collection.info.release_id)
            for step in collection.every(HASHES):
                book.hold(collection.info.release_id, map(hashes_of_row, step))

        self._patiently(read)

    def _load(self, shard: Shard, collection: Collection, book: Book, loaded: Loaded) -> None:
        """What of a shard is not stored; its vectors are read only where there is something."""
        path, release_id = self.folder / shard.name, self.manifest.release_id
        wanted = set()
        for product_id, content_hash, row_hash in hashes_of(path):
            of, _, content = content_hash.partition(":")
            said = Candidate(product_id, "", b"", {}, content, row_hash)
            if of != release_id or not book.say(said):
                raise SourceError(
                    f"{path}: expected rows of release {release_id} with ids of their own, got "
                    f"{product_id} of {of}, or twice; encode anew, into an empty folder"
                )
            stored = book.stored(release_id, product_id)
            if not stored or (stored.content_hash, stored.row_hash) != (content_hash, row_hash):
                wanted.add(product_id)
        for rows in self._rows(path, wanted):
            self._patiently(partial(collection.upsert, rows))
        loaded.stored += len(wanted)
        loaded.unchanged += shard.rows - len(wanted)
        loaded.skipped += not wanted

    def _rows(self, path: Path, wanted: set[str]) -> Iterator[list[ProductRow]]:
        if not wanted:
            return
        for rows in rows_of(path, self.manifest.vector_dim):
            if some := [row for row in rows if row.id in wanted]:
                yield some
