"""Indexes of vectors: what there is to choose, to build anew, and to choose by measuring.

What `tune` finds is a property of the collection, and every search of every client reads it there.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from retrieval_client.collection import FILTERED_PARAMS, SEARCH_PARAMS, Collection
from retrieval_client.milvus import Milvus
from retrieval_client.recalls import Exact, at_least, condition_of, found_at
from retrieval_client.records import BUCKET, TITLE, VECTOR
from retrieval_contract import models
from retrieval_contract.errors import CatalogError
from retrieval_contract.tensors import Array

FLAT_ROWS = 4000
"""Up to so many rows an exact search costs a server no more than a graph does: of 2.3.5 and 384
dims about 1.3 ms of processor and 0.15 ms for each 1000 rows, against 1.6 to 1.9 ms."""
EFFORTS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
DEPTH = 10
FILTERS = (0.1, 0.01)
"""Shares of the rows whose filters must keep FILTERED."""
RECALL, FILTERED = 0.98, 0.95
"""recall@DEPTH that is asked for, over all rows and under those filters."""
RECALL_ASKED, LOWEST_RECALL = "recall_asked", 0.95
"""The property of a collection that says what was asked for over all rows; where nothing was."""


@dataclass(frozen=True)
class Index:
    """A kind of index, what it is built with, and the one number that says how hard it looks.

    `first`: efforts without and with a condition, until `tune` has measured.
    """

    kind: str
    params: Mapping[str, int] = field(default_factory=dict)
    knob: str = ""
    efforts: Sequence[int] = ()
    first: tuple[int, int] = field(default=(0, 0), compare=False)

    @property
    def untuned(self) -> dict[str, str]:
        """The properties of a collection that has just got it."""
        plain, filtered = ({self.knob: effort} if self.knob else {} for effort in self.first)
        return search_properties(plain, filtered)

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.params.items())])


def flat() -> Index:
    """Every row is looked at: exact, and each query costs as much as there are rows."""
    return Index("FLAT")


def graph(m: int = 32, ef_construction: int = 300) -> Index:
    """HNSW: the cheapest search for a high recall, at the price of memory and of building it.

    With M = 16 a filter that lets a tenth pass cuts the graph into pieces (benchmarks.index).
    """
    params = {"M": m, "efConstruction": ef_construction}
    return Index("HNSW", params, "ef", EFFORTS, (128, 256))


def lists(rows: int, kind: str = "IVF_SQ8") -> Index:
    """IVF: rows sorted into about 4 √rows lists; IVF_SQ8 keeps a byte for each number."""
    cells = max(1, min(65536, round(4 * math.sqrt(rows))))
    efforts, first = (4, 8, 16, 32, 64, 128, 256), (min(64, cells), min(128, cells))
    return Index(kind, {"nlist": cells}, "nprobe", efforts, first)


KINDS: dict[str, Callable[[int], Index]] = {
    "FLAT": lambda rows: flat(),
    "HNSW": lambda rows: graph(),
    "IVF_FLAT": lambda rows: lists(rows, "IVF_FLAT"),
    "IVF_SQ8": lists,
}
"""By name, for so many rows: those that Milvus Lite and every server since 2.3 have."""


def index_of(collection: Collection) -> Index:
    """What there is now; CatalogError where there is none, or one that is not of KINDS."""
    found = _described(collection)
    kind = found.get("index_type", "none")
    if kind not in KINDS:
        raise CatalogError(
            f"{collection.name}: expected an index of {', '.join(KINDS)}, got {kind}; build one "
            "with `retrieval index tune --kind HNSW`"
        )
    known = KINDS[kind](1)
    params = {name: int(found[name]) for name in known.params if name in found}
    return replace(known, params=params)


def _described(collection: Collection) -> Mapping[str, str]:
    """What Milvus says of it; nothing where there is none."""
    milvus = collection.milvus
    with milvus.errors(f"index of {collection.name}"):
        found = milvus.client.describe_index(
            collection.name, VECTOR.name, timeout=milvus.write_timeout_s
        )
    return found or {}


def inherited(index: Index, serving: Collection | None) -> dict[str, str]:
    """The properties of a new collection with this index, beside one that serves.

    What was asked of that is asked of this, and where both have one kind of index, this one is
    searched as hard.
    """
    names = [RECALL_ASKED]
    if serving and _described(serving).get("index_type") == index.kind:
        names += [SEARCH_PARAMS, FILTERED_PARAMS]
    said = serving.info.properties if serving else {}
    return index.untuned | {name: said[name] for name in names if name in said}


def recall_asked(collection: Collection) -> float:
    """The recall@DEPTH that its searches are to have."""
    return float(collection.info.properties.get(RECALL_ASKED, LOWEST_RECALL))


def best_kind(milvus: Milvus, rows: int) -> Index:
    """Exact where that is no dearer: on Milvus Lite always, on a server up to FLAT_ROWS."""
    return flat() if milvus.lite or rows <= FLAT_ROWS else graph()


def sample_titles(collection: Collection, count: int) -> list[str]:
    """Titles of so many products (or all there are), the same each time: as queries, for want of
    real ones."""
    share = min(1.0, 2 * count / max(collection.count(), 1))
    condition = f"{BUCKET.name} >= {int((1 - share) * models.BUCKETS)}"
    titles = (row[TITLE.name] for rows in collection.every([TITLE.name], condition) for row in rows)
    return list(itertools.islice(filter(None, titles), count))


def build(collection: Collection, index: Index) -> None:
    """Another index for the vectors. Until it is there, the collection cannot be searched."""
    client, patience_s = collection.milvus.client, collection.milvus.write_timeout_s
    with collection.milvus.errors(f"index {collection.name}"):
        client.release_collection(collection.name, timeout=patience_s)
        client.drop_index(collection.name, VECTOR.name, timeout=patience_s)
        wanted = client.prepare_index_params()
        wanted.add_index(
            VECTOR.name,
            index_type=index.kind,
            metric_type=models.PRODUCTS.metric,
            params=dict(index.params),
        )
        client.create_index(collection.name, wanted, timeout=patience_s)
    _store(collection, index.untuned)
    collection.load()


def search_properties(params: Mapping[str, int], filtered: Mapping[str, int]) -> dict[str, str]:
    """By which every search of a collection uses these, without a condition and with one."""
    return {SEARCH_PARAMS: json.dumps(params), FILTERED_PARAMS: json.dumps(filtered)}


def _store(collection: Collection, properties: Mapping[str, str]) -> None:
    milvus = collection.milvus
    with milvus.errors(f"properties of {collection.name}"):
        milvus.client.alter_collection_properties(
            collection.name, properties=dict(properties), timeout=milvus.write_timeout_s
        )


@dataclass(frozen=True)
class Tuned:
    """What was chosen for searches without and with a condition, and the recall@10 of each, by the
    share of rows that the filter lets pass."""

    collection: str
    rows: int
    index: str
    params: Mapping[str, int]
    filtered_params: Mapping[str, int]
    recall: Mapping[float, float]


def tune(
    collection: Collection,
    queries: Array,
    *,
    target: float = RECALL,
    filtered: float = FILTERED,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """The least efforts that surely find enough (`at_least`), not just for these queries; stored
    in the collection's properties.

    `queries`: float32 (queries, vector_dim), unit norm, of real searches where there are some.
    Raises CatalogError where no effort is enough for the index that is there (see `build`).
    """
    index = index_of(collection)
    plain, found = _least(collection, index, queries, target, (1.0,), say)
    under, found_under = _least(collection, index, queries, filtered, FILTERS, say)
    _store(collection, search_properties(plain, under) | {RECALL_ASKED: str(target)})
    return Tuned(collection.name, collection.count(), str(index), plain, under, found | found_under)


def _least(
    collection: Collection,
    index: Index,
    queries: Array,
    wanted: float,
    shares: Sequence[float],
    say: Callable[[str], None],
) -> tuple[dict[str, int], dict[float, float]]:
    """The first effort that surely finds as much as wanted under each filter, and what it finds."""
    exact = {s: Exact.search(collection, queries, DEPTH, condition_of(s)) for s in shares}
    found: dict[float, float] = {}
    for effort in index.efforts or (0,):
        params = {index.knob: effort} if effort else {}
        searched = collection.tuned(params)
        for share in shares:
            recalls = found_at(searched, queries, exact[share], DEPTH, share)
            found[share], sure = float(recalls.mean()), at_least(recalls)
            say(
                f"{index} {params}: {share:.1%} of the rows: recall@{DEPTH} {found[share]:.4f}, "
                f"at least {sure:.4f}"
            )
            if not sure >= wanted:
                break
        else:
            return params, found
    raise CatalogError(
        f"{collection.name}: expected recall@{DEPTH} of surely {wanted} over shares {shares} of "
        f"the rows, got {found} from {index} at its hardest; build an exact one with "
        "`retrieval index tune --kind FLAT`"
    )
