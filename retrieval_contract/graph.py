"""A graph as the local server runs it, and as anyone else may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from retrieval_contract.lengths import like_lengths
from retrieval_contract.models import QUERY_IDS, QUERY_MASK
from retrieval_contract.tensors import Array


class OnnxGraph:
    """A graph on ONNX Runtime's CPU provider."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads steal the core from the tokenizer and from the server itself.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.on_run: Callable[[dict[str, Array]], None] | None = None
        """Told what each run computes, padding included."""
        self.inputs = [i.name for i in inputs]
        self.outputs = [o.name for o in self.session.get_outputs()]
        # Only where the graph takes any length: some towers were trained on full padding.
        self.trims = any(
            i.name == QUERY_MASK.name and not isinstance(i.shape[1], int) for i in inputs
        )

    def __call__(self, feed: dict[str, Array]) -> dict[str, Array]:
        """Inputs → outputs, by name, rows first.

        Queries are run without their padding: a row's vector is the same, and half of the work
        is saved. A picture outweighs its title's.
        """
        return self._trimmed(feed) if self.trims else self._run(feed)

    def _trimmed(self, feed: dict[str, Array]) -> dict[str, Array]:
        ids, mask = feed[QUERY_IDS.name], feed[QUERY_MASK.name]
        lengths = np.maximum(mask.sum(1), 1)
        found: dict[str, Array] = {}
        for rows in like_lengths(lengths):
            longest = lengths[rows[-1]]
            part = {QUERY_IDS.name: ids[rows, :longest], QUERY_MASK.name: mask[rows, :longest]}
            for name, vectors in self._run(part).items():
                found.setdefault(name, np.empty((len(ids), *vectors.shape[1:]), vectors.dtype))
                found[name][rows] = vectors
        return found

    def _run(self, feed: dict[str, Array]) -> dict[str, Array]:
        if self.on_run:
            self.on_run(feed)
        return dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
