"""The tower on ONNX Runtime, used by the `local` target alone."""

from retrieval_contract.serving import OnnxTower as TritonPythonModel

__all__ = ["TritonPythonModel"]
