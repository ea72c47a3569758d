"""A server in a terminal, and `--run`: a command beside it, which ends when it does."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from deploy.stopping import Stopped, listen
from retrieval_contract.errors import DeployError, RetrievalError

LOOK_S = 0.05
COMMAND_STOP_S = 5.0
"""What the command gets between SIGTERM and SIGKILL."""


def add_run_flag(top: argparse.ArgumentParser, where: str) -> None:
    """`where` says what the command finds there."""
    top.add_argument("--run", nargs=argparse.REMAINDER, help=f"run this command {where}, then stop")


@contextmanager
def in_terminal(args: argparse.Namespace) -> Iterator[None]:
    """Around a server that serves until Ctrl-C or SIGTERM: how a stop and an error are said."""
    listen()
    try:
        yield
    except Stopped as exc:
        print("stopped", file=sys.stderr)
        if args.run:  # its caller must not take it for done
            raise SystemExit(128 + exc.args[0]) from None
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc


def run_beside(
    args: Sequence[str],
    environment: Mapping[str, str],
    within: Sequence[str] = (),
    look: Callable[[float], object] = time.sleep,
) -> int:
    """Run a command that finds the server in its environment; its exit code as a shell's.

    `within` is what to start it with, such as `nsenter` and its flags. `look` is called meanwhile,
    with the seconds that it may take; what it raises, such as that the server is gone for good,
    ends the command.
    """
    try:
        process = subprocess.Popen([*within, *args], env=os.environ | environment)
    except OSError as exc:
        raise DeployError(f"--run {args[0]}: {exc.strerror}; give a program that starts") from exc
    try:
        while (code := process.poll()) is None:
            look(LOOK_S)
    finally:
        process.terminate()
        try:
            process.wait(COMMAND_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return code if code >= 0 else 128 - code
