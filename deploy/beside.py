"""`--run`: a command beside a server, which ends when it does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from retrieval_contract.errors import DeployError

COMMAND_STOP_S = 5.0
"""What the command gets between SIGTERM and SIGKILL."""


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
