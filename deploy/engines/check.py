"""The compile check: both towers of a release, for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.engines.builder import Engine, Runtime, build
from deploy.engines.profiles import check_profiles, profiles_of
from retrieval_contract import models
from retrieval_contract.errors import EngineError
from retrieval_contract.release import Release
from retrieval_contract.tensors import Model

ARCHITECTURES = ("SM80", "SM86", "SM89", "SM120")
"""A100; A10 and RTX 30; L4, L40 and RTX 40; RTX 50. The runtime has no SM90 (H100)."""


@dataclass(frozen=True)
class Checked:
    """One tower for one architecture; where it is not as it must be, why, and no engine."""

    tower: str
    architecture: str
    engine: Engine | None
    error: str | None = None

    def as_json(self) -> dict[str, object]:
        """One entry of the report; `mb` are 10⁶ bytes."""
        engine = self.engine
        facts = engine.facts.as_json() if engine else {}
        return {
            "tower": self.tower,
            "sm": self.architecture.removeprefix("SM"),
            "layers": facts.get("layers"),
            "fused_attention": facts.get("fused_attention"),
            "attention_layers": engine and engine.attention_layers,
            "half_share": facts.get("half_share"),
            "activation_mb": engine and round(engine.facts.activation_bytes / 1e6, 1),
            "mb": engine and round(len(engine.plan) / 1e6, 1),
            "seconds": engine and round(engine.seconds, 1),
            "error": self.error,
        }


def graph_of(release: Path, model: Model, version: int) -> bytes:
    """The FP16 graph of one tower in a release folder; EngineError where it is missing."""
    path = release / "model_repository" / model.name / str(version) / models.HALF_FILE
    if not path.is_file():
        raise EngineError(f"{path}: not found; build the release again: `make release`")
    return path.read_bytes()


def check_engines(
    release: Path,
    runtime: Runtime,
    architectures: Sequence[str],
    done: Callable[[Checked], None] = lambda one: None,
) -> list[Checked]:
    """Build every tower for every architecture, whatever becomes of the others.

    EngineError where there is nothing to build: no graph, no such architecture.
    """
    for architecture in architectures:
        runtime.check_architecture(architecture)
    facts, found = Release.load(release), []
    for model in models.TOWERS:
        graph = graph_of(release, model, facts.version)
        profiles = profiles_of(model, facts)
        check_profiles(profiles, model, facts)
        for architecture in architectures:
            try:
                engine = build(runtime, graph, profiles, architecture=architecture)
                found.append(Checked(model.name, architecture, engine))
            except EngineError as exc:
                found.append(Checked(model.name, architecture, None, str(exc)))
            done(found[-1])
    return found
