"""What torch's exporter makes of a tower: traced once a session, since a trace takes seconds.

Whoever wants to see the exporter itself calls `onnx_from_towers`, or starts `python -m export`.
"""

from __future__ import annotations

import onnx

from export.onnx_from_towers import onnx_from_towers
from retrieval_contract.tensors import Model
from towers.two_towers import TwoTowers

_TRACED: dict[tuple[str, str], bytes] = {}
"""By release, which is a hash of weights and code, and tower."""


def traced(towers: TwoTowers, model: Model) -> onnx.ModelProto:
    """The same as `onnx_from_towers`, and the caller's own."""
    key = towers.release().release_id, model.name
    if key not in _TRACED:
        _TRACED[key] = onnx_from_towers(towers, model).SerializeToString()
    return onnx.load_from_string(_TRACED[key])
