"""What an engine turned out to be: its layers, their precision, fused attention, memory.

TensorRT-RTX lists every layer in its build log (profiling verbosity DETAILED), which is all there
is without a GPU. TensorRT tells the same through its inspector, once the engine can be opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from retrieval_contract.errors import EngineError

LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*), "
    r"Constants: .*, Outputs: (?P<outputs>.*), TacticName: "
)
FLOATING = re.compile(r"Datatype: (Half|Float|BFloat16|FP8|Int8)\b")
INSPECTED = {"FP16": "Half", "Half": "Half", "FP32": "Float", "Float": "Float", "BF16": "BFloat16"}
"""Words of the inspector's "Format/Datatype", by version, and the log's word for them."""
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
FUSED = "mha"
MULTIPLIES = ("gemm", "mha", "conv", "fc", "matmul")
"""Parts of the names and kinds of layers that multiply matrices: where the time goes."""
LEAST_HALF_SHARE = 0.8


@dataclass(frozen=True)
class Layer:
    """One step of an engine; `precision` is what its inputs and outputs hold (no constants)."""

    name: str
    kind: str
    precision: frozenset[str]

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies matrices."""
        said = f"{self.name} {self.kind}".lower()
        return any(part in said for part in MULTIPLIES)

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
        return sum("Half" in layer.precision for layer in heavy) / max(1, len(heavy))

    def as_json(self) -> dict[str, object]:
        """For manifests and reports."""
        return {
            "layers": round(len(self.layers) / self.profiles),
            "fused_attention": round(self.fused_attention),
            "half_share": round(self.half_share, 3),
            "activation_bytes": self.activation_bytes,
            "precision": {
                layer.name: sorted(layer.precision) for layer in self.layers if layer.multiplies
            },
        }


def facts_of(log: Iterable[str], profiles: int) -> Facts:
    """Read a build log; EngineError where it lists no layers."""
    layers, activations = [], 0
    for line in log:
        if found := LAYER.match(line):
            types = FLOATING.findall(f"{found['inputs']} {found['outputs']}")
            layers.append(Layer(found["name"], found["kind"], frozenset(types)))
        elif memory := ACTIVATIONS.search(line):
            activations = max(activations, int(memory[1]))
    return _facts(layers, profiles, activations)


def facts_of_inspection(text: str, profiles: int, activation_bytes: int) -> Facts:
    """Read an inspector's JSON; EngineError where it lists no layers by more than their name."""
    layers = []
    for layer in json.loads(text).get("Layers", []):
        if not isinstance(layer, dict):  # names alone: built with less than DETAILED
            continue
        said = " ".join(
            str(end.get("Format/Datatype", end.get("Datatype", "")))
            for end in (*layer.get("Inputs", []), *layer.get("Outputs", []))
        )
        types = {INSPECTED[word] for word in re.findall(r"\w+", said) if word in INSPECTED}
        layers.append(Layer(layer["Name"], layer.get("LayerType", ""), frozenset(types)))
    return _facts(layers, profiles, activation_bytes)


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
        full = [layer.name for layer in heavy if "Half" not in layer.precision]
        raise EngineError(
            f"expected at least {LEAST_HALF_SHARE:.0%} of the matrix products in half precision, "
            f"got {facts.half_share:.0%}: build from the FP16 graph (in FP32: {full[:4]} …)"
        )
    if facts.fused_attention != attention_layers:
        raise EngineError(
            f"expected {attention_layers} fused attentions, one a layer, got "
            f"{facts.fused_attention:.1f}; an island inside an attention splits it"
        )
