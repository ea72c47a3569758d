"""Releases of a catalog: built beside the serving one, promoted and taken back by one alias move.

    serving A            build B       verify, shadow      promote            gc
    products ──► A       … ► A         … ► A               products ──► B     … ► B
                         candidate ► B                     previous ──► A

The encoder of each is a server of its own (`fleet.py`), and a search takes collection and encoder
of one release: so an alias is all that moves. Every command may die between two steps; then a
collection has two roles, or is held by a rollback alone; `status` says so, and the next `promote`,
`rollback` or `gc` finishes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from retrieval_client.book import Book
from retrieval_client.catalog import Catalog, Role
from retrieval_client.collection import Collection
from retrieval_client.feed import HASHES, Plan, hashes_of
from retrieval_client.fleet import Encoders
from retrieval_client.push import Push, PushReport
from retrieval_client.rows import Reject
from retrieval_client.settings import Settings
from retrieval_client.sources import SourceRow
from retrieval_client.verdict import Verdict, state_of
from retrieval_contract.errors import CatalogError, NotVerified, ReleaseMismatch

TRIAL = "is it there"
"""A query: readiness does not tell, an inference does."""


@dataclass(frozen=True)
class Standing:
    """One collection: its roles, what it holds, the last verdict on it, and who encodes for it.

    `rows` is None, and `problem` says why, where it cannot be read.
    """

    name: str
    release_id: str
    roles: tuple[Role, ...]
    rows: int | None
    verdict: Verdict | None
    served_by: str
    problem: str = ""


@dataclass
class Cleared:
    """What `gc` dropped, and what it left: collection → why."""

    dropped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


class Releases:
    """What may be done with the releases of one catalog. Not for two operators at a time."""

    def __init__(self, settings: Settings, encoders: Encoders, catalog: Catalog) -> None:
        self.settings, self.encoders, self.catalog = settings, encoders, catalog

    # ── build ────────────────────────────────────────────────────────────────────────────
    def build(
        self,
        rows: Iterable[SourceRow],
        release_id: str | None = None,
        plan: Plan | None = None,
        progress: Callable[[PushReport], None] = lambda report: None,
        on_reject: Callable[[Reject], None] = lambda reject: None,
        *,
        rows_expected: int | None = None,
    ) -> PushReport:
        """Make the candidate and push the source; may be killed, and run again with any source.

        It is a push: the serving collection gets what it lacks of the source, too, and pushes that
        run meanwhile reach both. Raises as Push, and ReleaseMismatch when it is not plain which
        release to build.
        """
        self.prepare(release_id)
        push = Push(self.settings, self.encoders, self.catalog, plan)
        return push.run(rows, progress, on_reject, rows_expected=rows_expected)

    def prepare(self, release_id: str | None = None) -> Collection:
        """The candidate's collection, made if there is none."""
        served = self.encoders.served()
        roles = self.roles()
        there = roles.get(Role.CANDIDATE)
        if there and there.name == roles[Role.SERVING].name:  # a promotion that died at its end
            self.catalog.unpoint(Role.CANDIDATE)
            there = None
        release_id = release_id or (there.info.release_id if there else self._new(served, roles))
        if there and there.info.release_id != release_id:
            raise ReleaseMismatch(
                f"candidate: expected none, or one of release {release_id}, got "
                f"{there.info.release_id}; promote it, or `retrieval release abort` it"
            )
        for role in (Role.SERVING, Role.PREVIOUS):
            if role in roles and roles[role].info.release_id == release_id:
                raise ReleaseMismatch(
                    f"release {release_id}: expected one that is not in use, got the "
                    f"{role.name.lower()} one; give another (--release), or `rollback`"
                )
        if release_id not in served:
            raise ReleaseMismatch(
                f"release {release_id}: expected a server of it, got {', '.join(served)}; start "
                "one beside the others, and give all addresses (--triton, with commas)"
            )
        return self.catalog.prepare(release_id, served[release_id].vector_dim, Role.CANDIDATE)

    def _new(self, served: Iterable[str], roles: dict[Role, Collection]) -> str:
        """The one served release that has no role."""
        known = {collection.info.release_id for collection in roles.values()}
        new = sorted(set(served) - known)
        if len(new) != 1:
            raise ReleaseMismatch(
                f"Triton at {self.settings.triton}: expected one release that is not in use yet, "
                f"got {', '.join(new) or 'none'}; serve the new one beside the others and give "
                "all addresses (--triton, with commas), or say which (--release)"
            )
        return new[0]

    # ── one alias move each ──────────────────────────────────────────────────────────────
    def promote(self, *, certain: bool = False) -> Collection:
        """Searches see the candidate from now on; what they saw is kept to go back to.

        Raises NotVerified unless it was verified as it is now, or `certain`.
        """
        roles = self._let_go(self.roles())
        serving, candidate = roles[Role.SERVING], roles.get(Role.CANDIDATE)
        if candidate is None:
            raise CatalogError(
                f"{self.catalog.alias}: expected a candidate, got none beside release "
                f"{serving.info.release_id}; `retrieval release build SOURCE` makes one"
            )
        if candidate.name != serving.name:
            if not certain:
                candidate.load()
                serving.load()
                check_verdict(candidate, serving)
            self._try(candidate)
            self.catalog.point(serving.name, Role.PREVIOUS)
            self.catalog.point(candidate.name, Role.SERVING)
        self.catalog.unpoint(Role.CANDIDATE)
        return candidate

    def rollback(self) -> Collection:
        """Searches see the previous release again; the one they saw is the candidate once more.

        Where another candidate is being built already, it becomes the previous one instead.
        """
        roles = self.roles()
        serving, held = roles[Role.SERVING], roles.get(Role.HELD)
        roles = self._let_go(roles)
        if held and held.name != serving.name:  # a rollback that died after its move
            return serving
        previous = roles.get(Role.PREVIOUS)
        if previous is None:
            raise CatalogError(
                f"{self.catalog.alias}: expected a previous release to go back to, got none beside "
                f"{serving.info.release_id}; build the one that you want"
            )
        if previous.name != serving.name:
            self._try(previous)
            candidate = roles.get(Role.CANDIDATE, serving)
            if candidate.name != serving.name:
                self.catalog.point(serving.name, Role.HELD)
                self.catalog.point(previous.name, Role.SERVING)
                self._let_go({**roles, Role.SERVING: previous, Role.HELD: serving})
                return previous
            self.catalog.point(serving.name, Role.CANDIDATE)
            self.catalog.point(previous.name, Role.SERVING)
        self.catalog.unpoint(Role.PREVIOUS)
        return previous

    def _let_go(self, roles: dict[Role, Collection]) -> dict[Role, Collection]:
        """The roles, with what a rollback held as the previous release where that has moved."""
        held = roles.get(Role.HELD)
        if held is None:
            return roles
        if held.name != roles[Role.SERVING].name:
            self.catalog.point(held.name, Role.PREVIOUS)
            roles = {**roles, Role.PREVIOUS: held}
        self.catalog.unpoint(Role.HELD)
        return {role: each for role, each in roles.items() if role is not Role.HELD}

    def _try(self, collection: Collection) -> None:
        """Its server encodes, and it can be searched; raises what a search would."""
        collection.load()
        encoded = self.encoders.for_collection(collection.info).encode_queries([TRIAL], fresh=True)
        collection.search(encoded.vectors)

    # ── clearing away ────────────────────────────────────────────────────────────────────
    def abort(self) -> Collection:
        """Drop the candidate, unless it is in use."""
        roles = self.roles()
        if (candidate := roles.pop(Role.CANDIDATE, None)) is None:
            raise CatalogError(f"{self.catalog.alias}: expected a candidate, got none")
        self.catalog.unpoint(Role.CANDIDATE)
        if candidate.name not in {collection.name for collection in roles.values()}:
            self.catalog.drop(candidate)
        return candidate

    def gc(self, *, certain: bool = False) -> Cleared:
        """Drop what no role needs, and the previous release if `certain`; never what is searched.

        An alias goes before its collection: a later Milvus refuses, and an earlier one leaves it.
        """
        roles, cleared = self._let_go(self.roles()), Cleared()
        serving = roles[Role.SERVING].name
        for role in (Role.CANDIDATE, Role.PREVIOUS):
            found = roles.get(role)
            if found and (found.name == serving or (certain and role is Role.PREVIOUS)):
                self.catalog.unpoint(role)
                del roles[role]
        kept = {collection.name: role for role, collection in roles.items()}
        for name in self.catalog.built():
            if name in kept:
                if kept[name] is Role.PREVIOUS:
                    cleared.left[name] = "kept for a rollback; `gc --yes` drops it"
            elif aliases := self.catalog.aliases_of(name):
                cleared.left[name] = f"somebody calls it {', '.join(aliases)}"
            else:
                self.catalog.drop(name)
                cleared.dropped.append(name)
        return cleared

    # ── looking ──────────────────────────────────────────────────────────────────────────
    def status(self) -> list[Standing]:
        """Every collection of the catalog, the serving one first."""
        roles, encoders = self.roles(), self.encoders.sort()
        found = []
        for name, release_id in self.catalog.built().items():
            mine = tuple(role for role, each in roles.items() if each.name == name)
            by = encoders[release_id].address if release_id in encoders else ""
            try:
                collection = roles[mine[0]] if mine else self.catalog.of_name(name)
                if not collection:
                    continue
                collection.load()
                rows, verdict, problem = collection.count(), Verdict.of(collection), ""
            except CatalogError as exc:
                rows, verdict, problem = None, None, str(exc)
            found.append(Standing(name, release_id, mine, rows, verdict, by, problem))
        order = list(Role)
        return sorted(found, key=lambda s: order.index(s.roles[0]) if s.roles else len(order))

    def roles(self) -> dict[Role, Collection]:
        """What each role means, not loaded; CollectionGone where nothing was pushed yet."""
        found = self.catalog.named()
        if Role.SERVING not in found:
            self.catalog.serving(max_age_s=0.0)  # raises, and says what to do
        return found


