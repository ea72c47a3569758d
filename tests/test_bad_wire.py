"""Requests that no client of ours would send: refused by name, and the server goes on right.

After each of them both ensembles must really answer, with the vectors they gave before:
Triton calls itself ready also when a model is dead.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from deploy.server import Server
from retrieval_client.wire import bytes_from_contents, request_from_rows
from retrieval_contract import models
from retrieval_contract.errors import ServerError
from tests.hostile import Input, Wire, int32, prefixed, request

CODE = grpc.StatusCode
TOKENS = 8
GOOD = prefixed(b"red shoes")
WRAPPED = 2**40
"""A batch axis whose low 32 bits are 0: past Triton's check of the most rows."""


def query(
    shape: tuple[int, ...] = (1, 1), contents: bytes = GOOD, datatype: str = "BYTES"
) -> ModelInferRequest:
    return request("query_encoder", ("query", datatype, list(shape), contents))


def product(title: Input | None = None, image: Input | None = None) -> ModelInferRequest:
    title = title or ("title", "BYTES", [1, 1], GOOD)
    return request("product_encoder", title, image or ("image", "BYTES", [1, 1], prefixed(b"")))


def tower(shape: list[int], token: int = 100, count: int | None = None) -> ModelInferRequest:
    """A part of the ensemble, called past it."""
    ids, mask = int32("query_ids", shape, token, count), int32("query_mask", shape, 1, count)
    return request("query_tower", ids, mask)


def changed(change: Callable[[ModelInferRequest], object]) -> ModelInferRequest:
    """A good query after one change."""
    message = query()
    change(message)
    return message


def classified(output: str, classes: int) -> ModelInferRequest:
    """A good query that asks for one output as its highest classes."""
    message = query()
    message.outputs.add(name=output).parameters["classification"].int64_param = classes
    return message


def typed(message: ModelInferRequest) -> None:
    message.inputs[0].contents.bytes_contents.append(b"blue")


def typed_wrong(message: ModelInferRequest) -> None:
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.append(1.0)


def shared_memory(message: ModelInferRequest) -> None:
    del message.raw_input_contents[:]
    message.inputs[0].parameters["shared_memory_region"].string_param = "nobody"
    message.inputs[0].parameters["shared_memory_byte_size"].int64_param = 8


def lie(length: int) -> bytes:
    """One value that says it is longer than it is."""
    return struct.pack("<I", length) + b"red"


