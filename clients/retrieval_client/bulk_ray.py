"""The shards of a bulk encode, made by Ray Data: on a cluster's machines, or as processes of this.

Every machine must see source and shards under the same paths, and have this library installed. A
worker that is killed is started again and gets the shard that it had in hand once more: it appears
under the same name, whole.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from typing import Any

from retrieval_client.bulk import Maker, Recipe, Run, Slice
from retrieval_client.settings import LOOPBACK, quiet_ray
from retrieval_client.shards import Shard
from retrieval_contract.errors import DeployError, RetrievalError

LOCAL = "local"
"""In place of a cluster's address: a Ray of our own, that ends with the run."""
STORE_BYTES = 100 * 2**20
"""Memory of a local Ray for what travels: names and counts, no rows."""


class ShardMaker:
    """An actor of Ray Data: one part in, one shard's name and counts out."""

    def __init__(self, recipe: Recipe) -> None:
        self._maker = Maker(recipe)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """As JSON both ways, which every version of Arrow knows."""
        number, start, stop, repeats = json.loads(row["part"])
        shard = self._maker(Slice(number, start, stop, tuple(repeats)))
        return {"shard": json.dumps(asdict(shard))}


def on_ray(address: str, workers: int) -> Run:
    """So many workers on the cluster at an address, or on this machine alone (LOCAL).

    Raises DeployError when Ray is not installed or cannot be reached.
    """

    def run(recipe: Recipe, parts: list[Slice]) -> Iterator[Shard]:
        if not parts:
            return
        with _connected(address, workers) as ray:
            items = [{"part": json.dumps(astuple(part))} for part in parts]
            # A block a part: what is done again after a kill is one shard.
            made = ray.data.from_items(items, override_num_blocks=len(items)).map(
                ShardMaker,
                fn_constructor_args=(recipe,),
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            )
            try:
                for row in made.iter_rows():
                    yield Shard(**json.loads(row["shard"]))
            except ray.exceptions.RayTaskError as exc:
                raise _cause(exc) from exc

    return run


def _cause(exc: Any) -> BaseException:
    """Ours, as far as it is."""
    found: BaseException | None = exc
    while found is not None:
        if isinstance(found, RetrievalError):
            return found
        found = getattr(found, "cause", None) or found.__cause__
    error: BaseException = exc
    return error


@contextmanager
def _connected(address: str, workers: int) -> Iterator[Any]:
    scratch = tempfile.mkdtemp(prefix="ray-") if address == LOCAL else None
    if scratch:
        quiet_ray(secrets.token_hex(32))
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise DeployError(
            "bulk encode: expected Ray, got none; install make-retrieval[retrieval_bulk], or "
            "leave --ray out"
        ) from exc
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        try:
            if scratch:
                _start_local(ray, workers, scratch)
            else:
                ray.init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as exc:
            raise DeployError(
                f"Ray at {address}: cannot be reached ({exc}); start it, or say --ray {LOCAL}"
            ) from exc
        yield ray
    finally:
        ray.shutdown()
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def _start_local(ray: Any, workers: int, scratch: str) -> None:
    """On loopback, with no dashboard, and nothing told to anybody."""
    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=STORE_BYTES,
        _temp_dir=scratch,
    )
    if (found := ray.util.get_node_ip_address()) != LOOPBACK:
        raise DeployError(
            f"Ray: expected to listen on {LOOPBACK}, got {found}: it was imported before us; "
            "start a cluster yourself and give its address (--ray)"
        )
