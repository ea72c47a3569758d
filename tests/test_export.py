"""Export: each pass on a tiny graph, the whole on a tiny MAKE, and proof that parity can fail."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from rich.console import Console

from export import surgery
from export.onnx_from_towers import onnx_from_towers
from export.parity import onnx_runtime, parity, session, torch_vectors
from export.publish import write_onnx
from export.surgery import operate
from retrieval_contract import models
from retrieval_contract.errors import ExportError
from retrieval_contract.models import PRODUCT_TOWER, QUERY_TOWER
from retrieval_contract.release import Release
from retrieval_contract.tensors import Model
from tests.conftest import ROOT
from tests.tiny import tiny_make
from tests.traced import traced

TINY = tiny_make()
RELEASE = TINY.release()


@pytest.fixture(scope="module")
def raw() -> dict[str, onnx.ModelProto]:
    """Both towers as the exporter wrote them."""
    return {model.name: traced(TINY, model) for model in models.TOWERS}


@pytest.fixture(scope="module")
def done(raw: dict[str, onnx.ModelProto]) -> dict[str, onnx.ModelProto]:
    """Both towers after surgery."""
    return {model.name: operate(raw[model.name], model, RELEASE) for model in models.TOWERS}


def graph_of(*nodes: gs.Node, inputs: list, outputs: list) -> gs.Graph:
    return gs.Graph(nodes=list(nodes), inputs=inputs, outputs=outputs, opset=20)


def test_ids_become_int32() -> None:
    ids = gs.Variable("ids", np.int64, ["b", "t"])
    pixels = gs.Variable("pixels", np.float32, ["b"])
    surgery.use_int32_inputs(graph_of(inputs=[ids, pixels], outputs=[]))
    assert (ids.dtype, pixels.dtype) == (np.int32, np.float32)


def test_masks_become_finite() -> None:
    x, y = gs.Variable("x", np.float32, [2]), gs.Variable("y", np.float32, [2])
    mask = gs.Constant("mask", np.array([-3.4e38, 0.5], np.float32))
    surgery.use_finite_masks(
        graph_of(gs.Node("Add", inputs=[x, mask], outputs=[y]), inputs=[x], outputs=[y])
    )
    assert mask.values.tolist() == [-1e4, 0.5]


def test_masks_in_an_attribute_become_finite() -> None:
    sizes, y = gs.Variable("sizes", np.int64, [1]), gs.Variable("y", np.float32, ["b"])
    value = gs.Constant("value", np.array([-3.4e38], np.float32))
    node = gs.Node("ConstantOfShape", attrs={"value": value}, inputs=[sizes], outputs=[y])
    surgery.use_finite_masks(graph_of(node, inputs=[sizes], outputs=[y]))
    assert node.attrs["value"].values.tolist() == [-1e4]


@pytest.mark.parametrize(("instead", "left"), [(0.0, ["Relu"]), (1.0, ["IsNaN", "Where", "Relu"])])
def test_nan_guards_go_and_other_choices_stay(instead: float, left: list[str]) -> None:
    x, y = gs.Variable("x", np.float32, [2]), gs.Variable("y", np.float32, [2])
    asked, guarded = gs.Variable("asked", np.bool_, [2]), gs.Variable("guarded", np.float32, [2])
    constant = gs.Constant("instead", np.array(instead, np.float32))
    graph = graph_of(
        gs.Node("IsNaN", inputs=[x], outputs=[asked]),
        gs.Node("Where", inputs=[asked, constant, x], outputs=[guarded]),
        gs.Node("Relu", inputs=[guarded], outputs=[y]),
        inputs=[x],
        outputs=[y],
    )
    assert [node.op for node in surgery.drop_nan_guards(graph).nodes] == left


def reshape_of(*parts: gs.Tensor | int, data: gs.Variable) -> tuple[gs.Graph, gs.Node]:
    """A Reshape of `data` to axes of other tensors and to numbers, put together at run time."""
    sizes, nodes = [], []
    for at, part in enumerate(parts):
        if isinstance(part, int):
            sizes.append(gs.Constant(f"n{at}", np.array([part], np.int64)))
            continue
        sizes.append(gs.Variable(f"n{at}", np.int64, [1]))
        axis = {"start": at, "end": at + 1}
        nodes.append(gs.Node("Shape", f"shape{at}", axis, [part], [sizes[-1]]))
    target, y = gs.Variable("target", np.int64), gs.Variable("y", np.float32)
    nodes.append(gs.Node("Concat", "concat", {"axis": 0}, sizes, [target]))
    reshape = gs.Node("Reshape", "reshape", {"allowzero": 1}, [data, target], [y])
    inputs = list({id(t): t for t in (data, *parts) if isinstance(t, gs.Variable)}.values())
    return graph_of(*nodes, reshape, inputs=inputs, outputs=[y]), reshape


def test_reshapes_become_static_where_axes_line_up() -> None:
    ids = gs.Variable("ids", np.int32, ["batch", "tokens"])
    x = gs.Variable("x", np.float32, ["batch", "tokens", 32])
    graph, reshape = reshape_of(ids, ids, -1, 8, data=x)
    graph = surgery.use_static_reshapes(graph)
    assert reshape.inputs[1].values.tolist() == [0, 0, -1, 8]
    assert [node.op for node in graph.nodes] == ["Reshape"]
    feed = {"x": np.ones((2, 3, 32), np.float32), "ids": np.ones((2, 3), np.int32)}
    assert session(gs.export_onnx(graph, ir_version=10)).run(None, feed)[0].shape == (2, 3, 4, 8)


def test_reshapes_to_other_axes_stay() -> None:
    swapped = gs.Variable("swapped", np.int32, ["tokens", "batch"])
    x = gs.Variable("x", np.float32, ["batch", "tokens", 32])
    graph, reshape = reshape_of(swapped, swapped, 32, data=x)
    surgery.use_static_reshapes(graph)
    assert isinstance(reshape.inputs[1], gs.Variable)


@pytest.mark.parametrize(("reader", "left"), [("Div", ["Div"]), ("Concat", ["Expand", "Concat"])])
def test_expands_go_where_the_reader_broadcasts(reader: str, left: list[str]) -> None:
    x = gs.Variable("x", np.float32, ["batch", 4])
    norm, sizes = gs.Variable("norm", np.float32, ["batch", 1]), gs.Variable("sizes", np.int64, [2])
    wide, y = gs.Variable("wide", np.float32, ["batch", 4]), gs.Variable("y", np.float32)
    graph = graph_of(
        gs.Node("Expand", "expand", {}, [norm, sizes], [wide]),
        gs.Node(reader, "reader", {"axis": 0} if reader == "Concat" else {}, [x, wide], [y]),
        inputs=[x, norm, sizes],
        outputs=[y],
    )
    assert [node.op for node in surgery.drop_expands(graph).nodes] == left


def test_a_graph_that_a_runtime_optimised_is_refused(done: dict[str, onnx.ModelProto]) -> None:
    """ONNX Runtime's own operators mean nothing to TensorRT."""
    graph = onnx.ModelProto()
    graph.CopyFrom(done["query_tower"])
    graph.graph.node[0].domain = "com.microsoft"
    with pytest.raises(ExportError, match=r"only standard ONNX operators.*com\.microsoft"):
        surgery.check_contract(graph, QUERY_TOWER, RELEASE)


