"""Raw graph → contract graph: one small pass per concern, each `Graph → Graph`, in place.

Loading into onnx-graphsurgeon and writing back drops the exporter's metadata, which holds a
stack trace with local paths on every node.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from retrieval_contract import models
from retrieval_contract.errors import ExportError
from retrieval_contract.release import ImageSpec, Release
from retrieval_contract.tensors import Model, UpTo
from towers.make import MASK_FLOOR

Pass = Callable[[gs.Graph], gs.Graph]
Told = Callable[[str, int, int], None]

LOWEST_HALF = -65504.0
PRODUCER = "make-retrieval"
REMEDY = "export the tower again with `python -m export`"
BROADCASTING = {"Add", "Div", "Mul", "Sub"}


def use_int32_inputs(graph: gs.Graph) -> gs.Graph:
    """Token ids and masks as INT32: half the bytes, and what TensorRT binds without a cast."""
    for tensor in graph.inputs:
        if tensor.dtype == np.int64:
            tensor.dtype = np.dtype(np.int32)
    return graph


def use_finite_masks(graph: gs.Graph) -> gs.Graph:
    """Constants below half precision's range (−3.4e38 masks) become −1e4, in attributes, too."""
    inside = [value for node in graph.nodes for value in node.attrs.values()]
    for tensor in (*graph.tensors().values(), *inside):
        if isinstance(tensor, gs.Constant) and tensor.values.dtype == np.float32:
            low = tensor.values < LOWEST_HALF
            if low.any():
                tensor.values = np.where(low, np.float32(MASK_FLOOR), tensor.values)
    return graph


def drop_nan_guards(graph: gs.Graph) -> gs.Graph:
    """`Where(IsNaN(x), 0, x)` → x: with finite masks no softmax gives NaN."""
    for node in [n for n in graph.nodes if n.op == "Where"]:
        condition, replacement, kept = node.inputs
        asked = condition.inputs[0] if condition.inputs else None
        zero = isinstance(replacement, gs.Constant) and not replacement.values.any()
        if asked is not None and asked.op == "IsNaN" and asked.inputs[0] is kept and zero:
            _use_instead(node.outputs[0], kept)
    return graph.cleanup(remove_unused_graph_inputs=False)


def use_static_reshapes(graph: gs.Graph) -> gs.Graph:
    """Reshapes to computed sizes → constants: 0 for an axis that stays, sizes for the rest.

    Where a size is that of another axis, the reshape stays as it is.
    """
    for node in graph.nodes:
        if node.op == "Reshape" and (sizes := _static_sizes(*node.inputs)):
            node.inputs[1] = gs.Constant(f"{node.name}_sizes", np.array(sizes, np.int64))
            node.attrs["allowzero"] = 0
    return graph.cleanup(remove_unused_graph_inputs=False)


def _static_sizes(data: gs.Tensor, target: gs.Tensor) -> list[int] | None:
    """What a concatenated target says, with 0 for the data's own axes; None where unknown."""
    if not target.inputs or target.inputs[0].op != "Concat" or data.shape is None:
        return None
    sizes: list[int] = []
    for part in target.inputs[0].inputs:
        at = len(sizes)
        if isinstance(part, gs.Constant):
            sizes += part.values.reshape(-1).tolist()
        elif at < len(data.shape) and _axis_read(part) == data.shape[at]:
            sizes.append(0)
        else:
            return None
    return sizes


def _axis_read(size: gs.Tensor) -> str | None:
    """The name of the dynamic axis whose length this tensor is, where it is one's."""
    if not size.inputs or size.inputs[0].op != "Shape":
        return None
    node = size.inputs[0]
    shape = node.inputs[0].shape or []
    axes = shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]
    return axes[0] if len(axes) == 1 and isinstance(axes[0], str) else None


def drop_expands(graph: gs.Graph) -> gs.Graph:
    """`Expand` goes where all its readers broadcast anyway, to the same shape."""
    for node in [n for n in graph.nodes if n.op == "Expand"]:
        (wide,) = node.outputs
        if wide.shape and all(_broadcasts_to(wide, reader) for reader in wide.outputs):
            _use_instead(wide, node.inputs[0])
    return graph.cleanup(remove_unused_graph_inputs=False)


def _broadcasts_to(wide: gs.Tensor, reader: gs.Node) -> bool:
    others = [tensor.shape for tensor in reader.inputs if tensor is not wide]
    return reader.op in BROADCASTING and wide.shape in others


def _use_instead(old: gs.Tensor, new: gs.Tensor) -> None:
    """All nodes that read `old` read `new`."""
    for reader in list(old.outputs):
        reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]


