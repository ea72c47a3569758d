"""Servers that are away during pushes and searches; ids, titles and conditions that mean harm."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.ingest import WRONG, Shelf, push_command, start_push
from benchmarks.ingest_state import compared
from benchmarks.stand_in import StandIns
from deploy.milvus import MilvusServer, milvus_server
from deploy.server import LOOPBACK, Server, choose_ports, triton
from retrieval_client.catalog import Catalog
from retrieval_client.collection import Ask, Collection
from retrieval_client.push import Push
from retrieval_client.query import Query
from retrieval_client.search import ProductSearch
from retrieval_client.settings import Settings
from retrieval_client.sources import SourceRow
from retrieval_client.where import Where
from retrieval_contract.errors import DeployError, RetrievalError

DEADLINE_S, SLACK_S, SEARCHERS = 1.0, 0.5, 4
PRODUCTS = 600
AFTER_S, PUSH_S = 3.0, 1200.0
KINDS = ("milvus_stopped", "milvus_killed", "triton_stopped", "triton_killed")


@dataclass
class Outage:
    """`hanging`: searches that took longer than their deadline and SLACK_S."""

    push: str = ""
    searches: int = 0
    answered: int = 0
    hanging: int = 0
    slowest_s: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)


class Searchers:
    """Threads that share a client and never stop searching, by a text and by a product's id."""

    def __init__(self, settings: Settings, outage: Outage) -> None:
        self.settings, self.outage = settings, outage
        self._over, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> None:
        self._search = ProductSearch(self.settings)
        found = self._search("red shirt", timeout_s=60.0)
        self._asked = (Query("red shirt"), Query(like=found[0].id))
        self._threads = [threading.Thread(target=self._go) for _ in range(SEARCHERS)]
        for thread in self._threads:
            thread.start()

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._search.__exit__(None, None, None)

    def _go(self) -> None:
        for query in itertools.cycle(self._asked):
            if self._over.is_set():
                return
            start = time.monotonic()
            try:
                self._search(query, timeout_s=DEADLINE_S)
                outcome = "answered"
            except Exception as exc:  # whatever it is, this caller has no answer
                outcome = type(exc).__name__
            took = time.monotonic() - start
            with self._lock:
                found = self.outage
                found.searches += 1
                found.answered += outcome == "answered"
                found.hanging += took > DEADLINE_S + SLACK_S
                found.slowest_s = round(max(found.slowest_s, took), 2)
                found.outcomes[outcome] = found.outcomes.get(outcome, 0) + 1
            time.sleep(0.1)


