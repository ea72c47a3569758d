"""Contract + release → Triton model configs, as protobuf messages.

Message: `ModelConfig` of Triton's `model_config.proto`. Auto-completion is off in every way we
start the server, so what stands here is all that the server knows.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelOutput

from deploy.engines.profiles import profiles_of
from deploy.tuning import DEFAULT
from retrieval_contract import models
from retrieval_contract.door import QUEUE
from retrieval_contract.errors import ContractError
from retrieval_contract.models import PRECISION, Target
from retrieval_contract.release import RELEASE_PARAMETER, Precision, Release, version_of
from retrieval_contract.tensors import Dtype, Engine, Ensemble, Model, Tensor

UNRELEASED = "unreleased"
"""The release id in the committed configs, which belong to no weights."""
LATEST_VERSION = -1
WARMUP_TOKENS = 8
"""Token length of the warm-up rows of towers whose token axis is dynamic."""

FILES = {Target.GPU: models.PLAN_FILE, Target.CPU: models.ONNX_FILE}
BACKENDS = {Target.GPU: "tensorrt", Target.CPU: "onnxruntime"}
PYTHON = "python"


KNOBS = DEFAULT.models
"""Copies, threads, delay and queue of each model: `deploy/profiles/default.toml`."""


def configs_of(part: Model | Ensemble, release: Release, release_id: str) -> dict[str, ModelConfig]:
    """Every config file of one repository entry, by its path inside the entry.

    A tower has one config per target and no `config.pbtxt`: a server started without
    `--model-config-name` must fail instead of guessing the runtime.
    """
    if isinstance(part, Ensemble):
        configs = {"config.pbtxt": ensemble_config(part, release, release_id)}
        if part in models.IN_ONE:
            configs[f"configs/{Target.LOCAL}.pbtxt"] = in_one_config(part, release, release_id)
        return configs
    if part.engine is Engine.PYTHON:
        return {"config.pbtxt": python_config(part, release, release_id)}
    return {
        f"configs/{t}.pbtxt": tower_config(part, release, release_id, t) for t in release.targets
    }


def ensemble_config(ensemble: Ensemble, release: Release, release_id: str) -> ModelConfig:
    """An ensemble: wires by tensor name. It has no batcher; its steps do."""
    config = _base(ensemble, release, release_id)
    config.platform = "ensemble"
    version = LATEST_VERSION if release_id == UNRELEASED else version_of(release_id)
    for step in ensemble.steps:
        entry = config.ensemble_scheduling.step.add(model_name=step.name, model_version=version)
        for tensor in step.inputs:
            entry.input_map[tensor.name] = tensor.name
        for tensor in step.outputs:
            entry.output_map[tensor.name] = tensor.name
    return config


def in_one_config(ensemble: Ensemble, release: Release, release_id: str) -> ModelConfig:
    """All steps of an ensemble in one Python process, which can say what each took."""
    config = _computing(ensemble, release, release_id)
    config.output.append(_output(models.TIMINGS, release))
    _python(config)
    _set(config, "text", asdict(release.query))
    _runtime(config, release)
    return config


def python_config(model: Model, release: Release, release_id: str) -> ModelConfig:
    """A tokenizer or preprocessor: our Python, with its rules in the parameters."""
    config = _computing(model, release, release_id)
    _python(config)
    if model is models.QUERY_TOKENIZER:
        _set(config, "text", asdict(release.query))
    elif model is models.PRODUCT_PREPROCESSOR:
        _set(config, "text", asdict(release.title))
        _set(config, "image", asdict(release.image))
    else:
        raise ContractError(f"{model.name}: no rule says which parameters this model needs")
    return config


def tower_config(model: Model, release: Release, release_id: str, target: Target) -> ModelConfig:
    """A tower on the runtime of one target."""
    config = _computing(model, release, release_id)
    if target is Target.LOCAL or release.precision != Precision.FP32:
        _python(config)
        _runtime(config, release)
        return config
    config.backend = BACKENDS[target]
    config.default_model_filename = FILES[target]
    if target is Target.GPU:
        config.instance_group[0].kind = config.instance_group[0].KIND_GPU
        # A context for each profile; the backend takes the one whose usual shape is nearest.
        count = len(profiles_of(model, release))
        config.instance_group[0].profile.extend(str(number) for number in range(count))
    else:
        threads = str(KNOBS[model.name]["threads"])
        config.parameters["intra_op_thread_count"].string_value = threads
        config.parameters["inter_op_thread_count"].string_value = "1"
    return config


def _base(part: Model | Ensemble, release: Release, release_id: str) -> ModelConfig:
    """Name, bounds, tensors and the release id: what every entry has."""
    config = ModelConfig(name=part.name, max_batch_size=part.batch.max)
    for tensor in part.inputs:
        config.input.append(_input(tensor, release))
    for tensor in part.outputs:
        config.output.append(_output(tensor, release))
    config.parameters[RELEASE_PARAMETER].string_value = release_id
    return config


def _computing(model: Model | Ensemble, release: Release, release_id: str) -> ModelConfig:
    """What every model with a batcher has: merging without delay, instances, warm-up."""
    config = _base(model, release, release_id)
    # Plain merging: whatever queued while the last batch ran. Limits and priorities on this
    # queue can stall the server's batcher, so they are kept elsewhere.
    config.dynamic_batching.SetInParent()
    if delay_us := KNOBS[model.name]["delay_us"]:
        config.dynamic_batching.max_queue_delay_microseconds = delay_us
    config.instance_group.add(kind="KIND_CPU", count=KNOBS[model.name]["instances"])
    warmup = config.model_warmup.add(name="one_row", batch_size=1, count=1)
    for tensor in model.inputs:
        entry = warmup.inputs[tensor.name]
        entry.data_type = _input(tensor, release).data_type
        if tensor.dtype is Dtype.BYTES:
            entry.dims[:] = [1]
            entry.input_data_file = tensor.name
        else:
            entry.dims[:] = [WARMUP_TOKENS if d < 0 else d for d in release.dims(tensor)]
            entry.zero_data = True
    return config


def _python(config: ModelConfig) -> None:
    """Our own Python, behind a door."""
    config.backend = PYTHON
    config.default_model_filename = models.PYTHON_FILE
    _set(config, QUEUE, KNOBS[config.name][QUEUE])


def _runtime(config: ModelConfig, release: Release) -> None:
    """How our Python runs a graph."""
    _set(config, "intra_op_threads", KNOBS[config.name]["threads"])
    _set(config, PRECISION, release.precision)


def _input(tensor: Tensor, release: Release) -> ModelInput:
    dims = release.dims(tensor)
    return ModelInput(name=tensor.name, data_type=tensor.dtype.config, dims=dims)


def _output(tensor: Tensor, release: Release) -> ModelOutput:
    dims = release.dims(tensor)
    return ModelOutput(name=tensor.name, data_type=tensor.dtype.config, dims=dims)


def _set(config: ModelConfig, name: str, value: object) -> None:
    config.parameters[name].string_value = json.dumps(value, sort_keys=True)


def text_of(config: ModelConfig) -> str:
    """The text of a `config.pbtxt`, in the order of the proto's fields."""
    return text_format.MessageToString(config, as_utf8=True)


def config_from_text(text: str) -> ModelConfig:
    """Read a `config.pbtxt`; an unknown field raises `text_format.ParseError`."""
    return text_format.Parse(text, ModelConfig())
