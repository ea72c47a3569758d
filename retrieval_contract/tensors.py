"""What a tensor, a model and an ensemble are: values that cannot be built wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval_contract.errors import ContractError

Array = npt.NDArray[Any]
Sizes = Mapping[str, int]
"""The numbers a release brings, by name (`vector_dim`, `query_tokens`, …)."""


class Dtype(Enum):
    """One element type under its NumPy, Triton and ONNX names."""

    BYTES = ("object", "BYTES", "string")
    UINT8 = ("uint8", "UINT8", "uint8")
    INT32 = ("int32", "INT32", "int32")
    FP32 = ("float32", "FP32", "float32")

    def __init__(self, numpy_name: str, triton: str, onnx: str) -> None:
        self.numpy = np.dtype(numpy_name)
        self.triton = triton
        self.onnx = onnx

    @property
    def config(self) -> str:
        """The name in `config.pbtxt`, which calls BYTES a string."""
        return "TYPE_STRING" if self is Dtype.BYTES else f"TYPE_{self.triton}"


@dataclass(frozen=True)
class UpTo:
    """A dynamic axis: any length from 1 to the release size of this name."""

    size: str


Axis = int | str | UpTo
"""A literal, the name of a release size, or `UpTo` one."""


@dataclass(frozen=True)
class Tensor:
    """One named wire; `axes` leave the batch axis out, as Triton's `dims` do."""

    name: str
    dtype: Dtype
    axes: tuple[Axis, ...]
    meaning: str

    def dims(self, sizes: Sizes) -> tuple[int, ...]:
        """Dims as Triton writes them; -1 for an axis whose length varies."""
        return tuple(-1 if isinstance(a, UpTo) else self._length(a, sizes) for a in self.axes)

    def largest(self, sizes: Sizes) -> tuple[int, ...]:
        """Dims with every dynamic axis at its bound: what buffers and profiles need."""
        return tuple(self._length(a.size if isinstance(a, UpTo) else a, sizes) for a in self.axes)

    def _length(self, axis: int | str, sizes: Sizes) -> int:
        if isinstance(axis, int):
            return axis
        if axis not in sizes:
            raise ContractError(
                f"{self.name}: the release gives no size '{axis}', it has {sorted(sizes)}; "
                "export the release again"
            )
        return sizes[axis]


@dataclass(frozen=True)
class Batch:
    """Rows in one request or merged batch: the bounds, and the size to tune for."""

    opt: int
    max: int
    min: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ContractError(f"batch: expected 1 <= min <= opt <= max, got {self}")


class Engine(Enum):
    """What runs a model: our Python, or a network whose runtime the target chooses."""

    PYTHON = "python"
    NETWORK = "network"


@dataclass(frozen=True)
class Model:
    """One Triton model that computes."""

    name: str
    engine: Engine
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batch: Batch

    def __post_init__(self) -> None:
        names = [t.name for t in self.inputs + self.outputs]
        if len(set(names)) != len(names):
            raise ContractError(f"{self.name}: one tensor name stands twice in {names}")


@dataclass(frozen=True)
class Ensemble:
    """Models wired by name: a tensor of one name is one wire."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: tuple[Model, ...]

    def __post_init__(self) -> None:
        wires = {t.name: t for t in self.inputs}
        for step in self.steps:
            self._feed(step.name, step.inputs, wires)
            wires |= {t.name: t for t in step.outputs}
        self._feed("the reply", self.outputs, wires)

    def _feed(self, who: str, wanted: Iterable[Tensor], wires: Mapping[str, Tensor]) -> None:
        if missing := [t.name for t in wanted if wires.get(t.name) != t]:
            raise ContractError(f"{self.name}: nothing feeds {who} with {missing}")

    @property
    def batch(self) -> Batch:
        """The narrowest of its steps."""
        return min((s.batch for s in self.steps), key=lambda b: b.max)
