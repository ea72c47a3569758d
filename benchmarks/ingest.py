"""Kills while products are pushed: what is lost, doubled, stale or mixed after the next run?

The `retrieval push` command itself is killed, or the Milvus that it writes to. A round changes the
source (titles, prices, photos taken away or swapped, products gone and new), kills some pushes of
it at random moments, each of which goes on from what the one before left, lets one run to its end,
and then compares the whole catalog with the source, row by row (`ingest_state.py`).
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from benchmarks.ingest_state import State, compared
from deploy.milvus import MilvusServer, milvus_server
from deploy.server import triton
from retrieval_client.settings import Settings
from retrieval_client.sources import Source

PRODUCTS = 5000
"""In the source at any time."""
CHANGED, PHOTOS, PRICED, GONE = 0.012, 0.006, 0.06, 0.004
"""Shares of the source, a round: titles, photos, prices alone; gone, and as many new ones."""
WITH_PHOTO = 0.7
SPAN_S = 9.0
"""A push is killed at any moment of so many seconds after it began to read its source; later, at
any moment of what the last one took that nobody disturbed."""
KILLS = (4, 12)
"""In a round, fewest and most."""
PUSH_S = 1800.0

Product = dict[str, Any]


class Shelf:
    """A source that changes: JSON lines, and photos in files beside it."""

    def __init__(self, folder: Path, source: Path, size: int, seed: int = 0) -> None:
        """`size` products of `source` are there at any time; others come and go."""
        self.path = folder / "products.jsonl"
        self._rng = random.Random(seed)
        (folder / "photos").mkdir(parents=True)
        self._all: list[Product] = []
        good = (row for row in Source(source).rows() if row.problem is None and row.title)
        for row in itertools.islice(good, size + size // 4 + 1):
            product: Product = {"id": row.id, "title": row.title.decode(), "price": 9.5}
            if row.image and self._rng.random() < WITH_PHOTO:
                photo = folder / "photos" / f"{len(self._all)}.jpg"
                photo.write_bytes(row.image)
                product["image"] = str(photo.relative_to(folder))
            self._all.append(product | row.attributes)
        self._photos = [product["image"] for product in self._all if "image" in product]
        self.there = self._all[: min(size, len(self._all) - 1)]
        self._away = self._all[len(self.there) :]
        self.touched: list[str] = []
        self._write()

    def change(self, round_number: int) -> None:
        """Some of everything; `touched` are the ids of those with another title or photo, or none
        before."""
        size, rng = len(self.there), self._rng
        places = list(range(size))
        gone = set(rng.sample(places, max(1, min(int(GONE * size), len(self._away)))))
        self.touched = []
        for at in rng.sample(places, max(1, int(CHANGED * size))):
            self.there[at] = {**self.there[at], "title": f"{self._title(at)} {round_number}"}
            self.touched.append(self.there[at]["id"])
        for at in rng.sample(places, max(2, int(PHOTOS * size))):
            before = self.there[at].get("image")
            others = [photo for photo in self._photos if photo != before]
            product = {name: value for name, value in self.there[at].items() if name != "image"}
            if others and (before is None or rng.random() < 0.5):
                product["image"] = rng.choice(others)
            self.there[at] = product
            self.touched.append(product["id"])
        for at in rng.sample(places, max(1, int(PRICED * size))):
            self.there[at] = {**self.there[at], "price": round(rng.uniform(1, 99), 2)}
        leaving = [self.there[at] for at in gone]
        staying = [product for at, product in enumerate(self.there) if at not in gone]
        coming = [self._away.pop(0) for _ in range(min(len(gone), len(self._away)))]
        self._away += leaving
        self.there = staying + coming
        self.touched += [product["id"] for product in coming]
        self._write()

    def _title(self, at: int) -> str:
        words = str(self.there[at]["title"]).split()
        return " ".join(words[:-1] if words[-1].isdigit() else words)

    def _write(self) -> None:
        lines = (json.dumps(product) + "\n" for product in self.there)
        self.path.write_text("".join(lines), "utf-8")


@dataclass
class Kills:
    """What came of it. `kills`: of pushes, or of Milvus, that hit one at work; `ended`: pushes
    that were through before their moment came. `stored`: rows that pushes that lived say of
    themselves; `went_on`: pushes that outlived the death of Milvus, `gave_up` those that did not.
    """

    trials: int = 0
    kills: int = 0
    ended: int = 0
    checks: int = 0
    rows_checked: int = 0
    went_on: int = 0
    gave_up: int = 0
    failed_runs: int = 0
    encoded: int = 0
    renewed: int = 0
    deleted: int = 0
    span_s: float = SPAN_S
    lost: int = 0
    surplus: int = 0
    duplicate: int = 0
    stale: int = 0
    mixed_release: int = 0
    wrong_vector: int = 0
    unfound: int = 0
    disk_mb: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, state: State) -> None:
        """One comparison."""
        self.checks += 1
        self.rows_checked += state.rows
        for name in WRONG:
            setattr(self, name, getattr(self, name) + getattr(state, name))
        self.errors += state.examples

    def ran(self, report: dict[str, int]) -> None:
        """A push that lived says what it did."""
        self.encoded += report["encoded"]
        self.renewed += report["renewed"]
        self.deleted += report["deleted"]


WRONG = ("lost", "surplus", "duplicate", "stale", "mixed_release", "wrong_vector", "unfound")


def push_command(settings: Settings, source: Path, *more: str) -> list[str]:
    """The command as users type it, that deletes what the source no longer has."""
    command = [sys.executable, "-m", "retrieval_client", "push", str(source), "--json", "--sync"]
    command += ["--rejects", str(source.with_suffix(".rejects")), "--triton", settings.triton]
    command += ["--milvus", settings.milvus, "--collection", settings.collection]
    return [*command, "--retry-s", str(settings.retry_s), *more]


def start_push(settings: Settings, source: Path, log: IO[str]) -> subprocess.Popen[str]:
    """Under way: it has opened the file of its rejects. Its report comes on stdout."""
    rejects = source.with_suffix(".rejects")
    rejects.unlink(missing_ok=True)
    command = push_command(settings, source)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    while not rejects.exists() and process.poll() is None:
        time.sleep(0.02)
    return process


def undisturbed(settings: Settings, shelf: Shelf, found: Kills, log: IO[str]) -> None:
    """One push to its end, and a look at everything."""
    process, started = start_push(settings, shelf.path, log), time.monotonic()
    said, _ = process.communicate(timeout=PUSH_S)
    found.span_s = max(1.0, min(SPAN_S * 4, time.monotonic() - started))
    if process.returncode:
        found.failed_runs += 1
        found.errors.append(f"a push that nobody disturbed: {said}")
    else:
        found.ran(json.loads(said.splitlines()[-1]))
    found.add(compared(settings, shelf.path, shelf.touched))
    if settings.milvus.endswith(".db"):
        files = (path for path in Path(settings.milvus).rglob("*") if path.is_file())
        found.disk_mb.append(round(sum(path.stat().st_size for path in files) / 1e6, 1))


Fault = Callable[[subprocess.Popen[str], Settings, random.Random, Kills], None]
"""Disturbs one push that has just been started, and returns when it is over."""


def kill_push(
    process: subprocess.Popen[str], settings: Settings, rng: random.Random, found: Kills
) -> None:
    """SIGKILL at a random moment."""
    try:
        process.wait(rng.uniform(0, found.span_s))
        found.ended += 1
    except subprocess.TimeoutExpired:
        process.kill()
        found.kills += 1
    assert process.stdout
    process.stdout.close()
    process.wait()


def kills(
    settings: Settings, shelf: Shelf, trials: int, fault: Fault, most: int, log: IO[str]
) -> Kills:
    """Rounds, until so many kills are done; never more than `most` in one."""
    rng, found = random.Random(trials), Kills(trials=trials)
    for number in itertools.count():
        wanted = min(rng.randint(min(KILLS[0], most), most), trials - found.kills)
        for _ in range(wanted):
            ended = found.ended
            fault(start_push(settings, shelf.path, log), settings, rng, found)
            if found.ended > ended:  # all is in: nothing left to disturb
                break
        undisturbed(settings, shelf, found, log)
        print(f"round {number}: {found}", file=log, flush=True)
        if found.kills >= trials:
            return found
        shelf.change(number)
    raise AssertionError


def push_kills_lite(
    release: Path,
    source: Path,
    trials: int,
    products: int = PRODUCTS,
    log: IO[str] = sys.stderr,
    begin_with: Path | None = None,
) -> Kills:
    """Pushes that are killed, into Milvus Lite."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if begin_with:
            shutil.copytree(begin_with, place / "catalog.db")
        server = stack.enter_context(triton(release, log=log))
        settings = Settings(triton=server.grpc_address, milvus=str(place / "catalog.db"))
        shelf = Shelf(place / "source", source, products)
        return kills(settings, shelf, trials, kill_push, KILLS[1], log)


