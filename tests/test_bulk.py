"""The first load of a large catalog: shards that survive kills, and rows that are in none twice."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.server import Server
from retrieval_client import Catalog, Collection, Encoders, Settings
from retrieval_client.bulk import Recipe, encode, in_processes, recipe_for, slices_of
from retrieval_client.bulk_load import Load
from retrieval_client.bulk_ray import LOCAL, on_ray
from retrieval_client.catalog import Role
from retrieval_client.push import Push
from retrieval_client.shards import FIELDS, MANIFEST, Manifest, Shard, rows_of, shard_name
from retrieval_client.sources import Source
from retrieval_contract.errors import DeployError, ReleaseMismatch, RetrievalError, SourceError
from retrieval_contract.release import Release
from tests.conftest import ROOT, photo, product_row

ROWS, SHARD_ROWS = 32, 4
OTHER = "0123456789abcdef"


def write_source(path: Path, **changed: str) -> Source:
    """Products with every way to be refused; row groups and shards end in different places."""
    rows = [
        {
            "id": f"r{n}",
            "title": f"thing number {n}",
            "image": photo((n, 90, 40)) if n % 10 == 0 else None,
            "price": n + 0.5,
            "tags": ["a", str(n)],
        }
        for n in range(ROWS)
    ]
    rows[5] |= {"title": ""}  # nothing to encode …
    rows[6] |= {"id": "r5"}  # … so this one is not its repetition,
    rows[30] |= {"id": "r5"}  # but this one is, many shards later.
    rows[20] |= {"id": "r3"}
    rows[21] |= {"image": b"no photo"}  # which the server says
    rows[22] |= {"id": None}
    for row in rows:
        row |= {"title": changed.get(str(row["id"]), row["title"])}
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return Source(path)


REFUSED = {("r5", "nothing_to_encode"), ("r5", "duplicate_id"), ("r3", "duplicate_id")}
REFUSED |= {("r21", "image_format"), ("row 23", "bad_id")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the source and its shards, which tests do not change."""
    return tmp_path_factory.mktemp("bulk")


@pytest.fixture(scope="module")
def source(place: Path) -> Source:
    """What all of these tests load."""
    return write_source(place / "source.parquet")


@pytest.fixture(scope="module")
def recipe(source: Source, place: Path, triton: Server) -> Recipe:
    """Its shards, of the release that is served."""
    settings = Settings(triton=triton.grpc_address, retry_s=5.0)
    return recipe_for(source, place / "serial", settings, shard_rows=SHARD_ROWS)


@pytest.fixture(scope="module")
def serial(recipe: Recipe) -> Recipe:
    """Encoded by one process, undisturbed."""
    encode(recipe)
    return recipe


def elsewhere(recipe: Recipe, folder: Path) -> Recipe:
    return dataclasses.replace(recipe, folder=folder)


def refused_in(folder: Path) -> set[tuple[str, str]]:
    lines = [line for path in folder.glob("*.rejects.jsonl") for line in path.open()]
    said = [json.loads(line) for line in lines]
    assert len(said) == len(REFUSED)
    return {(reject["id"], reject["code"]) for reject in said}


def assert_as_serial(folder: Path, serial: Recipe) -> None:
    """The same shards of the same rows, each once, and nothing besides."""
    manifest = Manifest.read(folder)
    assert manifest.shards == Manifest.read(serial.folder).shards
    assert {p.name for p in folder.iterdir()} == {p.name for p in serial.folder.iterdir()}
    for shard in manifest.shards:
        ours, theirs = (pq.read_table(f / shard.name) for f in (folder, serial.folder))
        assert ours.drop(["vector"]).equals(theirs.drop(["vector"]))
        vectors = [np.stack(t["vector"].to_numpy()) for t in (ours, theirs)]
        np.testing.assert_allclose(*vectors, atol=1e-5)
    assert refused_in(folder) == REFUSED


