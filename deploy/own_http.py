"""What a launcher asks of its own server: over HTTP, with the standard library alone.

The serve image has no gRPC for Python. Triton's HTTP has no TLS, so these are the same questions
however callers come in. Protocol: github.com/kserve/open-inference-protocol, and Triton's
extensions for binary tensors, statistics and the model repository.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deploy.security import HEADER
from retrieval_contract import models
from retrieval_contract.errors import ReleaseMismatch, ServerError, ServerUnavailable
from retrieval_contract.probes import Probes
from retrieval_contract.release import RELEASE_PARAMETER, version_of
from retrieval_contract.tensors import Array, Ensemble

VECTORS = {
    models.QUERY_ENCODER: models.QUERY_VECTOR,
    models.PRODUCT_ENCODER: models.PRODUCT_VECTOR,
}
ALIVE: Mapping[Ensemble, Mapping[str, Sequence[bytes]]] = {
    models.QUERY_ENCODER: {models.QUERY.name: [b"alive"]},
    models.PRODUCT_ENCODER: {models.TITLE.name: [b"alive"], models.IMAGE.name: [b""]},
}
"""One row that goes through every step of an ensemble."""


@dataclass(frozen=True)
class Done:
    """What a server has done of one ensemble: requests answered, and of its first step, runs and
    pictures; 0 where nobody counts these.
    """

    answered: int
    runs: int = 0
    pictures: int = 0

    def more_than(self, before: Done) -> bool:
        """Whether it gets on: somebody was answered, or a run of many pictures is not over yet.

        A run that is over, and nobody answered, is no sign of life: what comes after it may hang.
        """
        same_run = self.runs == before.runs
        return self.answered != before.answered or (same_run and self.pictures != before.pictures)


@dataclass(frozen=True)
class OwnHttp:
    """Where a server's HTTP listens, and the key to its controls.

    `cached`: it remembers answers to queries. Whoever asks here wants to know whether it can still
    give them, and so asks behind that memory.
    """

    host: str
    port: int
    metrics_port: int
    control_key: str = field(repr=False)
    cached: bool = False

    @property
    def ensembles(self) -> list[str]:
        """All that are made of other models, parts first."""
        inner = [models.QUERY_UNCACHED, models.QUERY_CACHED] if self.cached else []
        return [*inner, *(ensemble.name for ensemble in models.ENSEMBLES)]

    def behind(self, ensemble: Ensemble) -> str:
        """What computes the answers of an ensemble."""
        cached = self.cached and ensemble is models.QUERY_ENCODER
        return models.QUERY_UNCACHED if cached else ensemble.name

    def encode(
        self,
        ensemble: Ensemble,
        columns: Mapping[str, Sequence[bytes]],
        timeout_s: float,
        version: int | None = None,
    ) -> Array:
        """Rows → float32 (rows, vector_dim); ServerError when there is no good answer."""
        inputs, raw = [], b""
        for tensor in ensemble.inputs:
            column = b"".join(struct.pack("<I", len(row)) + row for row in columns[tensor.name])
            size = {"binary_data_size": len(column)}
            shape = [len(columns[tensor.name]), 1]
            inputs.append(
                {"name": tensor.name, "datatype": "BYTES", "shape": shape, "parameters": size}
            )
            raw += column
        outputs = [{"name": VECTORS[ensemble].name}]
        head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
        place = f"/versions/{version}" if version else ""
        length = {"Inference-Header-Content-Length": str(len(head))}
        said = self._ask(
            "POST", f"/{self.behind(ensemble)}{place}/infer", timeout_s, head + raw, length
        )
        (found,) = said["outputs"]
        return np.array(found["data"], np.float32).reshape(found["shape"])

    def probe(self, probes: Probes, timeout_s: float) -> float:
        """Ask for a release's golden probes, in its own version; the lowest cosine.

        Raises ReleaseMismatch when the server gives other vectors.
        """
        version = version_of(probes.release_id)
        queries = {models.QUERY.name: [text.encode() for text in probes.queries]}
        products = {
            models.TITLE.name: [title.encode() for title in probes.titles],
            models.IMAGE.name: list(probes.images),
        }
        return probes.check(
            self.encode(models.QUERY_ENCODER, queries, timeout_s, version),
            self.encode(models.PRODUCT_ENCODER, products, timeout_s, version),
        )

    def release_of(self, ensemble: Ensemble, timeout_s: float) -> str:
        """The release that the server's config of it names; "" where it names none."""
        config = self._ask("GET", f"/{ensemble.name}/config", timeout_s)
        named: Mapping[str, str] = config.get("parameters", {}).get(RELEASE_PARAMETER, {})
        return named.get("string_value", "")

    def ready(self, model: str, timeout_s: float) -> bool:
        """What the server believes; a model with a dead process is ready, too."""
        try:
            self._ask("GET", f"/{model}/ready", timeout_s)
        except ServerUnavailable:
            raise
        except ServerError:
            return False
        return True

    def done(self, ensemble: Ensemble, timeout_s: float) -> Done:
        """See Done. Where it is no ensemble but one Python model, its runs are its answers.

        Of a Python model Triton counts as answered what its door has let in, and a part of an
        ensemble that hangs hides behind another that gets on: only the ensemble's own count tells.
        """
        name, first = self.behind(ensemble), ensemble.steps[0].name
        stats = self._ask("GET", f"/{name}/stats", timeout_s)["model_stats"]
        answered = sum(version["inference_stats"]["success"]["count"] for version in stats)
        text = ""
        with contextlib.suppress(ServerError):  # it may tell none: --allow-metrics=false
            text = self._read("GET", "/metrics", timeout_s, port=self.metrics_port).decode()
        found = re.findall(r'^(\w+){model="(\w+)"} (\S+)$', text, re.MULTILINE)
        counts = {(metric, model): int(float(count)) for metric, model, count in found}
        runs, pictures = (counts.get((m, first), 0) for m in (models.RUNS, models.PICTURES))
        return Done(counts.get((models.RUNS, name), answered), runs, pictures)

    def load(self, model: str, timeout_s: float) -> None:
        """Does nothing where the model is loaded."""
        self._control(model, "load", timeout_s)

    def unload(self, model: str, timeout_s: float) -> None:
        """Returns before it is gone."""
        self._control(model, "unload", timeout_s)

    def version(self, timeout_s: float) -> str:
        """Such as "triton 2.51.0"."""
        said = self._ask("GET", "/v2", timeout_s, root="")
        return f"{said['name']} {said['version']}"

    def _control(self, model: str, verb: str, timeout_s: float) -> None:
        key = {HEADER: self.control_key}
        self._ask("POST", f"/v2/repository/models/{model}/{verb}", timeout_s, b"{}", key, root="")

    def _ask(
        self,
        method: str,
        path: str,
        timeout_s: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        root: str = "/v2/models",
    ) -> Any:
        """The answer's JSON."""
        text = self._read(method, root + path, timeout_s, body, headers)
        return json.loads(text) if text else {}

    def _read(
        self,
        method: str,
        path: str,
        timeout_s: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        port: int = 0,
    ) -> bytes:
        """The answer; ServerUnavailable when nobody answers, ServerError for a refusal."""
        port = port or self.port
        connection = http.client.HTTPConnection(self.host, port, timeout=timeout_s)
        try:
            connection.request(method, path, body, dict(headers or {}))
            reply = connection.getresponse()
            text = reply.read()
        except (OSError, http.client.HTTPException) as exc:
            raise ServerUnavailable(f"http://{self.host}:{port}{path}: {exc!r}") from exc
        finally:
            connection.close()
        if reply.status != http.client.OK:
            said = text.decode("utf-8", "replace")
            raise ServerError(f"http://{self.host}:{port}{path}: {reply.status} {said}")
        return text


def check_release_of(server: OwnHttp, probes: Probes, timeout_s: float) -> None:
    """ReleaseMismatch when the server is of another release than its probes."""
    for ensemble in models.ENSEMBLES:
        served = server.release_of(ensemble, timeout_s)
        if served != probes.release_id:
            raise ReleaseMismatch(
                f"{ensemble.name}: expected release {probes.release_id}, it serves {served}; "
                "serve one whole release folder"
            )
