"""Hostile bytes on the wire, drawn from a seed: does anything die, is anybody beside them harmed?

Left out, because this Triton cannot take them (tests/test_bad_company.py holds each): the parameter
`classification` on an output of texts, which ends the server, and shapes that overflow on the
towers' own names, which end their process.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import grpc
from tritonclient.grpc.service_pb2 import ModelInferRequest

from benchmarks.faults import TIMEOUT_S, Load
from deploy.server import Server, triton
from deploy.stubs import stubs_of
from retrieval_client.channel import channel_to
from retrieval_client.settings import Settings
from retrieval_client.wire import request_from_rows
from retrieval_contract import models
from retrieval_contract.probes import probe_pictures

METHOD = "/inference.GRPCInferenceService/ModelInfer"
DATATYPES = ("BYTES", "INT32", "FP32", "UINT8", "BOOL", "FP16", "TEXT", "")
NUMBERS = (0, 1, 2, 7, 128, 129, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**40, 2**62, 2**63 - 1, -1)
TEXTS = (b"", b"red shoes", b"\0", b"\xff\xfe", b"a" * 5000, "é漢\u202e".encode(), b"' OR 1=1 --")
LARGE_BYTES = 100_000_000
SOCKET_EVERY, LARGE_EVERY = 50, 2500
"""One in so many goes to the bare port, or is of LARGE_BYTES."""


@dataclass(frozen=True)
class Fuzzed:
    """`crashes`: processes of the server that are not what they were at the start.

    `wrong`, `failed`: of the good requests beside them, and of the latter the first few `errors`;
    `outcomes`: status codes of the bad ones.
    """

    trials: int
    crashes: int
    wrong: int
    failed: int
    answered: int
    errors: list[str]
    outcomes: dict[str, int]


def fuzz(release: Path, trials: int, seed: int = 0, log: IO[str] = sys.stderr) -> Fuzzed:
    """Send so many, while others ask as they should."""
    rng, outcomes = random.Random(seed), Counter[str]()
    with triton(release, log=log) as server:
        settings = Settings(triton=server.grpc_address, timeout_s=TIMEOUT_S)
        before = {server.process.pid, *(stub.pid for stub in stubs_of(server.process.pid))}
        with Load(settings).running() as load, channel_to(settings) as channel:
            send = channel.unary_unary(METHOD)
            for trial in range(trials):
                if trial % SOCKET_EVERY == 1:
                    outcomes[to_the_port(rng, server)] += 1
                else:
                    outcomes[sent(send, drawn(rng, large=trial % LARGE_EVERY == 2))] += 1
        after = {server.process.pid, *(stub.pid for stub in stubs_of(server.process.pid))}
        dead = server.process.poll() is not None
    return Fuzzed(
        trials,
        len(before - after) + dead,
        load.wrong,
        len(load.failed),
        len(load.answered),
        load.errors[:5],
        dict(outcomes),
    )


def sent(send: Callable[..., object], message: bytes) -> str:
    """The status code's name."""
    try:
        send(message, timeout=TIMEOUT_S)
    except grpc.RpcError as exc:
        name: str = exc.code().name
        return name
    return "OK"


def to_the_port(rng: random.Random, server: Server) -> str:
    """Bytes that are no gRPC, or its first words and then none, on either port."""
    port = rng.choice([server.ports.grpc, server.ports.http])
    hello = rng.choice(
        [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"POST /v2/models/x/infer HTTP/1.1\r\n"]
    )
    try:
        with socket.create_connection((server.host, port), timeout=1.0) as connection:
            connection.sendall(hello + rng.randbytes(rng.randrange(2000)))
    except OSError:
        return "closed"
    return "socket"


def drawn(rng: random.Random, large: bool = False) -> bytes:
    """A good request after some changes, as bytes that may have been changed as well."""
    message = good(rng)
    if large:
        message.raw_input_contents[0] = prefixed([b"a" * LARGE_BYTES])
        return message.SerializeToString()
    for _ in range(rng.randint(1, 3)):
        rng.choice(CHANGES)(rng, message)
    contents = bytearray(message.SerializeToString())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 8)):
            contents[rng.randrange(len(contents))] = rng.randrange(256)
    if rng.random() < 0.1:
        del contents[rng.randrange(len(contents)) :]
    # A flipped bit must not spell what is left out.
    return bytes(contents) if b"classification" not in contents else b"\xff"


