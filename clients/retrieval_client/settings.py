"""Where things are: flags over environment over default. The only reader of the environment."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from retrieval_contract import models
from retrieval_contract.door import Lane
from retrieval_contract.errors import RetrievalError

PREFIX = "RETRIEVAL_"

COLLECTORS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def traces_wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether OpenTelemetry's own variables name a collector, and do not switch it off."""
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    off = off or environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    return not off and any(environ.get(name) for name in COLLECTORS)


LOOPBACK = "127.0.0.1"


def quiet_ray(token: str) -> None:
    """For a Ray of our own, before it is imported: its switches are variables only.

    It stays on loopback (which it calls "no clusters, as on Windows"), tells nobody of its use,
    and lets in who knows the token, which it would else write into the home folder.
    """
    os.environ.update(
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=token,
        RAY_BACKEND_LOG_LEVEL="fatal",  # else it writes errors that are none to our stderr
    )


@dataclass(frozen=True)
class Settings:
    """Addresses and deadlines. Each field is also `RETRIEVAL_<FIELD>` in the environment.

    `triton` is `host:port`, or several with commas between: replicas that serve one release.
    `milvus` is Milvus Lite when it ends in `.db` (a folder of that name), else a server's URI.
    Deadlines are in seconds and cover one call; `retry_s` is how long a push goes on trying
    while a server is away. `traffic` is "interactive", or "bulk" for what may wait.
    `tls_ca` (a PEM file) encrypts the way to Triton, `tls_cert` and `tls_key` say who we are,
    `tls_name` is the server's name where its address is not it. `milvus_ca`, `milvus_cert`,
    `milvus_key` and `milvus_name` are the same for a Milvus server, `milvus_token` is
    `user:password` or an API key. `shadow` is the percentage of searches that are asked of a
    candidate release as well, in the background (`shadow.py`).
    """

    triton: str = "127.0.0.1:8001"
    milvus: str = "build/catalog.db"
    milvus_token: str = field(default="", repr=False)
    collection: str = models.PRODUCTS.alias
    timeout_s: float = 5.0
    push_timeout_s: float = 60.0
    retry_s: float = 60.0
    traffic: str = Lane.INTERACTIVE.value
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_name: str = ""
    milvus_ca: str = ""
    milvus_cert: str = ""
    milvus_key: str = ""
    milvus_name: str = ""
    shadow: int = 0

    @property
    def replicas(self) -> tuple[str, ...]:
        """The addresses that `triton` names, each once."""
        return tuple(dict.fromkeys(filter(None, map(str.strip, self.triton.split(",")))))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Defaults, overridden by the environment."""
        return cls().override(
            **{
                name: environ[PREFIX + name.upper()]
                for name in cls.__dataclass_fields__
                if PREFIX + name.upper() in environ
            }
        )

    def override(self, **values: str | float | None) -> Settings:
        """A copy with every value that is not None; text is read as the field's type."""
        known: dict[str, object] = {}
        for name, value in values.items():
            if value is None:
                continue
            kind = type(getattr(self, name))
            try:
                known[name] = kind(value)
            except ValueError as exc:
                raise RetrievalError(
                    f"{PREFIX}{name.upper()}: expected a {kind.__name__}, got {value!r}"
                ) from exc
        return replace(self, **known)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not 0 < value < math.inf:
                raise RetrievalError(f"{name}: expected seconds above 0, got {value}")
        if self.traffic not in set(Lane):
            raise RetrievalError(
                f"traffic: expected one of {[*map(str, Lane)]}, got {self.traffic!r}"
            )
        if not 0 <= self.shadow <= 100:
            raise RetrievalError(f"shadow: expected a percentage, 0 to 100, got {self.shadow}")
        # An address is said in errors and in `retrieval status`: no place for a secret.
        if "@" in self.milvus and ("://" in self.milvus or not self.milvus.endswith(".db")):
            raise RetrievalError(
                "milvus: expected an address without user and password, got one with them; give "
                f"them as {PREFIX}MILVUS_TOKEN"
            )
        if not self.replicas:
            raise RetrievalError(
                f"triton: expected host:port, or several with commas, got {self.triton!r}"
            )
