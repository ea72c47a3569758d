"""Rows of like length in one run: what a runtime computes for padding is lost.

A query has some seven tokens and its batch is as long as its longest. Every run of a graph has a
fixed price as well (its weights pass through the cache once), so a batch is cut only where the
padding that this saves is worth more.
"""

from __future__ import annotations

import numpy as np

from retrieval_contract.tensors import Array

WORTH = 24
"""Padded tokens that cost as much as one more run (measured: `docs/decisions.md`)."""


def like_lengths(lengths: Array, worth: int = WORTH) -> list[Array]:
    """Lengths (rows,) → row numbers of each run, the shortest rows first.

    Least cost by dynamic programming, a run costing `worth` tokens beside its padding.
    """
    order = np.argsort(lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    rows = [0, *np.cumsum(counts).tolist()]
    tokens = [0, *np.cumsum(counts * distinct).tolist()]
    least, cut = [0], [0]  # of the rows up to each length, and where their last run begins
    for end, longest in enumerate(distinct.tolist(), 1):
        costs = [
            least[start] + worth + longest * (rows[end] - rows[start]) - tokens[end] + tokens[start]
            for start in range(end)
        ]
        cut.append(int(np.argmin(costs)))
        least.append(costs[cut[-1]])
    runs, end = [], len(distinct)
    while end:
        runs.append(order[rows[cut[end]] : rows[end]])
        end = cut[end]
    return runs[::-1]
