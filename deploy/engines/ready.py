"""What a server starts with: a release with engines for this GPU, or the same on the processor.

Engines are for one GPU, one TensorRT and one release, so they are made where they run and kept in
a cache (`cache.py`). The release itself is mounted read-only; an overlay of links adds the plans.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from deploy.engines.builder import Runtime, Told, build, say_nothing
from deploy.engines.cache import Origin, cached, is_whole
from deploy.engines.check import graph_of
from deploy.engines.folders import writable
from deploy.engines.profiles import check_profiles, profiles_of
from deploy.versions import nvidia_smi
from retrieval_contract import models
from retrieval_contract.errors import EngineError
from retrieval_contract.models import PLAN_FILE, Target
from retrieval_contract.probes import PROBES_FILE
from retrieval_contract.release import RELEASE_FILE, Release, sha256_of_json
from retrieval_contract.tensors import Model

REPOSITORY = "model_repository"


class Missing(StrEnum):
    """What to do while there is no engine for this GPU."""

    WAIT = "wait"  # build now, start then
    CPU = "cpu"  # start on the processor; another process builds for the next start
    FAIL = "fail"  # do not start


@dataclass(frozen=True)
class Gpu:
    """The GPU that will run the engines; `architecture` where the compiler must be told."""

    name: str
    architecture: str | None = None


@dataclass(frozen=True)
class Ready:
    """A release folder to serve, on which target, and why not on the GPU where it is not."""

    release: Path
    target: Target
    why: str = ""

    def as_json(self) -> dict[str, str]:
        """For scripts."""
        return {"release": str(self.release), "target": self.target, "why": self.why}


def gpu_at_hand() -> Gpu | None:
    """What `nvidia-smi` names, with compute capability and driver, or None.

    Raises EngineError where GPUs are unlike: Triton puts a model on each, and a plan is for one
    kind.
    """
    kinds = sorted({*nvidia_smi("name,compute_cap,driver_version")})
    if len(kinds) > 1:
        raise EngineError(
            f"expected GPUs of one kind, as an engine is for one, got {'; '.join(kinds)}: give "
            "each server like ones, as `docker run --gpus device=0`"
        )
    return Gpu(kinds[0]) if kinds else None


def origin_of(release: Path, facts: Release, model: Model, runtime: Runtime, gpu: Gpu) -> Origin:
    """Everything that one tower's engine depends on here."""
    graph = graph_of(release, model, facts.version)
    profiles = [asdict(profile) for profile in profiles_of(model, facts)]
    return Origin(
        facts.release_id,
        model.name,
        hashlib.sha256(graph).hexdigest(),
        runtime.name,
        runtime.version,
        f"{gpu.name} {gpu.architecture or ''}".strip(),
        sha256_of_json(profiles),
    )


def prepare(
    release: Path,
    cache: Path,
    runtime: Runtime | None,
    gpu: Gpu | None,
    missing: Missing,
    told: Told = say_nothing,
) -> Ready:
    """Decide what to serve, and build what that takes.

    Raises EngineError where the GPU cannot be used and `missing` is not CPU, and for a build that
    fails under WAIT; DeployError for a cache that cannot be written, ContractError for a release
    that no GPU serves. Each message says what to do.
    """
    facts = Release.load(release).for_target(Target.GPU)
    if runtime is None or gpu is None:
        what = "GPU (nvidia-smi names none)" if gpu is None else "TensorRT (see above)"
        remedy = "give the container its GPU" if gpu is None else "use the serve image"
        if missing is not Missing.CPU:
            raise EngineError(
                f"expected a {what} to make engines for release {facts.release_id}; {remedy}, or "
                "serve on the processor: --missing cpu"
            )
        return Ready(release, Target.CPU, f"no {what}")
    writable(cache, "--cache")
    origins = {m.name: origin_of(release, facts, m, runtime, gpu) for m in models.TOWERS}
    absent = [name for name, o in origins.items() if not is_whole(cache / o.folder, o)]
    if absent and missing is not Missing.WAIT:
        why = (
            f"no engine of {', '.join(absent)} for {gpu.name} and {runtime.name} {runtime.version}"
        )
        if missing is Missing.FAIL:
            raise EngineError(
                f"{why} in {cache}; build them first: `python -m deploy.engines prepare "
                "--missing wait`"
            )
        return Ready(release, Target.CPU, why)
    plans = {
        model.name: engine_of(release, facts, model, origins[model.name], cache, runtime, gpu, told)
        for model in models.TOWERS
    }
    return Ready(overlay(release, facts, plans, cache), Target.GPU)


