"""The one place where gRPC's and Milvus's errors become ours.

By status code; by text only where Triton has one code for different things.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from pymilvus.exceptions import MilvusException

from retrieval_client.deadline import Deadline
from retrieval_contract.door import Refusal
from retrieval_contract.errors import (
    AccessDenied,
    BadCompany,
    CatalogError,
    CatalogUnavailable,
    CollectionGone,
    DeadlineExceeded,
    RequestRefused,
    RetrievalError,
    ServerBusy,
    ServerDraining,
    ServerError,
    ServerUnavailable,
)


class Untrusted(AccessDenied, ServerUnavailable):
    """TLS does not let us talk to a server that is there: one of several is as good as away, but no
    time mends it."""


TRITON = {
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    # While draining or loading, Triton says that a model it has is unknown.
    grpc.StatusCode.NOT_FOUND: ServerUnavailable,
    # We cancel nothing that we wait for: a server that ends while it answers says so.
    grpc.StatusCode.CANCELLED: ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: RequestRefused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RequestRefused,
}
# Codes of Triton 2.51 that mean several things, told apart by text alone; the first words of
# `door.py`'s refusals, which an ensemble puts its name before.
TEXTS = (
    (re.compile(rf"(^|, ){Refusal.BUSY}: |maximum queue size"), ServerBusy),
    (re.compile(rf"(^|, ){Refusal.LATE}: "), DeadlineExceeded),
    (re.compile("Server is stopping|no available versions"), ServerDraining),
    (re.compile("protocol is restricted"), AccessDenied),
    (
        re.compile(
            "CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER|Hostname Verification Check failed"
            "|security handshaker"
        ),
        Untrusted,
    ),
    (re.compile("Stub process .* is not healthy"), ServerUnavailable),
    # INVALID_ARGUMENT, of lengths that lie: ours do not.
    (re.compile(r"\bstrings? (.* )?for inference input '"), BadCompany),
)
NEXT_STEP = {
    ServerBusy: "try again later, or serve with more",
    BadCompany: "another client's request was malformed and took this one with it: try again, and "
    "keep the port among clients that are known",
    ServerDraining: "ask another replica, or wait until it is back",
    AccessDenied: "give the key that the server was started with",
    Untrusted: "see tls_ca, tls_name and the server's certificate: its dates, its names, who "
    "signed it; a server in the clear wants no tls_ca",
    ServerUnavailable: "start it with `make serve`, or give --triton",
    DeadlineExceeded: "the server is overloaded or hung; raise the deadline or look at its log",
}
# Whoever expects TLS, or a certificate, hangs up on one who has none.
HUNG_UP = re.compile("failed to connect .*Socket closed")
HUNG_UP_STEP = "it may expect TLS (tls_ca), or a certificate of ours (tls_cert, tls_key)"

# pymilvus: 2 = cannot connect (or a wrong token). The server, while it starts, stops or recovers:
# 9 = refuses all writes or reads for now; 101, 103 = collection still loading; 201, 202 = partition
# still loading; 500 to 503 = channels, 600 to 602 = segments, 901 to 905 = nodes that are away.
MILVUS_UNAVAILABLE = {2, 9, 101, 103, 201, 202, *range(500, 504), *range(600, 603)}
MILVUS_UNAVAILABLE |= set(range(901, 906))
# 100 = no such collection or alias (1600: alias, of the server).
MILVUS_GONE = {100, 1600}
# Of a server, asked to load what has no index.
MILVUS_NO_INDEX = 700
# A server that gave a call up at its end calls that an unexpected error (65535).
MILVUS_LATE = re.compile(r"\bcontext (Done|canceled|deadline exceeded)")
MILVUS_GRPC_UNAVAILABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
MILVUS_NEXT_STEP = "see that it runs and that the address and token are right (--milvus)"
MILVUS_TOKEN_STEP = "give `user:password`, or a key, as RETRIEVAL_MILVUS_TOKEN"


@contextmanager
def triton_errors(address: str, what: str) -> Iterator[None]:
    """Inside: gRPC calls to Triton at `address` for the model or purpose `what`."""
    try:
        yield
    except grpc.RpcError as exc:
        kind, said = TRITON.get(exc.code(), ServerError), exc.details() or ""
        if kind in (ServerUnavailable, ServerError, RequestRefused):
            kind = next((named for text, named in TEXTS if text.search(said)), kind)
        step = f"; {NEXT_STEP[kind]}" if kind in NEXT_STEP else ""
        step += f"; {HUNG_UP_STEP}" if HUNG_UP.search(said) else ""
        raise kind(f"Triton at {address}, {what}: {said}{step}") from exc


@contextmanager
def milvus_errors(uri: str, what: str, deadline: Deadline | None = None) -> Iterator[None]:
    """Inside: pymilvus calls to `uri` for the purpose `what`. Both of its error kinds come out.

    With a deadline: DeadlineExceeded where Milvus was there and did not answer in time.
    """
    try:
        yield
    except RetrievalError:
        raise
    except MilvusException as exc:
        if exc.code in MILVUS_GONE:
            raise CollectionGone(f"Milvus at {uri}, {what}: {exc.message}") from exc
        if deadline and MILVUS_LATE.search(exc.message):
            raise _late(uri, what, deadline) from exc
        # After repeating a call for its whole timeout, pymilvus gives gRPC's code for its own.
        away = exc.code in MILVUS_UNAVAILABLE | MILVUS_GRPC_UNAVAILABLE
        raise _milvus(away, f"Milvus at {uri}, {what}: {exc.message}", exc.__cause__) from exc
    except grpc.RpcError as exc:
        if deadline and exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise _late(uri, what, deadline) from exc
        away = exc.code() in MILVUS_GRPC_UNAVAILABLE
        raise _milvus(away, f"Milvus at {uri}, {what}: {exc.details()}") from exc


def _late(uri: str, what: str, deadline: Deadline) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"Milvus at {uri}, {what}: no answer within {deadline.seconds} s; "
        f"{NEXT_STEP[DeadlineExceeded]}"
    )


def _milvus(away: bool, message: str, cause: BaseException | None = None) -> CatalogError:
    """A wrong token looks to pymilvus like a dead server: `cause` is what gRPC said."""
    if isinstance(cause, grpc.RpcError):
        message = f"{message} ({cause.details()})"
        if cause.code() is grpc.StatusCode.UNAUTHENTICATED:
            return CatalogError(f"{message}; {MILVUS_TOKEN_STEP}")
    return CatalogUnavailable(f"{message}; {MILVUS_NEXT_STEP}") if away else CatalogError(message)
