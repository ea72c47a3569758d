"""An encoder that costs nothing, where ingestion itself is looked at: a vector by a hash."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np

from retrieval_client.collection import CollectionInfo
from retrieval_client.encoder import Encoded
from retrieval_client.handshake import Served
from retrieval_contract.errors import ItemError, Reason, ReleaseMismatch
from retrieval_contract.tensors import Array

BAD = "refused by the server"
"""A title that it refuses."""


class StandIn:
    """In place of an Encoder: the same product has the same vector, in each release another.

    `asked` counts products; `failures` are raised by the next calls, first one first.
    """

    def __init__(self, release_id: str, vector_dim: int) -> None:
        self.known = Served(release_id, vector_dim)
        self.asked = 0
        self.failures: list[Exception] = []
        self._lock = threading.Lock()

    def served(self, deadline: object = None) -> Served:
        """What a handshake would find."""
        return self.known

    def vector(self, title: str, image: bytes) -> Array:
        """Float32 (vector_dim,), unit norm."""
        said = f"{self.known.release_id} {title} ".encode() + image
        drawn = hashlib.blake2b(said, digest_size=8).digest()
        vector = np.random.Generator(np.random.SFC64(int.from_bytes(drawn, "big")))
        found = vector.standard_normal(self.known.vector_dim, np.float32)
        return found / np.linalg.norm(found)

    def encode_products(
        self, titles: Sequence[str], images: Sequence[bytes], *, timeout_s: float = 0.0
    ) -> Encoded:
        """As Encoder's."""
        with self._lock:
            if self.failures:
                raise self.failures.pop(0)
            self.asked += len(titles)
        vectors = np.stack([self.vector(*row) for row in zip(titles, images, strict=True)])
        errors = [
            ItemError(Reason.TOO_LONG, "as told") if title == BAD else None for title in titles
        ]
        return Encoded(vectors, errors, self.known)


class StandIns:
    """In place of Encoders: one stand-in a release."""

    def __init__(self, *release_ids: str, vector_dim: int = 8) -> None:
        self.by_release = {r: StandIn(r, vector_dim) for r in release_ids}

    def served(self, deadline: object = None) -> dict[str, Served]:
        """Every release, by its id."""
        return {release_id: each.known for release_id, each in self.by_release.items()}

    def for_collection(self, info: CollectionInfo, deadline: object = None) -> StandIn:
        """The encoder of what a collection holds."""
        if info.release_id not in self.by_release:
            raise ReleaseMismatch(f"expected {info.release_id}, got {[*self.by_release]}")
        return self.by_release[info.release_id]

    @property
    def asked(self) -> int:
        """Products, of all."""
        return sum(each.asked for each in self.by_release.values())
