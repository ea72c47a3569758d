"""python3 -m deploy.health: the image's health check, one query and one product.

Readiness alone stays green when a model's process has died, so both go through every step of their
ensemble. Where to ask stands on the command line of process 1, which is the entry point.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

from deploy.container import own_http, parser
from deploy.own_http import ALIVE
from retrieval_contract import models
from retrieval_contract.errors import RetrievalError

ENTRY_POINT = "deploy.container"
ASK_S = 5.0


def flags_of(command_line: Path) -> list[str]:
    """What the entry point was told; nothing where another program is process 1 (--pid=host)."""
    words = command_line.read_text("utf-8").rstrip("\0").split("\0")
    return words[words.index(ENTRY_POINT) + 1 :] if ENTRY_POINT in words else []


def check(flags: Sequence[str]) -> None:
    """Raises ServerError when one of the two is not answered."""
    args, more = parser().parse_known_args(flags)
    server = own_http(args, more, key="", cached=False)
    # A new one each time, should there be a cache.
    query = {models.QUERY.name: [f"ready {uuid.uuid4()}".encode()]}
    server.encode(models.QUERY_ENCODER, query, ASK_S)
    server.encode(models.PRODUCT_ENCODER, ALIVE[models.PRODUCT_ENCODER], ASK_S)


def main() -> None:
    """Command line."""
    try:
        check(flags_of(Path("/proc/1/cmdline")))
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc


if __name__ == "__main__":
    main()