def test_a_graph_with_a_renamed_output_is_refused(done: dict[str, onnx.ModelProto]) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(done["query_tower"])
    graph.graph.output[0].name = "vector"
    with pytest.raises(ExportError, match=r"expected query_vector float32 .*, got vector float32"):
        surgery.check_contract(graph, QUERY_TOWER, RELEASE)


def test_pixels_are_normalised_inside() -> None:
    x = gs.Variable("pixels", np.float32, ["batch", 3, 64, 64])
    y = gs.Variable("y", np.float32, ["batch", 3, 64, 64])
    graph = graph_of(gs.Node("Identity", inputs=[x], outputs=[y]), inputs=[x], outputs=[y])
    surgery.take_uint8_pixels(graph, RELEASE.image)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    got = session(gs.export_onnx(surgery.fold(graph), ir_version=10)).run(None, {"pixels": pixels})
    expected = (pixels.transpose(0, 3, 1, 2).astype(np.float64) - 127) / 128
    assert np.abs(got[0] - expected).max() < 1e-6


def test_a_graph_without_pixels_is_left_alone() -> None:
    x, y = gs.Variable("x", np.float32, [1]), gs.Variable("y", np.float32, [1])
    graph = graph_of(gs.Node("Identity", inputs=[x], outputs=[y]), inputs=[x], outputs=[y])
    assert surgery.take_uint8_pixels(graph, RELEASE.image).inputs == [x]