REFUSED: dict[str, tuple[ModelInferRequest, grpc.StatusCode]] = {
    "rows_2^40": (query((WRAPPED, 1)), CODE.INTERNAL),  # told by our own check of the rows
    "wrong_dtype": (query(datatype="INT32"), CODE.INVALID_ARGUMENT),
    "no_such_dtype": (query(datatype="TEXT"), CODE.INVALID_ARGUMENT),
    "wrong_shape": (query((1, 2), prefixed(b"a", b"b")), CODE.INVALID_ARGUMENT),
    "rank_0": (query(()), CODE.INVALID_ARGUMENT),
    "rank_1": (query((1,)), CODE.INVALID_ARGUMENT),
    "rank_3": (query((1, 1, 1)), CODE.INVALID_ARGUMENT),
    "negative_rows": (query((-1, 1)), CODE.INVALID_ARGUMENT),
    "negative_dim": (query((1, -1)), CODE.INVALID_ARGUMENT),
    "no_rows": (query((0, 1), b""), CODE.INVALID_ARGUMENT),
    "too_many_rows": (query((129, 1), prefixed(*[b"x"] * 129)), CODE.INVALID_ARGUMENT),
    "too_many_rows_and_no_contents": (query((2**31, 1)), CODE.INVALID_ARGUMENT),
    "most_rows_there_are": (query((2**63 - 1, 1)), CODE.INVALID_ARGUMENT),
    "no_input": (request("query_encoder"), CODE.INVALID_ARGUMENT),
    "missing_input": (
        request("product_encoder", ("title", "BYTES", [1, 1], GOOD)),
        CODE.INVALID_ARGUMENT,
    ),
    "extra_input": (
        request("query_encoder", *[(n, "BYTES", [1, 1], GOOD) for n in ("query", "more")]),
        CODE.INVALID_ARGUMENT,
    ),
    "same_input_twice": (
        request("query_encoder", *[("query", "BYTES", [1, 1], GOOD)] * 2),
        CODE.INVALID_ARGUMENT,
    ),
    "rows_disagree": (
        product(title=("title", "BYTES", [2, 1], prefixed(b"a", b"b"))),
        CODE.INVALID_ARGUMENT,
    ),
    "unknown_output": (
        changed(lambda m: m.outputs.add(name="secret")),
        CODE.INVALID_ARGUMENT,
    ),
    "unknown_model": (request("nobody"), CODE.NOT_FOUND),
    "no_model": (request(""), CODE.NOT_FOUND),
    "model_as_path": (request("../../etc/passwd"), CODE.NOT_FOUND),
    "nul_in_model": (request("query_encoder\0"), CODE.INVALID_ARGUMENT),
    "unknown_version": (changed(lambda m: setattr(m, "model_version", "7")), CODE.NOT_FOUND),
    "version_abc": (changed(lambda m: setattr(m, "model_version", "abc")), CODE.INVALID_ARGUMENT),
    "length_too_long": (query(contents=lie(99)), CODE.INVALID_ARGUMENT),
    "length_ffffffff": (query(contents=lie(2**32 - 1)), CODE.INVALID_ARGUMENT),
    "bytes_after_the_value": (query(contents=GOOD + b"xyz"), CODE.INVALID_ARGUMENT),
    "too_few_values": (query((2, 1)), CODE.INVALID_ARGUMENT),
    "too_many_values": (query(contents=GOOD * 2), CODE.INVALID_ARGUMENT),
    "2_bytes": (query(contents=b"ab"), CODE.INVALID_ARGUMENT),
    "0_bytes": (query(contents=b""), CODE.INVALID_ARGUMENT),
    "typed_and_raw_contents": (changed(typed), CODE.INVALID_ARGUMENT),
    "typed_as_another_type": (changed(typed_wrong), CODE.INVALID_ARGUMENT),
    "shared_memory_of_nobody": (changed(shared_memory), CODE.NOT_FOUND),
    "classification_0": (classified("query_vector", 0), CODE.INVALID_ARGUMENT),
    "classification_negative": (classified("query_vector", -1), CODE.INVALID_ARGUMENT),
    "tower_wrong_dim": (
        request("product_tower", int32("title_ids", [1, TOKENS], 1)),
        CODE.INVALID_ARGUMENT,
    ),
    "token_out_of_the_vocabulary": (tower([1, TOKENS], token=10**9), CODE.INTERNAL),
    "more_tokens_than_positions": (tower([1, 600]), CODE.INTERNAL),
    "tokens_and_mask_disagree": (
        request("query_tower", int32("query_ids", [1, 8], 1), int32("query_mask", [1, 16], 1)),
        CODE.INTERNAL,
    ),
    "tower_without_batch_axis": (tower([2**32, TOKENS], count=TOKENS), CODE.INTERNAL),
}
UNREADABLE: dict[str, bytes] = {
    "no_message": b"\xff" * 64,
    "cut_message": query().SerializeToString()[:-5],
    "model_name_not_utf8": b"\x0a\x04\xff\xfe\xc0\xaf",
    "input_name_not_utf8": query().SerializeToString().replace(b"\x05query", b"\x05que\xff\xfe"),
}
HARMLESS: dict[str, tuple[ModelInferRequest, dict[str, list[int]]]] = {
    "rows_past_2^32": (
        query((2**32 + 1, 1)),
        {"query_vector": [1, 384], "item_status": [1, 1]},
    ),
    "image_rows_2^40": (
        product(image=("image", "BYTES", [WRAPPED, 1], prefixed(b""))),
        {"product_vector": [1, 384], "item_status": [1, 1]},
    ),
    "surplus_raw_contents": (
        changed(lambda m: m.raw_input_contents.append(b"junk")),
        {"query_vector": [1, 384], "item_status": [1, 1]},
    ),
    "sequence_id": (
        changed(lambda m: setattr(m.parameters["sequence_id"], "int64_param", 7)),
        {"query_vector": [1, 384], "item_status": [1, 1]},
    ),
    "negative_timeout": (
        changed(lambda m: setattr(m.parameters["timeout"], "int64_param", -7)),
        {"query_vector": [1, 384], "item_status": [1, 1]},
    ),
    "one_output": (changed(lambda m: m.outputs.add(name="item_status")), {"item_status": [1, 1]}),
    "3_classes": (classified("query_vector", 3), {"query_vector": [1, 3]}),
    "2^40_classes": (classified("query_vector", WRAPPED), {"query_vector": [1, 0]}),
}


