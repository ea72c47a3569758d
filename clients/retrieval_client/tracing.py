"""OpenTelemetry spans of a search, where the application has set a tracer provider.

This library imports nothing of OpenTelemetry by itself: `spans_of_application` looks whether the
application has. The `retrieval` command is an application, and calls `export_spans`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

SPANS = "retrieval"
"""Name of the tracer, and of the service where OTEL_SERVICE_NAME gives none."""
LAST_SPANS_S = 2.0
"""What a command waits at its end for a collector that does not answer."""

Span = Callable[[str], AbstractContextManager[object]]
"""A name → the time in the block."""
NOTHING: AbstractContextManager[object] = contextlib.nullcontext()


def no_span(name: str) -> AbstractContextManager[object]:
    """Where nobody listens."""
    return NOTHING


def spans_of_application() -> Span:
    """What starts a span in the application's tracer provider; `no_span` where it has set none."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None or isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        return no_span
    start: Span = api.get_tracer(SPANS).start_as_current_span
    return start


def traceparent() -> list[tuple[str, str]] | None:
    """gRPC metadata that make the current span the parent of the server's (W3C Trace Context).

    None without a span that is recorded: Triton traces whatever has a parent, sampled or not.
    """
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    context = api.get_current_span().get_span_context()
    if not (context.is_valid and context.trace_flags.sampled):
        return None
    ids = (api.format_trace_id(context.trace_id), api.format_span_id(context.span_id))
    return [("traceparent", f"00-{ids[0]}-{ids[1]}-01")]


def export_spans() -> Callable[[], None] | None:
    """Send spans to the collector that OTEL_* names; a function that sends what is left.

    None where the packages are missing. A collector that is away costs its spans, and the command
    LAST_SPANS_S at its end.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return None
    # It says each retry with a traceback; what the command was asked for is not at stake.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: SPANS}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

    def send_last() -> None:
        sender = threading.Thread(target=provider.shutdown, daemon=True)
        sender.start()
        sender.join(LAST_SPANS_S)

    return send_last