class Tritons:
    """A server on ports that it keeps, so that it can be killed and started again."""

    def __init__(self, release: Path, log: IO[str]) -> None:
        self._start = lambda: triton(release, ports=self.ports, log=log)
        self.ports = choose_ports(LOOPBACK)
        self._running = ExitStack()
        self.server: Server = self._running.enter_context(self._start())

    def kill(self) -> None:
        """With all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.server.process.pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """Whatever state it is in."""
        with suppress(DeployError):
            self._running.close()

    def start(self) -> None:
        """Again."""
        self.server = self._running.enter_context(self._start())


def fault_of(kind: str, milvus: MilvusServer, tritons: Tritons, seconds: float) -> None:
    """One outage of so many seconds."""
    pid = milvus.pid if kind.startswith("milvus") else tritons.server.process.pid
    if kind.endswith("stopped"):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        return
    server: MilvusServer | Tritons = milvus if kind.startswith("milvus") else tritons
    server.kill()
    time.sleep(seconds)
    server.start()


def outage(
    kind: str, release: Path, source: Path, seconds: float, products: int, log: IO[str]
) -> Outage:
    """During a push, and searches beside it."""
    found = Outage()
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ttl_s = 10 if kind == "milvus_killed" else 120
        milvus = stack.enter_context(milvus_server(place / "m", log=log, session_ttl_s=ttl_s))
        tritons = Tritons(release, log)
        stack.callback(tritons.stop)
        settings = Settings(
            triton=tritons.server.grpc_address, milvus=milvus.uri, retry_s=180.0, timeout_s=10.0
        )
        shelf = Shelf(place / "source", source, products)
        few = push_command(settings, shelf.path)
        few = [word for word in few if word != "--sync"] + ["--limit", "32"]
        subprocess.run(few, check=True, stdout=log, stderr=log)
        with Searchers(settings, found):
            process = start_push(settings, shelf.path, log)
            time.sleep(AFTER_S)
            fault_of(kind, milvus, tritons, seconds)
            said, _ = process.communicate(timeout=PUSH_S)
            time.sleep(AFTER_S)
        found.push = "went on" if process.returncode == 0 else said[-300:]
        if process.returncode:
            subprocess.run(push_command(settings, shelf.path), check=True, stdout=log, stderr=log)
        state = compared(settings, shelf.path)
        found.wrong = {name: getattr(state, name) for name in WRONG if getattr(state, name)}
    return found


def outages(
    release: Path,
    source: Path,
    seconds: int,
    products: int = PRODUCTS,
    log: IO[str] = sys.stderr,
    kinds: Sequence[str] = KINDS,
) -> dict[str, Any]:
    """Each kind once, of so many seconds."""
    found = {kind: outage(kind, release, source, seconds, products, log) for kind in kinds}
    for kind, each in found.items():
        print(f"{kind}: {each}", file=log, flush=True)
    return {
        "trials": len(found),
        "wrong": sum(sum(each.wrong.values()) for each in found.values()),
        "hanging": sum(each.hanging for each in found.values()),
        "searches": sum(each.searches for each in found.values()),
        "answered": sum(each.answered for each in found.values()),
        "gave_up": sum(each.push != "went on" for each in found.values()),
        "outages": {kind: vars(each) for kind, each in found.items()},
    }


# ── harm in what is stored and asked for ─────────────────────────────────────────────────
PIECES = (
    "'", '"', "\\", "\\'", '\\"', "%", "_", ";", "--", "]", "[", "(", ")", "{", "}", "{x}", " or ",
    " and ", "id", "==", "!=", "in", "like", "true", "1", "0x", "é", "ß", "İ", "👟", "字", "\u202e",
    "\\u0041", "\\n", "$meta", "null", "#", "/*", "DROP", "\u00a0", "|", "&&", "a" * 50,
)  # fmt: skip
CLASSICS = (
    "zz'] or id not in ['qq",
    'zz"] or id not in ["qq',
    '" or 1 == 1 or id == "',
    "'; DROP TABLE products; --",
    'x" or id != "',
    "\\",
    '\\"',
    "\\\\",
    "id",
    "{ids}",
)
VICTIMS, RELEASE, DIM = 200, "e" * 16, 8


def hostile_text(rng: random.Random) -> str:
    """Pieces of several languages, in a row."""
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 6)))[:120]


@dataclass
class Harm:
    """Of `trials` hostile products. `read`: others' rows that an answer held; `harmed`: others'
    rows that are not as they were; `missed`: hostile rows that are not found under their id, as
    the value of a condition, or after they were deleted still are."""

    trials: int = 0
    stored: int = 0
    refused: int = 0
    read: int = 0
    missed: int = 0
    harmed: int = 0
    examples: list[str] = field(default_factory=list)


def hostile(settings: Settings, trials: int) -> Harm:
    """Push, find, search under a condition, and delete each, among others that must not notice."""
    rng, found = random.Random(7), Harm()
    stand_ins = StandIns(RELEASE, vector_dim=DIM)
    victims = [
        SourceRow(f"v{at}", b"victim %d" % at, attributes={"mark": "v"}) for at in range(VICTIMS)
    ]
    drawn = [*CLASSICS, *(hostile_text(rng) for _ in range(trials - len(CLASSICS)))][:trials]
    names = list(dict.fromkeys(drawn))
    rows = [SourceRow(name, name.encode(), attributes={"mark": name, name: name}) for name in names]
    rows.append(SourceRow("long", ("'\"\\" * 22_000)[:65_536].encode()))
    with Catalog(settings) as catalog:
        Push(settings, stand_ins, catalog).run(victims)  # type: ignore[arg-type]
        before = everything(catalog.serving())
        report = Push(settings, stand_ins, catalog).run(rows)  # type: ignore[arg-type]
        found.trials, found.refused = len(rows), report.refused.total()
        found.stored = report.stored
        collection = catalog.serving()
        stored = everything(collection).keys() - before.keys()
        found.missed += len({row.id for row in rows} - stored) - found.refused
        for name in sorted(stored):
            attack(collection, stand_ins, name, found)
        after = everything(collection)
    found.harmed += sum(after.get(name) != row for name, row in before.items())
    found.missed += len(after.keys() - before.keys())
    return found


def everything(collection: Collection) -> dict[str, Any]:
    """All rows, to the last bit."""
    fields = ["title", "attributes", "content_hash", "row_hash", "vector"]
    steps = collection.every(fields)
    return {r["id"]: [np.asarray(r[f]).tolist() for f in fields] for step in steps for r in step}


def attack(collection: Collection, stand_ins: StandIns, name: str, found: Harm) -> None:
    """With one row's own id and mark, by every way in."""
    vector = stand_ins.by_release[RELEASE].vector(name, b"")[None]
    marked = Where.parse("mark == {mark}", {"mark": name}).expression()
    ways: dict[str, Callable[[], set[str]]] = {
        "of_ids": lambda: set(collection.of_ids([name], [])),
        "search": lambda: {h.id for h in collection.search(vector, Ask(50, marked))[0]},
        "every": lambda: {r["id"] for step in collection.every([], marked) for r in step},
        "delete": lambda: set(collection.delete([name])),
    }
    for way, go in ways.items():
        try:
            got = go()
        except RetrievalError as exc:
            got = set()
            found.examples.append(f"{way} {name!r}: {exc}"[:200])
        found.read += len(got - {name})
        found.missed += name not in got
    found.missed += name in collection.of_ids([name], [])


def hostile_everywhere(trials: int, log: IO[str] = sys.stderr) -> dict[str, Any]:
    """On Milvus Lite and on the server."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        milvus = stack.enter_context(milvus_server(place / "m", log=log, session_ttl_s=120))
        lite = Settings(milvus=str(place / "catalog.db"), timeout_s=30.0)
        found = {
            "lite": hostile(lite, trials),
            "server": hostile(replace(lite, milvus=milvus.uri), trials),
        }
    names = ("trials", "stored", "refused", "read", "missed", "harmed")
    sums = {name: sum(getattr(each, name) for each in found.values()) for name in names}
    return sums | {"examples": [e for each in found.values() for e in each.examples][:10]}


def main() -> None:
    """The hostile ones, and what came of them."""
    print(json.dumps(hostile_everywhere(int(sys.argv[1]) if sys.argv[1:] else 300)))


if __name__ == "__main__":
    main()
