"""How a measuring program ends: its report is the last line, an error is one line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from retrieval_contract.errors import RetrievalError


def print_report(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Run, and print what comes of it as one line of JSON."""
    try:
        print(json.dumps(run(args), allow_nan=False))
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
