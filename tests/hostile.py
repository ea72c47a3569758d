"""For the bad-input tests: a server's wire with no client between, and image files by hand."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import grpc
import numpy as np
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from deploy.server import Server
from retrieval_client.channel import CHANNEL_OPTIONS
from retrieval_client.wire import arrays_from_reply, request_from_rows
from retrieval_contract import models
from retrieval_contract.tensors import Array, Ensemble
from tests.conftest import photo

SERVED = "served"
METHOD = "/inference.GRPCInferenceService/ModelInfer"
Input = tuple[str, str, list[int], bytes]
"""Name, datatype, shape, raw contents."""


class Answer(NamedTuple):
    """One row of a reply: `outcome` is SERVED or the reason of the refusal."""

    outcome: str
    vector: Array


class Wire:
    """A running server's gRPC: whatever bytes and shapes the tests make up go out as they are."""

    def __init__(self, server: Server) -> None:
        self.release = server.release
        self.channel = grpc.insecure_channel(server.grpc_address, options=CHANNEL_OPTIONS)
        self._stub = GRPCInferenceServiceStub(self.channel)

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.channel.close()

    def infer(self, request: ModelInferRequest, timeout_s: float = 60.0) -> ModelInferResponse:
        """The reply; raises grpc.RpcError."""
        return self._stub.ModelInfer(request, timeout=timeout_s)

    def raw(self, message: bytes) -> bytes:
        """The reply's bytes to bytes that need not be a message."""
        reply: bytes = self.channel.unary_unary(METHOD)(message, timeout=20.0)
        return reply

    def arrays(self, ensemble: Ensemble, reply: ModelInferResponse, rows: int) -> dict[str, Array]:
        """The reply as our client reads it; ServerError when it refuses to."""
        dims = {t.name: t.dims(self.release.sizes) for t in ensemble.outputs}
        return arrays_from_reply(ensemble, reply, rows, dims)

    def queries(self, *texts: bytes) -> list[Answer]:
        """One answer a text, from one request."""
        return self._answers(models.QUERY_ENCODER, {"query": texts})

    def products(self, *products: tuple[bytes, bytes]) -> list[Answer]:
        """One answer a (title, image file), from one request."""
        titles, images = zip(*products, strict=True)
        return self._answers(models.PRODUCT_ENCODER, {"title": titles, "image": images})

    def image(self, file: bytes) -> Answer:
        """The answer to one product that is only a picture."""
        return self.products((b"", file))[0]

    def health(self) -> Array:
        """What both ensembles really answer to one fixed row each; readiness does not tell."""
        answers = self.queries(b"red shoes") + self.products((b"red shoes", photo()))
        assert [a.outcome for a in answers] == [SERVED, SERVED]
        return np.stack([a.vector for a in answers])

    def _answers(self, ensemble: Ensemble, columns: dict[str, Sequence[bytes]]) -> list[Answer]:
        rows = len(next(iter(columns.values())))
        arrays = self.arrays(ensemble, self.infer(request_from_rows(ensemble, columns)), rows)
        vectors, statuses = (arrays[t.name] for t in ensemble.outputs)
        return [_answer(v, s.decode()) for v, s in zip(vectors, statuses, strict=True)]


def _answer(vector: Array, status: str) -> Answer:
    """A refused row has a zero vector and a served one a unit vector: nothing in between."""
    assert np.isfinite(vector).all()
    assert abs(np.linalg.norm(vector) - (not status)) < 1e-4, (status, np.linalg.norm(vector))
    return Answer(status.split(":")[0] or SERVED, vector)


def request(model: str, *inputs: Input, outputs: Sequence[str] = ()) -> ModelInferRequest:
    """A request as told, right or wrong."""
    message = ModelInferRequest(model_name=model)
    for name, datatype, shape, contents in inputs:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(contents)
    for name in outputs:
        message.outputs.add(name=name)
    return message


def prefixed(*values: bytes) -> bytes:
    """BYTES contents: each value behind its length."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def int32(name: str, shape: list[int], value: int, count: int | None = None) -> Input:
    """An INT32 input full of one value; `count` values where the shape lies."""
    count = int(np.prod(shape)) if count is None else count
    return name, "INT32", shape, np.full(count, value, np.int32).tobytes()


def cosine(a: Array, b: Array) -> float:
    """Of two vectors that are not zero."""
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def png(
    width: int, height: int, rows: bytes, *extra: bytes, depth: int = 8, colour: int = 0
) -> bytes:
    """A PNG file of whatever header over whatever rows (a filter byte, then samples, each)."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """One PNG chunk with a right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@contextmanager
def memory_growth(group: int) -> Iterator[list[int]]:
    """Inside: requests. Afterwards the list holds, in MB, how far each process of the group rose.

    The kernel keeps a high-water mark per process, so that no short peak is missed.
    """
    before = {}
    for process in _processes(group):
        (process / "clear_refs").write_text("5")  # the mark starts again from here
        before[process] = _kilobytes(process, "VmRSS")
    growth: list[int] = []
    yield growth
    growth += [(_kilobytes(p, "VmHWM") - rss) // 1024 for p, rss in before.items()]


def _processes(group: int) -> list[Path]:
    """Of a process group: after the name in brackets come state, parent and group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            after = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(after[2]) == group:
            found.append(path)
    return found


def _kilobytes(process: Path, name: str) -> int:
    return int((process / "status").read_text().split(f"{name}:")[1].split()[0])


HOSTILE_WORDS = [
    "it's", 'x"] or id != "', "x'] or true or id in ['y", "back\\slash\\", "%_like%", "\\u0041",
    "漢字 👟", "1; DROP COLLECTION products; --", "{v}", "' or 1==1 --", "] or true",
]  # fmt: skip
"""For ids, titles and values of conditions: each is to find itself, and nothing else."""
