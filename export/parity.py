"""torch ↔ a graph in some runtime: the same tensors must give the same vectors, or nothing is
published."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator

from export.onnx_from_towers import GRAPHS
from retrieval_contract import models
from retrieval_contract.errors import ExportError
from retrieval_contract.graph import openvino_bf16
from retrieval_contract.release import ImageSpec
from retrieval_contract.tensors import Array, Model, Sizes, UpTo
from towers.two_towers import TextSide, TwoTowers

Encode = Callable[[Mapping[str, Array]], Array]
"""Served inputs by name, rows first → float32 (rows, vector_dim)."""


@dataclass(frozen=True)
class Budget:
    """What a step may cost: at least this cosine, at most these differences.

    `invariance`: between a row alone and in company. `recall`: of Recall@10, as a share.
    """

    cosine: float
    max_abs: float
    invariance: float
    recall: float = 0.002


EXACT = Budget(cosine=1 - 1e-6, max_abs=1e-5, invariance=1e-5)
HALF = Budget(cosine=0.9995, max_abs=0.02, invariance=0.005)
BF16 = Budget(cosine=0.98, max_abs=0.05, invariance=0.005)
"""Eight bits of a number are left; flat drawings lose most of what a picture's features say."""
HALF_REFERENCE = Budget(cosine=0.999, max_abs=0.02, invariance=0.005)
FEW = 5
BATCHES = (1, FEW, 8)
SEED = 20230101


@dataclass(frozen=True)
class Parity:
    """Worst case over all cases of one tower; cosine without the refused (zero) rows."""

    tower: str
    cases: int
    max_abs: float
    min_cosine: float

    def as_json(self) -> dict[str, object]:
        """For reports."""
        return asdict(self)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """An ONNX Runtime CPU session, one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def onnx_runtime(model: onnx.ModelProto) -> Encode:
    """By ONNX Runtime on the processor, which fuses casts away: half precision looks better."""
    runtime = session(model)
    return lambda inputs: runtime.run(None, dict(inputs))[0]


def openvino(model: onnx.ModelProto) -> Encode:
    """By OpenVINO on the processor, in bf16; ContractError where it has none."""
    runtime = openvino_bf16(model.SerializeToString(), threads=1)
    return lambda inputs: next(iter(runtime.run(dict(inputs)).values()))


def reference(model: onnx.ModelProto) -> Encode:
    """By the evaluator that defines ONNX: slow, and rounds every tensor to its own precision."""
    runtime = ReferenceEvaluator(model)

    def encode(inputs: Mapping[str, Array]) -> Array:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # what overflows shows in the vectors
            return runtime.run(None, dict(inputs))[0]

    return encode


def cosines_of(got: Array, expected: Array) -> Array:
    """Row by row; 1 where both are zero (a refused row), 0 where only one is."""
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    both_zero = ~got.any(1) & ~expected.any(1)
    cosines: Array = np.where(both_zero, 1.0, (got * expected).sum(1) / np.maximum(norms, 1e-30))
    return cosines


def few(tried: Iterable[dict[str, Array]]) -> list[dict[str, Array]]:
    """For a slow runtime: one case, of every kind of row, and not the longest."""
    some = [inputs for inputs in tried if len(next(iter(inputs.values()))) == FEW]
    return some[-2:-1] or some


def cases(model: Model, towers: TwoTowers) -> Iterator[dict[str, Array]]:
    """Served inputs: several batches and lengths, padded rows, pictures of noise, of nothing and
    drawn ones, a missing title, a missing picture, a refused row."""
    rng = np.random.default_rng(SEED)
    sizes = towers.release().sizes
    side = towers.spec.query if model is models.QUERY_TOWER else towers.spec.title
    for batch in BATCHES:
        for length in lengths(side):
            yield _case(model, sizes, batch, length, side.spec.pad_id, rng)


def lengths(side: TextSide) -> tuple[int, ...]:
    """Token lengths worth trying: short, one padding step, full."""
    full = side.spec.max_tokens
    return (full,) if side.spec.pad_to == "max" else tuple(sorted({2, min(8, full), full}))


def _case(
    model: Model, sizes: Sizes, batch: int, length: int, pad_id: int, rng: np.random.Generator
) -> dict[str, Array]:
    mask = np.ones((batch, length), np.int32)
    for row in range(1, batch):  # ragged rows; the first stays full
        mask[row, int(rng.integers(1, length + 1)) :] = 0
    mask[3::4] = 0  # no text, and a drawn picture
    if batch == FEW:
        mask[-1] = 0  # no text, and no picture either: refused
    ids = np.where(mask, rng.integers(0, sizes["vocabulary"], mask.shape), pad_id)
    has_title = mask.max(1, keepdims=True)
    has_image = np.arange(batch).reshape(-1, 1) % 4 > 0  # row 0 has a text alone
    made = {
        "has_title": has_title,
        "has_image": has_image,
        models.PIXELS.name: _pictures((batch, *models.PIXELS.dims(sizes)), rng),
    }
    for tensor in model.inputs:
        if any(isinstance(axis, UpTo) for axis in tensor.axes):
            made[tensor.name] = ids if tensor.name.endswith("_ids") else mask
    return {t.name: made[t.name].astype(t.dtype.numpy) for t in model.inputs}


def _pictures(shape: Sequence[int], rng: np.random.Generator) -> Array:
    """uint8 (B, H, W, 3), by turns noise, white, and a thing on white: evenness makes the largest
    sums, and noise none that a photo would make."""
    pixels = rng.integers(0, 256, shape)
    pixels[2::4] = pixels[3::4] = 255
    height, width = shape[1] // 4, shape[2] // 4
    pixels[3::4, height:-height, width:-width] = (200, 20, 40)
    return pixels


@torch.no_grad()
def torch_vectors(towers: TwoTowers, model: Model, inputs: dict[str, Array]) -> Array:
    """What the torch graph gives for served inputs, float32 (batch, vector_dim)."""
    feed = {name: torch.from_numpy(a) for name, a in inputs.items()}
    if models.PIXELS.name in feed:
        feed[models.PIXELS.name] = normalised(inputs[models.PIXELS.name], towers.spec.image)
    vectors: Array = GRAPHS[model.name](towers).eval()(**feed).numpy()
    return vectors


def normalised(pixels: Array, spec: ImageSpec) -> torch.Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W), written apart from the graph's own way."""
    values = (pixels.astype(np.float32) - np.float32(spec.mean)) / np.float32(spec.std)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2)))


