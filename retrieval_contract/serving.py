"""Helpers of the Python models inside Triton: merge requests, split replies, run ONNX.

Only Triton's Python stub imports this file: `triton_python_backend_utils` exists there alone.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from retrieval_contract.door import (
    PATIENCE_S,
    QUEUE,
    TRAFFIC,
    UNSAID_BATCHES,
    Busy,
    Door,
    Lane,
    Refusal,
)
from retrieval_contract.graph import OnnxGraph
from retrieval_contract.meters import Meters
from retrieval_contract.models import (
    EXPLAIN,
    ITEM_STATUS,
    ONNX_FILE,
    PRECISION,
    QUERY_IDS,
    QUERY_MASK,
    QUERY_TOKENIZER,
    QUERY_TOWER,
    TIMINGS,
    TOKENIZER_FILE,
)
from retrieval_contract.preprocess import TextPreprocessor
from retrieval_contract.pulse import Pulse
from retrieval_contract.release import (
    RELEASE_PARAMETER,
    ImageSpec,
    Precision,
    TextSpec,
    image_spec_from_json,
)
from retrieval_contract.tensors import Array
from retrieval_contract.took import Took


def version_folder(args: dict[str, str]) -> Path:
    """The folder of the version that Triton is loading."""
    return Path(args["model_repository"]) / args["model_version"]


def parameter(args: dict[str, str], name: str, unsaid: Any = None) -> Any:
    """One JSON value from the model's config parameters; `unsaid` where an older release has none.

    Raises KeyError where every release has it.
    """
    said = json.loads(args["model_config"])["parameters"]
    if unsaid is not None and name not in said:
        return unsaid
    return json.loads(said[name]["string_value"])


def text_spec(args: dict[str, str]) -> TextSpec:
    """The TextSpec that export wrote into this model's config."""
    return TextSpec(**parameter(args, "text"))


def graph_of(args: dict[str, str], folder: Path) -> OnnxGraph:
    """The graph in `folder`, with the threads and the precision that this model's config says."""
    threads = parameter(args, "intra_op_threads")
    return OnnxGraph(folder / ONNX_FILE, threads, parameter(args, PRECISION, Precision.FP32))


def image_spec(args: dict[str, str]) -> ImageSpec:
    """The ImageSpec that export wrote into this model's config."""
    return image_spec_from_json(parameter(args, "image"))


class BehindDoor:
    """A Python model behind a door (`door.py`): requests are let in at once and answered later.

    A subclass says how to `load` itself and how to `compute` one array an input, rows first, into
    outputs by name, rows first. Whatever waits is computed together, at most the model's largest
    batch; when that fails, each request is run alone, so that only the one at fault gets the error.

    Responses are sent by a worker thread while `execute` takes further requests in: Python
    backend 2.51 allows it to models that are not decoupled as well.
    """

    meters: Meters
    pulse: Pulse
    took: Took | None = None
    """What the stages of the last run took, of models that can tell."""

    def load(self, args: dict[str, str]) -> None:
        """Read what the model needs."""
        raise NotImplementedError

    def compute(self, *arrays: Array) -> dict[str, Array]:
        """Arrays in the order of the config's inputs → outputs by name."""
        raise NotImplementedError

    def initialize(self, args: dict[str, str]) -> None:
        """Called by Triton, once."""
        config = json.loads(args["model_config"])
        said = config["parameters"]
        self.pulse = Pulse()
        release_id = said[RELEASE_PARAMETER]["string_value"]
        self.meters = Meters(args["model_name"], release_id, self.pulse.moved)
        self._inputs = [tensor["name"] for tensor in config["input"]]
        queue = parameter(args, QUEUE, UNSAID_BATCHES)
        self._door: Door[_Asked] = Door(config["max_batch_size"], queue)
        self.load(args)
        self.pulse.start()
        self._worker = threading.Thread(target=self._work, name="worker", daemon=True)
        self._worker.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Called by Triton: let them in, or refuse them."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                arrays = _rows(request, self._inputs)
                said = json.loads(request.parameters() or "{}")
                asked = _Asked(sender, arrays, EXPLAIN in said)
                self._door.enter(asked, len(arrays[0]), _lane(said), _time_s(request))
            except Busy as exc:
                self._refuse(sender, Refusal.BUSY, str(exc))
            except Exception as exc:
                _send(sender, _failure(exc))
        self._door.hold()

    def finalize(self) -> None:
        """Called by Triton when it unloads: who was let in is answered."""
        self._door.close()
        self._worker.join()
        self.meters.close()
        self.pulse.close()

    def _work(self) -> None:
        while (batches := self._door.take()) is not None:
            batch, late = batches
            replies = self._replies(batch) if batch else []
            self._door.done()
            for asked in late:
                self._refuse(asked.sender, Refusal.LATE, "could not be computed in its time")
            for asked, reply in zip(batch, replies, strict=True):
                _send(asked.sender, reply)
            self.pulse.rest()

    def _replies(self, batch: Sequence[_Asked]) -> list[Any]:
        """One response a request."""
        self.pulse.moved()
        began = time.perf_counter()
        try:
            arrays = map(np.concatenate, zip(*(asked.arrays for asked in batch), strict=True))
            outputs = self.compute(*arrays)
            ends = np.cumsum([len(asked.arrays[0]) for asked in batch])[:-1]
            split = {name: np.split(rows, ends) for name, rows in outputs.items()}
            return [
                pb_utils.InferenceResponse(
                    [pb_utils.Tensor(n, np.ascontiguousarray(p[i])) for n, p in split.items()]
                    + self._explained(asked, began)
                )
                for i, asked in enumerate(batch)
            ]
        except Exception as exc:
            if len(batch) > 1:
                return [self._replies([asked])[0] for asked in batch]
            return [_failure(exc)]

    def _explained(self, asked: _Asked, began: float) -> list[Any]:
        """TIMINGS for a request that asks for them; this Triton's replies have no parameters."""
        if self.took is None or not asked.explain:
            return []
        times = {"wait_s": began - asked.entered, "model_s": time.perf_counter() - asked.entered}
        row = np.array(self.took._replace(**times), TIMINGS.dtype.numpy)
        return [pb_utils.Tensor(TIMINGS.name, np.tile(row, (len(asked.arrays[0]), 1)))]

    def _refuse(self, sender: Any, refusal: Refusal, detail: str) -> None:
        self.meters.refused_request(refusal)
        error = pb_utils.TritonError(f"{refusal}: {detail}", pb_utils.TritonError.UNAVAILABLE)
        _send(sender, pb_utils.InferenceResponse(error=error))


