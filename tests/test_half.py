"""FP16 in the graph: the converter on tiny graphs and on towers, and the culprits it may have."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from export.culprits import find_culprits
from export.half import half_of, half_share, islands_of, to_half, typed
from export.judges import parity_judge
from export.parity import HALF, HALF_REFERENCE, cases, few, onnx_runtime, parity, reference
from export.surgery import operate
from retrieval_contract import models
from retrieval_contract.errors import ExportError
from tests.tiny import tiny_make
from tests.traced import traced
from towers.two_towers import TwoTowers

FULL, HALF_TYPE = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def model_of(*nodes: gs.Node, inputs: list, outputs: list) -> onnx.ModelProto:
    graph = gs.Graph(nodes=list(nodes), inputs=inputs, outputs=outputs, opset=20)
    return gs.export_onnx(graph, ir_version=10)


def chain(*steps: tuple[str, dict, list[np.ndarray]], width: int = 4) -> onnx.ModelProto:
    """x (batch, width) through one node after another, each named after its place."""
    x = first = gs.Variable("x", np.float32, ["batch", width])
    nodes = []
    for at, (op, attrs, constants) in enumerate(steps):
        extra = [gs.Constant(f"c{at}_{i}", c.astype(np.float32)) for i, c in enumerate(constants)]
        y = gs.Variable(f"t{at}", np.float32, ["batch", width])
        nodes.append(gs.Node(op, f"{at}_{op}", attrs, [x, *extra], [y]))
        x = y
    return model_of(*nodes, inputs=[first], outputs=[x])


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}


def test_inputs_and_outputs_stay_and_the_rest_is_half() -> None:
    half = half_of(chain(("Relu", {}, []), ("Mul", {}, [np.ones(4)]), ("Relu", {}, [])), [])
    ends = [*half.graph.input, *half.graph.output]
    assert {v.type.tensor_type.elem_type for v in ends} == {FULL}
    assert Counter(node.op_type for node in half.graph.node)["Cast"] == 2
    assert types_of(half)["t1"] == HALF_TYPE
    assert half_share(typed(half)) == 1.0


def test_a_constant_that_two_precisions_read_is_there_twice() -> None:
    x = gs.Variable("x", np.float32, ["batch", 4])
    shared = gs.Constant("shared", np.array([1, 2, 3, 4], np.float32))
    y, z = (gs.Variable(n, np.float32, ["batch", 4]) for n in "yz")
    nodes = [
        gs.Node("Add", "one", {}, [x, shared], [y]),
        gs.Node("Mul", "two", {}, [y, shared], [z]),
    ]
    half = half_of(model_of(*nodes, inputs=[x], outputs=[z]), ["one"])
    assert sorted(i.data_type for i in half.graph.initializer) == [FULL, HALF_TYPE]


def test_a_tensor_is_cast_once_for_all_who_read_it() -> None:
    x = gs.Variable("x", np.float32, ["batch", 4])
    ys = [gs.Variable(f"y{i}", np.float32, ["batch", 4]) for i in range(3)]
    nodes = [gs.Node("Relu", f"r{i}", {}, [x], [y]) for i, y in enumerate(ys)]
    out = gs.Variable("out", np.float32, ["batch", 4])
    nodes.append(gs.Node("Sum", "sum", {}, ys, [out]))
    half = half_of(model_of(*nodes, inputs=[x], outputs=[out]), [])
    assert Counter(node.op_type for node in half.graph.node)["Cast"] == 2


def test_what_half_precision_cannot_hold_is_refused_by_name() -> None:
    model = chain(("Add", {}, [np.full(4, -3.4e38)]))
    with pytest.raises(ExportError, match=r"0_Add: constant c0_0 holds 3\.4e\+38.*65504"):
        half_of(model, [])
    half_of(model, ["0_Add"])
    tiny = half_of(chain(("Add", {}, [np.full(4, 1e-6)])), [])
    assert onnx.numpy_helper.to_array(tiny.graph.initializer[0]).min() > 0  # subnormal, not lost


def filled(value: float) -> onnx.ModelProto:
    """x + a row that a node makes of the number in its attribute."""
    x, row, y = (gs.Variable(name, np.float32, ["batch", 4]) for name in ("x", "row", "y"))
    row.shape = [4]
    sizes = gs.Constant("sizes", np.array([4], np.int64))
    attribute = gs.Constant("value", np.array([value], np.float32))
    nodes = [
        gs.Node("ConstantOfShape", "fill", {"value": attribute}, [sizes], [row]),
        gs.Node("Add", "add", {}, [x, row], [y]),
    ]
    return model_of(*nodes, inputs=[x], outputs=[y])


def test_what_half_precision_cannot_hold_is_refused_in_an_attribute() -> None:
    with pytest.raises(ExportError, match=r"fill: constant .* holds 3\.4e\+38.*65504"):
        half_of(filled(-3.4e38), [])
    half_of(filled(-3.4e38), ["fill"])
    assert reference(half_of(filled(-1e4), []))(ROWS)[0, 0] == -1e4


def test_integers_become_half_at_once() -> None:
    ids = gs.Variable("ids", np.int32, ["batch"])
    y, z = gs.Variable("y", np.float32, ["batch"]), gs.Variable("z", np.float32, ["batch"])
    nodes = [gs.Node("Cast", "cast", {"to": FULL}, [ids], [y]), gs.Node("Relu", "r", {}, [y], [z])]
    half = half_of(model_of(*nodes, inputs=[ids], outputs=[z]), [])
    casts = [
        onnx.helper.get_node_attr_value(n, "to") for n in half.graph.node if n.op_type == "Cast"
    ]
    assert casts == [HALF_TYPE, FULL]


def test_an_unknown_island_is_an_error() -> None:
    with pytest.raises(ExportError, match=r"\['relu'\]: expected names of .*export culprits"):
        half_of(chain(("Relu", {}, [])), ["relu"])


def test_islands_are_sums_their_guards_and_the_tail() -> None:
    """Of two Clips the one that guards the division stays in FP32, the ReLU6 does not."""
    x = gs.Variable("x", np.float32, ["batch", 4])
    names = ("relu6", "product", "norm", "guard", "unit")
    widths = (4, 4, 1, 1, 4)
    relu6, product, norm, guard, unit = (
        gs.Variable(n, np.float32, ["batch", w]) for n, w in zip(names, widths, strict=True)
    )
    zero, six, eps = (gs.Constant(f"c{v}", np.array(v, np.float32)) for v in (0.0, 6.0, 1e-12))
    axes = gs.Constant("axes", np.array([1], np.int64))
    nodes = [
        gs.Node("Clip", "relu6", {}, [x, zero, six], [relu6]),
        gs.Node(
            "MatMul", "product", {}, [relu6, gs.Constant("w", np.eye(4, dtype="f4"))], [product]
        ),
        gs.Node("ReduceL2", "norm", {"keepdims": 1}, [product, axes], [norm]),
        gs.Node("Clip", "guard", {}, [norm, eps], [guard]),
        gs.Node("Div", "unit", {}, [product, guard], [unit]),
    ]
    model = model_of(*nodes, inputs=[x], outputs=[unit])
    assert islands_of(typed(model)) == ["norm", "guard", "unit"]
    kinds = types_of(half_of(model))
    assert (kinds["relu6"], kinds["guard"]) == (HALF_TYPE, FULL)


@pytest.fixture(scope="module")
def graphs() -> tuple[TwoTowers, dict[str, onnx.ModelProto]]:
    towers = tiny_make()
    release = towers.release()
    return towers, {m.name: operate(traced(towers, m), m, release) for m in models.TOWERS}


@pytest.mark.parametrize("model", models.TOWERS, ids=lambda m: m.name)
def test_towers_in_half_precision_give_the_vectors_of_torch(
    graphs: tuple[TwoTowers, dict[str, onnx.ModelProto]], model: models.Model
) -> None:
    towers, by_name = graphs
    half = half_of(by_name[model.name])
    tried = list(cases(model, towers))
    assert parity(towers, model, onnx_runtime(half), HALF, tried).min_cosine >= 0.9995
    assert parity(towers, model, reference(half), HALF_REFERENCE, few(tried)).min_cosine >= 0.999
    assert few(tried), "the slow runtime has a case"
    assert half.SerializeToString() == half_of(by_name[model.name]).SerializeToString()


ROWS = {"x": np.array([[1, 2, 3, 4], [4, 1, -2, 0.5]], np.float32)}


def test_the_finder_names_a_planted_overflow() -> None:
    large = np.eye(4) * 5e4
    model = chain(
        ("Relu", {}, []),
        ("MatMul", {}, [large]),
        ("Mul", {}, [np.full(4, 1e-4)]),
        ("Relu", {}, []),
    )
    tried: list[int] = []
    found = find_culprits(
        model,
        parity_judge(model, ROWS),
        1e-4,
        ROWS,
        told=lambda names, trials: tried.append(trials),
    )
    # The one that makes the value, and the one that reads it: it would be cast for it.
    assert [(c.name, c.largest) for c in found] == [("1_MatMul", 2e5), ("2_Mul", 2e5)]
    assert all("overflows" in culprit.why for culprit in found)
    json.dumps([culprit.as_json() for culprit in found], allow_nan=False)
    assert found[0].before <= 1e-4 < found[0].after
    assert tried[-1] < 15
    assert parity_judge(model, ROWS)(half_of(model, [c.name for c in found])) <= 1e-4


def test_a_layer_norm_whose_variance_overflows_is_found_and_is_an_island_by_rule() -> None:
    model = chain(
        ("Mul", {}, [np.full(4, 200.0)]),
        ("LayerNormalization", {}, [np.ones(4), np.zeros(4)]),
        ("Relu", {}, []),
    )
    judge = parity_judge(model, ROWS)
    assert not judge(half_of(model, [])) <= 1e-2
    assert [c.op for c in find_culprits(model, judge, 1e-3, ROWS)] == ["LayerNormalization"]
    assert judge(half_of(model)) <= 1e-3


def test_the_finder_says_when_the_bound_asks_for_full_precision() -> None:
    model = chain(("Relu", {}, []))
    with pytest.raises(ExportError, match=r"FP32 itself is off .*raise --bound"):
        find_culprits(model, lambda graph: 1.0, 1e-4, ROWS)


def test_two_islands_beside_each_other_need_no_cast_between_them() -> None:
    model = chain(("Relu", {}, []), ("Exp", {}, []), ("Log", {}, []), ("Relu", {}, []))
    graph = to_half(typed(model), ["1_Exp", "2_Log"])
    assert [node.op for node in graph.nodes] == [
        "Cast",
        "Relu",
        "Cast",
        "Exp",
        "Log",
        "Cast",
        "Relu",
        "Cast",
    ]