def rows_in(folder: Path, dim: int) -> dict[str, dict]:
    """Every row of a folder's shards as a collection gives it, by its id."""
    rows = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    found = {row["id"]: row | {"attributes": json.loads(row["attributes"])} for row in rows}
    assert len(found) == len(rows), "an id is in two shards"
    assert {len(row["vector"]) for row in rows} == {dim}
    return found


def assert_holds(collection: Collection, wanted: dict[str, dict]) -> None:
    names = [field.name for field in FIELDS]
    found = {row["id"]: row for step in collection.every(names) for row in step}
    assert set(found) == set(wanted)
    for product_id, row in wanted.items():
        for name in names:
            if name == "vector":
                np.testing.assert_allclose(found[product_id][name], row[name], atol=1e-5)
            else:
                assert found[product_id][name] == row[name], (product_id, name)


# ── encode ───────────────────────────────────────────────────────────────────────────────
def test_shards_hold_what_a_push_stores_and_refuse_what_it_refuses(
    serial: Recipe, settings: Settings
) -> None:
    refused = set()
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        Push(settings, encoders, catalog).run(
            serial.source.rows(), on_reject=lambda reject: refused.add((reject.id, reject.code))
        )
        assert_holds(catalog.serving(), rows_in(serial.folder, serial.vector_dim))
    assert refused == refused_in(serial.folder) == REFUSED
    manifest = Manifest.read(serial.folder)
    assert (manifest.rows, manifest.refused) == (ROWS - len(REFUSED), len(REFUSED))
    assert len(manifest.shards) == ROWS / SHARD_ROWS


def command(recipe: Recipe, *flags: object) -> list[str]:
    return [
        *(sys.executable, "-m", "retrieval_client", "bulk", "encode", str(recipe.source.path)),
        *("--out", str(recipe.folder), "--shard-rows", str(SHARD_ROWS), "--json"),
        *("--triton", recipe.settings.triton, *map(str, flags)),
    ]


def test_a_killed_encode_goes_on_with_the_shards_that_are_missing(
    serial: Recipe, tmp_path: Path
) -> None:
    ours = elsewhere(serial, tmp_path / "shards")
    killed = subprocess.Popen(command(ours), cwd=ROOT)
    end = time.monotonic() + 60
    while len(whole := set(ours.folder.glob("*.parquet"))) < 3:
        assert time.monotonic() < end
        assert killed.poll() is None
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with pytest.raises(SourceError, match="run it again until it ends"):
        Manifest.read(ours.folder)
    before = {path: path.stat().st_ino for path in whole}
    done = subprocess.run(command(ours), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    said = json.loads(done.stdout)
    assert (said["rows"], said["rejected"]) == (ROWS - len(REFUSED), len(REFUSED))
    assert {path: path.stat().st_ino for path in whole} == before, "whole shards are not made again"
    assert_as_serial(ours.folder, serial)


def test_a_changed_source_makes_another_shard_in_place_of_one(serial: Recipe, copied: Path) -> None:
    ours = dataclasses.replace(
        serial,
        source=write_source(copied.with_name("changed.parquet"), r29="another title"),
        folder=copied,
    )
    before = {shard.name for shard in Manifest.read(copied).shards}
    after = {shard.name for shard in encode(ours).shards}
    (old,), (new,) = before - after, after - before
    assert old.split("-")[:2] == new.split("-")[:2] == [serial.release_id, "000007"]
    assert {path.name for path in ours.folder.glob("*.parquet")} == after
    assert rows_in(ours.folder, ours.vector_dim)["r29"]["title"] == "another title"


def test_the_ways_to_ask_for_too_much(serial: Recipe, tmp_path: Path) -> None:
    settings = serial.settings
    with pytest.raises(ReleaseMismatch, match=rf"expected {OTHER}, got {serial.release_id}; name"):
        recipe_for(serial.source, tmp_path, settings, OTHER)
    dataclasses.replace(Manifest.read(serial.folder), release_id=OTHER).write(tmp_path)
    with pytest.raises(ReleaseMismatch, match=f"got some of {OTHER}; give a folder"):
        recipe_for(serial.source, tmp_path, settings)
    done = subprocess.run(command(serial, "--workers", 0), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)["error"]) == (1, "RetrievalError")


