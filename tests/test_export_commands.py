"""`python -m export`: what its flags reach, and what it says to those that are wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from deploy.rendered.catalog import write_rendered_catalog
from export.__main__ import main
from export.half import typed
from export.ladder import by_inputs, encoded, samples_of
from export.publish import publish, release_of
from export.rungs import Asked, climb_all, rungs_of, torch_encode
from export.surgery import operate
from retrieval_contract.errors import ExportError, SourceError
from retrieval_contract.models import QUERY_TOWER
from retrieval_contract.release import Precision, Release
from tests.conftest import ROOT
from tests.tiny import tiny_make
from tests.traced import traced
from towers.checkpoint import save_make
from towers.learning.catalog import read_data
from towers.learning.split import fraction_of

TOWERS = tiny_make()
QUIET = Console(quiet=True)
MORE = {"query_tower": ["node_gelu"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rendered_catalog(tmp_path_factory.mktemp("data") / "rendered", products=60)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_make(TOWERS, folder)
    return folder


@pytest.fixture
def releases(tiny_release: Path, tmp_path: Path) -> Path:
    """With the release without further islands in it."""
    shutil.copytree(tiny_release, tmp_path / "releases" / tiny_release.name)
    return tmp_path / "releases"


def island_file(folder: Path, islands: dict[str, list[str]]) -> Path:
    """As `culprits` writes it."""
    found = {"query_tower": [], "product_tower": []} | islands
    path = folder / "islands.json"
    path.write_text(json.dumps({tower: [{"name": n} for n in ns] for tower, ns in found.items()}))
    return path


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
    main()


# ── islands ──────────────────────────────────────────────────────────────────────────────


def test_a_release_with_further_islands_is_another(tiny_release: Path) -> None:
    def id_of(islands: dict[str, list[str]]) -> str:
        return release_of(TOWERS, Precision.FP32, islands).release_id

    assert id_of({}) == TOWERS.release().release_id == tiny_release.name
    assert id_of({"query_tower": [], "product_tower": []}) == tiny_release.name
    assert id_of(MORE) not in (tiny_release.name, id_of({"query_tower": ["node_gelu_1"]}))
    assert id_of({"query_tower": ["a", "b"]}) == id_of({"query_tower": ["b", "a", "b"]})


def test_an_island_file_reaches_the_manifest(
    releases: Path, tiny: Path, tiny_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the release without them stays, and is found built."""
    plain = releases / tiny_release.name
    before = plain.stat().st_mtime_ns
    path = island_file(releases.parent, MORE)
    flags = ["repository", "--checkpoint", tiny, "--out", releases, "--islands", path]
    call(monkeypatch, *flags)
    home = (releases / "latest").resolve()
    manifest = json.loads((home / "manifest.json").read_text())
    islands = json.loads((plain / "manifest.json").read_text())["graphs"][0]["islands"]
    assert home.name == Release.load(home).release_id == manifest["release_id"] != plain.name
    assert manifest["more_islands"] == MORE
    assert manifest["graphs"][0]["islands"] == [*islands, "node_gelu"]
    assert manifest["command"] == ["python", "-m", "export", *map(str, flags)]
    assert publish(TOWERS, releases, QUIET, {"query_tower": []}) == plain
    assert plain.stat().st_mtime_ns == before


def test_the_ladder_is_climbed_with_the_islands(data: Path) -> None:
    """With every node of a tower an island its FP16 graph is the FP32 one."""
    products = read_data(data)
    sample = samples_of(TOWERS.spec, [q.text for q in products.queries], products)["query_tower"]
    graph = typed(operate(traced(TOWERS, QUERY_TOWER), QUERY_TOWER, TOWERS.release()))
    every = {"query_tower": [node.name for node in graph.nodes]}
    wanted = encoded(by_inputs(torch_encode(TOWERS, QUERY_TOWER)), sample)
    off = []
    for islands in ({}, every):
        (half,) = [
            rung
            for rung in rungs_of(TOWERS, None, islands)
            if (rung.name, rung.tower) == ("ONNX FP16", QUERY_TOWER)
        ]
        off.append(float(np.abs(encoded(half.encode, sample) - wanted).max()))
    assert off[0] > 1e-5 > off[1]
    asked = Asked("none", data, 60, None, {"query_tower": ["no_such_node"]})
    with pytest.raises(ExportError, match=r"\['no_such_node'\]: expected names"):
        climb_all(TOWERS, asked, data.parent, QUIET)


