"""Is a candidate fit to be searched? It is compared with the serving release, with the source, and
with what an exact search finds; what would change for users is shown.

One pass over all that the candidate holds, one over the hashes of the serving collection, and two
searches a query.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_client.audit import Found, Refusals, Reservoir, encode_again, look_inside
from retrieval_client.book import Book
from retrieval_client.catalog import Catalog, Role
from retrieval_client.changes import (
    Answers,
    Change,
    answers_like,
    answers_of,
    changes_between,
    write_report,
)
from retrieval_client.feed import HASHES, LOOK_UP_ROWS, hashes_of
from retrieval_client.fleet import Encoders
from retrieval_client.index import recall_asked
from retrieval_client.judged import Asked, ndcg
from retrieval_client.recalls import Exact
from retrieval_client.records import BUCKET, CHECKED, CONTENT_HASH, ID, TITLE
from retrieval_client.rows import Candidate, batched, candidate_from_row, is_good_id
from retrieval_client.settings import Settings
from retrieval_client.sources import SourceRow
from retrieval_client.verdict import Digest, State, Verdict
from retrieval_contract import models
from retrieval_contract.errors import CatalogError, ItemError, ReleaseMismatch
from retrieval_contract.probes import Probes

DEPTH = 10
QUERIES = 200
"""Asked of both releases to see what changes; of judged queries all are asked."""
QUERY_WORDS = 5
"""Of a title, where no queries are given."""
NDCG_LOSS = 0.01
SAMPLE = 100
"""Products of the source that are encoded again."""


@dataclass(frozen=True)
class Check:
    """One promise: what was expected, what was found."""

    name: str
    expected: str
    got: str
    passed: bool


@dataclass
class Verification:
    """All checks of a candidate against the serving release; `changes`: the most changed first."""

    release: str
    against: str
    at: str
    checks: list[Check] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    overlap: float = 1.0

    @property
    def passed(self) -> bool:
        """Every check."""
        return all(check.passed for check in self.checks)

    def say(self, name: str, expected: object, got: object, passed: bool) -> None:
        """One more check."""
        self.checks.append(Check(name, str(expected), str(got), passed))

    def verdict(self, state: State, serving: State) -> Verdict:
        """To be kept with the collection."""
        failed = tuple(check.name for check in self.checks if not check.passed)
        return Verdict(self.at, self.against, state, serving, failed)

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        changes = [change.to_json() for change in self.changes]
        rest = {name: value for name, value in vars(self).items() if name != "checks"}
        checks = [asdict(check) for check in self.checks]
        return rest | {"passed": self.passed, "checks": checks, "changes": changes}


@dataclass(frozen=True)
class Wanted:
    """What to compare with, as far as it is given."""

    source: Iterable[SourceRow] | None = None
    thumbnails: bool = True
    probes: Probes | None = None
    asked: Asked | None = None
    ndcg_loss: float = NDCG_LOSS
    lowest_overlap: float = 0.0


class Verify:
    """Verifies the candidate of one catalog; `run` records the verdict with its collection."""

    def __init__(self, settings: Settings, encoders: Encoders, catalog: Catalog) -> None:
        self.encoders, self.patience_s = encoders, settings.push_timeout_s
        self.serving = catalog.serving(max_age_s=0.0)
        found = catalog.find(Role.CANDIDATE)
        if found is None or found.name == self.serving.name:
            raise CatalogError(
                f"{catalog.alias}: expected a candidate, got none; "
                "`retrieval release build SOURCE` makes one"
            )
        self.candidate = found

    def run(self, wanted: Wanted | None = None, report: Path | None = None) -> Verification:
        """Every check; into the folder `report` go report.json and a picture of what changes."""
        wanted = wanted or Wanted()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        found = Verification(self.candidate.info.release_id, self.serving.info.release_id, now)
        asked, ours, theirs = self._ask(wanted.asked)
        taken = np.flatnonzero(ours.vectors[:QUERIES].any(axis=1))
        exact, digest = Exact(ours.vectors[taken], DEPTH), Digest()
        with Book() as book:
            looked = self._look(book, exact, digest, found)
            serving = self._against_serving(book, found)
            if wanted.source is not None:
                self._against_source(wanted, book, looked, found)
        recalls = exact.recall([ours.hits[n] for n in taken], DEPTH).tolist()
        recall, least = mean(recalls, float(not asked.texts)), recall_asked(self.candidate)
        found.say("recall", f"at least {least}", f"{recall:.4f}", recall >= least)
        self._probe(wanted.probes, found)
        judge(asked, ours, theirs, wanted.ndcg_loss, found)
        found.changes = changes_between(asked.texts[:QUERIES], theirs, ours)
        found.overlap = mean([change.overlap for change in found.changes], 1.0)
        least = wanted.lowest_overlap
        found.say("overlap", f"at least {least}", f"{found.overlap:.3f}", found.overlap >= least)
        if report:
            write_report(found.to_json(), found.changes, self.serving, self.candidate, report)
        found.verdict(digest.state, serving).record(self.candidate)
        return found

    def _ask(self, asked: Asked | None) -> tuple[Asked, Answers, Answers]:
        """What both are asked, and the answers of each: the candidate's, those of what serves.

        Where nothing is given, first words of some products' titles, evenly over the catalog;
        where those have none, for products like them.
        """
        both = self.candidate, self.serving
        if not asked or not asked.texts:
            share = models.BUCKETS * QUERIES // max(self.serving.count(), 1) + 1
            some = self.serving.query(f"{BUCKET.name} < {share}", [ID.name, TITLE.name])
            words = (" ".join(row[TITLE.name].split()[:QUERY_WORDS]) for row in some)
            asked = Asked(list(dict.fromkeys(filter(None, words)))[:QUERIES])
            if not asked.texts:
                ids = [row[ID.name] for row in some[:QUERIES]]
                ours, theirs = (answers_like(c, ids, DEPTH, self.patience_s) for c in both)
                return Asked(ids), ours, theirs
        texts = asked.texts if asked.grades else asked.texts[:QUERIES]
        ours, theirs = (answers_of(c, self.encoders, texts, DEPTH, self.patience_s) for c in both)
        return Asked(texts, asked.grades), ours, theirs

    def _said(self, wanted: Wanted, book: Book) -> Iterator[Candidate]:
        """What the source says, into the book as well."""
        for row in wanted.source or ():
            try:
                product = candidate_from_row(row, wanted.thumbnails)
            except ItemError:
                if is_good_id(row.id):
                    book.refuse(row.id)
                continue
            if book.say(product):
                yield product

    def _look(self, book: Book, exact: Exact, digest: Digest, found: Verification) -> Found:
        """The one pass over the candidate, vectors and all."""
        info = self.candidate.info
        looked = Found(info.name, info.release_id)
        strangers = 0
        for rows in self.candidate.every([*HASHES, *CHECKED]):
            looked.stored += len(rows)
            look_inside(rows, looked)
            exact.add(rows)
            digest.add(rows)
            strangers += sum(
                not row[CONTENT_HASH.name].startswith(f"{info.release_id}:") for row in rows
            )
            book.hold(info.release_id, map(hashes_of, rows))
        bad = sum(looked.counts.values())
        wanted = "finite, of length 1, as written"
        found.say("vectors", wanted, f"{bad} of {looked.stored} not", not bad)
        found.say("release of rows", info.release_id, f"{strangers} of another", not strangers)
        return looked

    def _against_serving(self, book: Book, found: Verification) -> State:
        """The one pass over what serves, which is returned."""
        ours, theirs, digest = self.candidate.info, self.serving.info, Digest()
        for rows in self.serving.every(HASHES):
            digest.add(rows)
            book.hold(theirs.release_id, map(hashes_of, rows))
        counts = self.serving.count(), self.candidate.count()
        found.say("rows", f"{counts[0]}, as serving", counts[1], counts[0] == counts[1])
        apart = Counter(kind for _, kind in book.between(ours.release_id, theirs.release_id))
        got = ", ".join(f"{count} {kind}" for kind, count in sorted(apart.items()))
        found.say("row by row", "made from the same source rows", got or "all are", not apart)
        return digest.state

    def _against_source(
        self, wanted: Wanted, book: Book, looked: Found, found: Verification
    ) -> None:
        info, sample = self.candidate.info, Reservoir(SAMPLE)
        refusals = Refusals(self.candidate, self.encoders, book)
        for products in batched(self._said(wanted, book), LOOK_UP_ROWS):
            refusals.among(products)
            for product in products:
                sample.offer(product)
        wrong, refused = book.differences(info.release_id), book.refused(info.release_id)
        got = ", ".join(f"{count} {kind}" for kind, count in asdict(wrong).items() if count)
        got = (got or "all are") + (f"; {refused} are refused by its server" if refused else "")
        found.say("source", "every row as it says", got, not wrong.total)
        encode_again(self.candidate, self.encoders, sample.items, looked)
        differs = looked.counts["differs"]
        got = f"{differs} of {looked.sampled} give another vector"
        good = not differs and (looked.sampled > 0 or not sample.items)
        found.say("encoded again", "the vectors that are stored", got, good)

    def _probe(self, probes: Probes | None, found: Verification) -> None:
        if probes is None:
            return
        expected = f"the golden vectors of {probes.release_id}"
        try:
            cosine = self.encoders.for_collection(self.candidate.info).probe(probes)
        except ReleaseMismatch as exc:
            found.say("probes", expected, exc, False)
        else:
            found.say("probes", expected, f"lowest cosine {cosine:.6f}", True)


def judge(asked: Asked, ours: Answers, theirs: Answers, loss: float, found: Verification) -> None:
    """nDCG of both, where there are judgements."""
    if not asked.grades:
        return
    new, old = (
        mean(
            [
                ndcg([hit.id for hit in hits], grades, DEPTH)
                for hits, grades in zip(answers.hits, asked.grades, strict=True)
            ],
            0.0,
        )
        for answers in (ours, theirs)
    )
    expected = f"at least {old:.4f} - {loss}, as serving"
    found.say(f"nDCG@{DEPTH}", expected, f"{new:.4f}", new >= old - loss)


def mean(values: list[float], of_none: float) -> float:
    """Arithmetic; `of_none` of no values."""
    return sum(values) / len(values) if values else of_none
