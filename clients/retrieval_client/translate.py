"""The one place where gRPC's and Milvus's errors become ours. By status code, never by text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from pymilvus.exceptions import MilvusException

from retrieval_contract.errors import (
    CatalogError,
    CatalogUnavailable,
    DeadlineExceeded,
    RequestRefused,
    RetrievalError,
    ServerError,
    ServerUnavailable,
)

TRITON = {
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    # While draining or loading, Triton says that a model it has is unknown.
    grpc.StatusCode.NOT_FOUND: ServerUnavailable,
    # We cancel nothing: a server that ends while it answers says so.
    grpc.StatusCode.CANCELLED: ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: RequestRefused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RequestRefused,
}
NEXT_STEP = {
    ServerUnavailable: "start it with `make serve`, or give --triton",
    DeadlineExceeded: "the server is overloaded or hung; raise the deadline or look at its log",
}

# pymilvus: 2 = cannot connect (or a wrong token), 101 = collection still loading.
MILVUS_UNAVAILABLE = {2, 101}
MILVUS_GRPC_UNAVAILABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
MILVUS_NEXT_STEP = "see that it runs and that the address and token are right (--milvus)"


@contextmanager
def triton_errors(address: str, what: str) -> Iterator[None]:
    """Inside: gRPC calls to Triton at `address` for the model or purpose `what`."""
    try:
        yield
    except grpc.RpcError as exc:
        kind = TRITON.get(exc.code(), ServerError)
        step = f"; {NEXT_STEP[kind]}" if kind in NEXT_STEP else ""
        raise kind(f"Triton at {address}, {what}: {exc.details()}{step}") from exc


@contextmanager
def milvus_errors(uri: str, what: str) -> Iterator[None]:
    """Inside: pymilvus calls to `uri` for the purpose `what`. Both of its error kinds come out."""
    try:
        yield
    except RetrievalError:
        raise
    except MilvusException as exc:
        away = exc.code in MILVUS_UNAVAILABLE
        raise _milvus(away, f"Milvus at {uri}, {what}: {exc.message}") from exc
    except grpc.RpcError as exc:
        away = exc.code() in MILVUS_GRPC_UNAVAILABLE
        raise _milvus(away, f"Milvus at {uri}, {what}: {exc.details()}") from exc


def _milvus(away: bool, message: str) -> CatalogError:
    return CatalogUnavailable(f"{message}; {MILVUS_NEXT_STEP}") if away else CatalogError(message)
