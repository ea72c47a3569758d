"""python -m benchmarks.ingest_rates: a push again, one beside the bare encoder, a long one."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from benchmarks.cores import apart
from benchmarks.inflight import keep_in_flight
from benchmarks.ingest import Shelf, push_command
from benchmarks.limit import PRODUCTS_IN_FLIGHT, shuffled
from benchmarks.stand_in import StandIns
from deploy.milvus import milvus_server
from deploy.server import triton
from retrieval_client.catalog import Catalog
from retrieval_client.fleet import Encoders
from retrieval_client.push import REQUEST_ROWS, Push
from retrieval_client.settings import Settings
from retrieval_client.sources import Source, SourceRow
from retrieval_contract import models
from retrieval_contract.errors import RetrievalError

MANY = 37_000
RATE_ROWS, ROUNDS = 2048, 3
MILLION = 1_000_000
MILLION_DIM, MILLION_RELEASE = 16, "d" * 16


def second_push(
    release: Path, source: Path, products: int, log: IO[str] = sys.stderr
) -> dict[str, Any]:
    """The command twice, over the same products."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(triton(release, log=log))
        settings = Settings(triton=server.grpc_address, milvus=str(place / "catalog.db"))
        shelf = Shelf(place / "source", source, products)
        said, took = [], []
        for _ in range(2):
            start = time.perf_counter()
            done = subprocess.run(
                push_command(settings, shelf.path), stdout=subprocess.PIPE, stderr=log, text=True
            )
            took.append(time.perf_counter() - start)
            if done.returncode:
                raise RetrievalError(f"second_push: {done.stdout}")
            said.append(json.loads(done.stdout))
    return {
        "trials": len(shelf.there),
        "encoded": said[0]["encoded"],
        "encoded_again": said[1]["encoded"],
        "stored_again": said[1]["stored"],
        "time_ratio": round(took[1] / took[0], 4),
    }


def push_rate(
    release: Path, source: Path, products: int, log: IO[str] = sys.stderr
) -> dict[str, Any]:
    """A push of new products ÷ requests for the same ones alone, in turn; medians of ROUNDS.

    The server has one core, the push and its Milvus Lite the other, as in `limit.py`.
    """
    good = (row for row in Source(source).rows() if row.problem is None and row.image)
    rows = list(itertools.islice(good, products))
    bare = [(row.title, row.image) for row in rows]
    ratios, rates = [], []
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(triton(release, log=log))
        stack.enter_context(apart(server.process.pid))
        settings = Settings(
            triton=server.grpc_address, milvus=f"{place}/catalog.db", traffic="bulk"
        )
        encoders = stack.enter_context(Encoders(settings))
        catalog = stack.enter_context(Catalog(settings))
        Push(settings, encoders, catalog).run(rows[:REQUEST_ROWS])
        for number in range(ROUNDS):
            fresh = [
                replace(r, id=f"{r.id}-{number}", title=b"%d " % number + r.title) for r in rows
            ]
            start = time.perf_counter()
            report = Push(settings, encoders, catalog).run(fresh)
            took = time.perf_counter() - start
            asked = keep_in_flight(
                server,
                models.PRODUCT_ENCODER,
                shuffled(bare, number),
                PRODUCTS_IN_FLIGHT,
                REQUEST_ROWS,
                took,
            )
            rates.append(report.stored / took)
            ratios.append(rates[-1] / asked.rows_per_s)
    return {
        "trials": ROUNDS,
        "products": len(rows),
        "rows_per_s": round(statistics.median(rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def million_rows(count: int, log: IO[str] = sys.stderr) -> dict[str, Any]:
    """Memory of the process that pushes so many titles to a Milvus server, above its start."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        milvus = stack.enter_context(milvus_server(place, log=log, session_ttl_s=300))
        command = [sys.executable, "-m", "benchmarks.ingest_rates", milvus.uri, str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True)
        if done.returncode:
            raise RetrievalError(f"million_rows: {done.stdout or 'see the log'}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def titles(count: int) -> Iterator[SourceRow]:
    """As a source would give them."""
    for at in range(count):
        yield SourceRow(f"product-{at}", b"a product of many, number %d" % at)


def pushed(uri: str, count: int) -> dict[str, Any]:
    """One push; megabytes resident, before and at most."""
    settings = Settings(milvus=uri, retry_s=300.0, push_timeout_s=300.0)
    stand_ins = StandIns(MILLION_RELEASE, vector_dim=MILLION_DIM)
    with Catalog(settings) as catalog:
        catalog.prepare(MILLION_RELEASE, MILLION_DIM)
        before, start = resident_mb(), time.perf_counter()
        report = Push(settings, stand_ins, catalog).run(titles(count))  # type: ignore[arg-type]
        took = time.perf_counter() - start
        there = catalog.serving().count()
    peak = peak_mb()
    (fed,) = report.fed.values()
    return {
        "trials": count,
        "rows": count,
        "stored": report.stored,
        "there": there,
        "left": fed.left.total if fed.left else 0,
        "grew_mb": round(peak - before, 1),
        "rows_per_s": round(count / took),
    }


def resident_mb() -> float:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mb() -> float:
    """Of this process, since its program began: `ru_maxrss` keeps what its parent had before."""
    (line,) = (w for w in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in w)
    return int(line.split()[1]) / 1024


def main(argv: Sequence[str] | None = None) -> None:
    """The push of `million_rows`, in a process of its own."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.ingest_rates", description=__doc__)
    top.add_argument("milvus")
    top.add_argument("rows", type=int)
    args = top.parse_args(argv)
    print(json.dumps(pushed(args.milvus, args.rows)))


if __name__ == "__main__":
    main()
