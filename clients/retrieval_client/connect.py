"""One way to open a connection to Milvus: its address, its token, and TLS where settings say so."""

from __future__ import annotations

from pathlib import Path

from pymilvus import MilvusClient

from retrieval_client.settings import Settings
from retrieval_contract.errors import RetrievalError

CONNECT_TIMEOUT_S = 2.0
"""Of the constructor; pymilvus also reconnects with it while a server is away."""


def milvus_client(settings: Settings) -> MilvusClient:
    """A client of `settings.milvus`; pymilvus's errors when nobody answers.

    Encrypted when the address begins with `https://` or `milvus_ca` is given; with `milvus_cert`
    and `milvus_key` the client shows who it is. Raises RetrievalError when a file is not there.
    """
    return MilvusClient(
        settings.milvus,
        token=settings.milvus_token,
        timeout=CONNECT_TIMEOUT_S,
        dedicated=True,  # else it shares what is open to this address, whatever certificates say
        **tls_arguments(settings),
    )


def tls_arguments(settings: Settings) -> dict[str, str | bool]:
    """What pymilvus wants to hear: with a client certificate it calls the authority otherwise."""
    ca, cert, key = (
        _file(name, getattr(settings, name)) for name in ("milvus_ca", "milvus_cert", "milvus_key")
    )
    if bool(cert) != bool(key):
        raise RetrievalError(
            "milvus_cert, milvus_key: expected both or neither, got one; give the other"
        )
    if cert and not ca:
        raise RetrievalError(
            "milvus_cert, milvus_key: expected milvus_ca beside them, got none; give the "
            "certificate of the authority that signed the server's"
        )
    if not ca:
        return {"server_name": settings.milvus_name} if settings.milvus_name else {}
    told: dict[str, str | bool] = {"secure": True}
    if settings.milvus_name:
        told["server_name"] = settings.milvus_name
    if cert:
        return told | {"ca_pem_path": ca, "client_pem_path": cert, "client_key_path": key}
    return told | {"server_pem_path": ca}


def _file(name: str, path: str) -> str:
    if path and not Path(path).is_file():
        raise RetrievalError(f"{name}: {path}: no file there; give a PEM file")
    return path