@pytest.mark.parametrize("target", ["release", "serve", "engine-check", "parity"])
def test_make_passes_the_islands_on(target: str) -> None:
    """To whatever exports; a file's name may hold a space."""
    made = subprocess.run(
        ["make", "--dry-run", target, "ISLANDS=my own.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = made.stdout.replace("\\\n", " ").splitlines()
    exports = [line for line in lines if "-m export" in line]
    assert len(exports) == 1 + (target == "parity")
    assert all('--islands "my own.json"' in line for line in exports)


# ── flags and files that are wrong ───────────────────────────────────────────────────────


def test_commands_say_what_is_missing(
    tmp_path: Path, data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in a process of its own, the others where all is loaded."""
    unjudged = tmp_path / "unjudged"
    unjudged.mkdir()
    (unjudged / "products.parquet").write_bytes((data / "products.parquet").read_bytes())
    out = ("--out", tmp_path / "out")
    parity, no_file = ("parity", *out, "--checkpoint"), unjudged / "no.json"
    for args, message in (
        ((*parity, tiny, "--data", unjudged), "queries.csv"),
        ((*parity, tiny, "--data", tmp_path), "products.parquet"),
        ((*parity, tmp_path / "no", "--data", data), "no"),
        ((*parity, tiny, "--data", data, "--islands", no_file), "export culprits"),
        (("repository", *out, "--checkpoint", tiny, "--islands", no_file), "export culprits"),
    ):
        with pytest.raises(SystemExit, match=rf"^error: (?s:.*){re.escape(message)}"):
            call(monkeypatch, *args)
    command = [sys.executable, "-m", "export", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["onnx", "repository", "parity", "culprits"])
def test_an_out_that_is_a_file_is_refused_before_the_work(
    tmp_path: Path, data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    monkeypatch.setattr("export.__main__.load_towers", lambda given: pytest.fail("too late"))
    more = ["--data", data] if command == "parity" else []
    for out in (taken, taken / "inside"):
        with pytest.raises(SystemExit, match=rf"--out {out}: expected a folder .*give another"):
            call(monkeypatch, command, "--checkpoint", tiny, "--out", out, *more)


@pytest.mark.parametrize("count", ["-5", "0", "x", "1.5"])
@pytest.mark.parametrize("command", ["parity", "culprits"])
def test_a_count_of_products_is_one_at_least(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, count: str
) -> None:
    flags = [command, "--checkpoint", "c", "--data", "d", f"--products={count}"]
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, *flags)
    assert f"--products: expected a whole number from 1, got {count}" in capsys.readouterr().err


def test_data_without_judged_queries_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "products.parquet").write_bytes((data / "products.parquet").read_bytes())
    with pytest.raises(SourceError, match=r"expected queries with judgements.*queries\.csv"):
        climb_all(TOWERS, Asked("none", tmp_path, 5, None), tmp_path, QUIET)


def test_too_few_products_to_be_judged_by_are_named_so(tmp_path: Path, data: Path) -> None:
    """Every query of the folder is of products that were not taken."""
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    head, *lines = (folder / "qrels.csv").read_text().splitlines()
    first = min(read_data(data).ids, key=fraction_of)
    lines = [head, *(line for line in lines if first not in line)]
    (folder / "qrels.csv").write_text("\n".join(lines))
    with pytest.raises(SourceError, match=r"of 1 products, found none; of all 60 .*--products"):
        climb_all(TOWERS, Asked("none", folder, 1, None), tmp_path, QUIET)