@pytest.fixture(scope="module")
def wire(triton: Server) -> Iterator[Wire]:
    with Wire(triton) as connected:
        yield connected


@pytest.fixture
def unharmed(wire: Wire) -> Iterator[None]:
    """Both ensembles answer the same before and after the test."""
    before = wire.health()
    yield
    np.testing.assert_allclose(wire.health(), before, atol=1e-6)


def code_of(wire: Wire, message: ModelInferRequest) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        wire.infer(message)
    assert "Traceback" not in caught.value.details()
    assert ".py" not in caught.value.details()
    code: grpc.StatusCode = caught.value.code()
    return code


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_request_is_refused_by_name(wire: Wire, name: str) -> None:
    message, expected = REFUSED[name]
    assert code_of(wire, message) is expected


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", UNREADABLE)
def test_bytes_that_are_no_request_are_refused(wire: Wire, name: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        wire.raw(UNREADABLE[name])
    assert caught.value.code() is CODE.INTERNAL
    assert "Unable to parse" in caught.value.details()


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", HARMLESS)
def test_a_strange_request_gets_a_harmless_reply(wire: Wire, name: str) -> None:
    """Its shapes are asserted because our client tells by them what not to read."""
    message, expected = HARMLESS[name]
    reply = wire.infer(message)
    assert {o.name: list(o.shape) for o in reply.outputs} == expected


@pytest.mark.parametrize("name", ["3_classes", "2^40_classes", "one_output"])
def test_our_client_refuses_what_is_not_the_contracts(wire: Wire, name: str) -> None:
    reply = wire.infer(HARMLESS[name][0])
    with pytest.raises(ServerError, match="is this our server"):
        wire.arrays(models.QUERY_ENCODER, reply, rows=1)


def replies(wire: Wire) -> ModelInferResponse:
    """A good reply to two rows: vectors first, then statuses, as the server's one process does."""
    reply = wire.infer(request_from_rows(models.QUERY_ENCODER, {"query": [b"red shoes", b"\xff"]}))
    assert [o.name for o in reply.outputs] == ["query_vector", "item_status"]
    return reply


@pytest.mark.parametrize(
    ("output", "contents"),
    [
        (1, b""),
        (1, prefixed(b"")),
        (1, prefixed(b"", b"", b"")),
        (1, prefixed(b"") + lie(99)),
        (1, prefixed(b"", b"") + b"\0"),
        (0, b""),
        (0, b"\0" * 4 * 384),
        (0, b"\0" * (4 * 384 * 2 + 1)),
    ],
    ids=["none", "one", "three", "lie", "tail", "no_floats", "one_row", "one_byte_more"],
)
def test_our_client_refuses_contents_that_do_not_fill_the_shape(
    wire: Wire, output: int, contents: bytes
) -> None:
    reply = replies(wire)
    assert wire.arrays(models.QUERY_ENCODER, reply, rows=2)["item_status"][0] == b""
    reply.raw_output_contents[output] = contents
    with pytest.raises(ServerError, match="is this our server"):
        wire.arrays(models.QUERY_ENCODER, reply, rows=2)


def test_our_client_refuses_outputs_without_contents(wire: Wire) -> None:
    reply = replies(wire)
    del reply.raw_output_contents[1]
    with pytest.raises(ServerError, match="expected item_status"):
        wire.arrays(models.QUERY_ENCODER, reply, rows=2)


def test_values_come_back_from_their_contents() -> None:
    values = [b"", b"red", b"\0\xff" * 300]
    assert bytes_from_contents(prefixed(*values)).tolist() == values
    assert bytes_from_contents(b"").shape == (0,)