def parity(
    towers: TwoTowers,
    model: Model,
    encode: Encode,
    budget: Budget = EXACT,
    tried: Iterable[dict[str, Array]] | None = None,
    wanted: Sequence[Array] | None = None,
) -> Parity:
    """Compare with torch over all cases; ExportError past the budget.

    `wanted`: what torch gives for what is `tried`, where it is known.
    """
    tried = list(cases(model, towers) if tried is None else tried)
    if wanted is None:
        wanted = [torch_vectors(towers, model, inputs) for inputs in tried]
    worst, lowest = 0.0, 1.0
    for inputs, expected in zip(tried, wanted, strict=True):
        got = encode(inputs)
        if not np.isfinite(got).all():
            raise ExportError(
                f"{model.name}: non-finite vectors; find the nodes with `python -m export culprits`"
            )
        worst = max(worst, float(np.abs(expected - got).max()))
        norms = np.linalg.norm(got, axis=1)
        good = np.linalg.norm(expected, axis=1) > 0
        if not np.allclose(norms, good, atol=1e-5):
            raise ExportError(f"{model.name}: expected norms 1 (0 where refused), got {norms}")
        lowest = min(lowest, float((expected * got).sum(1)[good].min(initial=1.0)))
    found = Parity(model.name, len(tried), worst, lowest)
    if not (worst <= budget.max_abs and lowest >= budget.cosine):
        raise ExportError(
            f"{model.name}: torch and the graph differ by {worst:.1e} "
            f"(at most {budget.max_abs:.0e}), cosine {lowest:.7f} "
            f"(at least {budget.cosine:.6f}); the graph was not written; "
            "`python -m export culprits` says which nodes do it"
        )
    return found
