"""The Milvus server: shut in, one way to it, killed and back, who may ask; nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import milvus as deployed
from deploy.milvus import ROOT_TOKEN, MilvusServer
from deploy.milvus import milvus_server as start_milvus
from deploy.milvus_wheel import MILVUS_FOLDER, find_binary
from deploy.security import Tls
from retrieval_client import Catalog, Settings
from retrieval_client.collection import Ask
from retrieval_client.connect import tls_arguments
from retrieval_contract.errors import (
    CatalogError,
    CatalogUnavailable,
    DeployError,
    RetrievalError,
)
from tests.certificates import authority, certificate
from tests.conftest import ROOT, product_row

RELEASE, DIM = "0123456789abcdef", 8


def gone(pid: int, within_s: float = 10) -> bool:
    """Whether a process is no more, or a zombie, by then."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def refused(port: int, within_s: float = 10) -> bool:
    """Whether nobody listens there by then: threads of a zombie may hold its sockets a moment."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
        except ConnectionRefusedError:
            return True
        time.sleep(0.02)
    return False


def test_the_binary_is_the_locked_one() -> None:
    (pin,) = re.findall(r"^milvus==(\S+)$", (ROOT / "requirements/milvus.lock").read_text(), re.M)
    (installed,) = MILVUS_FOLDER.glob("milvus-*.dist-info")
    assert installed.name == f"milvus-{pin}.dist-info", "run `make setup`"


def test_it_sees_no_network_and_is_seen_at_one_port(milvus_server: MilvusServer) -> None:
    inside = Path(f"/proc/{milvus_server.pid}")
    assert (inside / "ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    interfaces = (inside / "net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    socket.create_connection(("127.0.0.1", milvus_server.port), timeout=2).close()
    with pytest.raises(ConnectionRefusedError):  # so it is not on every address of this machine
        socket.create_connection(("127.0.0.2", milvus_server.port), timeout=2)


def test_killed_it_is_back_at_the_same_address_with_all_rows(
    tmp_path: Path, milvus_server: MilvusServer
) -> None:
    """`milvus_server` is asked for, so that this skips where there can be none."""
    data = tmp_path / "data"
    with (
        (tmp_path / "log").open("w") as log,
        start_milvus(data, log=log) as server,
        Catalog(Settings(milvus=server.uri)) as catalog,
    ):
        stored = catalog.prepare(RELEASE, DIM)
        stored.upsert([product_row(str(i), DIM, i) for i in range(50)])
        address = server.uri
        with pytest.raises(DeployError, match="another Milvus server uses it"):
            start_milvus(data).__enter__()
        with pytest.raises(DeployError, match=f"port {server.port} on .*: Address already in use"):
            start_milvus(tmp_path / "other", port=server.port).__enter__()
        assert server._room is not None
        os.kill(server._room.pid, signal.SIGKILL)
        assert gone(server.pid), "the server outlived the one who started it"
        with pytest.raises(CatalogUnavailable, match="see that it runs"):
            stored.count()
        server.restart()
        assert server.uri == address
        assert stored.count() == 50
        (hits,) = stored.search(product_row("7", DIM, 7).vector[None], Ask(1))
        assert hits[0].id == "7"
    assert gone(server.pid)


# ── the command ──────────────────────────────────────────────────────────────────────────
def command(data: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "deploy.milvus", "--port", "0", "--data", str(data), *more]


def inhabitants(data: Path) -> list[int]:
    """Processes that work in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").readlink() == data:
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_command(
    tmp_path: Path, number: int, milvus_server: MilvusServer
) -> None:
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command(tmp_path / "data"), cwd=ROOT, stderr=log, stdout=log)
        try:
            end = time.monotonic() + 60
            while not (at := re.search(r"127\.0\.0\.1:(\d+);", (tmp_path / "log").read_text())):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.05)
            inside = inhabitants(tmp_path / "data")
            assert len(inside) == 2, "the server, and who forwards to it"
        finally:
            process.send_signal(number)
        assert process.wait(30) == (0 if number == signal.SIGTERM else -number)
    assert all(gone(pid) for pid in inside)
    assert refused(int(at[1]))