def engine_of(
    release: Path,
    facts: Release,
    model: Model,
    origin: Origin,
    cache: Path,
    runtime: Runtime,
    gpu: Gpu,
    told: Told = say_nothing,
) -> Path:
    """The plan of one tower, from the cache or built into it."""
    profiles = profiles_of(model, facts)
    check_profiles(profiles, model, facts)
    return cached(
        origin,
        cache,
        lambda: build(
            runtime,
            graph_of(release, model, facts.version),
            profiles,
            architecture=gpu.architecture,
            timing_cache=cache / timings_of(origin),
            told=told,
        ),
    )


def timings_of(origin: Origin) -> str:
    """The file of kernels' timings, which are of one GPU: another's would choose slow kernels."""
    words = f"timings-{origin.runtime}-{origin.runtime_version}-{origin.gpu}"
    return re.sub(r"[^\w.]+", "-", words)


def overlay(release: Path, facts: Release, plans: Mapping[str, Path], cache: Path) -> Path:
    """A release folder of links to `release`, with the plans beside the graphs; whole or not there.

    Its name follows from where its links lead, so that a server never sees another's engines
    appear, nor links into a volume that was mounted elsewhere.
    """
    where = {name: str(plan.resolve()) for name, plan in plans.items()}
    key = sha256_of_json({**where, REPOSITORY: str(release.resolve())})[:16]
    home = cache / f"release-{facts.release_id}-{key}"
    if home.exists():
        return home
    source = release.resolve() / REPOSITORY
    with tempfile.TemporaryDirectory(dir=cache, prefix=".linking-") as name:
        fresh = Path(name) / "new"
        (fresh / REPOSITORY).mkdir(parents=True)
        for file in (RELEASE_FILE, PROBES_FILE):
            (fresh / file).symlink_to(release.resolve() / file)
        for entry in source.iterdir():
            mine = fresh / REPOSITORY / entry.name
            if entry.name not in plans:
                mine.symlink_to(entry)
                continue
            version = str(facts.version)
            (mine / version).mkdir(parents=True)
            for part in [p for p in entry.iterdir() if p.name != version]:
                (mine / part.name).symlink_to(part)
            for part in (entry / version).iterdir():
                (mine / version / part.name).symlink_to(part)
            (mine / version / PLAN_FILE).symlink_to(plans[entry.name].resolve())
        try:
            fresh.rename(home)
        except OSError:  # another replica was first
            if not home.exists():
                raise
    return home


def build_beside(release: Path, cache: Path) -> subprocess.Popen[bytes]:
    """Build in a process of its own, which outlives its caller."""
    command = _prepare_command(release, cache, Missing.WAIT)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def prepared_apart(release: Path, cache: Path, missing: Missing) -> Ready:
    """As `prepare` for the GPU at hand, in a process that ends: TensorRT swallows what a signal
    raises while it builds, and its process keeps a context on the GPU.

    Raises EngineError when it fails; why stands in the log. Interrupted, it takes the build along.
    """
    command = _prepare_command(release, cache, missing)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            said, _ = child.communicate()
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        raise EngineError(
            f"release {release}: expected engines to serve, or none needed; got exit code "
            f"{child.returncode} of `{' '.join(command)}`; why stands above"
        )
    found = json.loads(said.splitlines()[-1])
    return Ready(Path(found["release"]), Target(found["target"]), found["why"])


def _prepare_command(release: Path, cache: Path, missing: Missing) -> list[str]:
    command = [sys.executable, "-m", "deploy.engines", "prepare", f"--missing={missing}"]
    return [*command, f"--release={release}", f"--cache={cache}"]
