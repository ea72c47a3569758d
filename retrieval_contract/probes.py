"""Golden probes: a few fixed queries and products, and the vectors that a release gives them.

They are written when a release is built, by its own graphs, and asked again of whoever serves it: a
server that loads other weights under the same name answers every request, and wrongly.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrieval_contract.errors import ContractError, ReleaseMismatch
from retrieval_contract.tensors import Array

PROBES_FILE = "probes.json"
LOWEST_COSINE = 0.999
"""What half precision keeps with room to spare; other weights are far below it."""
FARTHEST_NORM = 1e-3
"""From 1: a graph that lost its last step, the norm, points in the right direction all the same."""
QUERIES = ("red shoes", "navy blue shirt for men", "watch", "women printed kurta with long sleeves")
TITLES = ("Black leather wallet", "", "Running shoes")
COLOURS = ((200, 30, 30), (20, 40, 120), None)
"""Of each product's picture; the last has none, and the one before it no title."""


@dataclass(frozen=True)
class Probes:
    """Vectors are float32 (queries, vector_dim) and (products, vector_dim), unit norm."""

    release_id: str
    queries: Sequence[str]
    query_vectors: Array
    titles: Sequence[str]
    images: Sequence[bytes]
    product_vectors: Array

    def save(self, folder: Path) -> None:
        """Write PROBES_FILE into `folder`."""
        said = {
            "release_id": self.release_id,
            "queries": list(self.queries),
            "query_vectors": rounded(self.query_vectors),
            "titles": list(self.titles),
            "images": [base64.b64encode(image).decode() for image in self.images],
            "product_vectors": rounded(self.product_vectors),
        }
        (folder / PROBES_FILE).write_text(json.dumps(said) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Probes:
        """Read PROBES_FILE of `folder`; ContractError when it is not there or not whole."""
        path = folder / PROBES_FILE
        try:
            said = json.loads(path.read_text("utf-8"))
            return cls(
                said["release_id"],
                said["queries"],
                np.array(said["query_vectors"], np.float32),
                said["titles"],
                [base64.b64decode(image) for image in said["images"]],
                np.array(said["product_vectors"], np.float32),
            )
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ContractError(
                f"{path}: not a file of golden probes ({exc}); build the release again"
            ) from exc

    def check(self, query_vectors: Array, product_vectors: Array) -> float:
        """The lowest cosine of a server's vectors; ReleaseMismatch names the probe that fails."""
        lowest = 1.0
        for kind, names, wanted, got in (
            ("query", self.queries, self.query_vectors, query_vectors),
            ("product", self.titles, self.product_vectors, product_vectors),
        ):
            if wanted.shape != got.shape:
                raise ReleaseMismatch(
                    f"golden probes: expected {kind} vectors {wanted.shape}, got {got.shape}; "
                    "serve the release that they are of"
                )
            cosines, norms = (wanted * got).sum(1).tolist(), np.linalg.norm(got, axis=1).tolist()
            for name, cosine, norm in zip(names, cosines, norms, strict=True):
                if not (cosine >= LOWEST_COSINE and abs(norm - 1) <= FARTHEST_NORM):
                    raise ReleaseMismatch(
                        f"golden probe {name!r}: expected the {kind} vector of release "
                        f"{self.release_id}, got one at cosine {cosine:.4f}, norm {norm:.4f}; the "
                        "server runs other weights or other code: build the release again and "
                        "restart it"
                    )
                lowest = min(lowest, cosine)
        return lowest


def rounded(vectors: Array) -> list[list[float]]:
    """Six digits: far finer than LOWEST_COSINE."""
    return [[round(value, 6) for value in row] for row in vectors.tolist()]


def probe_pictures() -> list[bytes]:
    """PNG, which every version of a codec reads alike; missing ones are no bytes."""
    from PIL import Image

    images = []
    for colour in COLOURS:
        buffer = io.BytesIO()
        if colour:
            picture = Image.new("RGB", (60, 80), "white")
            picture.paste(colour, (15, 20, 45, 60))
            picture.save(buffer, "PNG")
        images.append(buffer.getvalue())
    return images
