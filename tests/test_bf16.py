"""Releases in bf16: another identity, other targets, the same vectors but for rounding."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from deploy.engines.ready import Missing, prepare
from deploy.server import Server, check_release, triton
from export.config_from_contract import configs_of
from export.parity import BF16, torch_vectors
from export.publish import publish
from export.rungs import over_grpc
from retrieval_client import Encoder, Settings
from retrieval_contract import models
from retrieval_contract.errors import ContractError, ReleaseMismatch
from retrieval_contract.graph import OnnxGraph, why_no_bf16
from retrieval_contract.models import Target
from retrieval_contract.preprocess import TextPreprocessor
from retrieval_contract.probes import Probes
from retrieval_contract.release import Precision, Release
from tests.conftest import ROOT, TWO_CORES
from tests.tiny import tiny_make

TOWERS = tiny_make()
WHY_NOT = why_no_bf16()
here = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "bf16 is here")
TEXTS = ["red shoes", "navy blue shirt for men", "watch", "a"]


@pytest.fixture(scope="module")
def folder() -> Path:
    console = Console(quiet=True)
    return publish(TOWERS, ROOT / "build" / "test-releases", console, precision=Precision.BF16)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with (
        (tmp_path_factory.mktemp("bf16") / "server.log").open("w") as log,
        triton(folder, log=log) as server,
    ):
        yield server


def test_a_release_in_bf16_is_another_and_not_for_gpus() -> None:
    plain = TOWERS.release()
    rounded = replace(plain, precision=Precision.BF16)
    assert rounded.release_id != plain.release_id
    assert plain.targets == tuple(Target)
    assert rounded.targets == (Target.CPU, Target.LOCAL)
    for tower in models.TOWERS:
        configs = configs_of(tower, rounded, rounded.release_id)
        assert sorted(configs) == ["configs/cpu.pbtxt", "configs/local.pbtxt"]
        assert {config.backend for config in configs.values()} == {"python"}
    with pytest.raises(ContractError, match=r"expected a precision of .*'bf16'.*, got 'fp16'"):
        replace(plain, precision="fp16")


def test_without_bf16_there_is_none_in_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself OpenVINO would compute in FP32, and say nothing."""
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    with pytest.raises(ContractError, match=r"AVX512_BF16.*got one with.*--precision fp32"):
        OnnxGraph(Path("none.onnx"), 1, Precision.BF16)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ContractError, match=r"expected OpenVINO.*install `openvino`"):
        OnnxGraph(Path("none.onnx"), 1, Precision.BF16)


@here
def test_it_is_checked_for_the_targets_that_it_has(folder: Path, tmp_path: Path) -> None:
    assert Release.load(folder).precision == "bf16"
    for target in (Target.CPU, Target.LOCAL):
        assert check_release(folder, target).release_id == folder.name
    with pytest.raises(ContractError, match=r"expected one of \['cpu', 'local'\] for bf16"):
        check_release(folder, Target.GPU)
    with pytest.raises(ContractError, match=r"got 'gpu'; build it with --precision fp32"):
        prepare(folder, tmp_path, None, None, Missing.WAIT)


@here
def test_served_vectors_are_those_of_torch_but_for_rounding(server: Server) -> None:
    with Encoder(Settings(triton=server.grpc_address)) as encoder:
        together = encoder.encode_queries(TEXTS).vectors
        alone = np.stack([encoder.encode_queries([text]).vector(0) for text in TEXTS])
        refused = encoder.encode_queries(["", "watch"])
    side = TOWERS.spec.query
    batch = TextPreprocessor(side.tokenizer_json, side.spec, required=True)(
        [text.encode() for text in TEXTS]
    )
    inputs = {models.QUERY_IDS.name: batch.ids, models.QUERY_MASK.name: batch.mask}
    wanted = torch_vectors(TOWERS, models.QUERY_TOWER, inputs)
    cosines = (together * wanted).sum(1)
    assert cosines.min() >= BF16.cosine
    assert np.abs(together - wanted).max() > 1e-5, "in FP32, this would be closer"
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(alone, together, atol=BF16.invariance)
    assert refused.errors[0] is not None
    assert refused.errors[1] is None


@here
def test_neither_release_takes_the_others_vectors(server: Server, tiny_release: Path) -> None:
    rung = over_grpc(TOWERS, models.QUERY_TOWER, server.grpc_address)
    assert (rung.name, rung.budget) == ("served over gRPC, bf16", BF16)
    plain = Probes.load(tiny_release)
    with (
        Encoder(Settings(triton=server.grpc_address)) as encoder,
        pytest.raises(ReleaseMismatch, match=plain.release_id),
    ):
        encoder.probe(plain)


@here
@TWO_CORES
def test_what_it_is_worth_is_measured(folder: Path, tiny_release: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.precision", str(tiny_release), str(folder)]
    command += ["--rounds", "1", "--seconds", "0.2", "--product-seconds", "0.2"]
    done = subprocess.run(
        [*command, "--in-flight", "4", "--rows", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["query"]["4"] > 0
    assert report["product"]["2"] > 0
