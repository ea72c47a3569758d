"""Batches of like length: every row once, no padding that costs more than a run."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_contract.lengths import like_lengths


def test_no_rows_no_runs() -> None:
    assert like_lengths(np.array([], np.int32)) == []


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_run_once_and_little_padding_is_left(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 33, 128)
    runs = like_lengths(lengths, worth=48)
    assert sorted(np.concatenate(runs).tolist()) == list(range(128))
    padding = sum(int((lengths[rows[-1]] - lengths[rows]).sum()) for rows in runs)
    whole = int((32 - lengths).sum())
    assert padding < whole / 4
    assert len(runs) < 20


def test_a_few_rows_of_almost_one_length_are_one_run() -> None:
    (rows,) = like_lengths(np.array([7, 6, 8, 7]))
    assert rows.tolist() == [1, 0, 3, 2]


def test_one_long_row_does_not_lengthen_the_others() -> None:
    runs = like_lengths(np.array([5] * 15 + [32]))
    assert [len(rows) for rows in runs] == [15, 1]
