"""Helpers of the Python models inside Triton: merge requests, split replies, run ONNX.

Only Triton's Python stub imports this file: `triton_python_backend_utils` exists there alone.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from retrieval_contract.graph import OnnxGraph
from retrieval_contract.meters import Meters
from retrieval_contract.models import (
    EXPLAIN,
    ITEM_STATUS,
    ONNX_FILE,
    QUERY,
    QUERY_IDS,
    QUERY_MASK,
    QUERY_TOKENIZER,
    QUERY_TOWER,
    TIMINGS,
    TOKENIZER_FILE,
)
from retrieval_contract.preprocess import TextPreprocessor
from retrieval_contract.release import (
    RELEASE_PARAMETER,
    ImageSpec,
    TextSpec,
    image_spec_from_json,
)
from retrieval_contract.tensors import Array
from retrieval_contract.took import Stopwatch


def version_folder(args: dict[str, str]) -> Path:
    """The folder of the version that Triton is loading."""
    return Path(args["model_repository"]) / args["model_version"]


def parameter(args: dict[str, str], name: str) -> Any:
    """One JSON value from the model's config parameters."""
    return json.loads(json.loads(args["model_config"])["parameters"][name]["string_value"])


def text_spec(args: dict[str, str]) -> TextSpec:
    """The TextSpec that export wrote into this model's config."""
    return TextSpec(**parameter(args, "text"))


def image_spec(args: dict[str, str]) -> ImageSpec:
    """The ImageSpec that export wrote into this model's config."""
    return image_spec_from_json(parameter(args, "image"))


def execute_merged(
    requests: Sequence[Any],
    names: Sequence[str],
    compute: Callable[..., dict[str, Array]],
    watch: Stopwatch | None = None,
) -> list[Any]:
    """Run `compute` once over the rows of all requests, and give each request its rows.

    `compute` takes one array a name, rows first, and returns outputs by name, rows first.
    When it fails, each request is run alone, so that only the one at fault gets the error.
    Who asks to have it explained gets what `watch` says as well.
    """
    try:
        return _merged(requests, names, compute, watch)
    except Exception as exc:
        if len(requests) > 1:
            return [execute_merged([request], names, compute, watch)[0] for request in requests]
        # The caller gets the cause; where it happened is for the server's log alone.
        pb_utils.Logger.log_error(traceback.format_exc())
        return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"cannot run: {exc}"))]


def _merged(
    requests: Sequence[Any],
    names: Sequence[str],
    compute: Callable[..., dict[str, Array]],
    watch: Stopwatch | None,
) -> list[Any]:
    inputs = [_rows(request, names) for request in requests]
    outputs = compute(*map(np.concatenate, zip(*inputs, strict=True)))
    ends = np.cumsum([len(arrays[0]) for arrays in inputs])[:-1]
    split = {name: np.split(rows, ends) for name, rows in outputs.items()}
    return [
        pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.ascontiguousarray(parts[i])) for name, parts in split.items()]
            + explained(request, len(inputs[i][0]), watch)
        )
        for i, request in enumerate(requests)
    ]


def explained(request: Any, rows: int, watch: Stopwatch | None) -> list[Any]:
    """TIMINGS for a request that asks for them; this Triton's replies have no parameters."""
    if watch is None or f'"{EXPLAIN}"' not in request.parameters():
        return []
    row = np.array(watch.took(), TIMINGS.dtype.numpy)
    return [pb_utils.Tensor(TIMINGS.name, np.tile(row, (rows, 1)))]


def _rows(request: Any, names: Sequence[str]) -> list[Array]:
    """One request's inputs. Triton lets a batch axis past 2^32 through, and then cuts it off."""
    arrays = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names]
    if len({len(array) for array in arrays}) != 1 or min(array.ndim for array in arrays) < 2:
        shapes = {name: array.shape for name, array in zip(names, arrays, strict=True)}
        raise ValueError(f"expected (rows, …) with equal rows, got {shapes}")
    return arrays


def strings(rows: Sequence[str]) -> Array:
    """Texts → a BYTES column, object (rows, 1)."""
    return np.array([[row.encode("utf-8", "replace")] for row in rows], np.object_).reshape(-1, 1)


class Metered:
    """A Python model that counts what it does (`meters.py`)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Count for this model and release."""
        config = json.loads(args["model_config"])
        release_id = config["parameters"][RELEASE_PARAMETER]["string_value"]
        self.meters = Meters(args["model_name"], release_id)

    def finalize(self) -> None:
        """Tell what is left."""
        self.meters.close()


class OnnxTower(Metered):
    """A tower, for servers that have no backend for ONNX."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph beside this model; thread count from the config."""
        super().initialize(args)
        threads = parameter(args, "intra_op_threads")
        self.graph = OnnxGraph(version_folder(args) / ONNX_FILE, threads)
        self.graph.on_run = self.meters.ran

    def execute(self, requests: list[Any]) -> list[Any]:
        """One run over the merged batch."""
        return execute_merged(requests, self.graph.inputs, self._run)

    def _run(self, *arrays: Array) -> dict[str, Array]:
        return self.graph(dict(zip(self.graph.inputs, arrays, strict=True)))


class OnnxQueryEncoder(Metered):
    """Tokenizer and tower in one process, from the files of the two models that they are."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the siblings of this model, in its own version."""
        super().initialize(args)
        home = Path(args["model_repository"]).parent
        tokenizer, tower = (
            home / model.name / args["model_version"] for model in (QUERY_TOKENIZER, QUERY_TOWER)
        )
        text = (tokenizer / TOKENIZER_FILE).read_text("utf-8")
        self.preprocess = TextPreprocessor(text, text_spec(args), required=True)
        self.graph = OnnxGraph(tower / ONNX_FILE, parameter(args, "intra_op_threads"))
        self.graph.on_run = self.meters.ran

    def execute(self, requests: list[Any]) -> list[Any]:
        """One run over the merged batch."""
        self.watch = Stopwatch()
        return execute_merged(requests, [QUERY.name], self._encode, self.watch)

    def _encode(self, queries: Array) -> dict[str, Array]:
        start = time.perf_counter()
        batch = self.preprocess(queries.reshape(-1).tolist())
        tokenized = time.perf_counter()
        found = self.graph({QUERY_IDS.name: batch.ids, QUERY_MASK.name: batch.mask})
        self.watch.tokenize_s = tokenized - start
        self.watch.tower_s = time.perf_counter() - tokenized
        self.meters.refused_items(batch.status)
        return found | {ITEM_STATUS.name: strings(batch.status)}