def test_a_command_runs_inside_and_its_exit_code_is_ours(
    tmp_path: Path, milvus_server: MilvusServer
) -> None:
    script = (
        "import os, socket; from retrieval_client import Catalog, Settings; "
        "s = Settings.from_env(); version = Catalog(s).milvus.backend.version; "
        "print(s.milvus, version, [n for _, n in socket.if_nameindex()]); os._exit(7)"
    )
    done = subprocess.run(
        command(tmp_path / "data", "--run", sys.executable, "-c", script),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "http://127.0.0.1:19530 v2.3.5-lite ['lo']" in done.stdout, done.stderr
    assert done.returncode == 7


# ── what it cannot do without ────────────────────────────────────────────────────────────
def test_a_machine_without_namespaces_is_told_so(milvus_server: MilvusServer) -> None:
    """A user namespace may forbid further network namespaces: here they truly are not to be had."""
    script = "from deploy.milvus import namespace; namespace()"
    shell = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "sh", "-c", shell, "sh", sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "DeployError: Milvus: expected a network namespace of its own" in done.stderr
    assert "unshare failed" in done.stderr
    assert "or use Milvus Lite" in done.stderr


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeployError, match="no Milvus server there; run `make setup`"):
        find_binary(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeployError, match=r"unshare\(1\) of util-linux is not installed"):
        deployed.namespace()


def test_a_server_that_cannot_start_says_why(tmp_path: Path, milvus_server: MilvusServer) -> None:
    """Its own words: here a file is where its data should be."""
    (tmp_path / "rocksmq").write_text("")
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(DeployError, match=r"(?s)while starting; its last words:\n.*rocksmq"),
    ):
        start_milvus(tmp_path, log=log).__enter__()


# ── who may ask ──────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of our authority for server and client, and another authority."""
    folder = tmp_path_factory.mktemp("milvus-papers")
    for name in ("ours", "theirs"):
        authority(folder, name)
    certificate(folder, "server", "ours")
    certificate(folder, "client", "ours")
    return folder


@pytest.fixture(scope="module", params=["one-way", "mutual"])
def guarded(
    request: pytest.FixtureRequest,
    papers: Path,
    tmp_path_factory: pytest.TempPathFactory,
    milvus_server: MilvusServer,
) -> Iterator[Settings]:
    """How to ask a server that wants TLS and a token."""
    place = tmp_path_factory.mktemp("guarded-milvus")
    access = Settings(milvus_token=ROOT_TOKEN, milvus_ca=str(papers / "ours.pem"))
    root = None
    if request.param == "mutual":
        root = papers / "ours.pem"
        access = access.override(
            milvus_cert=str(papers / "client.pem"), milvus_key=str(papers / "client.key")
        )
    tls = Tls(papers / "server.pem", papers / "server.key", root)
    with (
        (place / "log").open("w") as log,
        start_milvus(place / "data", log=log, tls=tls, access=access) as server,
    ):
        yield access.override(milvus=server.uri)


def test_who_has_the_papers_is_served(guarded: Settings) -> None:
    with Catalog(guarded) as catalog:
        assert catalog.find() is None


@pytest.mark.parametrize(("token", "said"), [("root:wrong", "auth check failure"), ("", "missing")])
def test_a_wrong_token_is_said_and_is_no_outage(guarded: Settings, token: str, said: str) -> None:
    """So nobody tries again for a minute."""
    with (
        Catalog(guarded.override(milvus_token=token)) as catalog,
        pytest.raises(CatalogError, match=rf"{said}.*give `user:password`") as refused,
    ):
        catalog.find()
    assert not isinstance(refused.value, CatalogUnavailable)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"milvus_ca": "theirs.pem"}, "CERTIFICATE_VERIFY_FAILED"),
        ({"milvus_name": "elsewhere"}, "Hostname Verification Check failed"),
    ],
)
def test_a_server_we_do_not_trust_gets_no_token(
    guarded: Settings, papers: Path, change: dict[str, str], said: str
) -> None:
    """Though another client of this process has talked to it before."""
    change = {k: str(papers / v) if v.endswith(".pem") else v for k, v in change.items()}
    with Catalog(guarded) as trusting, Catalog(guarded.override(**change)) as catalog:
        assert trusting.find() is None
        with pytest.raises(CatalogUnavailable, match=said):
            catalog.find()


def test_a_server_that_asks_for_a_certificate_refuses_who_has_none(guarded: Settings) -> None:
    with Catalog(guarded.override(milvus_cert="", milvus_key="")) as catalog:
        if guarded.milvus_cert:
            with pytest.raises(CatalogUnavailable):
                catalog.find()
        else:
            assert catalog.find() is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"milvus_cert": "client.pem", "milvus_key": "client.key"}, "expected milvus_ca beside"),
        ({"milvus_ca": "ours.pem", "milvus_cert": "client.pem"}, "expected both or neither"),
        ({"milvus_ca": "missing.pem"}, r"milvus_ca: .*missing\.pem: no file there"),
    ],
)
def test_settings_that_cannot_work_say_so(papers: Path, names: dict[str, str], said: str) -> None:
    paths = {name: str(papers / file) for name, file in names.items()}
    with pytest.raises(RetrievalError, match=said):
        tls_arguments(Settings().override(**paths))
