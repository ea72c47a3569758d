"""What a launcher that ends without a word leaves, and who tidies it up."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.soak import children_of
from deploy import stopping
from deploy.orphans import PREFIX, claim, let_go, sweep_orphans
from deploy.server import LOOPBACK, choose_ports
from tests.serving import Serving, serve


@pytest.fixture
def serving(release_folder: Path, tmp_path: Path) -> Iterator[Serving]:
    """The command, as a user starts it."""
    with serve(release_folder, tmp_path / "serve.log") as started:
        yield started


def test_a_killed_launcher_takes_the_server_with_it(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is left to stop the server: its port must come free for the next start, which tidies
    up. What is held, and what is not ours, stays."""
    port = int(serving.address.split(":")[1])
    serving.process.kill()
    end = time.monotonic() + 20
    while serving.processes():
        assert time.monotonic() < end, "the server runs on"
        time.sleep(0.2)
    time.sleep(0.5)  # one that ends has lost its words before its locks
    choose_ports(LOOPBACK, grpc=port)
    region = Path("/dev/shm") / f"{serving.scratch.name}-region"
    region.touch()  # as of a server that was killed, too
    stays = [Path("/dev/shm") / f"{PREFIX}{name}" for name in ("held", "of-nobody")]
    for path in stays:
        path.touch()
    held = claim(f"{PREFIX}held")
    assert {region, serving.scratch} < set(serving.leftovers())
    monkeypatch.setattr(tempfile, "tempdir", str(serving.scratch.parent))
    sweep_orphans()
    assert [path.exists() for path in stays] == [True, True]
    let_go(f"{PREFIX}held", held)
    for path in stays:
        path.unlink()
    assert serving.leftovers() == []


def test_what_a_server_still_uses_is_nobodys_orphan(serving: Serving) -> None:
    """Its launcher was killed, and it drains."""
    assert serving.address, "it serves"
    (group,) = children_of(serving.process.pid)
    os.kill(group, signal.SIGSTOP)
    try:
        serving.process.kill()
        serving.process.wait()
        sweep_orphans()
        assert len(serving.leftovers()) > 2
    finally:
        os.killpg(group, signal.SIGKILL)
    end = time.monotonic() + 20
    while serving.leftovers() != [serving.scratch]:  # of another temporary folder than ours
        assert time.monotonic() < end, serving.leftovers()
        sweep_orphans()
        time.sleep(0.1)
    shutil.rmtree(serving.scratch)


def test_a_closed_terminal_stops_and_nohup_does_not() -> None:
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stopping.listen()
        with pytest.raises(stopping.Stopped):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # the shell's own, after the kernel's
        stopping.listen()
        signal.raise_signal(signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
