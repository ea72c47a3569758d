"""TLS in both directions, controls that are closed, on the real server."""

from __future__ import annotations

import io
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from deploy.security import CONTROLS, Tls, check_dates, control_flags, new_key, read_key
from deploy.server import LOOPBACK, Server, http_host_of, triton
from retrieval_client import Encoder, RetrievalError, Settings
from retrieval_client.channel import channel_to
from retrieval_client.patience import Patient
from retrieval_contract.errors import AccessDenied, DeployError, ServerUnavailable
from tests.certificates import authority, certificate

KEY = "a-key-of-the-test"
AWAY = "127.0.0.2"


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of our authority for server and client, and a stranger's."""
    assert shutil.which("openssl"), "the certificates of this test are made by openssl"
    folder = tmp_path_factory.mktemp("papers")
    for name in ("ours", "theirs"):
        authority(folder, name)
    certificate(folder, "server", "ours")
    certificate(folder, "client", "ours")
    certificate(folder, "stranger", "theirs")
    certificate(folder, "expired", "ours", days=-1)
    certificate(folder, "elsewhere", "ours", names="DNS:elsewhere")
    (folder / "none.pem").write_text("no certificate")
    return folder


@pytest.fixture(scope="module")
def guarded(
    release_folder: Path, papers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that asks callers for a certificate, and for a key before it is controlled.

    At another address than loopback's usual one, as a server for other machines is.
    """
    log = tmp_path_factory.mktemp("guarded") / "log"
    tls = Tls(papers / "server.pem", papers / "server.key", papers / "ours.pem")
    with (
        log.open("w") as lines,
        triton(release_folder, host=AWAY, log=lines, tls=tls, control_key=KEY) as server,
    ):
        yield server
    assert KEY not in log.read_text()


def test_what_has_no_tls_is_not_where_callers_from_elsewhere_are(guarded: Server) -> None:
    ports = (guarded.ports.grpc, guarded.ports.http, guarded.ports.metrics)
    socket.create_connection((AWAY, ports[0]), timeout=5).close()
    for port in ports[1:]:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((AWAY, port), timeout=5)
        socket.create_connection((LOOPBACK, port), timeout=5).close()
    assert http_host_of(AWAY, None) == http_host_of(LOOPBACK, None, AWAY) == AWAY


def settings(server: Server, papers: Path, **names: str) -> Settings:
    paths = {name: str(papers / file) for name, file in names.items()}
    return Settings(triton=server.grpc_address, timeout_s=3.0).override(**paths)


def test_who_shows_a_certificate_is_served(guarded: Server, papers: Path) -> None:
    ours = settings(guarded, papers, tls_ca="ours.pem", tls_cert="client.pem", tls_key="client.key")
    with Encoder(ours) as encoder:
        assert encoder.encode_queries(["red shoes"]).errors == [None]


def test_replicas_are_asked_by_their_common_name(guarded: Server, papers: Path) -> None:
    """Two spellings of one server's address; the certificate does not name the second."""
    paths = {"tls_ca": "ours.pem", "tls_cert": "client.pem", "tls_key": "client.key"}
    twice = f"{guarded.grpc_address},127.2:{guarded.ports.grpc}"
    both = settings(guarded, papers, **paths).override(triton=twice)
    with Encoder(both.override(tls_name="127.0.0.1")) as encoder:
        for _ in range(4):
            assert encoder.encode_queries(["red shoes"]).errors == [None]
    with Encoder(both.override(tls_name="elsewhere")) as stranger, pytest.raises(ServerUnavailable):
        stranger.served()


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"tls_ca": "ours.pem"},
        {"tls_ca": "ours.pem", "tls_cert": "stranger.pem", "tls_key": "stranger.key"},
        {"tls_ca": "theirs.pem", "tls_cert": "client.pem", "tls_key": "client.key"},
    ],
    ids=["in the clear", "no certificate", "a stranger's", "a server we do not trust"],
)
def test_nobody_else_is(guarded: Server, papers: Path, names: dict[str, str]) -> None:
    with Encoder(settings(guarded, papers, **names)) as encoder, pytest.raises(ServerUnavailable):
        encoder.served()


@contextmanager
def answering(papers: Path, name: str, mutual: bool) -> Iterator[str]:
    """Where something listens that has this certificate, or none and speaks in the clear."""
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        if name:
            key, chain = ((papers / f"{name}.{kind}").read_bytes() for kind in ("key", "pem"))
            root = (papers / "ours.pem").read_bytes() if mutual else None
            shown = grpc.ssl_server_credentials([(key, chain)], root, mutual)
            port = server.add_secure_port(f"{LOOPBACK}:0", shown)
        else:
            port = server.add_insecure_port(f"{LOOPBACK}:0")
        server.start()
        try:
            yield f"{LOOPBACK}:{port}"
        finally:
            server.stop(0)


@pytest.mark.parametrize(
    ("server", "ca"),
    [
        ("expired", "ours.pem"),
        ("elsewhere", "ours.pem"),
        ("server", "theirs.pem"),
        ("server", "none.pem"),
        ("", "ours.pem"),
    ],
    ids=["expired", "another name", "another authority", "no PEM", "in the clear"],
)
def test_what_tls_forbids_is_said_and_not_waited_for(papers: Path, server: str, ca: str) -> None:
    start = time.monotonic()
    with answering(papers, server, mutual=False) as address:
        ours = Settings(triton=address, tls_ca=str(papers / ca), timeout_s=3.0)
        with (
            Encoder(ours) as encoder,
            pytest.raises(AccessDenied, match="see tls_ca, tls_name and the server's certificate"),
        ):
            Patient(30.0)(encoder.served)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("ca", ["", "ours.pem"], ids=["in the clear", "no certificate"])
