"""query → query_vector, item_status, in one process; used by the `local` target alone."""

from retrieval_contract.serving import OnnxQueryEncoder as TritonPythonModel

__all__ = ["TritonPythonModel"]
