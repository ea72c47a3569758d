"""Short versions of what `make chaos` does to ingestion."""

from __future__ import annotations

import inspect
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from benchmarks import (
    faults,
    fuzz,
    ingest,
    ingest_faults,
    ingest_rates,
    ingest_storage,
    overload,
    promotions,
    soak,
)
from benchmarks.chaos import ROWS
from benchmarks.ingest import Kills, Shelf, kill_push, kills
from benchmarks.ingest_faults import hostile
from benchmarks.ingest_state import compare
from benchmarks.ingest_storage import NAMESPACE, Storage, cut, repaired, said, scratch, unflushed
from benchmarks.stand_in import StandIns
from deploy.rendered.catalog import write_rendered_catalog
from deploy.server import Server
from retrieval_client import Catalog, Collection, Settings
from retrieval_client.collection import CollectionInfo
from retrieval_client.deadline import Deadline
from retrieval_client.push import Push
from retrieval_client.sources import SourceRow
from retrieval_contract.errors import DeadlineExceeded
from tests.conftest import ROOT


def test_killed_pushes_lose_nothing(triton: Server, tmp_path: Path) -> None:
    source = write_rendered_catalog(tmp_path / "drawn", products=60, progress=False)
    settings = Settings(triton=triton.grpc_address, milvus=str(tmp_path / "catalog.db"))
    shelf = Shelf(tmp_path / "shelf", source, 40)
    with (tmp_path / "log").open("w") as log:
        found = kills(settings, shelf, 2, kill_push, 2, log)
    assert found.kills == 2
    assert found.checks >= 1
    assert found.rows_checked == 40 * found.checks
    blank = Kills(trials=2, kills=2, ended=found.ended, checks=found.checks)
    blank.rows_checked, blank.disk_mb = found.rows_checked, found.disk_mb
    blank.span_s = found.span_s
    blank.encoded, blank.renewed, blank.deleted = found.encoded, found.renewed, found.deleted
    assert found == blank, "nothing wrong, no push that failed"


def test_a_shelf_changes_in_every_way(tmp_path: Path) -> None:
    """Else a kill would never hit a push that takes a photo away."""
    source = write_rendered_catalog(tmp_path / "drawn", products=60, progress=False)
    shelf = Shelf(tmp_path / "shelf", source, 40)
    seen = set()
    for number in range(8):
        before = {product["id"]: product for product in shelf.there}
        shelf.change(number)
        now = {product["id"]: product for product in shelf.there}
        assert [*map(json.loads, shelf.path.read_text().splitlines())] == shelf.there
        assert len(now) == 40
        seen |= {"gone"} if before.keys() - now else set()
        seen |= {"new"} if now.keys() - before else set()
        for product_id in before.keys() & now:
            old, new = before[product_id], now[product_id]
            seen |= {name for name in ("title", "price") if old[name] != new[name]}
            photos = old.get("image"), new.get("image")
            if photos[0] != photos[1]:
                assert product_id in shelf.touched
                seen.add(
                    "photo taken" if not photos[1] else "photo given" if not photos[0] else "photo"
                )
    assert seen == {"gone", "new", "title", "price", "photo", "photo taken", "photo given"}


