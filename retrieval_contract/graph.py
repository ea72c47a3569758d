"""A graph as the local server runs it, and as anyone else may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrieval_contract.errors import ContractError
from retrieval_contract.lengths import like_lengths
from retrieval_contract.models import QUERY_IDS, QUERY_MASK
from retrieval_contract.release import Precision
from retrieval_contract.tensors import Array


@dataclass(frozen=True)
class Runtime:
    """A loaded graph: inputs → outputs by name; inputs whose second axis is of any length."""

    run: Callable[[dict[str, Array]], dict[str, Array]]
    any_length: frozenset[str]


def onnx_runtime(path: Path, threads: int) -> Runtime:
    """In FP32, on ONNX Runtime's CPU provider."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads steal the core from the tokenizer and from the server itself.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(feed: dict[str, Array]) -> dict[str, Array]:
        return dict(zip(names, session.run(names, feed), strict=True))

    inputs = session.get_inputs()
    return Runtime(run, frozenset(i.name for i in inputs if not isinstance(i.shape[1], int)))


def why_no_bf16() -> str:
    """What this machine lacks for bf16, and what to do; empty where it lacks nothing."""
    try:
        import openvino
    except ImportError as exc:
        return f"bf16: expected OpenVINO, got {exc}; install `openvino`"
    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" in can:
        return ""
    return f"bf16: expected a processor with AMX or AVX512_BF16, got one with {sorted(can)}"


def openvino_bf16(graph: Path | bytes, threads: int) -> Runtime:
    """In bf16, by OpenVINO; what comes back is FP32.

    Asked for by name, and refused elsewhere: left to itself, OpenVINO takes bf16 where the
    processor has it, and FP32 where it has not, without a word
    (docs.openvino.ai, "Inference Precision").
    """
    if why := why_no_bf16():
        raise ContractError(f"{why}; or take a release that was built with --precision fp32")
    import openvino

    core = openvino.Core()
    asked = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    model = core.compile_model(core.read_model(graph), "CPU", asked)
    request = model.create_infer_request()
    names = [output.get_any_name() for output in model.outputs]
    shapes = {i.get_any_name(): i.get_partial_shape() for i in model.inputs}

    def run(feed: dict[str, Array]) -> dict[str, Array]:
        found = request.infer({name: feed[name] for name in shapes})  # it drops unused inputs
        return {name: found[at].copy() for at, name in enumerate(names)}  # it reuses the memory

    return Runtime(run, frozenset(name for name, shape in shapes.items() if shape[1].is_dynamic))


RUNTIMES = {Precision.FP32: onnx_runtime, Precision.BF16: openvino_bf16}


class OnnxGraph:
    """A graph on the processor, in the precision of its release.

    Raises ContractError where the processor cannot compute in it.
    """

    def __init__(self, path: Path, threads: int, precision: str = Precision.FP32) -> None:
        self.runtime = RUNTIMES[Precision(precision)](path, threads)
        self.on_run: Callable[[dict[str, Array]], None] | None = None
        """Told what each run has computed, padding included; a run that failed computed nothing."""
        # Only where the graph takes any length: some towers were trained on full padding.
        self.trims = QUERY_MASK.name in self.runtime.any_length

    def __call__(self, feed: dict[str, Array]) -> dict[str, Array]:
        """Inputs → outputs, by name, rows first.

        Queries are run without their padding: a row's vector is the same, and half of the work
        is saved. A picture outweighs its title's.
        """
        return self._trimmed(feed) if self.trims else self._run(feed)

    def _trimmed(self, feed: dict[str, Array]) -> dict[str, Array]:
        ids, mask = feed[QUERY_IDS.name], feed[QUERY_MASK.name]
        lengths = np.maximum(mask.sum(1), 1)
        found: dict[str, Array] = {}
        for rows in like_lengths(lengths):
            longest = lengths[rows[-1]]
            part = {QUERY_IDS.name: ids[rows, :longest], QUERY_MASK.name: mask[rows, :longest]}
            for name, vectors in self._run(part).items():
                found.setdefault(name, np.empty((len(ids), *vectors.shape[1:]), vectors.dtype))
                found[name][rows] = vectors
        return found

    def _run(self, feed: dict[str, Array]) -> dict[str, Array]:
        found = self.runtime.run(feed)
        if self.on_run:
            self.on_run(feed)
        return found
