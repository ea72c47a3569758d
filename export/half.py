"""FP32 graph → FP16 graph. TensorRT 11 has no precision switch: precision lives in the graph.

A node computes in half precision unless it is named as an island. Nodes are named, not kinds of
nodes: every ReLU6 is a Clip, and so is the guard of a division.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from retrieval_contract.errors import ExportError

LARGEST = float(np.finfo(np.float16).max)
FULL, HALF = np.dtype(np.float32), np.dtype(np.float16)
SHORT = {FULL: "full", HALF: "half"}
REDUCTIONS = {"ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "LayerNormalization"}
GUARDS = {"Clip", "Max", "Add", "Sqrt", "Expand", "Div"}
"""What lies between a reduction and the division by it, and the division."""
PRODUCTS = {"MatMul", "Gemm", "Conv"}


def islands_of(graph: gs.Graph) -> list[str]:
    """Nodes that stay in FP32 wherever they are, by name and in order.

    Sums over many values overflow or lose their end in half precision: reductions, and what
    guards and divides by them (an eps of 1e-12 is zero in FP16). So does the last rounding:
    what follows the last matrix product makes the vector's norm.
    """
    names = {node.name for node in graph.nodes if node.op in REDUCTIONS and _is_floating(node)}
    for node in graph.nodes:
        if node.op in REDUCTIONS - {"LayerNormalization"} and node.name in names:
            names |= _until_divided(node)
    names |= _tail(graph)
    return [node.name for node in graph.toposort().nodes if node.name in names]


def islands_with(more: Sequence[str], model: onnx.ModelProto) -> list[str]:
    """Those of the rule, and `more`; each once."""
    return list(dict.fromkeys([*islands_of(typed(model)), *more]))


def _tail(graph: gs.Graph) -> set[str]:
    """Floating nodes between the last matrix products and the outputs."""
    tail: dict[str, gs.Node] = {}
    behind = [node for tensor in graph.outputs for node in tensor.inputs]
    while behind:
        node = behind.pop()
        if node.op not in PRODUCTS and _is_floating(node) and node.name not in tail:
            tail[node.name] = node
            behind += [before for tensor in node.inputs for before in tensor.inputs]
    return set(tail)


def _until_divided(node: gs.Node) -> set[str]:
    """The guards after a reduction, and the division; nothing where none comes."""
    path: set[str] = set()
    while node.op != "Div":
        readers = [reader for output in node.outputs for reader in output.outputs]
        node = next((reader for reader in readers if reader.op in GUARDS), None)
        if node is None or node.name in path:
            return set()
        path.add(node.name)
    return path


def _is_floating(node: gs.Node) -> bool:
    return any(tensor.dtype in (FULL, HALF) for tensor in node.outputs)


def to_half(graph: gs.Graph, islands: Collection[str]) -> gs.Graph:
    """The same graph, in place, with FP16 between its inputs and outputs, whose types stay.

    `islands` are names of nodes that go on in FP32. Where precision changes, a tensor is cast
    once for all who read it. Every variable needs a dtype (`typed`). Raises ExportError for an
    unknown island, and for a constant that half precision cannot hold.
    """
    if unknown := set(islands) - {node.name for node in graph.nodes}:
        raise ExportError(
            f"islands {sorted(unknown)}: expected names of the graph's nodes, it has none of "
            "these; find its own with `python -m export culprits`"
        )
    casts: dict[tuple[int, np.dtype], gs.Tensor] = {}
    ends = {id(tensor) for tensor in graph.outputs}
    for node in list(graph.toposort().nodes):
        wanted = FULL if node.name in islands else HALF
        for at, tensor in enumerate(node.inputs):
            if tensor.dtype in (FULL, HALF) and tensor.dtype != wanted:
                if (id(tensor), wanted) not in casts:
                    casts[id(tensor), wanted] = _as(tensor, wanted, graph, node.name)
                node.inputs[at] = casts[id(tensor), wanted]
        if wanted is HALF:
            _use_half_attributes(node)
            for at, tensor in enumerate(node.outputs):
                if tensor.dtype == FULL and id(tensor) in ends:
                    inner = gs.Variable(f"{tensor.name}_half", HALF, tensor.shape)
                    node.outputs[at] = inner
                    _cast(graph, inner, tensor)
                elif tensor.dtype == FULL:
                    tensor.dtype = HALF
    return graph.cleanup(remove_unused_graph_inputs=False).toposort()


def _as(tensor: gs.Tensor, wanted: np.dtype, graph: gs.Graph, reader: str) -> gs.Tensor:
    """The tensor in another precision: a constant's copy, or a cast of a variable."""
    name = f"{tensor.name}_{SHORT[wanted]}"
    if isinstance(tensor, gs.Variable):
        other = gs.Variable(name, wanted, tensor.shape)
        _cast(graph, tensor, other)
        return other
    return _constant(tensor, name, wanted, reader)


def _constant(given: gs.Constant, name: str, wanted: np.dtype, reader: str) -> gs.Constant:
    """A copy in another precision; ExportError where half precision cannot hold it."""
    worst = float(np.abs(given.values).max(initial=0.0))
    if wanted is HALF and not worst <= LARGEST:  # NaN, too
        raise ExportError(
            f"{reader}: constant {given.name} holds {worst:.3g}, half precision ends at "
            f"{LARGEST:.0f}; make the node an island, or the constant smaller"
        )
    return gs.Constant(name, given.values.astype(wanted))


def _cast(graph: gs.Graph, given: gs.Tensor, other: gs.Variable) -> None:
    to = onnx.helper.np_dtype_to_tensor_dtype(other.dtype)
    graph.nodes.append(gs.Node("Cast", f"cast_{other.name}", {"to": to}, [given], [other]))


def _use_half_attributes(node: gs.Node) -> None:
    """What says FLOAT in an attribute says FLOAT16."""
    if node.op == "Cast" and node.attrs["to"] == onnx.TensorProto.FLOAT:
        node.attrs["to"] = onnx.TensorProto.FLOAT16
    for name, value in node.attrs.items():
        if isinstance(value, gs.Tensor) and value.dtype == FULL:
            node.attrs[name] = _constant(value, value.name, HALF, node.name)


def typed(model: onnx.ModelProto) -> gs.Graph:
    """Load with the dtype and shape of every inner tensor."""
    return gs.import_onnx(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def half_share(graph: gs.Graph) -> float:
    """Of the nodes that compute on floating point (casts not counted), the share in half."""
    kinds = [
        {tensor.dtype for tensor in node.outputs} & {FULL, HALF}
        for node in graph.nodes
        if node.op != "Cast"
    ]
    floating = [kind for kind in kinds if kind]
    return sum(HALF in kind for kind in floating) / max(1, len(floating))


def half_of(model: onnx.ModelProto, islands: Collection[str] | None = None) -> onnx.ModelProto:
    """FP16 twin of a finished FP32 graph: same inputs and outputs; `islands` default to the rule's.

    Raises ExportError, and onnx's own error for a graph that is not valid afterwards.
    """
    graph = typed(model)
    half = gs.export_onnx(
        to_half(graph, islands_of(graph) if islands is None else islands),
        producer_name=model.producer_name,
        producer_version=model.producer_version,
    )
    del half.graph.value_info[:]
    onnx.checker.check_model(half, full_check=True)
    return half
