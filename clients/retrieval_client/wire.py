"""Arrays ↔ Triton's gRPC messages (KServe v2): raw little-endian contents, BYTES length-prefixed.

Protocol: github.com/kserve/open-inference-protocol, `grpc_predict_v2.proto`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from retrieval_contract.errors import ServerError
from retrieval_contract.tensors import Array, Dtype, Ensemble


def request_from_rows(
    ensemble: Ensemble, columns: Mapping[str, Sequence[bytes]]
) -> ModelInferRequest:
    """One request of an ensemble whose inputs are BYTES columns of equal length."""
    request = ModelInferRequest(model_name=ensemble.name)
    for tensor in ensemble.inputs:
        rows = columns[tensor.name]
        request.inputs.add(name=tensor.name, datatype=tensor.dtype.triton, shape=[len(rows), 1])
        request.raw_input_contents.append(
            b"".join(struct.pack("<I", len(row)) + row for row in rows)
        )
    return request


def arrays_from_reply(
    ensemble: Ensemble, reply: ModelInferResponse, rows: int, dims: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    """The reply's outputs by name; ServerError unless they are the contract's, `rows` each.

    BYTES come as object arrays of bytes, shape (rows,).
    """
    raw = dict(zip((o.name for o in reply.outputs), reply.raw_output_contents, strict=False))
    seen = {o.name: (o.datatype, tuple(o.shape)) for o in reply.outputs}
    arrays: dict[str, Array] = {}
    for tensor in ensemble.outputs:
        wanted = (tensor.dtype.triton, (rows, *dims[tensor.name]))
        if seen.get(tensor.name) != wanted or tensor.name not in raw:
            raise ServerError(
                f"{ensemble.name}: expected {tensor.name} as {wanted}, got "
                f"{seen.get(tensor.name)}; is this our server?"
            )
        try:
            arrays[tensor.name] = _array(tensor.dtype, raw[tensor.name], wanted[1])
        except ValueError as exc:
            raise ServerError(
                f"{ensemble.name}: expected the contents of {tensor.name} to fill {wanted}, got "
                f"{len(raw[tensor.name])} bytes ({exc}); is this our server?"
            ) from exc
    return arrays


def _array(dtype: Dtype, contents: bytes, shape: tuple[int, ...]) -> Array:
    """ValueError unless the contents fill the shape."""
    if dtype is Dtype.BYTES:
        return bytes_from_contents(contents).reshape(shape[0])
    return np.frombuffer(contents, dtype.numpy).reshape(shape)


def bytes_from_contents(contents: bytes) -> Array:
    """Length-prefixed values → object array of bytes, shape (values,); ValueError if cut short."""
    values: list[bytes] = []
    at = 0
    while at < len(contents):
        start = at + 4
        at = start + int.from_bytes(contents[at:start], "little")
        if at > len(contents):
            raise ValueError(f"value {len(values)} goes past the end")
        values.append(contents[start:at])
    return np.array(values, np.object_)