def test_an_inner_tensor_makes_way_for_the_contracts_name() -> None:
    ids, mask = (gs.Variable(n, np.int32, ["b", "t"]) for n in ("query_ids", "query_mask"))
    inner = gs.Variable("query_vector", np.float32, ["b", 16])
    out = gs.Variable("raw_query_vector", np.float32, ["b", 16])
    graph = graph_of(
        gs.Node("Cast", attrs={"to": 1}, inputs=[ids], outputs=[inner]),
        gs.Node("Identity", inputs=[inner], outputs=[out]),
        inputs=[mask, ids],
        outputs=[out],
    )
    surgery.name_by_contract(graph, QUERY_TOWER, RELEASE)
    assert [t.name for t in graph.inputs] == ["query_ids", "query_mask"]
    assert (out.name, inner.name) == ("query_vector", "inner_query_vector")
    assert out.shape == ["batch", 16]


def test_a_graph_without_a_declared_input_is_refused() -> None:
    x, y = gs.Variable("x", np.int32, ["b", "t"]), gs.Variable("y", np.float32, ["b", 16])
    with pytest.raises(ExportError, match="expected a tensor 'query_ids', the graph has"):
        surgery.name_by_contract(graph_of(inputs=[x], outputs=[y]), QUERY_TOWER, RELEASE)


@pytest.mark.parametrize("model", models.TOWERS, ids=lambda m: m.name)
def test_the_served_graph_is_the_contract(model: Model, done: dict[str, onnx.ModelProto]) -> None:
    graph = done[model.name].graph
    assert [i.name for i in graph.input] == [t.name for t in model.inputs]
    assert [o.name for o in graph.output] == [t.name for t in model.outputs]
    kinds = [onnx.TensorProto.DataType.Name(i.type.tensor_type.elem_type) for i in graph.input]
    assert kinds == [t.dtype.onnx.upper() for t in model.inputs]
    assert {n.domain for n in graph.node} <= {"", "ai.onnx"}


def test_each_tower_takes_its_own_side_only(done: dict[str, onnx.ModelProto]) -> None:
    """The query graph knows no product, the product graph no query: not even unused weights."""
    query, product = done["query_tower"].graph, done["product_tower"].graph
    assert {i.name for i in query.input} == {"query_ids", "query_mask"}
    assert not any("query" in i.name for i in product.input)
    table = TEXT_TABLE_BYTES = 30522 * 32 * 4
    sizes = {name: len(done[name].SerializeToString()) for name in done}
    assert table < sizes["query_tower"] < 1.3 * table  # one text encoder, no image encoder
    assert TEXT_TABLE_BYTES < sizes["product_tower"] < 1.3 * table + 16_000_000


