"""What a server says of itself, compared with the contract before anything is asked of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from retrieval_client.deadline import Deadline
from retrieval_client.translate import triton_errors
from retrieval_contract import models
from retrieval_contract.errors import ContractError
from retrieval_contract.release import RELEASE_PARAMETER
from retrieval_contract.tensors import Ensemble


@dataclass(frozen=True)
class Served:
    """What the server said of itself in the handshake; `cached`: it remembers queries' answers."""

    release_id: str
    vector_dim: int
    cached: bool = field(default=False, compare=False)


def describe(stub: GRPCInferenceServiceStub, address: str, deadline: Deadline) -> list[Served]:
    """What one server says of both ensembles; ContractError where they are not this contract's."""
    return [_describe(ensemble, stub, address, deadline) for ensemble in models.ENSEMBLES]


def _describe(
    ensemble: Ensemble, stub: GRPCInferenceServiceStub, address: str, deadline: Deadline
) -> Served:
    """Compare one ensemble's config with the contract; its release and vector size."""
    request = pb.ModelConfigRequest(name=ensemble.name)
    with triton_errors(address, ensemble.name):
        config = stub.ModelConfig(request, timeout=deadline.left_s).config
    release_id = config.parameters[RELEASE_PARAMETER].string_value
    vector = config.output[0].dims[0] if config.output and config.output[0].dims else 0
    sizes = {"vector_dim": vector}
    for declared, found in ((ensemble.inputs, config.input), (ensemble.outputs, config.output)):
        wanted = [(t.name, t.dtype.config, list(t.dims(sizes))) for t in declared]
        extra = models.TIMINGS.name  # which only a model in one process has
        got = [(t.name, pb_type(t), list(t.dims)) for t in found if t.name != extra]
        if wanted != got:
            raise ContractError(
                f"Triton at {address}, {ensemble.name}: expected {wanted}, got {got}; "
                "client and server are of different versions"
            )
    if not re.fullmatch("[0-9a-f]{16}", release_id):
        raise ContractError(
            f"Triton at {address}, {ensemble.name}: its config names no "
            "release; serve a built release folder"
        )
    steps = [step.model_name for step in config.ensemble_scheduling.step]
    return Served(release_id, vector, cached=models.QUERY_CACHED in steps)


def pb_type(tensor: Any) -> str:
    """The name of a config tensor's data type, such as TYPE_FP32."""
    name: str = (
        type(tensor)
        .DESCRIPTOR.fields_by_name["data_type"]
        .enum_type.values_by_number[tensor.data_type]
        .name
    )
    return name
