"""The model repository: committed configs, three targets, whole releases, another vector size."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.protobuf import text_format
from rich.console import Console

from deploy.server import LOOPBACK, check_release, choose_ports, triton
from export.__main__ import reference_release
from export.config_from_contract import UNRELEASED, config_from_text, configs_of
from export.publish import (
    BESIDE,
    ROOMS,
    SOURCES,
    code_fingerprint,
    make_read_only,
    publish,
    write_onnx,
)
from retrieval_client import Catalog, Encoder, ProductSearch, Settings
from retrieval_contract import models
from retrieval_contract.errors import CheckpointError, DeployError, ReleaseMismatch
from retrieval_contract.models import Target
from retrieval_contract.release import Release, contract_fingerprint
from retrieval_contract.tensors import Ensemble
from tests.conftest import ROOT, photo, product_row
from tests.test_towers import edit_config
from tests.tiny import tiny_make
from towers.checkpoint import load_towers, save_make

PARTS = (*models.MODELS, *models.ENSEMBLES)


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name)
def test_committed_configs_are_what_the_contract_says(part: models.Model) -> None:
    made = configs_of(part, reference_release(), UNRELEASED)
    folder = SOURCES / part.name
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*.pbtxt")}
    assert on_disk == set(made)
    for name, config in made.items():
        committed = config_from_text((folder / name).read_text("utf-8"))
        assert committed == config, f"{part.name}/{name} is stale: run `make repository`"


def test_a_misspelt_field_is_found() -> None:
    with pytest.raises(text_format.ParseError):
        config_from_text('name: "x" max_batch_sise: 8')


@pytest.mark.parametrize("tower", models.TOWERS, ids=lambda p: p.name)
def test_three_targets_serve_the_same_tensors(tower: models.Model, release: Release) -> None:
    configs = configs_of(tower, release, release.release_id)
    assert set(configs) == {f"configs/{target}.pbtxt" for target in Target}
    for config in configs.values():
        for declared, found in ((tower.inputs, config.input), (tower.outputs, config.output)):
            assert [(t.name, tuple(t.dims)) for t in found] == [
                (t.name, t.dims(release.sizes)) for t in declared
            ]
        assert config.max_batch_size == tower.batch.max
    first, *others = configs.values()
    for other in others:
        assert list(other.input) == list(first.input)
        assert list(other.output) == list(first.output)
        assert other.model_warmup == first.model_warmup
    assert {c.backend for c in configs.values()} == {"tensorrt", "onnxruntime", "python"}


@pytest.mark.parametrize("ensemble", models.IN_ONE, ids=lambda p: p.name)
def test_what_runs_in_one_process_looks_like_its_ensemble(
    ensemble: Ensemble, release: Release
) -> None:
    whole, one = configs_of(ensemble, release, release.release_id).values()
    assert (whole.platform, one.platform, one.backend) == ("ensemble", "", "python")
    for field in ("input", "max_batch_size", "name"):
        assert getattr(whole, field) == getattr(one, field)
    *outputs, timings = one.output  # the one thing more that it can say, to who asks
    assert outputs == list(whole.output)
    assert (timings.name, list(timings.dims)) == ("timings", [4])


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name)
def test_every_config_names_its_release_and_batches(part: models.Model, release: Release) -> None:
    for config in configs_of(part, release, release.release_id).values():
        assert config.parameters["release_id"].string_value == release.release_id
        computes = config.platform != "ensemble"
        assert computes is (config.backend != "")
        assert config.HasField("dynamic_batching") is computes
        assert bool(config.model_warmup) is computes


def test_a_release_is_whole_and_says_how_it_was_made(release_folder: Path) -> None:
    manifest = json.loads((release_folder / "manifest.json").read_text())
    files = {
        str(p.relative_to(release_folder))
        for p in release_folder.rglob("*")
        if p.is_file() and p.name != "manifest.json" and p.suffix != ".pyc"  # Triton's stub's
    }
    assert set(manifest["files"]) == files
    assert manifest["release_id"] == Release.load(release_folder).release_id == release_folder.name
    assert {graph["tower"] for graph in manifest["graphs"]} == {t.name for t in models.TOWERS}
    assert manifest["versions"]["torch"].startswith("2.")
    assert manifest["command"] is None, "it was no command that built it"
    assert manifest["contract"] == contract_fingerprint()
    repository = release_folder / "model_repository"
    version = Release.load(release_folder).version
    assert {p.name for p in repository.iterdir()} == {p.name for p in PARTS}
    for part in PARTS:
        assert any((repository / part.name / str(version)).iterdir()), (
            "empty folders are lost in copies"
        )
    assert not any((release_folder / name).stat().st_mode & 0o222 for name in files)


def test_surgery_of_the_shipped_towers_is_what_it_was(release_folder: Path) -> None:
    """Nodes before and after each pass, and the islands: a change shows, and is looked at."""
    manifest = json.loads((release_folder / "manifest.json").read_text())
    found = {
        graph["tower"]: {
            "passes": [[p["pass"], p["before"], p["after"]] for p in graph["passes"]],
            "islands": len(graph["islands"]),
            "half_share": graph["half_share"],
        }
        for graph in manifest["graphs"]
    }
    assert found == json.loads((ROOT / "tests" / "golden_surgery.json").read_text())


@pytest.fixture
def own_release(tiny_release: Path, tmp_path: Path) -> Path:
    """A copy to build again."""
    return shutil.copytree(tiny_release, tmp_path / "releases" / tiny_release.name)


def test_publishing_again_changes_nothing(own_release: Path) -> None:
    before = own_release.stat().st_mtime_ns
    assert publish(tiny_make(), own_release.parent, Console(quiet=True)) == own_release
    assert own_release.stat().st_mtime_ns == before
    assert (own_release.parent / "latest").resolve() == own_release


def test_other_code_rebuilds_a_release(own_release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.publish.code_fingerprint", lambda: "other code")
    publish(tiny_make(), own_release.parent, Console(quiet=True))
    manifest = json.loads((own_release / "manifest.json").read_text())
    assert manifest["code"] == "other code"


@pytest.mark.parametrize(
    "name", ["export/half.py", "deploy/profiles/default.toml", "deploy/engines/profiles.py"]
)
def test_other_sources_are_other_code(tmp_path: Path, name: str) -> None:
    """Whatever decides what a release holds, by its bytes and by its place."""
    for part in (*ROOMS, *BESIDE):
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("weights", "*.pyc")
            shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
        else:
            (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / part, tmp_path / part)
    ours = code_fingerprint()
    assert code_fingerprint(tmp_path) == ours
    (tmp_path / "export" / "half.py").rename(tmp_path / "export" / "moved.py")
    moved = code_fingerprint(tmp_path)
    (tmp_path / "export" / "moved.py").rename(tmp_path / "export" / "half.py")
    with (tmp_path / name).open("a") as source:
        source.write("\n# changed\n")
    assert len({ours, moved, code_fingerprint(tmp_path)}) == 3


def test_who_comes_while_it_is_built_waits_and_finds_it_built(
    own_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once: of two who build, the later would put its folder in the other's place."""
    built = []
    monkeypatch.setattr("export.publish.code_fingerprint", lambda: "other code")
    monkeypatch.setattr(
        "export.publish.write_onnx", lambda *given: built.append(1) or write_onnx(*given)
    )
    towers, quiet = tiny_make(), Console(quiet=True)
    with ThreadPoolExecutor() as pool:
        homes = list(pool.map(lambda _: publish(towers, own_release.parent, quiet), range(2)))
    assert (homes, len(built)) == ([own_release] * 2, 1)


