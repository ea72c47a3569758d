"""Engines on disk: built once for each GPU, runtime and release, whatever starts beside it.

    <cache>/<tower>-<key>/model.plan    the engine
    <cache>/<tower>-<key>/engine.json   what it was built from and by, its hash, its facts

The key is a hash of all that an engine depends on, so that nothing ever has to be invalidated.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.engines.builder import Engine
from deploy.locking import locked
from retrieval_contract.models import PLAN_FILE
from retrieval_contract.release import sha256_of_json

FACTS_FILE = "engine.json"


@dataclass(frozen=True)
class Origin:
    """All that decides what an engine is; another value of any of these is another engine."""

    release_id: str
    tower: str
    graph_sha256: str
    runtime: str
    runtime_version: str
    gpu: str
    """Name and compute capability: an engine is for exactly this GPU."""
    profiles_sha256: str

    @property
    def folder(self) -> str:
        """Of the engine, inside the cache."""
        return f"{self.tower}-{sha256_of_json(asdict(self))[:24]}"


def cached(origin: Origin, cache: Path, build: Callable[[], Engine]) -> Path:
    """The path of the plan: the one that lies there, if it is whole, or a new one.

    Processes that start at once on one volume wait for the first to build. A plan that is cut,
    changed, or does not say where it comes from is built again. What `build` raises is raised,
    and leaves the cache as it was.
    """
    cache.mkdir(parents=True, exist_ok=True)
    home = cache / origin.folder
    with locked(cache / f"{origin.folder}.lock"):
        if not is_whole(home, origin):
            _write(home, origin, build())
    return home / PLAN_FILE


def is_whole(home: Path, origin: Origin) -> bool:
    """Whether a plan lies there that was built from just this, and is still what was written."""
    try:
        said = json.loads((home / FACTS_FILE).read_text("utf-8"))
        plan = (home / PLAN_FILE).read_bytes()
    except (OSError, ValueError):
        return False
    return (
        isinstance(said, dict)
        and said.get("origin") == asdict(origin)
        and said.get("sha256") == hashlib.sha256(plan).hexdigest()
    )


def _write(home: Path, origin: Origin, engine: Engine) -> None:
    """Whole or not at all: written beside, then renamed."""
    facts = {
        "origin": asdict(origin),
        "sha256": hashlib.sha256(engine.plan).hexdigest(),
        "bytes": len(engine.plan),
        "seconds": round(engine.seconds, 1),
        "profiles": [asdict(profile) for profile in engine.profiles],
        "attention_layers": engine.attention_layers,
        "facts": engine.facts.as_json(),
    }
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".building-") as name:
        fresh = Path(name) / "new"
        fresh.mkdir()
        (fresh / PLAN_FILE).write_bytes(engine.plan)
        (fresh / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        if home.exists():
            home.rename(Path(name) / "old")
        fresh.rename(home)