def good(rng: random.Random) -> ModelInferRequest:
    """A few queries or products."""
    rows = rng.randint(1, 4)
    if rng.random() < 0.5:
        return request_from_rows(models.QUERY_ENCODER, {models.QUERY.name: [b"red shoes"] * rows})
    columns = {models.TITLE.name: [b"a shirt"] * rows, models.IMAGE.name: pictures(rng, rows)}
    return request_from_rows(models.PRODUCT_ENCODER, columns)


def pictures(rng: random.Random, rows: int) -> Sequence[bytes]:
    """Whole ones and broken ones."""
    file = rng.choice(probe_pictures())
    return [rng.choice([file, b"", file[: rng.randint(0, len(file))]]) for _ in range(rows)]


def prefixed(values: Sequence[bytes]) -> bytes:
    """BYTES on the wire."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


# ── one change each ──────────────────────────────────────────────────────────────────────
def _values(rng: random.Random, message: ModelInferRequest) -> None:
    at = rng.randrange(len(message.raw_input_contents)) if message.raw_input_contents else None
    if at is not None:
        rows = [rng.choice(TEXTS) for _ in range(rng.randint(0, 5))]
        message.raw_input_contents[at] = prefixed(rows)


def _lie(rng: random.Random, message: ModelInferRequest) -> None:
    if message.raw_input_contents:
        length = rng.choice(NUMBERS) % 2**32
        message.raw_input_contents[0] = struct.pack("<I", length) + b"red"


def _shape(rng: random.Random, message: ModelInferRequest) -> None:
    if message.inputs:
        shape = [rng.choice(NUMBERS) for _ in range(rng.randint(0, 3))]
        del message.inputs[0].shape[:]
        message.inputs[0].shape.extend(shape)


def _datatype(rng: random.Random, message: ModelInferRequest) -> None:
    if message.inputs:
        message.inputs[0].datatype = rng.choice(DATATYPES)


def _name(rng: random.Random, message: ModelInferRequest) -> None:
    name = rng.choice(["", "nobody", "../../etc/passwd", "query_encoder\0", "a" * 10_000])
    if rng.random() < 0.5 or not message.inputs:
        message.model_name = name
    else:
        message.inputs[0].name = name


def _version(rng: random.Random, message: ModelInferRequest) -> None:
    message.model_version = rng.choice(["1", "-1", "abc", str(2**64), "0" * 5000])


def _parameter(rng: random.Random, message: ModelInferRequest) -> None:
    key = rng.choice(["timeout", "priority", "sequence_id", "traffic", "binary_data", "x" * 1000])
    if rng.random() < 0.5:
        message.parameters[key].int64_param = rng.choice(NUMBERS[:-2])
    else:
        message.parameters[key].string_param = rng.choice(["", "bulk", "{", "\\", "a" * 10_000])


def _shared_memory(rng: random.Random, message: ModelInferRequest) -> None:
    if message.inputs:
        message.inputs[0].parameters["shared_memory_region"].string_param = "nobody"
        message.inputs[0].parameters["shared_memory_byte_size"].int64_param = rng.choice(NUMBERS)


def _output(rng: random.Random, message: ModelInferRequest) -> None:
    names = ["query_vector", "product_vector", "item_status", "secret", ""]
    message.outputs.add(name=rng.choice(names))


def _drop(rng: random.Random, message: ModelInferRequest) -> None:
    part = rng.choice([message.inputs, message.raw_input_contents])
    if part:
        del part[rng.randrange(len(part))]


def _again(rng: random.Random, message: ModelInferRequest) -> None:
    if message.inputs:
        message.inputs.add().CopyFrom(message.inputs[0])
    if message.raw_input_contents and rng.random() < 0.5:
        message.raw_input_contents.append(message.raw_input_contents[0])


CHANGES: tuple[Callable[[random.Random, ModelInferRequest], None], ...] = (
    *(_values, _lie, _shape, _datatype, _name, _version),
    *(_parameter, _shared_memory, _output, _drop, _again),
)