def test_who_is_hung_up_on_is_told_of_tls(papers: Path, ca: str) -> None:
    """It may be a server that is starting, too: that is waited for."""
    with answering(papers, "server", mutual=bool(ca)) as address:
        ours = Settings(triton=address, tls_ca=ca and str(papers / ca), timeout_s=3.0)
        with (
            Encoder(ours) as encoder,
            pytest.raises(ServerUnavailable, match=r"may expect TLS \(tls_ca\)"),
        ):
            encoder.served()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"tls_cert": "client.pem", "tls_key": "client.key"}, "expected tls_ca beside them"),
        ({"tls_ca": "ours.pem", "tls_cert": "client.pem"}, "expected both or neither"),
        ({"tls_ca": "missing.pem"}, r"tls_ca: .*missing\.pem: No such file"),
    ],
)
def test_settings_that_cannot_work_say_so(papers: Path, names: dict[str, str], said: str) -> None:
    paths = {name: str(papers / file) for name, file in names.items()}
    with pytest.raises(RetrievalError, match=said):
        channel_to(Settings(**paths))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "milvus",
    ["http://root:Milvus@db:19530", "https://root:a/b@db/my.db", "root:Milvus@db:19530"],
)
def test_no_secret_is_said(milvus: str) -> None:
    """An address is printed, and so are settings."""
    token = "root:Milvus"
    assert token not in repr(Settings(milvus="http://db:19530", milvus_token=token))
    with pytest.raises(RetrievalError, match="RETRIEVAL_MILVUS_TOKEN") as said:
        Settings().override(milvus=milvus)
    assert "root" not in str(said.value)
    assert Settings(milvus="build/catalog@home.db").milvus


def controls(channel: grpc.Channel, key: str | None) -> list[str]:
    """What each control answers: its status code, OK where it does as asked."""
    stub = GRPCInferenceServiceStub(channel)
    calls = [
        (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="nothing")),
        (stub.SystemSharedMemoryStatus, pb.SystemSharedMemoryStatusRequest()),
        (stub.TraceSetting, pb.TraceSettingRequest()),
        (stub.LogSettings, pb.LogSettingsRequest()),
    ]
    said = []
    for call, request in calls:
        try:
            metadata = [("triton-grpc-protocol-control", key)] if key else []
            call(request, metadata=metadata, timeout=5)
            said.append("OK")
        except grpc.RpcError as exc:
            said.append("closed" if "restricted" in exc.details() else exc.code().name)
    return said


def test_controls_are_closed_by_default(triton: Server) -> None:
    with channel_to(Settings(triton=triton.grpc_address)) as channel:
        assert controls(channel, None) == ["closed"] * len(CONTROLS)
        assert controls(channel, "guessed") == ["closed"] * len(CONTROLS)


def test_a_key_opens_them(guarded: Server, papers: Path) -> None:
    ours = settings(guarded, papers, tls_ca="ours.pem", tls_cert="client.pem", tls_key="client.key")
    with channel_to(ours) as channel:
        assert controls(channel, None) == ["closed"] * len(CONTROLS)
        assert controls(channel, KEY) == ["OK"] * len(CONTROLS)


def test_each_start_has_a_key_of_its_own(tmp_path: Path) -> None:
    assert new_key() != new_key()
    file = tmp_path / "key"
    with pytest.raises(DeployError, match="give a file that holds the key"):
        read_key(file)
    file.write_text("\n")
    with pytest.raises(DeployError, match="expected one word"):
        read_key(file)
    file.write_text(f"{KEY}\n")
    assert read_key(file) == KEY
    assert all(flag.endswith(f":control={KEY}") for flag in control_flags(KEY))


def test_a_certificate_that_has_expired_does_not_start(papers: Path, tmp_path: Path) -> None:
    """And one that soon will is said."""
    log = io.StringIO()
    for name, days in (("lasting", 30), ("of_the_next_century", 40_000)):
        certificate(papers, name, "ours", days=days)
        check_dates(papers / f"{name}.pem", log)
    assert not log.getvalue()
    check_dates(papers / "server.pem", log)
    (line,) = log.getvalue().splitlines()
    in_two_days = datetime.now(UTC) + timedelta(days=2)
    assert f"server.pem: expires at {in_two_days:%Y-%m-%d}" in line
    (tmp_path / "chain.pem").write_text(
        (papers / "lasting.pem").read_text() + (papers / "expired.pem").read_text()
    )
    yesterday = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
    with pytest.raises(DeployError, match=rf"chain\.pem: expired at {yesterday} \d\d:\d\d UTC"):
        check_dates(tmp_path / "chain.pem", log)
    with pytest.raises(DeployError, match=r"none\.pem: .*; give certificates in PEM"):
        check_dates(papers / "none.pem", log)
    with pytest.raises(DeployError, match=r"expired\.pem: expired"):
        Tls(papers / "expired.pem", papers / "expired.key").flags(log)


def test_certificates_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"missing\.pem: not found"):
        Tls(tmp_path / "missing.pem", tmp_path / "k").flags(io.StringIO())
