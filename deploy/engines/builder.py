"""FP16 ONNX graph → engine, by whichever TensorRT is installed.

One builder for `tensorrt` (10 and 11, in the container) and `tensorrt_rtx` (compiles for any of
its GPUs without one, so it is the check that runs everywhere; Triton cannot load what it makes).
No precision flag is ever set: TensorRT 11 has none, and networks are strongly typed.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.engines.facts import LAYER, Facts, check_facts, facts_of, facts_of_inspection
from deploy.engines.profiles import PROFILES_REMEDY, Profile
from retrieval_contract.errors import EngineError

SERVED = ("tensorrt", "tensorrt_bindings")
"""What makes engines for Triton; the second stands on the libraries of NVIDIA's image."""
RUNTIMES = (*SERVED, "tensorrt_rtx")
FATAL = ("kMAX values are not self-consistent",)
"""Warnings that announce an engine which fails at run time."""

Told = Callable[[str, int, int], None]
"""Phase, steps done, steps in all."""


def say_nothing(phase: str, done: int, total: int) -> None:
    """For who does not watch."""


@dataclass(frozen=True)
class Engine:
    """A serialized engine, what it was tuned for, and what it turned out to be."""

    plan: bytes
    profiles: tuple[Profile, ...]
    facts: Facts
    attention_layers: int
    seconds: float


@dataclass(frozen=True)
class Runtime:
    """An installed TensorRT: its Python module."""

    trt: Any

    @property
    def name(self) -> str:
        """`tensorrt` or `tensorrt_rtx`."""
        return str(self.trt.__name__).removesuffix("_bindings")

    @property
    def version(self) -> str:
        """Engines are of one version."""
        return str(self.trt.__version__)

    @property
    def architectures(self) -> list[str]:
        """What it compiles for without a GPU (`SM89`), or nothing: then for the GPU at hand."""
        capabilities = getattr(self.trt, "ComputeCapability", None)
        names = capabilities.__members__ if capabilities else {}
        return [name for name in names if name.startswith("SM")]

    def check_architecture(self, name: str) -> None:
        """EngineError for one that it does not compile for."""
        if name not in self.architectures:
            raise EngineError(
                f"{self.name} {self.version}: expected one of {self.architectures}, got {name}; "
                "give --sm one of these"
            )


def find_runtime(names: Sequence[str] = RUNTIMES) -> Runtime:
    """The first that can be imported; EngineError where there is none."""
    said = []
    for name in names:
        try:
            return Runtime(importlib.import_module(name))
        except ImportError as exc:
            said.append(str(exc))
    raise EngineError(
        f"expected one of the Python modules {list(names)}, got none ({'; '.join(said)}); "
        "`make setup` installs tensorrt_rtx, the serve image tensorrt's bindings"
    )


def build(
    runtime: Runtime,
    graph: bytes,
    profiles: Sequence[Profile],
    *,
    architecture: str | None = None,
    timing_cache: Path | None = None,
    told: Told = say_nothing,
) -> Engine:
    """Parse, compile, prove half precision and fused attention.

    `graph` is a whole ONNX file; `profiles` are checked ones (`check_profiles`); `architecture`
    is one of `runtime.architectures`. Raises EngineError with the parser's or builder's words.
    """
    trt, started = runtime.trt, time.monotonic()
    log = _logger(trt)
    builder = trt.Builder(log)
    network, _parser = _parse(trt, builder, log, graph)  # which owns the network's weights
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the facts are read from it
    config.progress_monitor = _monitor(trt, told)
    if architecture:
        runtime.check_architecture(architecture)
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[architecture], 0)
    for profile in profiles:
        _add_profile(builder, config, profile)
    timings = _timings(config, timing_cache)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(
            f"{runtime.name} {runtime.version}: expected an engine, got none: {log.complaints()}; "
            "see that the GPU has memory to spare, and build the release again: `make release`"
        )
    if fatal := [line for line in log.lines if any(word in line for word in FATAL)]:
        raise EngineError(
            f"{fatal[0]}: a profile is larger than the graph allows; {PROFILES_REMEDY}"
        )
    if timings is not None and timing_cache:
        _keep(timings, timing_cache)
    attention = attention_layers(trt, network)
    facts = _facts(trt, log, serialized, len(profiles))
    check_facts(facts, attention)
    seconds = time.monotonic() - started
    return Engine(bytes(serialized), tuple(profiles), facts, attention, seconds)


