"""What a checkpoint was trained on, product by product, kept beside its weights as hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from towers.learning.catalog import ProductData
from towers.learning.split import keys_of

FILE = "trained_on.npy"
Marks = NDArray[np.uint64]


def marks_of(data: ProductData) -> list[list[int]]:
    """For each product one hash of its title and one of its picture, of those that it has."""
    return [
        [int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in keys]
        for keys in keys_of(data.titles, data.images)
    ]


def save_trained_on(data: ProductData, folder: Path, start: str | None) -> None:
    """These products, and those that the checkpoint to start from was trained on."""
    now = {mark for marks in marks_of(data) for mark in marks}
    before = trained_on([start] if start else [])
    np.save(folder / FILE, np.array(sorted(now | before), np.uint64))


def trained_on(checkpoints: Iterable[str | Path]) -> set[int]:
    """The marks of all that any of these was trained on; none where that is not known."""
    files = [Path(checkpoint) / FILE for checkpoint in checkpoints]
    return {int(mark) for file in files if file.is_file() for mark in np.load(file)}


def new_rows(data: ProductData, checkpoints: Iterable[str | Path]) -> list[int]:
    """Products with neither a title nor a picture that one of the checkpoints was trained on."""
    seen = trained_on(checkpoints)
    return [row for row, marks in enumerate(marks_of(data)) if seen.isdisjoint(marks)]