def test_a_damaged_release_is_rebuilt(own_release: Path) -> None:
    graph = next(own_release.glob("model_repository/query_tower/*/model.onnx"))
    whole = graph.read_bytes()
    graph.chmod(0o644)
    graph.write_bytes(whole[:-1])
    publish(tiny_make(), own_release.parent, Console(quiet=True))
    assert graph.read_bytes() == whole


def test_another_vector_size_is_followed_everywhere_or_refused(
    tiny_release: Path, tmp_path: Path
) -> None:
    """One edit of the checkpoint's config: refused while the weights are the old ones, and with
    new weights ONNX, configs, server, client and catalog follow; the old catalog is refused."""
    save_make(tiny_make(), tmp_path / "checkpoint")
    edit_config(tmp_path / "checkpoint", vector_dim=24)
    with pytest.raises(CheckpointError, match="expected \\(24, 32\\)"):
        load_towers(str(tmp_path / "checkpoint"))
    save_make(tiny_make(24), tmp_path / "checkpoint")
    wider = publish(
        load_towers(str(tmp_path / "checkpoint")), tmp_path / "releases", Console(quiet=True)
    )
    assert wider.name != tiny_release.name
    old, new = Release.load(tiny_release), Release.load(wider)
    store = str(tmp_path / "catalog.db")
    with Catalog(Settings(milvus=store)) as catalog:
        catalog.prepare(old.release_id, old.vector_dim).upsert([product_row("a", old.vector_dim)])
    log = (tmp_path / "triton.log").open("w")
    ports = choose_ports(LOOPBACK)
    encoder = Encoder(Settings(triton=f"{LOOPBACK}:{ports.grpc}"))
    with triton(tiny_release, ports=ports, log=log):
        assert encoder.encode_queries(["red dress"]).vector(0).shape == (16,)
    with triton(wider, ports=ports, log=log) as server:
        settings = Settings(triton=server.grpc_address, milvus=store)
        time.sleep(1.5)  # a channel that met nobody looks again within a second and a bit
        with encoder:  # connected to the first release: notices the second by itself
            encoded = encoder.encode_queries(["red dress"])
            assert encoded.served.release_id == new.release_id
            assert encoded.vector(0).shape == (24,)
            encoded = encoder.encode_products(["red dress"], [photo()])
            assert encoded.vector(0).shape == (24,)
        with ProductSearch(settings) as search, pytest.raises(ReleaseMismatch, match="16 dims"):
            search("red dress")
        with Catalog(settings) as catalog:
            with pytest.raises(ReleaseMismatch, match=new.release_id):
                catalog.prepare(new.release_id, new.vector_dim)
            assert catalog.serving().count() == 1, "nothing stored is lost"
        beside = Settings(triton=server.grpc_address, milvus=store, collection="wider")
        with Catalog(beside) as catalog:
            catalog.prepare(new.release_id, new.vector_dim).upsert([product_row("b", 24)])
        with ProductSearch(beside) as search:
            assert [hit.id for hit in search("red dress")] == ["b"]


def test_a_release_that_is_not_whole_is_not_started(tiny_release: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_release, broken)
    next(broken.glob("model_repository/query_tower/*/model.onnx")).unlink()
    with (
        pytest.raises(DeployError, match=r"query_tower/\d+/model.onnx: not found.*build it again"),
        triton(broken),
    ):
        pass
    with pytest.raises(DeployError, match=r"query_tower/\d+/model.plan: not found"):
        check_release(tiny_release, Target.GPU)
    assert check_release(tiny_release, Target.CPU).release_id == tiny_release.name


def test_a_release_can_be_read_by_every_user(tmp_path: Path) -> None:
    """A container's is another one than who built it, maybe under a strict umask."""
    inner = tmp_path / "release" / "model_repository" / "1"
    inner.mkdir(parents=True)
    (inner / "model.onnx").write_bytes(b"x")
    for folder in (inner, inner.parent, inner.parent.parent):
        folder.chmod(0o700)
    (inner / "model.onnx").chmod(0o600)
    make_read_only(tmp_path / "release")
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "release", inner)]
    assert modes == [0o755, 0o755]
    assert (inner / "model.onnx").stat().st_mode & 0o777 == 0o444
