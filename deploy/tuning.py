"""Profiles: how many copies, threads and so on a machine of some size gives each model.

A profile is a TOML file, `deploy/profiles/default.toml` the one that names every knob. It is laid
over a repository of links when a server starts, so a release is the same on every machine.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.pbtxt import Message, message_of, parse, quoted
from deploy.query_cache import prepare_cache, rewrite
from retrieval_contract.door import QUEUE
from retrieval_contract.errors import DeployError

PROFILES = Path(__file__).parent / "profiles"
CACHE = "query_cache_mb"
LEAST = {"instances": 1, "threads": 1, "delay_us": 0, QUEUE: 1}
"""The knobs of a model, and the least that each can be."""
PARAMETERS = {"intra_op_threads": "threads", "intra_op_thread_count": "threads", QUEUE: QUEUE}
"""Knobs by what our Python models and Triton's ONNX Runtime backend call them in a config."""
DELAY = "max_queue_delay_microseconds"

Knobs = Mapping[str, int]


@dataclass(frozen=True)
class Profile:
    """Knobs by model and name; `query_cache_mb`: MiB, 0 for no cache."""

    models: Mapping[str, Knobs] = field(default_factory=dict)
    query_cache_mb: int = 0

    def text(self) -> str:
        """As TOML."""
        lines = [f"{CACHE} = {self.query_cache_mb}"]
        for model, knobs in self.models.items():
            lines += ["", f"[{model}]", *(f"{name} = {value}" for name, value in knobs.items())]
        return "\n".join(lines) + "\n"


def read_profile(path: Path, known: Mapping[str, Knobs] | None = None) -> Profile:
    """Read a file; where `known` is given, only its models and knobs, which it also fills in.

    Raises DeployError that names file, key and what was expected.
    """
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise DeployError(f"{path}: expected a TOML file, got {exc}; see {PROFILES}") from exc
    cache = found.pop(CACHE, 0)
    _check(path, CACHE, cache, 0)
    models = {name: dict(knobs) for name, knobs in (known or {}).items()}
    for model, knobs in found.items():
        if not isinstance(knobs, dict) or (known is not None and model not in known):
            expected = [CACHE, *(f"[{name}]" for name in known or ())]
            raise DeployError(f"{path}: {model}: expected one of {', '.join(expected)}; correct it")
        allowed = known[model] if known is not None else LEAST
        for name, value in knobs.items():
            if name not in allowed:
                raise DeployError(
                    f"{path}: {model}.{name}: expected one of {', '.join(allowed)}; correct it"
                )
            _check(path, f"{model}.{name}", value, LEAST[name])
        models[model] = {**models.get(model, {}), **knobs}
    return Profile(models, cache)


def _check(path: Path, key: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise DeployError(
            f"{path}: {key}: expected a whole number from {least}, got {value!r}; correct it"
        )


DEFAULT = read_profile(PROFILES / "default.toml")


def profile_of(name: str) -> Profile:
    """A profile by its name, or by a path that ends in .toml; DeployError if it is neither."""
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if not path.is_file():
        named = ", ".join(sorted(p.stem for p in PROFILES.glob("*.toml")))
        raise DeployError(f"profile {name}: expected one of {named}, or a path that ends in .toml")
    return read_profile(path, DEFAULT.models)


def add_profile_flag(parser: argparse.ArgumentParser) -> None:
    """`--profile`; None where it is not given."""
    parser.add_argument(
        "--profile",
        metavar="NAME|FILE",
        help="copies, threads, delays of each model: a name in deploy/profiles, or a .toml file",
    )


def profile_from(args: argparse.Namespace) -> Profile | None:
    """What `--profile` and `--query-cache-mb` say together; None where they say nothing."""
    profile = profile_of(args.profile) if args.profile else None
    if args.query_cache_mb is None:
        return profile
    return Profile(profile.models if profile else {}, args.query_cache_mb)


def lay_over(profile: Profile, repository: Path) -> list[str]:
    """Change the configs of a repository of links, which is ours alone; Triton's flags for it."""
    for model, knobs in profile.models.items():
        for path in (repository / model).rglob("*.pbtxt"):
            config = parse(path.read_text("utf-8"))
            if config.messages("instance_group"):  # an ensemble has none, and computes nothing
                turn(config, knobs)
                rewrite(path, config)
    return prepare_cache(profile.query_cache_mb, repository)


def turn(config: Message, knobs: Knobs) -> None:
    """Set the knobs of one config; those that its runtime does not have are left out."""
    for group in config.messages("instance_group"):
        group.set("count", str(knobs["instances"]))
    for batching in config.messages("dynamic_batching"):
        batching.drop(DELAY)
        if knobs["delay_us"]:
            batching.set(DELAY, str(knobs["delay_us"]))
    named = {quoted(name): str(knobs[knob]) for name, knob in PARAMETERS.items() if knob in knobs}
    for parameter in config.messages("parameters"):
        if value := named.get(parameter["key"]):
            parameter.set("value", message_of(("string_value", quoted(value))))