def check_verdict(candidate: Collection, serving: Collection) -> None:
    """NotVerified unless the last verdict on the candidate was good, and is of what both hold."""
    verdict, release = Verdict.of(candidate), candidate.info.release_id
    step = "`retrieval release verify`, or say --yes"
    if verdict is None:
        raise NotVerified(f"release {release}: expected it verified, got no verdict; {step}")
    if verdict.failed:
        raise NotVerified(
            f"release {release}: expected every check passed, got {', '.join(verdict.failed)} "
            f"failed at {verdict.at}; see the report, mend it and {step}"
        )
    if verdict.against != serving.info.release_id:
        raise NotVerified(
            f"release {release}: expected it verified against {serving.info.release_id}, which "
            f"serves, got {verdict.against}; {step}"
        )
    for collection, then in ((candidate, verdict.state), (serving, verdict.serving)):
        if then != (now := state_of(collection)):
            raise NotVerified(
                f"release {release}: expected {collection.name} as it was verified at {verdict.at} "
                f"({then.rows} rows), got other rows ({now.rows}); push the source, which reaches "
                f"both, and {step}"
            )


def apart(one: Collection, other: Collection) -> Counter[str]:
    """Rows that the two do not share, by what is wrong with the first (`Book.between`)."""
    with Book() as book:
        for each in (one, other):
            for rows in each.every(HASHES):
                book.hold(each.info.release_id, map(hashes_of, rows))
        return Counter(kind for _, kind in book.between(one.info.release_id, other.info.release_id))


def unfinished(standings: Iterable[Standing]) -> list[str]:
    """What a command that died has left, and how to go on."""
    said = []
    for each in standings:
        roles = set(each.roles)
        if each.problem:
            said.append(f"{each.name} cannot be read: {each.problem}")
        if {Role.SERVING, Role.CANDIDATE} <= roles:
            said.append(
                f"{each.name} serves and is still the candidate: `promote` ends a promotion, "
                "`rollback` goes back"
            )
        if {Role.SERVING, Role.PREVIOUS} <= roles:
            said.append(
                f"{each.name} serves and is the previous one as well: `promote` goes on, "
                "`rollback` ends a rollback"
            )
        if Role.HELD in roles:
            said.append(f"{each.name} is held by a rollback that died: `rollback` ends it")
        if not roles:
            said.append(f"{each.name} has no role: `gc` drops it")
        elif not each.served_by:
            said.append(
                f"{each.name}: nobody serves release {each.release_id}; pushes need it as long as "
                "it has a role"
            )
    return said
