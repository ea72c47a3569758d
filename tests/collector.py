"""A collector of spans: OTLP over HTTP, in JSON as Triton sends it or in protobuf as SDKs do.

Protocol: opentelemetry.io/docs/specs/otlp, section OTLP/HTTP.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Seen:
    """One span; ids in hex, `parent` empty for a root; `service` says who sent it."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    start_ns: int
    end_ns: int
    events: tuple[str, ...]


@dataclass
class Collector:
    """Spans that came, in the order in which they came."""

    url: str
    spans: list[Seen] = field(default_factory=list)

    def named(self, *names: str, within_s: float = 20) -> dict[str, Seen]:
        """The last span of each name, once all are there: senders gather them for seconds."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            found = {span.name: span for span in list(self.spans)}
            if set(names) <= set(found):
                return found
            time.sleep(0.05)
        raise AssertionError(f"expected {names}, got {[span.name for span in self.spans]}")


def spans_of(body: bytes, kind: str) -> Iterator[Seen]:
    """What one POST holds. In protobuf's own JSON bytes are base64, in OTLP's ids are hex."""
    if "json" in kind:
        sent = json.loads(body)
    else:
        sent = MessageToDict(ExportTraceServiceRequest.FromString(body))
    for resource in sent["resourceSpans"]:
        attributes = {
            a["key"]: next(iter(a["value"].values())) for a in resource["resource"]["attributes"]
        }
        for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
            ids = [span.get(name, "") for name in ("traceId", "spanId", "parentSpanId")]
            if "json" not in kind:
                ids = [base64.b64decode(text).hex() for text in ids]
            yield Seen(
                str(attributes.get("service.name")),
                span["name"],
                *ids,
                int(span["startTimeUnixNano"]),
                int(span["endTimeUnixNano"]),
                tuple(event["name"] for event in span.get("events", [])),
            )


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.spans += spans_of(body, self.headers["content-type"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def silent() -> Iterator[str]:
    """The address of one that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces"