@pytest.mark.parametrize("model", models.TOWERS, ids=lambda m: m.name)
def test_no_path_and_no_stack_trace_is_left(
    model: Model, raw: dict[str, onnx.ModelProto], done: dict[str, onnx.ModelProto]
) -> None:
    here = str(ROOT).encode()
    assert here in raw[model.name].SerializeToString()  # the exporter wrote it: the test can fail
    cleaned = done[model.name].SerializeToString()
    assert here not in cleaned
    assert b"site-packages" not in cleaned


@pytest.mark.parametrize("model", models.TOWERS, ids=lambda m: m.name)
def test_torch_and_onnx_agree(model: Model, done: dict[str, onnx.ModelProto]) -> None:
    found = parity(TINY, model, onnx_runtime(done[model.name]))
    assert found.cases >= 9
    assert found.max_abs <= 1e-5


def test_parity_refuses_other_weights(done: dict[str, onnx.ModelProto]) -> None:
    with pytest.raises(ExportError, match=r"differ by .* the graph was not written"):
        parity(tiny_make(seed=1), QUERY_TOWER, onnx_runtime(done["query_tower"]))


def test_parity_refuses_a_slightly_wrong_weight(done: dict[str, onnx.ModelProto]) -> None:
    nudged = tiny_make()
    with torch.no_grad():
        nudged.heads.projection.weight[0, 0] += 1e-3
    with pytest.raises(ExportError, match="differ by"):
        parity(nudged, PRODUCT_TOWER, onnx_runtime(done["product_tower"]))


def test_refused_rows_are_zero_and_served_rows_unit(done: dict[str, onnx.ModelProto]) -> None:
    run = session(done["product_tower"]).run
    feed = {
        "title_ids": np.full((4, 8), 2000, np.int32),
        "title_mask": np.ones((4, 8), np.int32),
        "has_title": np.array([[1], [0], [1], [0]], np.int32),
        "pixels": np.full((4, 64, 64, 3), 90, np.uint8),
        "has_image": np.array([[1], [1], [0], [0]], np.int32),
    }
    norms = np.linalg.norm(run(None, feed)[0], axis=1)
    assert np.allclose(norms, [1, 1, 1, 0], atol=1e-5)
    assert norms[3] == 0


def test_a_vector_does_not_depend_on_its_company_or_padding(
    done: dict[str, onnx.ModelProto],
) -> None:
    run = session(done["query_tower"]).run
    ids = np.random.default_rng(3).integers(1000, 9000, (16, 32)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[:, 6:] = 0
    together = run(None, {"query_ids": ids, "query_mask": mask})[0]
    alone = run(None, {"query_ids": ids[:1, :8].copy(), "query_mask": mask[:1, :8].copy()})[0]
    assert np.abs(together[0] - alone[0]).max() < 1e-6


def test_two_exports_have_one_hash(done: dict[str, onnx.ModelProto]) -> None:
    again = operate(onnx_from_towers(tiny_make(), QUERY_TOWER), QUERY_TOWER, RELEASE)
    hashes = {
        hashlib.sha256(graph.SerializeToString()).hexdigest()
        for graph in (again, done["query_tower"])
    }
    assert len(hashes) == 1


def test_write_onnx_leaves_the_graphs_and_the_release(tmp_path: Path) -> None:
    graphs = write_onnx(TINY, tmp_path, Console(quiet=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "product_tower.fp16.onnx",
        "product_tower.onnx",
        "query_tower.fp16.onnx",
        "query_tower.onnx",
        "release.json",
    ]
    assert Release.load(tmp_path) == RELEASE
    assert [graph["tower"] for graph in graphs] == ["query_tower", "product_tower"]


def test_torch_vectors_are_the_reference() -> None:
    """What parity compares with is the tower itself, normalised: no detour through the graph."""
    ids = np.full((1, 8), 2000, np.int32)
    mask = np.ones_like(ids)
    vector = torch_vectors(TINY, QUERY_TOWER, {"query_ids": ids, "query_mask": mask})
    with torch.no_grad():
        direct = TINY.encode_query(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())
    assert np.allclose(vector, torch.nn.functional.normalize(direct).numpy(), atol=1e-6)
