"""Golden probes: written with a release, and asked of whoever serves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.server import LOOPBACK, Server, choose_ports, triton
from retrieval_client import Encoder, Settings
from retrieval_client.__main__ import main
from retrieval_contract import models
from retrieval_contract.errors import ContractError, ReleaseMismatch
from retrieval_contract.probes import PROBES_FILE, Probes
from retrieval_contract.release import Release
from tests.negated import negated


@pytest.fixture(scope="module")
def other(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same sizes, with other vectors."""
    return negated(tiny_release, tmp_path_factory.mktemp("others"))


@pytest.fixture(scope="module")
def served(tiny_release: Path) -> Iterator[Server]:
    with triton(tiny_release) as server:
        yield server


def test_a_release_holds_vectors_of_every_kind_of_item(tiny_release: Path) -> None:
    release, probes = Release.load(tiny_release), Probes.load(tiny_release)
    assert probes.release_id == release.release_id
    assert "" in probes.titles
    assert b"" in probes.images
    for vectors in (probes.query_vectors, probes.product_vectors):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-4)
    assert PROBES_FILE in json.loads((tiny_release / "manifest.json").read_text())["files"]


def test_the_server_gives_them(served: Server, tiny_release: Path) -> None:
    with Encoder(Settings(triton=served.grpc_address)) as encoder:
        assert encoder.probe(Probes.load(tiny_release)) > 1 - 1e-5


def test_the_command_says_how_close(
    served: Server, tiny_release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["probe", str(tiny_release), "--triton", served.grpc_address, "--json"])
    assert left.value.code in (0, None)
    said = json.loads(capsys.readouterr().out)
    assert (said["release_id"], said["probes"]) == (Release.load(tiny_release).release_id, 7)
    assert said["cosine"] > 1 - 1e-5


def test_another_release_is_told_apart(served: Server, tiny_release: Path, other: Path) -> None:
    with Encoder(Settings(triton=served.grpc_address)) as encoder:
        with pytest.raises(ReleaseMismatch, match="expected release"):
            encoder.probe(Probes.load(other))
        lied = replace(Probes.load(other), release_id=Release.load(tiny_release).release_id)
        with pytest.raises(ReleaseMismatch, match=r"golden probe 'red shoes': .*cosine"):
            encoder.probe(lied)


def test_every_replica_is_asked_and_the_one_at_fault_named(
    served: Server, tiny_release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody answers for another: here one of two is away."""
    nobody = f"{LOOPBACK}:{choose_ports(LOOPBACK).grpc}"
    for both in ((served.grpc_address, nobody), (nobody, served.grpc_address)):
        with pytest.raises(SystemExit, match="1"):
            main(["probe", str(tiny_release), "--triton", ",".join(both)])
        assert f"Triton at {nobody}, " in capsys.readouterr().err


@pytest.mark.parametrize("norm", [0.99, 2.0, float("nan")])
def test_right_directions_of_another_length_are_told_apart(tiny_release: Path, norm: float) -> None:
    """As of a graph that lost its last step."""
    probes = Probes.load(tiny_release)
    assert probes.check(probes.query_vectors, probes.product_vectors) > 1 - 1e-5
    with pytest.raises(ReleaseMismatch, match=r"expected the product vector .* norm"):
        probes.check(probes.query_vectors, norm * probes.product_vectors)


def test_a_server_with_other_weights_under_the_same_name_is_not_ready(
    tiny_release: Path, other: Path, tmp_path: Path
) -> None:
    swapped = Path(shutil.copytree(tiny_release, tmp_path / tiny_release.name))
    version = str(Release.load(tiny_release).version)
    graphs = [
        home / "model_repository" / models.QUERY_TOWER.name / number / models.ONNX_FILE
        for home, number in ((other, str(Release.load(other).version)), (swapped, version))
    ]
    graphs[1].chmod(0o644)
    shutil.copyfile(*graphs)
    with pytest.raises(ReleaseMismatch, match="golden probe"), triton(swapped):
        pass


def test_a_release_without_probes_is_not_whole(tiny_release: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"probes\.json: not a file of golden probes"):
        Probes.load(tmp_path)
    (tmp_path / PROBES_FILE).write_text((tiny_release / PROBES_FILE).read_text()[:100])
    with pytest.raises(ContractError, match="build the release again"):
        Probes.load(tmp_path)