def test_a_killed_process_ends_the_run_and_costs_what_it_had_in_hand(
    serial: Recipe, tmp_path: Path
) -> None:
    ours = elsewhere(serial, tmp_path / "shards")
    made: list[Shard] = []

    def kill_one(shard: Shard) -> None:
        made.append(shard)
        if len(made) == 1:
            busy_worker(ours.folder).kill()

    with pytest.raises(RetrievalError, match=r"a worker was killed .* run it again"):
        encode(ours, in_processes(2), kill_one)
    assert not (ours.folder / MANIFEST).exists()
    encode(ours)
    assert_as_serial(ours.folder, serial)


def busy_worker(folder: Path) -> psutil.Process:
    """A process below this one that has a shard of the folder in hand."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for process in psutil.Process().children(recursive=True):
            try:
                opened = [Path(file.path) for file in process.open_files()]
            except psutil.Error:
                continue
            if any(path.parent == folder and path.suffix == ".part" for path in opened):
                return process
    raise AssertionError("no worker had a shard in hand")


@pytest.mark.timeout(600)  # most of it is Ray's start, which a busy machine stretches
def test_ray_makes_the_same_shards_while_a_worker_is_killed(serial: Recipe, tmp_path: Path) -> None:
    """Two workers, one of which dies with a shard in hand; all of Ray stays on loopback."""
    ours = elsewhere(serial, tmp_path / "shards")
    killed: list[psutil.Process] = []
    listened: set[str] = set()

    def kill_one(shard: Shard) -> None:
        if killed:
            return
        below = psutil.Process().children(recursive=True)
        assert sum(process.name().startswith("ray::MapWorker") for process in below) == 2
        listened.update(
            connection.laddr.ip.removeprefix("::ffff:")
            for process in [psutil.Process(), *below]
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        )
        killed.append(busy_worker(ours.folder))
        killed[0].kill()

    manifest = encode(ours, on_ray(LOCAL, 2), kill_one)
    assert killed
    assert listened == {"127.0.0.1"}
    assert len(manifest.shards) == len(slices_of(ours))
    assert_as_serial(ours.folder, serial)
    assert not [p for p in psutil.Process().children(recursive=True) if "ray" in p.name()]


def test_without_ray_it_says_what_to_install(
    serial: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeployError, match=r"install make-retrieval\[retrieval_bulk\]"):
        encode(elsewhere(serial, tmp_path / "shards"), on_ray(LOCAL, 2))


# ── load ─────────────────────────────────────────────────────────────────────────────────
KILLED_LOAD = """
import os, signal, sys
from pathlib import Path
from retrieval_client import Catalog, Settings
from retrieval_client.bulk_load import Load

settings = Settings(triton=sys.argv[1], milvus=sys.argv[2], collection=sys.argv[3])
with Catalog(settings) as catalog:
    Load(settings, Path(sys.argv[4])).run(
        catalog, lambda shard: os.kill(os.getpid(), signal.SIGKILL) if shard.number == 1 else None
    )
