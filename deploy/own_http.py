"""What a launcher asks of its own server: over HTTP, with the standard library alone.

The serve image has no gRPC for Python. Triton's HTTP has no TLS, so these are the same questions
however callers come in. Protocol: github.com/kserve/open-inference-protocol, and Triton's
extensions for binary tensors, statistics and the model repository.
"""

from __future__ import annotations

import http.client
import json
import struct
from collections.abc import Collection, Mapping, Sequence
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
class OwnHttp:
    """Where a server's HTTP listens, and the key to its controls.

    `cached`: it remembers answers to queries. Whoever asks here wants to know whether it can still
    give them, and so asks behind that memory.
    """

    host: str
    port: int
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

    def done(self, names: Collection[str], timeout_s: float) -> int:
        """Requests that these models have answered well: those given up count as failures."""
        stats = self._ask("GET", "/stats", timeout_s)["model_stats"]
        return sum(
            model["inference_stats"]["success"]["count"]
            for model in stats
            if model["name"] in names
        )

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
        """The answer's JSON; ServerUnavailable when nobody answers, ServerError for a refusal."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request(method, root + path, body, dict(headers or {}))
            reply = connection.getresponse()
            text = reply.read()
        except (OSError, http.client.HTTPException) as exc:
            raise ServerUnavailable(f"http://{self.host}:{self.port}{path}: {exc!r}") from exc
        finally:
            connection.close()
        if reply.status != http.client.OK:
            said = text.decode("utf-8", "replace")
            raise ServerError(f"http://{self.host}:{self.port}{path}: {reply.status} {said}")
        return json.loads(text) if text else {}


def check_release_of(server: OwnHttp, probes: Probes, timeout_s: float) -> None:
    """ReleaseMismatch when the server is of another release than its probes."""
    for ensemble in models.ENSEMBLES:
        served = server.release_of(ensemble, timeout_s)
        if served != probes.release_id:
            raise ReleaseMismatch(
                f"{ensemble.name}: expected release {probes.release_id}, it serves {served}; "
                "serve one whole release folder"
            )
