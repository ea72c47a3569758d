"""What an engine is taken for: half precision and fused attention, and what only looks like it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from deploy.engines.builder import Engine, build, find_runtime
from deploy.engines.facts import Facts, Layer, check_facts, facts_of, facts_of_inspection
from deploy.engines.profiles import profiles_of
from export.half import half_of, islands_of, typed
from retrieval_contract.errors import EngineError
from retrieval_contract.models import ONNX_FILE, QUERY_TOWER
from retrieval_contract.release import Release

RUNTIME = find_runtime(["tensorrt_rtx"])


@pytest.fixture(scope="module")
def release(tiny_release: Path) -> Release:
    return Release.load(tiny_release)


@pytest.fixture(scope="module")
def full(tiny_release: Path, release: Release) -> onnx.ModelProto:
    """The query tower in FP32; two layers."""
    home = tiny_release / "model_repository" / QUERY_TOWER.name / str(release.version)
    return onnx.load(home / ONNX_FILE)


def built(graph: onnx.ModelProto, release: Release) -> Engine:
    """For the largest batch: of one row, products are no layers of their own."""
    bulk = profiles_of(QUERY_TOWER, release)[-1:]
    return build(RUNTIME, graph.SerializeToString(), bulk, architecture="SM89")


def test_an_engine_in_full_precision_is_not_taken_for_half(
    full: onnx.ModelProto, release: Release
) -> None:
    with pytest.raises(EngineError, match=r"half precision, got 0%: build from the FP16 graph"):
        built(full, release)


def test_a_product_in_full_precision_that_gives_half_is_none(
    full: onnx.ModelProto, release: Release
) -> None:
    """Islands between nodes in half: what goes in and comes out of them is cast."""
    graph = typed(full)
    wide = [
        node.name
        for node in graph.nodes
        if node.op == "MatMul" and isinstance(node.inputs[1], gs.Constant)
    ]
    with pytest.raises(EngineError, match=r"expected at least 80% .*in FP32: \['"):
        built(half_of(full, [*islands_of(graph), *wide]), release)


HALF, FULL = frozenset({"Half"}), frozenset({"Float"})


@pytest.mark.parametrize(
    ("layer", "half"),
    [
        (Layer("node_MatMul_1", "gemm", HALF, HALF), True),
        (Layer("_gemm_mha_v2", "kgen", HALF), True),
        (Layer("__myl_FcCast", "runtime_fusion", FULL, FULL), False),
        (Layer("__myl_CastFcCast", "runtime_fusion", HALF, FULL), False),
    ],
)
def test_half_is_what_goes_into_a_product(layer: Layer, half: bool) -> None:
    assert (layer.multiplies, layer.is_half) == (True, half)


def test_an_activation_is_no_product() -> None:
    assert not Layer("__myl_MulCastErfCastMul_myl0_3", "kgen", FULL).multiplies


LINE = (
    "Name: __myl_FcCast_myl0_10, LayerType: runtime_fusion, Inputs: [ {{ Name: x, Dimensions: "
    "[1,-1,384], Strides: [-1,384,1], StrideOrder: [2,1,0], Datatype: {x}, Format: (Linear) Row "
    "major linear format }}], Constants: [ {{ Name: w, Dimensions: [1,384,1536], Strides: "
    "[589824,1536,1], StrideOrder: [2,1,0], Datatype: {w}, Format: (Linear) Row major linear "
    "format }}, {{ Name: alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, "
    "Format: (Linear) Row major linear format }}], Outputs: [ {{ Name: y, Dimensions: [1,-1,1536], "
    "Strides: [-1,1536,1], StrideOrder: [2,1,0], Datatype: Half, Format: (Linear) Row major linear "
    "format }}], TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_MatMul_55]"
)


@pytest.mark.parametrize(
    ("x", "w", "share"), [("Half", "Half", 1.0), ("Float", "Float", 0.0), ("Half", "Float", 0.0)]
)
def test_a_log_is_read_by_inputs_and_matrices(x: str, w: str, share: float) -> None:
    """A scalar beside them is FP32 in every product."""
    assert facts_of([LINE.format(x=x, w=w)], 1).half_share == share


@pytest.mark.parametrize("word", ["Half", "Row major linear FP16 format"])
def test_an_inspection_says_the_same_as_a_log(word: str) -> None:
    """In the words of the documentation; no GPU was at hand to ask one."""
    ends = [{"Name": "x", "Dimensions": [1, 384], "Format/Datatype": word}]
    full = [{"Name": "x", "Dimensions": [1, 384], "Format/Datatype": "Float"}]
    layers = [
        {"Name": "_gemm_mha_v2_myl0_7", "LayerType": "kgen", "Inputs": ends, "Outputs": ends},
        {"Name": "norm", "LayerType": "kgen", "Inputs": full, "Outputs": full},
    ]
    facts = facts_of_inspection(json.dumps({"Layers": layers}), 1, 10)
    assert (len(facts.layers), facts.fused_attention, facts.half_share) == (2, 1, 1.0)
    check_facts(facts, 1)
    island = {"Name": "node_MatMul_1", "LayerType": "gemm", "Inputs": full, "Outputs": ends}
    assert facts_of_inspection(json.dumps({"Layers": [island]}), 1, 10).half_share == 0.0
    with pytest.raises(EngineError, match="DETAILED"):
        facts_of_inspection(json.dumps({"Layers": ["norm"]}), 1, 10)


def test_a_log_without_layers_says_so() -> None:
    with pytest.raises(EngineError, match="DETAILED"):
        facts_of(["Engine generation completed in 2 seconds."], 1)


def test_an_attention_that_is_not_fused_is_named() -> None:
    layers = tuple(Layer(f"gemm{i}", "gemm", HALF) for i in range(4))
    with pytest.raises(EngineError, match="expected 2 fused attentions"):
        check_facts(Facts(layers, 1, 0), 2)


def test_a_factor_for_each_head_leaves_an_attention_an_attention(
    full: onnx.ModelProto, release: Release
) -> None:
    """It is not fused then, and is counted all the same."""
    graph = gs.import_onnx(half_of(full))
    for node in [node for node in graph.nodes if node.op == "Softmax"]:
        (given,) = node.outputs
        weights = gs.Variable(f"{given.name}_weights", given.dtype, given.shape)
        heads = gs.Constant(f"{node.name}_heads", np.array([[[[1.0]], [[0.5]]]], np.float16))
        node.outputs = [weights]
        graph.nodes.append(gs.Node("Mul", f"{node.name}_scaled", {}, [heads, weights], [given]))
    scaled = gs.export_onnx(graph.toposort())
    with pytest.raises(EngineError, match=r"expected 2 fused attentions, one a layer, got 0\.0"):
        built(scaled, release)
