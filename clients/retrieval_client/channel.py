"""One way to open a channel to Triton: replicas, options, and TLS where the settings say so."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import grpc

from retrieval_client.settings import Settings
from retrieval_contract.errors import RetrievalError

ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
# A reconnecting channel waits at most a second: a restarted server is found again at once.
# A peer that vanished without a word is found out by a ping, sent while a call waits and nothing
# has come for `time`: after `timeout` without an answer the connection is given up. gRPC 1.85 heeds
# the ping's own timeout alone, the other one bounds unacknowledged TCP data. Without data between
# them gRPC sends two pings, then one a minute; a Triton that is not told to take as many
# (deploy/instance.py) closes the connection at the third in five minutes. Shorter timeouts would
# cut off pictures on a slow line, where pings queue behind data.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 4000),
    ("grpc.http2.ping_timeout_ms", 4000),
)


def channel_to(settings: Settings) -> grpc.Channel:
    """A channel to `settings.triton`, encrypted when `tls_ca` is given; replicas take turns.

    With `tls_cert` and `tls_key` as well the client shows who it is (mutual TLS). Raises
    RetrievalError when a file cannot be read.
    """
    target = target_of(settings.replicas)
    options: list[tuple[str, int | str]] = [*CHANNEL_OPTIONS]
    if len(settings.replicas) > 1:  # of a lone server it would try the address at its own pace
        options.append(("grpc.service_config", ROUND_ROBIN))
    if not settings.tls_ca:
        if settings.tls_cert or settings.tls_key:
            raise RetrievalError(
                "tls_cert, tls_key: expected tls_ca beside them, got none; give the certificate "
                "of the authority that signed the server's"
            )
        return grpc.insecure_channel(target, options=options)
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise RetrievalError("tls_cert, tls_key: expected both or neither, got one; give the other")
    if len(settings.replicas) > 1 and not settings.tls_name:
        raise RetrievalError(
            "tls_name: expected one beside several addresses, got none; give the name that all "
            "their certificates have"
        )
    ca, cert, key = (
        _bytes(name, getattr(settings, name)) for name in ("tls_ca", "tls_cert", "tls_key")
    )
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    if settings.tls_name:
        options.append(("grpc.ssl_target_name_override", settings.tls_name))
    return grpc.secure_channel(target, credentials, options=options)


def target_of(addresses: tuple[str, ...]) -> str:
    """gRPC's name for one server, or for several; those are looked up once, here.

    Raises RetrievalError for an address that is none.
    """
    if len(addresses) == 1:
        return addresses[0]
    known = [_look_up(address) for address in addresses]
    for scheme, family in (("ipv4", socket.AF_INET), ("ipv6", socket.AF_INET6)):
        if all(family in found for found in known):
            return f"{scheme}:" + ",".join(found[family] for found in known)
    raise RetrievalError(
        f"triton: expected addresses that are all IPv4 or all IPv6, got {', '.join(addresses)}"
    )


def _look_up(address: str) -> dict[int, str]:
    """`host:port` as gRPC writes it, by family; the first of each."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError) as exc:
        raise RetrievalError(f"triton: expected host:port, got {address!r}: {exc}") from exc
    by_family: dict[int, str] = {}
    for family, _, _, _, place in found:
        name = f"[{place[0]}]" if family == socket.AF_INET6 else place[0]
        by_family.setdefault(family, f"{name}:{port}")
    return by_family


def _bytes(name: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise RetrievalError(f"{name}: {path}: {exc.strerror}; give a PEM file") from exc