def push_kills_server(
    release: Path, source: Path, trials: int, products: int = PRODUCTS, log: IO[str] = sys.stderr
) -> Kills:
    """Pushes that are killed, into a Milvus server."""
    with ExitStack() as stack:
        place, settings, _ = _server_of(stack, release, log, session_ttl_s=120)
        shelf = Shelf(place / "source", source, products)
        return kills(settings, shelf, trials, kill_push, KILLS[1], log)


def milvus_kills(
    release: Path, source: Path, trials: int, products: int = PRODUCTS, log: IO[str] = sys.stderr
) -> Kills:
    """Milvus itself is killed during a push, and started again at once."""
    with ExitStack() as stack:
        place, settings, milvus = _server_of(stack, release, log, session_ttl_s=10)
        settings = replace(settings, retry_s=90.0)
        shelf = Shelf(place / "source", source, products)

        def kill_milvus(
            process: subprocess.Popen[str], settings: Settings, rng: random.Random, found: Kills
        ) -> None:
            time.sleep(rng.uniform(0, found.span_s))
            if process.poll() is not None:
                found.ended += 1
            else:
                found.kills += 1
                milvus.restart()
            said, _ = process.communicate(timeout=PUSH_S)
            if process.returncode:
                found.gave_up += 1
                found.errors.append(said[-300:])
            else:
                found.went_on += 1
                found.ran(json.loads(said.splitlines()[-1]))

        return kills(settings, shelf, trials, kill_milvus, 1, log)


def _server_of(
    stack: ExitStack, release: Path, log: IO[str], session_ttl_s: int
) -> tuple[Path, Settings, MilvusServer]:
    place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    milvus = stack.enter_context(
        milvus_server(place / "milvus", log=log, session_ttl_s=session_ttl_s)
    )
    server = stack.enter_context(triton(release, log=log))
    return place, Settings(triton=server.grpc_address, milvus=milvus.uri), milvus