def attention_layers(trt: Any, network: Any) -> int:
    """Of a parsed network: softmaxes whose result a matrix product reads.

    On the way it may be reshaped, cast, and changed in each number (a factor for each head, say);
    a softmax that weighs a few parts becomes another shape there, and is no attention.
    """
    kinds = trt.LayerType
    readers: dict[str, list[Any]] = {}
    layers = [network.get_layer(at) for at in range(network.num_layers)]
    for layer in layers:
        for at in range(layer.num_inputs):
            if (tensor := layer.get_input(at)) is not None:
                readers.setdefault(tensor.name, []).append(layer)

    def reaches_a_product(tensor: Any) -> bool:
        for reader in readers.get(tensor.name, []):
            if reader.type == kinds.MATRIX_MULTIPLY:
                return True
            given = reader.get_output(0)
            same = reader.type == kinds.SHUFFLE or tuple(given.shape) == tuple(tensor.shape)
            if same and reaches_a_product(given):
                return True
        return False

    return sum(one.type == kinds.SOFTMAX and reaches_a_product(one.get_output(0)) for one in layers)


def _facts(trt: Any, log: Any, serialized: Any, profiles: int) -> Facts:
    """From the log where it lists layers, else from the engine itself, which needs its GPU."""
    if any(LAYER.match(line) for line in log.lines):
        return facts_of(log.lines, profiles)
    engine = trt.Runtime(log).deserialize_cuda_engine(serialized)
    if engine is None:
        raise EngineError(
            f"the log lists no layers and the engine cannot be opened: {log.complaints()}; "
            "build on the GPU that will run it"
        )
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return facts_of_inspection(text, profiles, engine.device_memory_size_v2)


def _parse(trt: Any, builder: Any, log: Any, graph: bytes) -> tuple[Any, Any]:
    flags = trt.NetworkDefinitionCreationFlag
    strongly_typed = getattr(flags, "STRONGLY_TYPED", None)  # no flag: no other way exists
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        errors = [str(parser.get_error(at).desc()) for at in range(parser.num_errors)]
        raise EngineError(
            f"the parser refused the graph: {'; '.join(errors) or log.complaints()}; "
            "export it again, and take the graph after surgery, not one that a runtime optimised"
        )
    return network, parser


def _add_profile(builder: Any, config: Any, profile: Profile) -> None:
    made = builder.create_optimization_profile()
    for name, shapes in profile.inputs.items():
        made.set_shape(name, shapes.min, shapes.opt, shapes.max)
    if config.add_optimization_profile(made) < 0:
        raise EngineError(
            f"profile {profile.name}: refused by the builder: {profile.inputs}; {PROFILES_REMEDY}"
        )


def _timings(config: Any, path: Path | None) -> Any:
    """A cache of kernels' timings for this config, taken up from `path`; none where not wanted.

    What was kept by another GPU or is broken counts as nothing.
    """
    if path is None:
        return None
    for kept in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(kept)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def _keep(timings: Any, path: Path) -> None:
    """Whole or not at all: another process may be reading there, or writing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".timings-") as name:
        fresh = Path(name) / "new"
        fresh.write_bytes(memoryview(timings.serialize()))
        fresh.replace(path)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Every line, kept."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.extend(message.splitlines())
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def complaints(self) -> str:
            """The errors, or that there was none."""
            return "; ".join(self.errors) or "failed without a word"

    return Log()


def _monitor(trt: Any, told: Told) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Phases nest; each counts its own steps."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = steps
            told(name, 0, steps)

        def step_complete(self, name: str, step: int) -> bool:
            told(name, step + 1, self.steps[name])
            return True

        def phase_finish(self, name: str) -> None:
            told(name, self.steps[name], self.steps[name])

    return Monitor()
