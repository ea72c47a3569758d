"""python -m benchmarks.ingest_storage: a Milvus Lite whose disk is full, torn, read-only or taken.

Each trouble is made on purpose; then: is it said clearly, does a look at the catalog say what is
wrong, and does it repair that? The encoder is a stand-in, so that every vector can be compared.
A step is a process of its own, because Milvus Lite holds its folder until its process ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stand_in import StandIns
from retrieval_client.audit import Audit
from retrieval_client.catalog import Catalog
from retrieval_client.push import Push
from retrieval_client.settings import Settings
from retrieval_client.sources import SourceRow
from retrieval_contract.errors import RetrievalError

RELEASE, DIM = "c" * 16, 64
ROWS = 3000
WORDS = "an attribute that takes some room, as real ones do, " * 8
SMALL_BYTES, LARGE_MB = 600, 256
"""A row, where the disk is to become full; and of the whole, where there is room."""
NAMESPACE = ["unshare", "--mount", "--map-root-user"]


# ── one step, in a process of its own ────────────────────────────────────────────────────
def rows(count: int) -> Iterator[SourceRow]:
    """What the source says."""
    for at in range(count):
        yield SourceRow(f"p{at}", f"product {at}".encode(), attributes={"about": f"{at} {WORDS}"})


def step(what: str, place: Path, count: int) -> dict[str, Any]:
    """Push, audit, "repair" (an audit, then a push), search, or compare every row ("check")."""
    settings = Settings(milvus=str(place), retry_s=1.0, push_timeout_s=20.0)
    stand_ins = StandIns(RELEASE, vector_dim=DIM)
    with Catalog(settings) as catalog:
        if what in ("audit", "repair"):
            audit = Audit(catalog)
            report = audit.run(rows(count))
            if what == "audit":
                return dict(report.found[0].counts)
            audit.mend(report)
        if what in ("push", "repair"):
            fed = Push(settings, stand_ins, catalog).run(rows(count))  # type: ignore[arg-type]
            names = ("encoded", "renewed", "stored", "unchanged")
            return {name: getattr(fed, name) for name in names}
        collection, encoder = catalog.serving(), stand_ins.by_release[RELEASE]
        if what == "search":
            (hits,) = collection.search(encoder.vector("product 1", b"")[None])
            return {"hits": len(hits), "first": hits[0].id if hits else ""}
        there = {r["id"]: r for s in collection.every(["title", "vector", "attributes"]) for r in s}
        wrong = 0
        for row in rows(count):
            found, title = there.pop(row.id, None), row.title.decode()
            wrong += found is not None and not (
                found["title"] == title
                and found["attributes"] == row.attributes
                and np.allclose(found["vector"], encoder.vector(title, b""), atol=1e-6)
            )
            wrong += found is None
        return {"wrong": wrong + len(there), "counted": collection.count()}


@dataclass
class Said:
    """How a step ended: what it found, or the error that it said, and whether that was ours."""

    found: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    clear: bool = True


def said(what: str, place: Path, count: int, around: Sequence[str] = ()) -> Said:
    """A step in a process of its own; `around` is what it is started with."""
    command = [*around, sys.executable, "-m", "benchmarks.ingest_storage", what, str(place)]
    done = subprocess.run([*command, "--rows", str(count)], capture_output=True, text=True)
    try:
        return Said(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return Said(error=done.stderr[-600:], clear=False)


# ── the troubles ─────────────────────────────────────────────────────────────────────────
@dataclass
class Storage:
    """Of each trouble: what was seen. `unclear`: errors that were not said as ours; `lost`: rows
    that were not as they should be after the push that repairs."""

    trials: int = 0
    unclear: int = 0
    lost: int = 0
    unseen: int = 0
    """Troubles of which the audit before the repair named fewer rows than were wrong."""
    seen: dict[str, Any] = field(default_factory=dict)


def repaired(name: str, place: Path, count: int, found: Storage, **seen: Any) -> None:
    """Look, repair, compare."""
    found.trials += 1
    before, look = said("check", place, count), said("audit", place, count)
    push, after = said("repair", place, count), said("check", place, count)
    all_said = [before, look, push, after, *(s for s in seen.values() if isinstance(s, Said))]
    found.unclear += sum(not each.clear for each in all_said)
    found.lost += after.found.get("wrong", count)
    gone = before.found.get("wrong", 0)
    told = bool(look.error) or sum(look.found.values()) >= gone
    found.unseen += not told
    found.seen[name] = {
        "gone": before.error[:300] or gone,
        "look": look.error[:300] or look.found,
        "push": push.error[:300] or push.found,
        "after": after.error[:300] or after.found,
    } | {k: asdict(v) if isinstance(v, Said) else v for k, v in seen.items()}
    print(name, found.seen[name], file=sys.stderr, flush=True)


def cut(place: Path, pattern: str) -> list[str]:
    """The last third of the files is gone."""
    names = []
    for path in place.rglob(pattern):
        if path.is_file() and path.stat().st_size > 100:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size * 2 // 3)
            names.append(path.name)
    return names


def scratch(place: Path, pattern: str) -> list[str]:
    """Bytes in the middle are others, by one bit each."""
    names = []
    for path in sorted(place.rglob(pattern))[:1]:
        with path.open("r+b") as file:
            middle = path.stat().st_size // 2
            file.seek(middle)
            changed = bytes(byte ^ 1 for byte in file.read(64))
            file.seek(middle)
            file.write(changed)
        names.append(path.name)
    return names


def unflushed(place: Path, count: int) -> None:
    """A push that was killed before its end: rows are in the log alone."""
    code = (
        "import os; from benchmarks import ingest_storage as s; from retrieval_client import "
        "Collection; Collection.flush = lambda self: os._exit(0); "
        f"s.step('push', s.Path({str(place)!r}), {count})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def torn(folder: Path, count: int, found: Storage) -> None:
    """Files cut short or changed."""
    kinds: dict[str, tuple[bool, Callable[[Path, str], list[str]], str]] = {
        "log_cut": (False, cut, "*wal*/*"),
        "index_cut": (True, cut, "*.idx"),
        "parquet_cut": (True, cut, "*.parquet"),
        "parquet_changed": (True, scratch, "*.parquet"),
        "manifest_cut": (True, cut, "*manifest*"),
    }
    for name, (flushed, harm, pattern) in kinds.items():
        place = folder / f"{name}.db"
        if flushed:
            said("push", place, count)
        else:
            unflushed(place, count)
        harmed, refused = harm(place, pattern), Said()
        if not harmed:
            raise RetrievalError(f"{name}: expected files like {pattern} in {place}, got none")
        if pattern != "*wal*/*":
            refused = said("audit", place, count)
        if refused.error:  # as it says: its file is moved away
            found.unclear += "move a file that is damaged away" not in refused.error
            for path in [path for file in harmed for path in place.rglob(file)]:
                path.unlink()
        repaired(name, place, count, found, harmed=harmed, refused=refused)


def taken(folder: Path, count: int, found: Storage) -> None:
    """Another process has it open."""
    place = folder / "taken.db"
    said("push", place, count)
    code = (
        "import sys; from retrieval_client import Catalog, Settings; "
        f"Catalog(Settings(milvus={str(place)!r})).serving(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout
        holder.stdout.readline()
        refused = said("push", place, count)
        found.unclear += "may hold it" not in refused.error
    finally:
        holder.kill()
        holder.wait()
    repaired("taken", place, count, found, refused=refused)


def mounted(what: str, folder: Path, count: int) -> Storage:
    """In a mount namespace of one's own: a small disk, or a folder that nobody may write to."""
    found, place = Storage(), folder / "disk" / "catalog.db"
    place.parent.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(place.parent)], check=True)

    if what == "full":
        mount("-t", "tmpfs", "-o", f"size={SMALL_BYTES * count}", "none")
        refused = said("push", place, count)
        found.unclear += not refused.error
        reads = said("search", place, count)
        mount("-o", f"remount,size={LARGE_MB}m")
        repaired("disk_full", place, count, found, refused=refused, reads=reads)
    else:
        mount("-t", "tmpfs", "none")
        said("push", place, count)
        mount("-o", "remount,ro")
        refused, reads = said("push", place, count + 1), said("search", place, count)
        found.unclear += not refused.error
        mount("-o", "remount,rw")
        repaired("read_only", place, count, found, refused=refused, reads=reads)
    return found


