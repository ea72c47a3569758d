"""The wire with no helper: one query in, one vector out, for callers in other languages.

    python clients/raw_grpc.py 127.0.0.1:8001 "navy blue shirt"

Everything here has a twin in any language with gRPC and the KServe v2 `grpc_predict_v2.proto`:
one unary call, one length-prefixed string in, little-endian float32 out.
"""

from __future__ import annotations

import struct
import sys

import grpc
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse


def main(address: str, query: str) -> None:
    """Print the vector's length and first numbers, or why the query was refused."""
    text = query.encode("utf-8")
    request = ModelInferRequest(model_name="query_encoder")
    # Shape is (rows, 1). A BYTES value is four length bytes, little endian, and the text.
    request.inputs.add(name="query", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(struct.pack("<I", len(text)) + text)

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )
        reply = call(request, timeout=1.0)

    # Outputs come in any order: go by name.
    outputs = {o.name: raw for o, raw in zip(reply.outputs, reply.raw_output_contents, strict=True)}
    status = outputs["item_status"][4:].decode()
    if status:  # this row was refused; its vector is all zeros
        raise SystemExit(status)
    vector = struct.unpack(f"<{len(outputs['query_vector']) // 4}f", outputs["query_vector"])
    print(f"release version {reply.model_version}: {len(vector)} numbers, {vector[:4]} …")


if __name__ == "__main__":
    main(*sys.argv[1:3])
