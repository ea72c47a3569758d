"""Vectors to measure indexes with, and a catalog that holds them.

    python -m benchmarks.vectors

encodes titles and queries of a real shop with the release's query encoder, once, into VECTORS.
Without that the vectors are synthetic: clustered, unit norm, as wide as those of the release.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq

from deploy.demo import REAL_CATALOG
from deploy.milvus import milvus_server
from deploy.server import LATEST, triton
from deploy.wheel import ROOT
from retrieval_client import Catalog, Collection, Encoder, ProductRow, Settings
from retrieval_client.index import build, graph
from retrieval_client.recalls import cpu_seconds
from retrieval_contract.tensors import Array

SHOP = REAL_CATALOG.parent / "homedepot_relevance"
VECTORS = ROOT / "build" / "vectors.npz"
ROWS, QUERIES, DIM = 50_000, 4000, 384
CLUSTERS, SPREAD = 500, 0.7
RELEASE = "0123456789abcdef"
WRITE_ROWS, ENCODE_ROWS = 2048, 512
PATIENCE_S = 300.0
SETTLED_S, QUIET_SHARE, STEP_S = 300.0, 0.1, 10.0
"""How long to wait for a server to use so little of a core for a step, at most."""


@dataclass(frozen=True)
class Vectors:
    """Stored ones (rows, dim), those of queries (queries, dim), and where they are from."""

    stored: Array
    queries: Array
    source: str

    @classmethod
    def load(cls, rows: int = ROWS) -> Vectors:
        """Real ones where they were made, else synthetic ones."""
        if VECTORS.exists():
            with np.load(VECTORS) as file:
                return cls(file["stored"][:rows], file["queries"], "titles and queries of a shop")
        random = np.random.default_rng(0)
        centres = random.standard_normal((CLUSTERS, DIM))

        def draw(count: int) -> Array:
            found = centres[random.integers(CLUSTERS, size=count)]
            found = found + SPREAD * random.standard_normal((count, DIM))
            unit: Array = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
            return unit

        return cls(draw(rows), draw(QUERIES), "synthetic clusters")


def make() -> None:
    """VECTORS from the titles and queries of SHOP."""
    titles = pq.read_table(SHOP / "products.parquet", columns=["title"])["title"].to_pylist()
    with (SHOP / "queries.csv").open(newline="") as file:
        queries = [row["query"] for row in csv.DictReader(file)]
    with (
        triton(LATEST.resolve(), log=sys.stderr) as server,
        Encoder(Settings(triton=server.grpc_address, timeout_s=PATIENCE_S)) as encoder,
    ):

        def encoded(texts: list[str]) -> Array:
            steps = range(0, len(texts), ENCODE_ROWS)
            parts = [encoder.encode_queries(texts[n : n + ENCODE_ROWS]) for n in steps]
            good = [part.vectors[[error is None for error in part.errors]] for part in parts]
            return np.concatenate(good)

        np.savez(VECTORS, stored=encoded(titles[:ROWS]), queries=encoded(queries[:QUERIES]))


def fill(settings: Settings, vectors: Array) -> Collection:
    """A catalog that holds them; left alone where it does already."""
    catalog = Catalog(settings)
    collection = catalog.prepare(RELEASE, vectors.shape[1])
    if collection.count() != len(vectors):
        for start in range(0, len(vectors), WRITE_ROWS):
            rows = range(start, min(start + WRITE_ROWS, len(vectors)))
            collection.upsert([_row(n, vectors[n]) for n in rows])
        collection.flush()
        if not collection.milvus.lite:
            build(collection, graph())  # and waits for it
    return catalog.serving(max_age_s=0)


def settle(pid: int | None) -> None:
    """Wait until a server has merged the segments of what it was filled with.

    It takes most of a core for minutes after its index is said to be there.
    """
    end = time.monotonic() + SETTLED_S
    while (before := cpu_seconds(pid)) is not None and time.monotonic() < end:
        time.sleep(STEP_S)
        if (cpu_seconds(pid) or 0.0) - before < QUIET_SHARE * STEP_S:
            return


def _row(n: int, vector: Array) -> ProductRow:
    about = {"price": n % 100, "brand": f"brand {n % 37}"}
    return ProductRow(f"p{n}", f"the title of product {n}", f"{RELEASE}:{n}", vector, about)


@contextmanager
def places(milvus: str = "", pid: int | None = None) -> Iterator[dict[str, tuple[str, int | None]]]:
    """Addresses of Milvus Lite and of a server, and the server's process; empty folders both,
    unless a server is given."""
    with TemporaryDirectory(prefix="benchmark-") as folder:
        found: dict[str, tuple[str, int | None]] = {"lite": (f"{folder}/lite.db", None)}
        if milvus:
            yield {**found, "server": (milvus, pid)}
            return
        data = Path(folder) / "server"
        with (
            (Path(folder) / "server.log").open("w") as log,
            milvus_server(data, log=log, session_ttl_s=300) as server,
        ):
            yield {**found, "server": (server.uri, server.pid)}


if __name__ == "__main__":
    make()
