"""python -m benchmarks.ingest_state: is a catalog, row by row, what a source says?

Asks Milvus and Triton themselves; of the library only the reading of the source and its hashes are
used. In a process of its own, since Milvus Lite holds its lock until the process ends. The last
line is JSON, a State.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_client.catalog import Catalog
from retrieval_client.collection import Ask, Collection, Consistency
from retrieval_client.encoder import Encoder
from retrieval_client.records import bucket_of
from retrieval_client.rows import Candidate, candidate_from_row
from retrieval_client.settings import Settings
from retrieval_client.sources import Source
from retrieval_contract.errors import RetrievalError

SAMPLE = 32
"""Rows whose vectors are compared with the encoder's, and searched for, besides the named ones."""
NEAR = 1e-3
"""Of a vector of the same product: batches of another size round otherwise."""
EXAMPLES = 5
HARD = 1024


@dataclass
class State:
    """Rows of a catalog that are not as its source says; all 0 when all is well.

    `unfound`: rows of the sample that a search for their own vector does not find, although it sees
    every write and looks hard: what a graph misses otherwise, `benchmarks.index` measures.
    """

    rows: int = 0
    lost: int = 0
    surplus: int = 0
    duplicate: int = 0
    stale: int = 0
    mixed_release: int = 0
    wrong_vector: int = 0
    unfound: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """All of them."""
        counts = (getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "examples"))
        return sum(counts)

    def say(self, what: str, product_id: str) -> None:
        """One row more."""
        setattr(self, what, getattr(self, what) + 1)
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{what}: {product_id}")


def compare(settings: Settings, source: Path, named: Sequence[str] = ()) -> State:
    """Every row's hashes, title, attributes and bucket; the vectors of a sample and of `named`."""
    said = {c.id: c for c in (candidate_from_row(row, True) for row in Source(source).rows())}
    state = State()
    with Catalog(settings) as catalog, Encoder(settings) as encoder:
        collection = catalog.serving()
        release = encoder.served().release_id
        if collection.info.release_id != release:
            state.say("mixed_release", collection.name)
        there = _rows(collection, state)
        state.rows = len(there)
        for product_id in said.keys() - there.keys():
            state.say("lost", product_id)
        for product_id in there.keys() - said.keys():
            state.say("surplus", product_id)
        both = sorted(said.keys() & there.keys())
        for product_id in both:
            _same(state, there[product_id], said[product_id], release)
        drawn = set(random.Random(len(both)).sample(both, min(SAMPLE, len(both))))
        drawn |= set(named) & set(both)
        _vectors(state, collection, encoder, [said[i] for i in sorted(drawn)])
    return state


def _rows(collection: Collection, state: State) -> Mapping[str, Mapping[str, Any]]:
    there: dict[str, Mapping[str, Any]] = {}
    wanted = ["title", "content_hash", "row_hash", "attributes", "bucket"]
    for step in collection.every(wanted):
        for row in step:
            if row["id"] in there:
                state.say("duplicate", row["id"])
            there[row["id"]] = row
    if (count := collection.count()) != len(there):
        state.say("duplicate", f"{count} counted, {len(there)} read")
    return there


def _same(state: State, row: Mapping[str, Any], said: Candidate, release: str) -> None:
    if not row["content_hash"].startswith(f"{release}:"):
        state.say("mixed_release", said.id)
    as_said = (
        said.content_hash(release),
        said.row_hash,
        said.title,
        said.attributes,
        bucket_of(said.id),
    )
    names = ("content_hash", "row_hash", "title", "attributes", "bucket")
    if tuple(row[name] for name in names) != as_said:
        state.say("stale", said.id)


def _vectors(
    state: State, collection: Collection, encoder: Encoder, drawn: Sequence[Candidate]
) -> None:
    """Against what the encoder says now; and does a search find them?"""
    for start in range(0, len(drawn), SAMPLE):
        some = drawn[start : start + SAMPLE]
        encoded = encoder.encode_products(
            [c.title for c in some], [c.image for c in some], timeout_s=60.0
        )
        stored = collection.of_ids([c.id for c in some], ["vector"])
        hits = collection.tuned({"ef": HARD}).search(
            encoded.vectors, Ask(consistency=Consistency.ALL)
        )
        for candidate, vector, found in zip(some, encoded.vectors, hits, strict=True):
            there = np.asarray(stored[candidate.id]["vector"], np.float32)
            if np.abs(there - vector).max() > NEAR:
                state.say("wrong_vector", candidate.id)
            # Products may share title and photo, and so their place.
            same = [hit.id for hit in found if hit.score > 1 - NEAR]
            if candidate.id not in same and len(same) < len(found):
                state.say("unfound", candidate.id)


def compared(settings: Settings, source: Path, named: Sequence[str] = ()) -> State:
    """As `compare`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ingest_state", str(source)]
    command += ["--triton", settings.triton, "--milvus", settings.milvus]
    command += ["--collection", settings.collection]
    done = subprocess.run(command, input="\n".join(named), capture_output=True, text=True)
    if done.returncode:
        raise RetrievalError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return State(**json.loads(done.stdout.splitlines()[-1]))


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.ingest_state", description=__doc__)
    top.add_argument("source", type=Path)
    for name in ("triton", "milvus", "collection"):
        top.add_argument(f"--{name}")
    return top


def main() -> None:
    """Command line; ids that must be in the sample come on stdin."""
    args = parser().parse_args()
    settings = Settings(timeout_s=30.0).override(
        triton=args.triton, milvus=args.milvus, collection=args.collection
    )
    print(json.dumps(asdict(compare(settings, args.source, sys.stdin.read().split("\n")))))


if __name__ == "__main__":
    main()