def take_uint8_pixels(graph: gs.Graph, image: ImageSpec) -> gs.Graph:
    """Replace the normalised float NCHW input by UINT8 NHWC, with the normalisation inside.

    A quarter of the bytes on the wire, and no client can normalise wrongly. It is not folded
    into the first convolution: zero padding at the border would then mean another colour.
    """
    old = next((t for t in graph.inputs if t.name == models.PIXELS.name), None)
    if old is None:
        return graph
    scale = 1.0 / np.array(image.std, np.float64)
    shift = -np.array(image.mean, np.float64) * scale
    batch = old.shape[0]
    old.name = "pixels_nchw"
    pixels = gs.Variable(models.PIXELS.name, np.uint8, [batch, image.height, image.width, 3])
    steps = [pixels] + [
        gs.Variable(f"pixels_{step}", np.float32) for step in ("float", "scaled", "normalised")
    ]
    constants = {
        "Mul": gs.Constant("pixels_scale", scale.astype(np.float32)),
        "Add": gs.Constant("pixels_shift", shift.astype(np.float32)),
    }
    graph.nodes += [
        gs.Node("Cast", "pixels_to_float", {"to": onnx.TensorProto.FLOAT}, [steps[0]], [steps[1]]),
        gs.Node("Mul", "scale_pixels", inputs=[steps[1], constants["Mul"]], outputs=[steps[2]]),
        gs.Node("Add", "shift_pixels", inputs=[steps[2], constants["Add"]], outputs=[steps[3]]),
        gs.Node("Transpose", "pixels_to_nchw", {"perm": [0, 3, 1, 2]}, [steps[3]], [old]),
    ]
    graph.inputs[graph.inputs.index(old)] = pixels
    return graph


def name_by_contract(graph: gs.Graph, model: Model, release: Release) -> gs.Graph:
    """Inputs and outputs get the contract's names, dtypes and axes, in its order."""
    inner = graph.tensors()
    for declared, tensor in zip(model.outputs, graph.outputs, strict=True):
        if clash := inner.get(declared.name):
            clash.name = f"inner_{declared.name}"
        tensor.name, tensor.dtype = declared.name, declared.dtype.numpy
    ends = {t.name: t for t in (*graph.inputs, *graph.outputs)}
    for declared in (*model.inputs, *model.outputs):
        if declared.name not in ends:
            raise ExportError(
                f"{model.name}: expected a tensor '{declared.name}', the graph has {sorted(ends)}; "
                "take the tower's own graph, as `python -m export` traces it"
            )
        axes = zip(declared.axes, release.dims(declared), strict=True)
        ends[declared.name].shape = ["batch"] + [
            axis.size if isinstance(axis, UpTo) and dim == -1 else dim for axis, dim in axes
        ]
    graph.inputs = [ends[t.name] for t in model.inputs]
    graph.outputs = [ends[t.name] for t in model.outputs]
    return graph


def fold(graph: gs.Graph) -> gs.Graph:
    """Compute what is constant, drop what is dead, order the rest; declared inputs stay."""
    graph.fold_constants().cleanup(remove_unused_graph_inputs=False).toposort()
    return graph


def passes(model: Model, release: Release) -> list[Pass]:
    """The passes of one tower, in their order."""
    return [
        use_int32_inputs,
        use_finite_masks,
        drop_nan_guards,
        use_static_reshapes,
        drop_expands,
        partial(take_uint8_pixels, image=release.image),
        partial(name_by_contract, model=model, release=release),
        fold,
    ]


def say_nothing(name: str, before: int, after: int) -> None:
    """For who does not watch."""


def operate(
    raw: onnx.ModelProto, model: Model, release: Release, told: Told = say_nothing
) -> onnx.ModelProto:
    """All passes, then proof that the result is valid and is what the contract says.

    `told(pass, nodes before, nodes after)` after each.
    """
    graph = gs.import_onnx(raw)
    for one in passes(model, release):
        before = len(graph.nodes)
        graph = one(graph)
        told(getattr(one, "func", one).__name__, before, len(graph.nodes))
    graph.name, graph.doc_string = model.name, ""
    done = gs.export_onnx(graph, producer_name=PRODUCER, producer_version="")
    del done.graph.value_info[:]
    del done.metadata_props[:]
    onnx.checker.check_model(done, full_check=True)
    check_contract(done, model, release)
    return done


def check_contract(graph: onnx.ModelProto, model: Model, release: Release) -> None:
    """Raise ExportError unless inputs and outputs are the contract's, in name, type and dims."""
    wanted = [
        (t.name, t.dtype.onnx, ["batch", *release.dims(t)]) for t in (*model.inputs, *model.outputs)
    ]
    found = []
    for value in (*graph.graph.input, *graph.graph.output):
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        dims = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        found.append((value.name, kind, dims))
    for (name, dtype, dims), (got_name, got_dtype, got_dims) in zip(wanted, found, strict=False):
        same = len(dims) == len(got_dims) and all(
            want == got or want == -1 for want, got in zip(dims, got_dims, strict=True)
        )
        if (name, dtype) != (got_name, got_dtype) or not same:
            raise ExportError(
                f"{model.name}: expected {name} {dtype} {dims}, got {got_name} "
                f"{got_dtype} {got_dims}; {REMEDY}"
            )
    if len(wanted) != len(found):
        raise ExportError(
            f"{model.name}: expected {[w[0] for w in wanted]}, got {[f[0] for f in found]}; "
            f"{REMEDY}"
        )
    if foreign := {n.domain for n in graph.graph.node if n.domain not in ("", "ai.onnx")}:
        raise ExportError(
            f"{model.name}: only standard ONNX operators may stay, got {foreign}; take the graph "
            "after surgery, not one that a runtime optimised"
        )
