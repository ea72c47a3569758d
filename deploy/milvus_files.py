"""What a Milvus server keeps in its data folder: its configuration, its lock, its data."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from deploy.security import Tls
from retrieval_contract.errors import DeployError

INNER_PORT = 19530
"""In its own namespace nobody else has a port, so all of them are Milvus's usual ones."""
QUIET_GLOG = "--logtostderr=true\n--minloglevel=2\n"


def write_config(data: Path, session_ttl_s: int, tls: Tls | None, token: bool) -> Path:
    """`milvus.yaml` (JSON is YAML), where it differs from Milvus's defaults; its folder."""
    security: dict[str, object] = {"authorizationEnabled": token}
    config: dict[str, object] = {
        "etcd": {
            "endpoints": "localhost:2379",
            "use": {"embed": True},
            "data": {"dir": str(data / "etcd")},
            "log": {"level": "error", "path": str(data / "etcd.log")},
        },
        "mq": {"type": "rocksmq"},
        "rocksmq": {"path": str(data / "rocksmq")},
        "localStorage": {"path": str(data / "storage")},
        "log": {"level": "warn"},
        "common": {
            "storageType": "local",
            "session": {"ttl": session_ttl_s},
            "security": security,
        },
        # Where they are not named, several of them are the same.
        "proxy": {"port": INNER_PORT, "internalPort": 19529},
        "rootCoord": {"port": 53100},
        "queryCoord": {"port": 19531},
        "queryNode": {"port": 21123},
        "indexNode": {"port": 21121},
        "dataCoord": {"port": 13333},
        "dataNode": {"port": 21124},
    }
    if tls:
        tls.flags(sys.stderr)  # says what is not there, or has expired
        security["tlsMode"] = 2 if tls.root else 1
        paths = {"serverPemPath": tls.cert, "serverKeyPath": tls.key, "caPemPath": tls.root}
        config["tls"] = {name: str(path.resolve()) for name, path in paths.items() if path}
    folder = data / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "milvus.yaml").write_text(json.dumps(config, indent=1))
    (folder / "glog.conf").write_text(QUIET_GLOG)
    return folder


DYING_S = 2.0
"""A killed server holds its lock until the last of its threads is gone."""


def lock_within(file: int, seconds: float) -> None:
    """Lock a file; BlockingIOError when somebody else has it all the time."""
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def locked(data: Path) -> Iterator[int]:
    """The number of a locked file: who inherits it holds the lock on. DeployError when it is held.

    The lock ends with the last process that has it, whatever ends that process.
    """
    data.mkdir(parents=True, exist_ok=True)
    file = os.open(data / "lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            lock_within(file, DYING_S)
        except BlockingIOError as exc:
            raise DeployError(
                f"{data}: another Milvus server uses it; stop that one, or give another folder"
            ) from exc
        yield file
    finally:
        os.close(file)
