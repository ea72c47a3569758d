"""What an engine turned out to be: its layers, their precision, fused attention, memory.

TensorRT-RTX lists every layer in its build log (profiling verbosity DETAILED), which is all there
is without a GPU. TensorRT tells the same through its inspector, once the engine can be opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from retrieval_contract.errors import EngineError

LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*), "
    r"Constants: (?P<constants>.*), Outputs: .*, TacticName: "
)
TENSOR = re.compile(r"Dimensions: \[([^]]*)\][^{}]*Datatype: (Half|Float|BFloat16|FP8|Int8)\b")
INSPECTED = {"FP16": "Half", "Half": "Half", "FP32": "Float", "Float": "Float", "BF16": "BFloat16"}
"""Words of the inspector's "Format/Datatype", by version, and the log's word for them."""
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
FUSED = "mha"
MULTIPLIES = re.compile(r"gemm|mha|conv|matmul|(?<!er)fc", re.IGNORECASE)  # no "ErfCast"
"""In the names and kinds of layers that multiply matrices: where the time goes."""
LEAST_HALF_SHARE = 0.8


@dataclass(frozen=True)
class Layer:
    """One step of an engine: what its inputs hold, and those of its constants that are matrices.

    Not its outputs: a product in full precision may be rounded to half in the same step.
    """

    name: str
    kind: str
    inputs: frozenset[str]
    matrices: frozenset[str] = frozenset()

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies matrices."""
        return bool(MULTIPLIES.search(f"{self.name} {self.kind}"))

    @property
    def is_half(self) -> bool:
        """Whether what it multiplies is in half precision."""
        return "Half" in self.inputs and "Float" not in self.matrices

    @property
    def is_fused_attention(self) -> bool:
        """Whether it is softmax(QKᵀ)V in one step."""
        return FUSED in self.name


@dataclass(frozen=True)
class Facts:
    """Of one engine; `layers` are those of all its profiles, which are compiled apart."""

    layers: tuple[Layer, ...]
    profiles: int
    activation_bytes: int

    @property
    def fused_attention(self) -> float:
        """How many attention layers became one step, in each profile."""
        return sum(layer.is_fused_attention for layer in self.layers) / self.profiles

    @property
    def half_share(self) -> float:
        """Of the layers that multiply matrices, in [0, 1]; 0 where there are none."""
        heavy = [layer for layer in self.layers if layer.multiplies]
        return sum(layer.is_half for layer in heavy) / max(1, len(heavy))

    def as_json(self) -> dict[str, object]:
        """For manifests and reports."""
        return {
            "layers": round(len(self.layers) / self.profiles),
            "fused_attention": round(self.fused_attention),
            "half_share": round(self.half_share, 3),
            "activation_bytes": self.activation_bytes,
            "precision": {
                layer.name: sorted(layer.inputs | layer.matrices)
                for layer in self.layers
                if layer.multiplies
            },
        }


def facts_of(log: Iterable[str], profiles: int) -> Facts:
    """Read a build log; EngineError where it lists no layers."""
    layers, activations = [], 0
    for line in log:
        if found := LAYER.match(line):
            inputs, constants = (TENSOR.findall(found[part]) for part in ("inputs", "constants"))
            layers.append(
                Layer(
                    found["name"],
                    found["kind"],
                    frozenset(kind for _, kind in inputs),
                    frozenset(kind for dims, kind in constants if _is_matrix(dims.split(","))),
                )
            )
        elif memory := ACTIVATIONS.search(line):
            activations = max(activations, int(memory[1]))
    return _facts(layers, profiles, activations)


def facts_of_inspection(text: str, profiles: int, activation_bytes: int) -> Facts:
    """Read an inspector's JSON; EngineError where it lists no layers by more than their name."""
    layers = []
    for layer in json.loads(text).get("Layers", []):
        if not isinstance(layer, dict):  # names alone: built with less than DETAILED
            continue
        inputs, constants = (layer.get(part, []) for part in ("Inputs", "Constants"))
        layers.append(
            Layer(
                layer["Name"],
                layer.get("LayerType", ""),
                _types_of(inputs),
                _types_of(one for one in constants if _is_matrix(one.get("Dimensions", []))),
            )
        )
    return _facts(layers, profiles, activation_bytes)


def _types_of(tensors: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """What an inspector's tensors hold, in the log's words."""
    said = " ".join(str(t.get("Format/Datatype", t.get("Datatype", ""))) for t in tensors)
    return frozenset(INSPECTED[word] for word in re.findall(r"\w+", said) if word in INSPECTED)


def _is_matrix(dims: Iterable[object]) -> bool:
    """Whether two sizes at least are more than one."""
    return sum(str(dim) not in ("", "1") for dim in dims) > 1


def _facts(layers: list[Layer], profiles: int, activation_bytes: int) -> Facts:
    if not layers:
        raise EngineError(
            "expected facts of every layer, found none; build with DETAILED verbosity"
        )
    return Facts(tuple(layers), profiles, activation_bytes)


def check_facts(facts: Facts, attention_layers: int) -> None:
    """Raise EngineError unless it is in half precision and every attention is one step."""
    if facts.half_share < LEAST_HALF_SHARE:
        heavy = [layer for layer in facts.layers if layer.multiplies]
        full = [layer.name for layer in heavy if not layer.is_half]
        raise EngineError(
            f"expected at least {LEAST_HALF_SHARE:.0%} of the matrix products in half precision, "
            f"got {facts.half_share:.0%}: build from the FP16 graph (in FP32: {full[:4]} …)"
        )
    if facts.fused_attention != attention_layers:
        raise EngineError(
            f"expected {attention_layers} fused attentions, one a layer, got "
            f"{facts.fused_attention:.1f}; an island inside an attention splits it"
        )