def test_the_comparison_sees_what_is_wrong(
    triton: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rendered_catalog(tmp_path / "drawn", products=60, progress=False)
    settings = Settings(triton=triton.grpc_address, milvus=str(tmp_path / "catalog.db"))
    shelf = Shelf(tmp_path / "shelf", source, 20)
    ids = [product["id"] for product in shelf.there]
    stand_ins = StandIns(triton.release.release_id, vector_dim=triton.release.vector_dim)
    lines = shelf.path.read_text().splitlines()
    rows = [
        SourceRow(product["id"], product["title"].encode(), attributes={"price": 0})
        for product in map(json.loads, lines[1:])
    ]
    with Catalog(settings) as catalog:
        Push(settings, stand_ins, catalog).run([*rows, SourceRow("more", b"more")])
        state = asdict(compare(settings, shelf.path))
    assert (state["rows"], state["lost"], state["surplus"], state["stale"]) == (20, 1, 1, 19)
    assert state["wrong_vector"] == state["unfound"] == 19, "none is the encoder's"
    assert f"lost: {ids[0]}" in state["examples"]


def test_hostile_words_read_and_harm_nobody(milvus: Settings) -> None:
    found = hostile(milvus, 24)
    assert found.stored > 12
    assert found.refused >= 1, "65,536 characters of quotes are too many"
    assert (found.read, found.missed, found.harmed, found.examples) == (0, 0, 0, [])


@pytest.mark.parametrize(
    ("harm", "pattern"), [(cut, "*wal*/*"), (cut, "*.idx"), (scratch, "*.parquet")]
)
def test_a_torn_store_is_seen_and_repaired(
    tmp_path: Path, harm: Callable[[Path, str], list[str]], pattern: str
) -> None:
    place, found = tmp_path / "catalog.db", Storage()
    if pattern != "*wal*/*":
        command = [sys.executable, "-m", "benchmarks.ingest_storage", "push", str(place)]
        subprocess.run([*command, "--rows", "300"], cwd=ROOT, check=True)
    else:
        unflushed(place, 300)
    harmed = harm(place, pattern)
    repaired("torn", place, 300, found, harmed=harmed)
    assert (found.trials, found.unclear, found.unseen, found.lost) == (1, 0, 0, 0), found
    assert harmed or pattern == "*.idx"
    if pattern != "*.idx":
        assert found.seen["torn"]["gone"] > 0, "else the test shows nothing"


@pytest.mark.parametrize("pattern", ["*.parquet", "*manifest*"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, pattern: str) -> None:
    place = tmp_path / "catalog.db"
    assert said("push", place, 300).found["stored"] == 300
    harmed = cut(place, pattern)
    for what in ("audit", "push", "search"):
        refused = said(what, place, 300)
        assert refused.clear
        assert harmed[0] in refused.error
        assert "move a file that is damaged away" in refused.error


@pytest.mark.parametrize("what", ["full", "readonly"])
def test_a_disk_that_cannot_be_written_is_said_and_loses_nothing(tmp_path: Path, what: str) -> None:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("expected mount namespaces, this machine has none")
    command = [*NAMESPACE, sys.executable, "-m", "benchmarks.ingest_storage", what, str(tmp_path)]
    done = subprocess.run([*command, "--rows", "500"], cwd=ROOT, capture_output=True, text=True)
    found = Storage(**json.loads(done.stdout.splitlines()[-1]))
    assert (found.trials, found.unclear, found.unseen, found.lost) == (1, 0, 0, 0), found
    (seen,) = found.seen.values()
    assert seen["refused"]["error"], "else the test shows nothing"


WAITS: dict[str, Callable[[Catalog, Collection, Deadline], object]] = {
    "the first look": lambda catalog, stored, deadline: catalog.serving(deadline),
    "more like this": lambda catalog, stored, deadline: stored.of_ids(["a"], [], deadline=deadline),
    "words as well": lambda catalog, stored, deadline: stored.need_words(deadline),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_milvus_that_never_answers_keeps_nobody_past_the_deadline(wait: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        catalog = Catalog(Settings(milvus=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        stored = Collection(catalog.milvus, CollectionInfo("products", "0123456789abcdef", 8))
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.7 s"):
            WAITS[wait](catalog, stored, Deadline(0.7))
        assert time.monotonic() - started < 0.7 + 1.5


def test_a_long_push_is_counted_and_needs_little(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.ingest_rates",
        str(tmp_path / "catalog.db"),
        "3000",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["trials"], found["stored"], found["there"], found["left"]) == (
        3000,
        3000,
        3000,
        0,
    )
    assert found["grew_mb"] < 600, "Milvus Lite, which lives in that process, has its part of it"


RUNS: dict[str, Callable[..., object]] = {
    "stub_kills": faults.stub_kills,
    "server_kills": faults.server_kills,
    "rolling_restarts": faults.rolling_restart,
    "fuzz": fuzz.fuzz,
    "overload": overload.overload,
    "stalls": overload.stalls,
    "bulk": overload.beside_bulk,
    "promotions": promotions.every_promotion,
    "soak": soak.soak,
    "push_kills_lite": ingest.push_kills_lite,
    "push_kills_server": ingest.push_kills_server,
    "milvus_kills": ingest.milvus_kills,
    "second_push": ingest_rates.second_push,
    "push_rate": ingest_rates.push_rate,
    "million_rows": ingest_rates.pushed,
    "outages": ingest_faults.outages,
    "hostile": ingest_faults.hostile_everywhere,
    "storage": ingest_storage.storage,
}


def test_every_row_counts_its_trials() -> None:
    """By what its function is declared or written to return: running them all takes hours."""
    assert RUNS.keys() == ROWS.keys()
    for name, run in RUNS.items():
        returned = get_type_hints(run)["return"]
        if is_dataclass(returned):
            assert "trials" in {field.name for field in fields(returned)}, name
        else:
            assert '"trials"' in inspect.getsource(run), name
