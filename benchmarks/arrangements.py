"""python -m benchmarks.arrangements: how a full server may be arranged, each on the real one.

Triton has bounds and priorities for its queue; `retrieval_contract/door.py` is the one that is
served. Each arrangement gets requests of one text, which nobody merges: bursts of ten, and three
times the rate that it answers when it is asked without pause. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks.inflight import keep_in_flight
from benchmarks.overload import ANSWERED, BURST, OFFERED, STALL_S, Sender
from benchmarks.workload import built_in_queries
from deploy.pbtxt import Message, message_of, parse
from deploy.query_cache import rewrite
from deploy.server import LATEST, triton
from retrieval_client.channel import channel_to
from retrieval_client.settings import Settings
from retrieval_contract import models
from retrieval_contract.errors import RetrievalError
from retrieval_contract.models import QUERY_ENCODER, Target

WITHOUT_DOOR = '''"""query_encoder without a door: it answers before it takes more."""

from retrieval_contract import serving


class TritonPythonModel(serving.OnnxQueryEncoder):
    def execute(self, requests):
        arrays = [serving._rows(request, self._inputs) for request in requests]
        return self._replies([serving._Asked(None, rows, False) for rows in arrays])
'''
IN_FLIGHT, TIME_S = 32, 0.3
QUEUE = message_of(("max_queue_size", "32"))


@dataclass(frozen=True)
class Arrangement:
    """Fields of the batcher, copies of the model, and whether it has its door."""

    batching: Message
    copies: int = 1
    door: bool = False


ARRANGEMENTS = {
    "nothing": Arrangement(message_of()),
    "max_queue_size": Arrangement(message_of(("default_queue_policy", QUEUE))),
    "priorities": Arrangement(
        message_of(("priority_levels", "2"), ("default_priority_level", "1"))
    ),
    "two copies, max_queue_size": Arrangement(message_of(("default_queue_policy", QUEUE)), 2),
    "door": Arrangement(message_of(), door=True),
}


@dataclass(frozen=True)
class Found:
    """Shares of requests: slower than STALL_S in bursts; past the load, what became of them."""

    stalled: float
    goodput: float
    refused: float
    unanswered: float


def arranged(release: Path, arrangement: Arrangement, folder: Path) -> Path:
    """The release by links, with another batcher before its queries."""
    copy = folder / release.resolve().name
    shutil.copytree(release.resolve(), copy, copy_function=os.symlink)
    home = copy / "model_repository" / QUERY_ENCODER.name
    path = home / "configs" / f"{Target.LOCAL}.pbtxt"
    config = parse(path.read_text("utf-8"))
    config.set("dynamic_batching", arrangement.batching)
    for group in config.messages("instance_group"):
        group.set("count", str(arrangement.copies))
    rewrite(path, config)
    if not arrangement.door:
        (code,) = home.glob(f"*/{models.PYTHON_FILE}")
        code.unlink()
        code.write_text(WITHOUT_DOOR, "utf-8")
    return copy


def measure(release: Path, arrangement: Arrangement, args: argparse.Namespace) -> Found:
    """Bursts, then overload, on a server of its own."""
    texts = built_in_queries()
    rows = itertools.cycle([(text.encode(),) for text in texts])
    with (
        tempfile.TemporaryDirectory() as folder,
        Path("build/arrangements.log").open("w", encoding="utf-8") as log,
        triton(arranged(release, arrangement, Path(folder)), log=log) as server,
        channel_to(Settings(triton=server.grpc_address)) as channel,
    ):
        rate = keep_in_flight(server, QUERY_ENCODER, rows, IN_FLIGHT, 1, args.seconds).rows_per_s
        sender = Sender(channel, texts, TIME_S)
        slow = sum(took > STALL_S for took in sender.bursts(args.bursts).all)
        counts = sender.offer(rate * OFFERED, args.seconds, TIME_S).counts
    good, refused = counts.get(ANSWERED, 0), counts.get(grpc.StatusCode.UNAVAILABLE.name, 0)
    return Found(
        slow / (args.bursts * BURST),
        good / (rate * args.seconds),
        refused / sum(counts.values()),
        1 - (good + refused) / sum(counts.values()),
    )


def show(found: dict[str, Found]) -> None:
    """One row an arrangement."""
    table = Table(title=f"bursts of {BURST}; then {OFFERED:g} times what it answers")
    for column in ("", f"slower than {STALL_S} s", "answered ÷ capacity", "refused", "no answer"):
        table.add_column(column, justify="right")
    for name, one in found.items():
        shares = (one.stalled, one.goodput, one.refused, one.unanswered)
        table.add_row(name, *(f"{share:.0%}" for share in shares))
    Console(stderr=True).print(table)


def main() -> None:
    """Command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.arrangements", description=__doc__)
    top.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    top.add_argument("--only", choices=list(ARRANGEMENTS), action="append", help="default: all")
    top.add_argument("--bursts", type=int, default=60)
    top.add_argument("--seconds", type=float, default=3.0)
    args = top.parse_args()
    try:
        found = {
            name: measure(args.release, ARRANGEMENTS[name], args)
            for name in args.only or ARRANGEMENTS
        }
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
    show(found)
    print(json.dumps({name: asdict(one) for name, one in found.items()}))


if __name__ == "__main__":
    main()
