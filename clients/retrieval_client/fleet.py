"""Servers of several releases side by side: each search is encoded by the one that its index wants.

A release is a server of its own (or several replicas), never a second model in a shared one: what a
release is made of, its start and its end touch no other. The client sorts the addresses by what
they say they serve.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from retrieval_client.collection import CollectionInfo
from retrieval_client.deadline import Deadline
from retrieval_client.encoder import Encoder
from retrieval_client.handshake import Served, describe
from retrieval_client.replicas import Replicas
from retrieval_client.settings import Settings
from retrieval_contract.errors import (
    ContractError,
    ReleaseMismatch,
    RetrievalError,
    ServerUnavailable,
)

SORTED_S = 5.0
"""How long an address that was silent when the others were sorted is left out."""
LATELY_S = 0.5
"""A release that nobody served so long ago is not asked for again."""


def described(
    stub: GRPCInferenceServiceStub, address: str, deadline: Deadline
) -> Served | ContractError:
    """What one server serves, or why it is not for us: that must not stop the searches that others
    can answer, such as those of the release before it."""
    try:
        one, *others = describe(stub, address, deadline)
    except ContractError as exc:
        return exc
    if all(other == one for other in others):
        return one
    return ReleaseMismatch(
        f"Triton at {address}: its ensembles are of different releases; serve one built release "
        "folder"
    )


class Encoders:
    """One Encoder a release, over `settings.triton`; safe between threads."""

    def __init__(self, settings: Settings, *, explain: bool = False) -> None:
        """`explain`: as of Encoder."""
        self.settings = settings
        self._explain = explain
        self._replicas = Replicas(settings)
        self._by_release: dict[str, Encoder] = {}
        self._opened: dict[tuple[str, str], Encoder] = {}
        self._release: dict[str, str] = {}
        """What each address served when it last said so."""
        self._sorted = float("-inf")
        self._silent: list[str] = []
        """The addresses that did not answer when all were sorted."""
        self._lock, self._sorting = threading.Lock(), threading.Lock()

    def __enter__(self) -> Encoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        for encoder in self._opened.values():
            encoder.close()
        self._replicas.close()

    def of(self, release_id: str, deadline: Deadline | None = None) -> Encoder:
        """The encoder of a release.

        Raises ReleaseMismatch when others are served, ServerUnavailable when nobody answers, or
        not the one who may serve it.
        """
        age_s = time.monotonic() - self._sorted
        found = self._by_release.get(release_id)
        if found and not (self._silent and age_s > SORTED_S and self._sorting.acquire(False)):
            return found
        if found:  # one asks who was silent, the others go on
            try:
                self.sort(deadline)
            except RetrievalError:
                return found  # whose own errors say more
            finally:
                self._sorting.release()
            return self._by_release.get(release_id, found)
        by_release = self._by_release
        if not by_release or age_s > LATELY_S:
            by_release = self.sort(deadline)
        if release_id not in by_release:
            silent = f", and no answer from {', '.join(self._silent)}" if self._silent else ""
            error = ServerUnavailable if silent else ReleaseMismatch
            raise error(
                f"Triton at {self.settings.triton}: expected release {release_id}, got "
                f"{', '.join(sorted(by_release))}{silent}; start a server of that release as well"
            )
        return by_release[release_id]

    def for_collection(self, info: CollectionInfo, deadline: Deadline | None = None) -> Encoder:
        """The encoder of what a collection holds; raises as `of`, and where sizes differ."""
        try:
            encoder = self.of(info.release_id, deadline)
            if encoder.served(deadline).vector_dim == info.vector_dim:
                return encoder
        except ReleaseMismatch:
            pass
        serves = (
            f"release {release_id} ({served.vector_dim} dims)"
            for release_id, served in self.served(deadline).items()
        )
        raise ReleaseMismatch(
            f"{info.name}: holds vectors of release {info.release_id or 'unknown'} "
            f"({info.vector_dim} dims), Triton at {self.settings.triton} serves "
            f"{', '.join(serves)}; serve the collection's release as well (--triton, with a comma "
            "between), or use another catalog (--milvus or --collection)"
        )

    def served(self, deadline: Deadline | None = None) -> dict[str, Served]:
        """Every release that is served now, by its id."""
        said = self._ask(deadline).values()
        found = {each.release_id: each for each in said if isinstance(each, Served)}
        if not found:
            raise next(each for each in said if isinstance(each, ContractError))
        return found

    def _ask(self, deadline: Deadline | None) -> dict[str, Served | ContractError]:
        return self._replicas.ask(described, deadline or Deadline(self.settings.timeout_s))

    def sort(self, deadline: Deadline | None = None) -> dict[str, Encoder]:
        """Ask every address what it serves; the encoders by release."""
        answers = self._ask(deadline)
        refused = [said for said in answers.values() if isinstance(said, ContractError)]
        if len(refused) == len(answers):
            raise refused[0]
        addresses: dict[str, list[str]] = {}
        with self._lock:
            for address in self.settings.replicas:
                said = answers.get(address)
                if isinstance(said, Served):
                    self._release[address] = said.release_id
                elif said is not None:
                    self._release.pop(address, None)
                if address in self._release:  # the silent stay what they were
                    addresses.setdefault(self._release[address], []).append(address)
            if len(addresses) == 1 and not refused:  # who is silent is taken for another replica
                addresses = {release: [self.settings.triton] for release in addresses}
            by_release = {
                release: self._encoder(release, ",".join(several))
                for release, several in addresses.items()
            }
            self._silent = [each for each in self.settings.replicas if each not in answers]
            self._by_release, self._sorted = by_release, time.monotonic()
        return by_release

    def _encoder(self, release_id: str, addresses: str) -> Encoder:
        if (release_id, addresses) not in self._opened:
            settings = self.settings.override(triton=addresses)
            self._opened[release_id, addresses] = Encoder(settings, explain=self._explain)
        return self._opened[release_id, addresses]

    def forget(self) -> None:
        """Ask anew who serves what, before the next use."""
        with self._lock:
            self._by_release, self._sorted = {}, float("-inf")
