"""Triton's flags for OpenTelemetry: spans of the requests whose callers trace.

A rate of 0 means: no request of its own accord. Triton 2.51 still traces each one that brings a
`traceparent`, and hangs its spans under it; the supervisor's own questions bring none.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from retrieval_contract.errors import DeployError


def trace_flags(url: str | None) -> list[str]:
    """For a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces.

    None: no flags. Raises DeployError for what is no such address.
    """
    if url is None:
        return []
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.path.strip("/"):
        raise DeployError(
            f"--otel-url: expected http://host:port/v1/traces, got {url!r}; give the whole address"
        )
    settings = ("mode=opentelemetry", "rate=0", "level=TIMESTAMPS", f"opentelemetry,url={url}")
    return [f"--trace-config={setting}" for setting in settings]
