"""What is asked and when: seeded Zipf queries and Poisson arrivals."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval_contract.errors import SourceError

QUERY_COLUMN = "query"
BLOCK = 4096
"""Numbers drawn at a time: one NumPy call a query would cost the generator its pace."""

# The seed's independent streams.
RANKS, SHOPPERS, ARRIVALS = 0, 1, 2

COLOURS = ("black", "white", "red", "navy", "green", "beige", "grey", "pink", "orange", "sky blue")
KINDS = ("shirt", "jeans", "jacket", "boots", "dress", "socks", "watch", "scarf", "cap", "sneakers")
AUDIENCES = ("", "women's", "men's")


def built_in_queries() -> list[str]:
    """Every colour of every kind for every audience: 300 texts."""
    parts = itertools.product(AUDIENCES, COLOURS, KINDS)
    return [" ".join(word for word in words if word) for words in parts]


def queries_from_csv(path: Path) -> list[str]:
    """The distinct texts of the column `query`; `path` is the file or the catalog folder of it.

    Raises SourceError when there is no such file, column or text.
    """
    file = path / "queries.csv" if path.is_dir() else path
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            if QUERY_COLUMN not in (rows.fieldnames or ()):
                raise SourceError(
                    f"{file}: expected a column '{QUERY_COLUMN}', got {rows.fieldnames}; rename it"
                )
            found = dict.fromkeys(
                text for row in rows if (text := (row[QUERY_COLUMN] or "").strip())
            )
    except (OSError, UnicodeDecodeError) as exc:
        raise SourceError(f"{file}: cannot be read ({exc}); give a CSV file in UTF-8") from exc
    if not found:
        raise SourceError(f"{file}: expected at least one query, got none; fill it")
    return list(found)


class Workload:
    """Distinct queries with Zipf weights: the one of rank r is asked in proportion to r^-exponent.

    Which query has which rank follows from the seed, so neither the alphabet nor the file decides.
    """

    def __init__(self, queries: Sequence[str], *, exponent: float = 0.8, seed: int = 0) -> None:
        order = np.random.default_rng([seed, RANKS]).permutation(len(queries))
        self.by_rank = [queries[place] for place in order]
        self.weights = zipf_weights(len(queries), exponent)
        self.seed = seed

    def stream(self, shopper: int) -> Iterator[str]:
        """An endless stream of queries; every shopper has one of its own."""
        rng = np.random.default_rng([self.seed, SHOPPERS, shopper])
        edges = np.cumsum(self.weights)
        edges /= edges[-1]  # exactly 1 at the end, so that no draw falls beyond it
        while True:
            for rank in np.searchsorted(edges, rng.random(BLOCK), side="right"):
                yield self.by_rank[rank]


def zipf_weights(count: int, exponent: float) -> npt.NDArray[np.float64]:
    """Probability by rank, (count,); exponent 0 asks for all alike."""
    weights: npt.NDArray[np.float64] = np.power(np.arange(1.0, count + 1), -exponent)
    return weights / float(weights.sum())


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Endless arrival times in seconds from the start, `rate` a second on average."""
    rng, now = np.random.default_rng([seed, ARRIVALS]), 0.0
    while True:
        for gap in rng.exponential(1 / rate, BLOCK).tolist():
            now += gap
            yield now
