"""Checkpoint → ONNX → model repository, each artefact proved before it is placed."""
