"""A server in a terminal, and `--run`: a command beside it, which ends when it does."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from deploy.stopping import Stopped, listen
from retrieval_contract.errors import DeployError, RetrievalError

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
    args: Sequence[str], environment: Mapping[str, str], within: Sequence[str] = ()
) -> int:
    """Run a command that finds the server in its environment; its exit code as a shell's.

    `within` is what to start it with, such as `nsenter` and its flags.
    """
    try:
        process = subprocess.Popen([*within, *args], env=os.environ | environment)
    except OSError as exc:
        raise DeployError(f"--run {args[0]}: {exc.strerror}; give a program that starts") from exc
    try:
        code = process.wait()
    finally:
        process.terminate()
        try:
            process.wait(COMMAND_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return code if code >= 0 else 128 - code