@dataclass(frozen=True)
class _Asked:
    """One request that was let in."""

    sender: Any
    arrays: list[Array]
    explain: bool
    entered: float = field(default_factory=time.perf_counter)


def _rows(request: Any, names: Sequence[str]) -> list[Array]:
    """One request's inputs. Triton lets a batch axis past 2^32 through, and then cuts it off."""
    arrays = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names]
    if len({len(array) for array in arrays}) != 1 or min(array.ndim for array in arrays) < 2:
        shapes = {name: array.shape for name, array in zip(names, arrays, strict=True)}
        raise ValueError(f"expected (rows, …) with equal rows, got {shapes}")
    return arrays


def _lane(parameters: Mapping[str, Any]) -> Lane:
    """The parameter `traffic`; whoever says nothing waits for an answer."""
    return Lane.BULK if parameters.get(TRAFFIC) == Lane.BULK else Lane.INTERACTIVE


def _time_s(request: Any) -> float:
    """The parameter `timeout`, microseconds in KServe's protocol; some time when it is absent."""
    said: int = request.timeout()
    return said / 1e6 if said > 0 else PATIENCE_S


def _failure(exc: Exception) -> Any:
    # The caller gets the cause; where it happened is for the server's log alone.
    pb_utils.Logger.log_error("".join(traceback.format_exception(exc)))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"cannot run: {exc}"))


def _send(sender: Any, response: Any) -> None:
    """One answer that cannot be sent must not cost the others theirs."""
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception:
        pb_utils.Logger.log_error(traceback.format_exc())


def strings(rows: Sequence[str]) -> Array:
    """Texts → a BYTES column, object (rows, 1)."""
    return np.array([[row.encode("utf-8", "replace")] for row in rows], np.object_).reshape(-1, 1)


class OnnxTower(BehindDoor):
    """A tower, for servers that have no backend for ONNX."""

    def load(self, args: dict[str, str]) -> None:
        """The graph beside this model; thread count from the config."""
        self.graph = graph_of(args, version_folder(args))
        self.graph.on_run = self.meters.ran

    def compute(self, *arrays: Array) -> dict[str, Array]:
        """One run."""
        return self.graph(dict(zip(self._inputs, arrays, strict=True)))


class OnnxQueryEncoder(BehindDoor):
    """Tokenizer and tower in one process, from the files of the two models that they are."""

    def load(self, args: dict[str, str]) -> None:
        """The siblings of this model, in its own version."""
        home = Path(args["model_repository"]).parent
        tokenizer, tower = (
            home / model.name / args["model_version"] for model in (QUERY_TOKENIZER, QUERY_TOWER)
        )
        text = (tokenizer / TOKENIZER_FILE).read_text("utf-8")
        self.preprocess = TextPreprocessor(text, text_spec(args), required=True)
        self.graph = graph_of(args, tower)
        self.graph.on_run = self.meters.ran

    def compute(self, *arrays: Array) -> dict[str, Array]:
        """Texts → vectors and statuses."""
        start = time.perf_counter()
        batch = self.preprocess(arrays[0].reshape(-1).tolist())
        tokenized = time.perf_counter()
        found = self.graph({QUERY_IDS.name: batch.ids, QUERY_MASK.name: batch.mask})
        self.took = Took(tokenize_s=tokenized - start, tower_s=time.perf_counter() - tokenized)
        self.meters.refused_items(batch.status)
        return found | {ITEM_STATUS.name: strings(batch.status)}