"""


@pytest.fixture
def loaded(backend: Callable[[], Settings], serial: Recipe) -> Iterator[tuple[Settings, Catalog]]:
    """The shards in a catalog: by a load that was killed after the second, and one more."""
    settings = dataclasses.replace(backend(), triton=serial.settings.triton, retry_s=5.0)
    where = (settings.triton, settings.milvus, settings.collection, str(serial.folder))
    killed = subprocess.run([sys.executable, "-c", KILLED_LOAD, *where])
    assert killed.returncode == -signal.SIGKILL
    first, second, *_ = (shard.rows for shard in Manifest.read(serial.folder).shards)
    with Catalog(settings) as catalog:
        done = Load(settings, serial.folder).run(catalog)
        assert (done.skipped, done.unchanged) == (2, first + second)
        assert done.stored == ROWS - len(REFUSED) - first - second
        yield settings, catalog


def test_a_load_stores_the_shards_and_only_what_is_missing_of_them(
    loaded: tuple[Settings, Catalog], serial: Recipe
) -> None:
    settings, catalog = loaded
    collection = catalog.serving()
    wanted = rows_in(serial.folder, serial.vector_dim)
    assert_holds(collection, wanted)
    assert collection.count() == len(wanted)

    again = Load(settings, serial.folder).run(catalog)
    assert (again.stored, again.skipped) == (0, ROWS / SHARD_ROWS)

    # As after a kill in the middle: one row gone, one of other content, one more than the shards.
    collection.delete(["r7"])
    stale = product_row("r9", serial.vector_dim)
    collection.upsert([stale, product_row("elsewhere", serial.vector_dim)])
    third = Load(settings, serial.folder).run(catalog)
    assert (third.stored, third.unchanged) == (2, len(wanted) - 2)
    collection.delete(["elsewhere"])
    assert_holds(collection, wanted)

    with pytest.raises(ReleaseMismatch, match=f"expected a collection of release {OTHER}"):
        Load(settings, of_release(OTHER, serial)).run(catalog)


def of_release(release_id: str, serial: Recipe) -> Path:
    """A folder that says that it is of another release."""
    folder = serial.folder.parent / release_id
    folder.mkdir(exist_ok=True)
    manifest = Manifest.read(serial.folder)
    dataclasses.replace(manifest, release_id=release_id, shards=()).write(folder)
    return folder


@pytest.fixture
def copied(serial: Recipe, tmp_path: Path) -> Path:
    """The shards, to be damaged."""
    return Path(shutil.copytree(serial.folder, tmp_path / "copied"))


def test_a_new_catalog_is_filled_for_what_is_served(serial: Recipe, settings: Settings) -> None:
    with Catalog(settings) as catalog:
        with pytest.raises(ReleaseMismatch, match=f"serves {serial.release_id}; a new catalog"):
            Load(settings, of_release(OTHER, serial)).run(catalog)
        assert not catalog.live()


def test_a_release_that_is_built_is_loaded_beside_the_one_that_serves(
    serial: Recipe, settings: Settings
) -> None:
    with Catalog(settings) as catalog:
        serving = catalog.prepare(OTHER, serial.vector_dim)
        built = catalog.prepare(serial.release_id, serial.vector_dim, Role.CANDIDATE)
        assert Load(settings, serial.folder).run(catalog).collection == built.name
        assert (serving.count(), built.count()) == (0, ROWS - len(REFUSED))


@pytest.mark.parametrize("damage", ["cut short", "a bit", "of other rows", "gone"])
def test_a_damaged_shard_is_found(
    copied: Path, settings: Settings, damage: str, release: Release
) -> None:
    first, second, *_ = Manifest.read(copied).shards
    path = copied / first.name
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "a bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    elif damage == "of other rows":
        path.write_bytes((copied / second.name).read_bytes())
    else:
        path.unlink()
    with Catalog(settings) as catalog:
        with pytest.raises(SourceError, match=f"{first.name}: (not a whole shard|expected)"):
            Load(settings, copied).run(catalog)
        assert not (found := catalog.find()) or found.count() == 0


def test_shards_are_named_by_what_they_are_made_from(serial: Recipe) -> None:
    shards = Manifest.read(serial.folder).shards
    for shard in shards:
        release_id, number, made_from = shard.name.removesuffix(".parquet").split("-")
        assert shard.name == shard_name(release_id, shard.number, made_from)
        assert (release_id, int(number), len(made_from)) == (serial.release_id, shard.number, 32)
        (rows,) = rows_of(serial.folder / shard.name, serial.vector_dim) if shard.rows else [[]]
        assert len(rows) == shard.rows
