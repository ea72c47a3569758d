"""Promotions and rollbacks under load: does a search fail, or mix two releases?

Callers never stop asking, and know what each release answers; in between they forget what the alias
meant, so that they look while it moves. In the end the old collection is dropped under them.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from deploy.milvus import milvus_server
from deploy.server import triton
from retrieval_client import Catalog, Encoders, Hit, ProductSearch, Settings
from retrieval_client.changes import answers_of
from retrieval_client.push import Push
from retrieval_client.releases import Releases
from retrieval_client.sources import SourceRow
from retrieval_contract.errors import DeployError

CALLERS, FORGETS = 4, 5
"""Threads that share a client; after so many searches one looks anew what the alias means."""
PRODUCTS = 240
MOVES = 20
"""Promotions, and as many rollbacks."""
FAR = 1e-3
"""Scores that differ by more are of another vector."""
TIMEOUT_S = 20.0
SIZES = {"equal dimension": (16, 16), "other dimension": (16, 24)}
COLOURS = ("red", "navy blue", "white", "green", "black", "yellow")
KINDS = ("shirt", "dress", "watch", "running shoes", "jeans")
QUERIES = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]


@dataclass
class Outcome:
    """Counts of searches, alias moves, and answers by what they are of.

    `mixed`: answers that no single release gives. `answers`: by release id.
    """

    searches: int = 0
    promotions: int = 0
    rollbacks: int = 0
    dropped: int = 0
    errors: int = 0
    mixed: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)
    """The first few errors, as callers saw them."""


Answer = Sequence[tuple[str, float]]
Right = Mapping[str, Mapping[str, Answer]]
"""Release id → query → what it is answered with."""


def products() -> Iterator[SourceRow]:
    """Titles alone."""
    for number, (colour, kind) in enumerate(
        itertools.islice(itertools.cycle(itertools.product(COLOURS, KINDS)), PRODUCTS)
    ):
        title = f"Brand {number} {colour} {kind} no {number * 7}"
        yield SourceRow(f"p{number}", title.encode(), number=number)


def is_of(hits: Sequence[Hit], right: Answer) -> bool:
    """Whether these are a release's own hits; scores tell whose vector was asked with."""
    ids = [hit.id for hit in hits]
    if set(ids) != {product_id for product_id, _ in right}:
        return False
    scores = dict(right)
    return all(abs(hit.score - scores[hit.id]) < FAR for hit in hits)


class Callers:
    """Threads that share one client and ask until they are told to stop."""

    def __init__(self, search: ProductSearch, right: Right) -> None:
        self.search, self.right = search, right
        self.found = Outcome()
        self._over, self._moved = threading.Event(), threading.Condition()

    @contextmanager
    def asking(self) -> Iterator[Callers]:
        """While the block runs."""
        threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def wait_for(self, searches: int) -> None:
        """Until there were so many."""
        with self._moved:
            self._moved.wait_for(lambda: self.found.searches >= searches)

    def _ask(self, number: int) -> None:
        for turn in itertools.count(number):
            if self._over.is_set():
                return
            if turn % FORGETS == 0:
                self.search.catalog.forget()
            query = QUERIES[turn % len(QUERIES)]
            try:
                hits = self.search(query, timeout_s=TIMEOUT_S)
                of = [r for r, answers in self.right.items() if is_of(hits, answers[query])]
                error = ""
            except Exception as exc:  # whatever it is, this caller has no answer
                of, error = [], f"{type(exc).__name__}: {exc}"
            with self._moved:
                self.found.searches += 1
                self._count(of, error)
                self._moved.notify_all()

    def _count(self, of: Sequence[str], error: str) -> None:
        if error:
            self.found.errors += 1
            self.found.said += [error] if len(self.found.said) < 5 else []
        elif len(of) == 1:
            self.found.answers[of[0]] += 1
        else:
            self.found.mixed += 1


def promotions(old: str, new: str, settings: Settings, searches: int, moves: int) -> Outcome:
    """Fill a catalog with the release served at `old`, build that of `new`, and move to and fro.

    `settings` name an empty catalog.
    """
    both = settings.override(triton=f"{old},{new}", timeout_s=TIMEOUT_S)
    with (
        Encoders(both.override(triton=old)) as first,
        Encoders(both) as encoders,
        Catalog(both) as catalog,
    ):
        Push(both, first, catalog).run(products())
        releases = Releases(both, encoders, catalog)
        releases.build(products())
        right = {}
        for collection in catalog.roles().values():
            found = answers_of(collection, encoders, QUERIES, 10, TIMEOUT_S)
            answers = [[(hit.id, hit.score) for hit in hits] for hits in found.hits]
            right[collection.info.release_id] = dict(zip(QUERIES, answers, strict=True))
        check_can_tell(right)
        with ProductSearch(both) as search, Callers(search, right).asking() as callers:
            found = callers.found
            for move in range(moves):
                callers.wait_for(move * searches // moves)
                releases.promote(certain=True)
                found.promotions += 1
                callers.wait_for((2 * move + 1) * searches // (2 * moves))
                releases.rollback()
                found.rollbacks += 1
            releases.promote(certain=True)
            before = found.searches
            found.dropped = len(releases.gc(certain=True).dropped)
            callers.wait_for(max(before + 20 * CALLERS, searches))
    return found


def check_can_tell(right: Right) -> None:
    """DeployError unless every query has other answers in the other release."""
    one, other = right.values()
    for query, answer in one.items():
        hits = [Hit(product_id, score, "", {}) for product_id, score in answer]
        if is_of(hits, other[query]):
            raise DeployError(f"{query!r}: expected answers that tell two releases apart")


def every_promotion(searches: int, log: IO[str]) -> dict[str, object]:
    """On Milvus Lite and on a server, over releases of equal and of different dimension.

    So many searches on each of the four, and a promotion and a rollback every hundred, MOVES of
    each at most. Counts are sums; `places` has those of each.
    """
    from benchmarks.thin import thin_release  # torch, which no other row needs

    moves, folder = min(MOVES, -(-searches // 100)), Path("build/thin-releases")
    sizes = {size for pair in SIZES.values() for size in enumerate(pair)}
    built = {(seed, dim): thin_release(folder, dim, seed) for seed, dim in sorted(sizes)}
    places: dict[str, Outcome] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        milvus = stack.enter_context(milvus_server(scratch / "milvus", log=log))
        served = {
            key: stack.enter_context(triton(release, log=log)).grpc_address
            for key, release in built.items()
        }
        uris = {"lite": str(scratch / "{}.db"), "server": milvus.uri}
        for (backend, uri), (name, dims) in itertools.product(uris.items(), SIZES.items()):
            alias = f"products_{name.split()[0]}"
            settings = Settings(milvus=uri.format(alias), collection=alias)
            old, new = (served[key] for key in enumerate(dims))
            places[f"{backend}, {name}"] = promotions(old, new, settings, searches, moves)
    counts = ("searches", "promotions", "rollbacks", "dropped", "errors", "mixed")
    sums: dict[str, object] = {
        name: int(np.sum([getattr(found, name) for found in places.values()])) for name in counts
    }
    return (
        {"trials": sums["searches"]}
        | sums
        | {"places": {place: vars(found) for place, found in places.items()}}
    )
