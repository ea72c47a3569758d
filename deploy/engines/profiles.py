"""The input shapes that an engine is tuned for, derived from the contract, and their proof.

TensorRT takes a wrong profile without a word (an input that does not exist, two batch sizes at
once, a sequence longer than the position table), so ours are checked before it sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retrieval_contract.errors import EngineError
from retrieval_contract.release import Release
from retrieval_contract.tensors import Model, Tensor, UpTo

Shape = tuple[int, ...]
PROFILES_REMEDY = "take the profiles of the release, `profiles_of`"
SHORT_TOKENS = 16
"""What a typical text is padded to; the tokenizers pad in steps of 8."""


@dataclass(frozen=True)
class Range:
    """One input's smallest, most usual and largest shape, batch axis first."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Profile:
    """One way in which a model is called."""

    name: str
    inputs: Mapping[str, Range]


def profiles_of(model: Model, release: Release) -> tuple[Profile, ...]:
    """One row at a time; a usual batch of usual length; the largest batch of full length.

    Triton opens a context a profile and takes the one whose `opt` is nearest.
    """
    batch = model.batch
    return (
        _profile("single", model, release, (1, 1, 1), SHORT_TOKENS),
        _profile("typical", model, release, (1, batch.opt, batch.max), SHORT_TOKENS),
        _profile("bulk", model, release, (1, batch.max, batch.max), None),
    )


def _profile(
    name: str, model: Model, release: Release, rows: tuple[int, int, int], tokens: int | None
) -> Profile:
    ranges = {}
    for tensor in model.inputs:
        low, high = _bounds(tensor, release)
        usual = tuple(
            top if tokens is None or bottom == top else min(tokens, top)
            for bottom, top in zip(low, high, strict=True)
        )
        ranges[tensor.name] = Range(
            *((n, *shape) for n, shape in zip(rows, (low, usual, high), strict=True))
        )
    return Profile(name, ranges)


def _bounds(tensor: Tensor, release: Release) -> tuple[Shape, Shape]:
    """The smallest and largest shape of one row."""
    high = tensor.largest(release.sizes)
    low = tuple(
        1 if isinstance(axis, UpTo) and dim < 0 else top
        for axis, dim, top in zip(tensor.axes, release.dims(tensor), high, strict=True)
    )
    return low, high


def check_profiles(profiles: Sequence[Profile], model: Model, release: Release) -> None:
    """Raise EngineError for what TensorRT would swallow; the message names profile and input."""
    known = {tensor.name: tensor for tensor in model.inputs}
    for profile in profiles:
        if profile.inputs.keys() != known.keys():
            raise EngineError(
                f"{model.name}, profile {profile.name}: expected the inputs {sorted(known)}, "
                f"got {sorted(profile.inputs)}; {PROFILES_REMEDY}"
            )
        for name, shapes in profile.inputs.items():
            _check_range(f"{model.name}, profile {profile.name}, {name}", shapes)
            low, high = _bounds(known[name], release)
            for shape in (shapes.min, shapes.max):
                inside = len(shape) == len(high) + 1 and all(
                    a <= size <= b for a, size, b in zip(low, shape[1:], high, strict=True)
                )
                if not inside or not 1 <= shape[0] <= model.batch.max:
                    raise EngineError(
                        f"{model.name}, profile {profile.name}, {name}: expected shapes from "
                        f"{(1, *low)} to {(model.batch.max, *high)}, got {shape}; {PROFILES_REMEDY}"
                    )
        rows = {(r.min[0], r.opt[0], r.max[0]) for r in profile.inputs.values()}
        if len(rows) > 1:
            raise EngineError(
                f"{model.name}, profile {profile.name}: expected one batch size for all inputs, "
                f"got (min, opt, max) of {sorted(rows)}; {PROFILES_REMEDY}"
            )
    largest = max((r.max[0] for p in profiles for r in p.inputs.values()), default=0)
    if largest != model.batch.max:
        raise EngineError(
            f"{model.name}: expected a profile that takes {model.batch.max} rows, "
            f"the largest takes {largest}; {PROFILES_REMEDY}"
        )


def _check_range(where: str, shapes: Range) -> None:
    if not len(shapes.min) == len(shapes.opt) == len(shapes.max) or not all(
        a <= b <= c for a, b, c in zip(shapes.min, shapes.opt, shapes.max, strict=True)
    ):
        raise EngineError(
            f"{where}: expected min <= opt <= max on every axis, got {shapes}; {PROFILES_REMEDY}"
        )
