"""What the source says and what each collection holds, side by side on disk: memory is bounded.

In a temporary file, which nobody else reads and nothing survives: after a kill the collection
itself says how far it got.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from retrieval_client.rows import Candidate
from retrieval_contract.errors import RetrievalError

ON_DISK = ""
"""SQLite's name for a database in a temporary file that goes when it is closed."""
CACHE_KB = 32_000
SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -{CACHE_KB};
CREATE TABLE source (id TEXT PRIMARY KEY, content TEXT, row_hash TEXT) WITHOUT ROWID;
CREATE TABLE stored (
    release TEXT, id TEXT, content_hash TEXT, row_hash TEXT, PRIMARY KEY (release, id)
) WITHOUT ROWID;
CREATE TABLE refused (release TEXT, id TEXT, PRIMARY KEY (release, id)) WITHOUT ROWID;
"""
REFUSED = ""
"""In place of the hashes of a row that the source has, but not in a state that can be stored."""


@dataclass(frozen=True)
class Stored:
    """What a collection says of one row; each hash as in `rows.Candidate`."""

    content_hash: str
    row_hash: str


@dataclass(frozen=True)
class Differences:
    """Rows by what is wrong with them, of one collection against the source."""

    missing: int
    stale: int
    other_release: int
    surplus: int

    @property
    def total(self) -> int:
        """Rows that are not as the source says."""
        return self.missing + self.stale + self.other_release + self.surplus


class Book:
    """Not shared between threads."""

    def __init__(self) -> None:
        self._db = sqlite3.connect(ON_DISK, isolation_level=None, check_same_thread=False)
        self._db.executescript(SCHEMA)

    def __enter__(self) -> Book:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._db.close()
        if isinstance(exc, sqlite3.Error):
            raise RetrievalError(
                f"push: its temporary file cannot be written ({exc}); free space there, or name "
                "another folder as SQLITE_TMPDIR"
            ) from exc

    def say(self, candidate: Candidate) -> bool:
        """The source has this row; False if an earlier one that was not refused has its id."""
        done = self._db.execute(
            """
            INSERT INTO source VALUES (?1, ?2, ?3)
            ON CONFLICT (id) DO UPDATE SET content = ?2, row_hash = ?3 WHERE content = ?4
            """,
            (candidate.id, candidate.content, candidate.row_hash, REFUSED),
        )
        return done.rowcount == 1

    def refuse(self, product_id: str) -> None:
        """The source has a row of this id that cannot be stored: what is stored under it stays."""
        self._db.execute(
            "INSERT OR IGNORE INTO source VALUES (?, ?, ?)", (product_id, REFUSED, REFUSED)
        )

    def take_back(self, release_id: str, product_id: str) -> None:
        """As `refuse`, of a row that was said before, and that the server of a release refuses."""
        self._db.execute("INSERT OR IGNORE INTO refused VALUES (?, ?)", (release_id, product_id))

    def is_refused(self, release_id: str, product_id: str) -> bool:
        """Whether the server of a release is known to refuse this row."""
        wanted = "SELECT 1 FROM refused WHERE release = ? AND id = ?"
        return self._db.execute(wanted, (release_id, product_id)).fetchone() is not None

    def refused(self, release_id: str) -> int:
        """Rows that the server of a release is known to refuse."""
        (count,) = self._db.execute(
            "SELECT count(*) FROM refused WHERE release = ?", (release_id,)
        ).fetchone()
        return int(count)

    def says(self, product_id: str) -> bool:
        """Whether the source has a row of this id."""
        wanted = "SELECT 1 FROM source WHERE id = ?"
        return self._db.execute(wanted, (product_id,)).fetchone() is not None

    def ids(self) -> Iterator[str]:
        """Every id of the source."""
        return (product_id for (product_id,) in self._db.execute("SELECT id FROM source"))

    def hold(self, release_id: str, rows: Iterable[tuple[str, str, str]]) -> None:
        """The collection of a release holds these: id, content hash, row hash."""
        self._db.execute("BEGIN")
        self._db.executemany(
            "INSERT OR REPLACE INTO stored VALUES (?, ?, ?, ?)",
            ((release_id, *row) for row in rows),
        )
        self._db.execute("COMMIT")

    def empty(self, release_id: str) -> None:
        """Forget what the collection of a release holds."""
        self._db.execute("DELETE FROM stored WHERE release = ?", (release_id,))

    def stored(self, release_id: str, product_id: str) -> Stored | None:
        """What is known to be stored under an id."""
        found = self._db.execute(
            "SELECT content_hash, row_hash FROM stored WHERE release = ? AND id = ?",
            (release_id, product_id),
        ).fetchone()
        return Stored(*found) if found else None

    def held(self, release_id: str) -> int:
        """Rows that the collection of a release is known to hold."""
        (count,) = self._db.execute(
            "SELECT count(*) FROM stored WHERE release = ?", (release_id,)
        ).fetchone()
        return int(count)

    def surplus(self, release_id: str) -> Iterator[str]:
        """Ids that are stored and that the source does not have."""
        found = self._db.execute(
            "SELECT id FROM stored WHERE release = ? AND id NOT IN (SELECT id FROM source)",
            (release_id,),
        )
        return (product_id for (product_id,) in found)

    def wrong(self, release_id: str) -> Iterator[tuple[str, str]]:
        """Ids that are not stored as the source says, each with "missing", "stale" or
        "other_release"."""
        return iter(
            self._db.execute(
                """
                SELECT source.id, CASE
                    WHEN stored.id IS NULL THEN 'missing'
                    WHEN substr(stored.content_hash, 1, length(?1) + 1) <> ?1 || ':'
                    THEN 'other_release'
                    ELSE 'stale' END
                FROM source LEFT JOIN stored ON stored.release = ?1 AND stored.id = source.id
                WHERE source.content <> ?2 AND (
                    stored.id IS NULL
                    OR stored.content_hash <> ?1 || ':' || source.content
                    OR stored.row_hash <> source.row_hash)
                    AND NOT EXISTS (SELECT 1 FROM refused WHERE release = ?1 AND id = source.id)
                """,
                (release_id, REFUSED),
            )
        )

    def between(self, release_id: str, other: str) -> Iterator[tuple[str, str]]:
        """Ids whose rows two collections do not share, each with "missing" (the first lacks it),
        "surplus" (the second does) or "stale" (made from different source rows)."""
        return iter(
            self._db.execute(
                """
                SELECT theirs.id, CASE WHEN ours.id IS NULL THEN 'missing' ELSE 'stale' END
                FROM stored AS theirs LEFT JOIN stored AS ours
                    ON ours.release = ?1 AND ours.id = theirs.id
                WHERE theirs.release = ?2
                    AND (ours.id IS NULL OR ours.row_hash <> theirs.row_hash)
                UNION ALL
                SELECT id, 'surplus' FROM stored AS ours WHERE release = ?1 AND NOT EXISTS (
                    SELECT 1 FROM stored WHERE release = ?2 AND id = ours.id)
                """,
                (release_id, other),
            )
        )

    def differences(self, release_id: str) -> Differences:
        """How many of each."""
        counts = {"missing": 0, "stale": 0, "other_release": 0}
        for _, what in self.wrong(release_id):
            counts[what] += 1
        return Differences(**counts, surplus=sum(1 for _ in self.surplus(release_id)))