def storage(count: int = ROWS) -> Storage:
    """All of them."""
    found = Storage()
    with tempfile.TemporaryDirectory() as name:
        for what in ("full", "readonly"):
            command = [*NAMESPACE, sys.executable, "-m", "benchmarks.ingest_storage", what, name]
            (Path(name) / what).mkdir()
            command[-1] = str(Path(name) / what)
            done = subprocess.run(
                [*command, "--rows", str(count)], stdout=subprocess.PIPE, text=True
            )
            if done.returncode:
                raise RetrievalError(f"{' '.join(command)}: see above")
            more = Storage(**json.loads(done.stdout.splitlines()[-1]))
            found.trials += more.trials
            found.unclear += more.unclear
            found.lost += more.lost
            found.unseen += more.unseen
            found.seen |= more.seen
        taken(Path(name), count, found)
        torn(Path(name), count, found)
    return found


def main() -> None:
    """Command line: everything, or one step of it."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.ingest_storage", description=__doc__)
    top.add_argument("what", nargs="?", default="all")
    top.add_argument("place", type=Path, nargs="?")
    top.add_argument("--rows", type=int, default=ROWS)
    args = top.parse_args()
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    if args.what == "all":
        print(json.dumps(asdict(storage(args.rows))))
    elif args.what in ("full", "readonly"):
        print(json.dumps(asdict(mounted(args.what, args.place, args.rows))))
    else:
        try:
            answer = Said(step(args.what, args.place, args.rows))
        except RetrievalError as exc:
            answer = Said(error=f"{type(exc).__name__}: {exc}")
        print(json.dumps(asdict(answer)))


if __name__ == "__main__":
    main()
