"""One way to open a channel to Triton: options, and TLS where the settings say so."""

from __future__ import annotations

from pathlib import Path

import grpc

from retrieval_client.settings import Settings
from retrieval_contract.errors import RetrievalError

# A reconnecting channel waits at most a second: a restarted server is found again at once.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def channel_to(settings: Settings) -> grpc.Channel:
    """A channel to `settings.triton`, encrypted when `tls_ca` is given.

    With `tls_cert` and `tls_key` as well the client shows who it is (mutual TLS). Raises
    RetrievalError when a file cannot be read.
    """
    if not settings.tls_ca:
        if settings.tls_cert or settings.tls_key:
            raise RetrievalError(
                "tls_cert, tls_key: expected tls_ca beside them, got none; give the certificate "
                "of the authority that signed the server's"
            )
        return grpc.insecure_channel(settings.triton, options=CHANNEL_OPTIONS)
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise RetrievalError("tls_cert, tls_key: expected both or neither, got one; give the other")
    ca, cert, key = (
        _bytes(name, getattr(settings, name)) for name in ("tls_ca", "tls_cert", "tls_key")
    )
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    options: list[tuple[str, int | str]] = [*CHANNEL_OPTIONS]
    if settings.tls_name:
        options.append(("grpc.ssl_target_name_override", settings.tls_name))
    return grpc.secure_channel(settings.triton, credentials, options=options)


def _bytes(name: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise RetrievalError(f"{name}: {path}: {exc.strerror}; give a PEM file") from exc
