"""How every command of this room ends: one line of JSON, or one line that says what is wrong."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping

from retrieval_contract.errors import RetrievalError


def at_least(lowest: int) -> Callable[[str], int]:
    """The type of a flag that counts."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            said = f"expected a whole number from {lowest}, got {text}"
            raise argparse.ArgumentTypeError(said)
        return int(text)

    return count


def answer(
    run: Callable[[argparse.Namespace], Mapping[str, object]], parser: argparse.ArgumentParser
) -> None:
    """Run with the command line's flags; an error of ours is said without a traceback."""
    args = parser.parse_args()
    try:
        print(json.dumps(run(args)))
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
