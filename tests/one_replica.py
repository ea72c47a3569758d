"""One of several processes that want the same engine; it imports no more than that takes."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from deploy.engines.builder import Engine, build, find_runtime
from deploy.engines.cache import Origin, cached
from deploy.engines.profiles import profiles_of
from retrieval_contract import models
from retrieval_contract.release import Release


def one_replica(origin: Origin, cache: Path, graph: bytes, release: Release) -> str:
    """The hash of the engine that it starts with; each build leaves a file `built-…`."""

    def make() -> Engine:
        with tempfile.NamedTemporaryFile(dir=cache, prefix="built-", delete=False):
            profiles = profiles_of(models.QUERY_TOWER, release)[:1]
            runtime = find_runtime(["tensorrt_rtx"])
            return build(runtime, graph, profiles, architecture="SM89")

    return hashlib.sha256(cached(origin, cache, make).read_bytes()).hexdigest()
