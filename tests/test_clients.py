"""Push, search, status, delete on the real server and Milvus Lite: as a library, as a command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deploy.server import triton
from retrieval_client import Catalog, Encoder, Encoders, ProductSearch, RetrievalError, Settings
from retrieval_client.collection import Ask
from retrieval_client.push import Push, PushReport
from retrieval_client.sources import Source, SourceRow
from retrieval_contract.errors import (
    CatalogUnavailable,
    ContractError,
    DeadlineExceeded,
    ItemError,
    ReleaseMismatch,
    ServerUnavailable,
)
from retrieval_contract.release import Release
from tests.conftest import ROOT, photo

TITLES = [
    "red cotton dress for women",
    "navy blue formal shirt for men",
    "steel kitchen knife",
    "white running shoes",
    "brown leather wallet",
    "green garden hose",
    "wireless mouse",
    "blue denim jeans",
]


def good_rows(count: int = len(TITLES)) -> list[SourceRow]:
    return [
        SourceRow(f"p{i}", TITLES[i % len(TITLES)].encode(), photo((i, 90, 200)), {"price": i})
        for i in range(count)
    ]


def push(settings: Settings, rows: list[SourceRow]) -> PushReport:
    with Encoders(settings) as encoders, Catalog(settings) as catalog:
        return Push(settings, encoders, catalog).run(rows)


def test_settings_come_from_flags_over_environment_over_defaults() -> None:
    environ = {"RETRIEVAL_TRITON": "a:1", "RETRIEVAL_TIMEOUT_S": "2.5", "OTHER": "x"}
    settings = Settings.from_env(environ)
    assert (settings.triton, settings.timeout_s) == ("a:1", 2.5)
    assert settings.override(triton="b:2", timeout_s=None).triton == "b:2"
    with pytest.raises(RetrievalError, match="RETRIEVAL_TIMEOUT_S: expected a float, got 'soon'"):
        Settings.from_env({"RETRIEVAL_TIMEOUT_S": "soon"})
    for value in ("0", "-1", "nan", "inf"):
        with pytest.raises(RetrievalError, match="timeout_s"):
            Settings.from_env({"RETRIEVAL_TIMEOUT_S": value})


def test_pushed_products_are_found_by_their_words(settings: Settings) -> None:
    report = push(settings, good_rows())
    assert (report.read, report.stored, report.rejects) == (8, 8, [])
    with ProductSearch(settings) as search:
        hits = search("navy blue shirt", limit=3, thumbnails=True)
        assert hits[0].title == "navy blue formal shirt for men"
        assert hits[0].attributes == {"price": 1}
        assert hits[0].thumbnail.startswith(b"\xff\xd8"), "a JPEG to show"
        assert hits == sorted(hits, key=lambda h: -h.score)
        knife, nothing, wallet = search.many(["kitchen knife", "", "wallet"], limit=1)
    assert isinstance(nothing, ItemError), "one bad query does not cost the others"
    assert [hits[0].id for hits in (knife, wallet)] == ["p2", "p4"]


def test_pushing_twice_changes_nothing_and_changes_are_seen(settings: Settings) -> None:
    push(settings, good_rows())
    again = push(settings, good_rows())
    assert (again.stored, again.unchanged) == (0, 8)
    changed = good_rows()
    changed[2] = SourceRow("p2", b"purple umbrella", changed[2].image, {"price": 2})
    changed[3] = SourceRow("p3", changed[3].title, photo((1, 2, 3)), {"price": 3})
    changed[4] = SourceRow("p4", changed[4].title, changed[4].image, {"price": 99})
    report = push(settings, changed)
    assert (report.stored, report.unchanged) == (3, 5)
    with ProductSearch(settings) as search:
        assert search("purple umbrella", limit=1)[0].id == "p2"
        assert search.catalog.serving().count() == 8


def test_bad_rows_are_set_aside_by_id_and_the_rest_goes_in(settings: Settings) -> None:
    bad = [
        SourceRow("empty"),
        SourceRow("broken", b"red dress", photo()[:200]),
        SourceRow("gif", b"red dress", photo(format="GIF")),
        SourceRow("latin1", b"caf\xe9"),
        SourceRow("endless", b"x" * 5000),
        SourceRow("longish", b"word " * 500),
        SourceRow("p1", b"second of this id"),
        SourceRow("", b"no id", number=28),
        SourceRow("again", b"\xff"),
        SourceRow("again", b"a good row after a bad one of its id"),
        SourceRow("nan", b"red dress", attributes={"price": float("nan")}),
        SourceRow("heavy", b"red dress", attributes={"text": "x" * 70_000}),
    ]
    rows = good_rows(40)
    rows[20:20] = bad
    report = push(settings, rows)
    assert {r.id: r.code for r in report.rejects} == {
        "empty": "nothing_to_encode",
        "broken": "image_broken",
        "gif": "image_format",
        "latin1": "not_utf8",
        "endless": "too_long",
        "longish": "too_long",
        "p1": "duplicate_id",
        "row 28": "bad_id",
        "again": "not_utf8",
        "nan": "bad_attributes",
        "heavy": "bad_attributes",
    }
    assert (report.read, report.stored, report.settled) == (52, 41, 52)
    stored = {"p1", "again"}
    with Catalog(settings) as catalog:
        assert catalog.serving().count() == 41
        ids = [row.id for row in bad if row.id]
        assert set(catalog.serving().of_ids(ids, [])) == stored


def test_missing_title_or_missing_picture_is_served(settings: Settings) -> None:
    rows = [SourceRow("title", b"red dress"), SourceRow("picture", image=photo())]
    assert push(settings, rows).stored == 2


def test_stored_vectors_are_the_encoders(settings: Settings, encoder: Encoder) -> None:
    push(settings, good_rows())
    expected = encoder.encode_products([TITLES[3]], [photo((3, 90, 200))]).vector(0)
    with Catalog(settings) as catalog:
        ((hit,),) = catalog.serving().search(expected[None], Ask(1))
    assert hit.id == "p3"
    assert hit.score == pytest.approx(1.0, abs=1e-5)


def test_a_bad_query_is_an_item_error(settings: Settings) -> None:
    push(settings, good_rows())
    with ProductSearch(settings) as search:
        with pytest.raises(ItemError, match="empty: expected some text"):
            search("  ")
        assert search("red dress", limit=1), "the connection is as good as before"


def test_one_deadline_covers_encode_and_search(settings: Settings) -> None:
    push(settings, good_rows())
    with ProductSearch(settings) as search:
        search("warm up")
        with pytest.raises(DeadlineExceeded):
            search("red dress", timeout_s=1e-4)
        assert search("red dress", limit=1), "the connection is as good as before"


def test_ctrl_c_does_not_wait_for_servers_that_are_away(
    settings: Settings, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **more: object) -> None:
        raise ServerUnavailable("away")

    def interrupted():
        yield from good_rows(64)
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "encode_products", away)
    started = time.monotonic()
    with Encoders(settings) as encoders, pytest.raises(KeyboardInterrupt):
        Push(settings.override(retry_s=60.0), encoders, catalog).run(interrupted())
    assert time.monotonic() - started < 10


def test_more_rows_than_one_request_holds(encoder: Encoder) -> None:
    queries = [f"product number {i}" for i in range(300)]
    encoded = encoder.encode_queries(queries)
    assert encoded.vectors.shape == (300, encoded.served.vector_dim)
    assert np.allclose(
        encoded.vectors[299], encoder.encode_queries(queries[299:]).vectors[0], atol=1e-5
    )
    assert encoder.encode_queries([]).vectors.shape == (0, encoded.served.vector_dim)


def test_titles_and_images_come_in_pairs(encoder: Encoder) -> None:
    with pytest.raises(ContractError, match="got 2 titles and 1 images"):
        encoder.encode_products(["a", "b"], [b""])


def test_a_server_that_is_down_stops_a_push_and_loses_nothing(
    settings: Settings, release: Release
) -> None:
    push(settings, good_rows())
    away = settings.override(triton="127.0.0.1:1", retry_s=0.5)
    with pytest.raises(ServerUnavailable, match="start it with `make serve`"):
        push(away, good_rows(16))
    with Catalog(settings) as catalog:
        assert catalog.serving().count() == 8
    milvus_away = settings.override(milvus="http://127.0.0.1:1", retry_s=0.5)
    with pytest.raises(CatalogUnavailable):
        push(milvus_away, good_rows())


def test_a_server_that_comes_back_is_waited_for(
    release_folder: Path, settings: Settings, tmp_path: Path
) -> None:
    """Triton is restarted in the middle of a push; the push goes on and every row arrives."""
    log = (tmp_path / "log").open("w")
    with triton(release_folder, log=log) as server:
        ports = server.ports
        patient = settings.override(triton=server.grpc_address, retry_s=60.0)
        rows = iter(good_rows(240))
        with Encoders(patient) as encoders, Catalog(patient) as catalog:
            encoders.served()

            def interrupted():
                for number, row in enumerate(rows):
                    if number == 200:
                        server.process.kill()
                        server.process.wait()
                        restart.enter_context(triton(release_folder, ports=ports, log=log))
                    yield row

            from contextlib import ExitStack

            with ExitStack() as restart:
                report = Push(patient, encoders, catalog).run(interrupted())
                assert (report.stored, report.rejects) == (240, [])
                assert catalog.serving().count() == 240


def test_a_catalog_of_another_release_is_refused(settings: Settings, release: Release) -> None:
    with Catalog(settings) as catalog:
        catalog.prepare("feedfacefeedface", release.vector_dim)
    mismatch = pytest.raises(ReleaseMismatch, match=r"feedfacefeedface .* Triton at .* serves")
    with ProductSearch(settings) as search, mismatch:
        search("red dress")
    with pytest.raises(ReleaseMismatch):
        push(settings, good_rows())


def test_the_raw_wire_example_works(settings: Settings) -> None:
    script = [sys.executable, ROOT / "clients" / "raw_grpc.py", settings.triton]
    good = subprocess.run([*script, "navy blue shirt"], capture_output=True, text=True)
    assert "384 numbers" in good.stdout, good.stderr
    bad = subprocess.run([*script, " "], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr.strip().split(":")[0]) == (1, "empty")


# ── the command ──────────────────────────────────────────────────────────────────────────


def retrieval(settings: Settings, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retrieval_client", *args]
    where = ["--triton", settings.triton, "--milvus", settings.milvus]
    return subprocess.run([*command, *where], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_the_command_as_a_new_user_types_it(settings: Settings, tmp_path: Path) -> None:
    pictures = {"jpeg": [photo((i, 0, 0)) for i in range(8)]}
    table = pa.table({"id": list(range(8)), "title": TITLES, **pictures})
    pq.write_table(table, tmp_path / "products.parquet")
    done = retrieval(settings, "push", "products.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 refused; the catalog holds 8" in done.stderr

    done = retrieval(settings, "search", "navy blue shirt", "--image-out", "out.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "navy blue formal shirt for men" in done.stdout
    assert Image.open(tmp_path / "out.png").width > 500

    done = retrieval(settings, "search", "[red] dress", "", "--json", cwd=tmp_path)
    assert done.returncode == 3
    good, bad = json.loads(done.stdout)
    assert good["hits"][0]["id"] == "0"
    assert bad["error"].startswith("empty: ")

    done = retrieval(settings, "status", "--json", cwd=tmp_path)
    status = json.loads(done.stdout)
    assert done.returncode == 0
    assert (status["products"], status["problems"]) == (8, [])
    assert status["serves"] == status["holds"]

    done = retrieval(settings, "delete", "3", "nowhere", "--json", cwd=tmp_path)
    assert done.returncode == 3
    assert json.loads(done.stdout) == {"deleted": ["3"], "unknown": ["nowhere"], "in_catalog": 7}


def test_the_command_reports_refused_rows(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,title\n1,red dress\n1,again\n2,\n3,blue shirt\n")
    done = retrieval(settings, "push", "c.csv", "--json", cwd=tmp_path)
    said = json.loads(done.stdout)
    assert done.returncode == 3
    assert (said["stored"], said["rejected"], said["in_catalog"]) == (2, 2, 2)
    lines = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert {(r["id"], r["code"]) for r in map(json.loads, lines)} == {
        ("1", "duplicate_id"),
        ("2", "nothing_to_encode"),
    }


def test_a_dry_run_says_that_the_run_would_be_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,title\n1,red dress\n2,blue mug\n")
    assert retrieval(settings, "push", "c.csv", cwd=tmp_path).returncode == 0
    (tmp_path / "c.csv").write_text("id,title\n1,red dress\n")
    command = ("push", "c.csv", "--sync", "--dry-run")
    done = retrieval(settings, *command, cwd=tmp_path)
    assert "would be refused without --yes: products_" in done.stderr
    done = retrieval(settings, *command, "--json", cwd=tmp_path)
    (why,) = json.loads(done.stdout)["would_be_refused"]
    assert "expected a source that lacks at most 20% of the 2 rows stored, got one that" in why


def test_an_id_that_no_encoding_takes_is_listed(settings: Settings, tmp_path: Path) -> None:
    lines = [json.dumps({"id": "\ud800", "title": "a"}), json.dumps({"id": "b", "title": "mug"})]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    done = retrieval(settings, "push", "c.jsonl", "--json", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["stored"] == 1
    (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert reject["code"] == "bad_id"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["push", ".", "--rejects", "no/such/folder.jsonl"], "no/such/folder.jsonl"),
        (["push", "nowhere.csv"], "nowhere.csv: not found; expected a .parquet"),
        (["search", "red dress"], "fill it with `retrieval push SOURCE`"),
        (["status"], "no collection 'products' there"),
        (["delete", "1"], "no collection 'products' there"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_errors_are_one_readable_line(
    settings: Settings, tmp_path: Path, args: list[str], said: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(photo())
    done = retrieval(settings, *args, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_a_server_that_is_down_is_one_readable_line(tmp_path: Path) -> None:
    away = Settings(triton="127.0.0.1:1", milvus=str(tmp_path / "c.db"))
    (tmp_path / "one.csv").write_text("id,title\na,red dress\n")
    (tmp_path / "rejects.jsonl").write_text("of the last push")
    assert retrieval(away, "push", "one.csv", "--dry-run", cwd=tmp_path).returncode == 0
    assert (tmp_path / "rejects.jsonl").read_text() == "of the last push", "no push has been since"
    for command in (["push", "one.csv", "--retry-s", "1"], ["status"]):
        done = retrieval(away, *command, cwd=tmp_path)
        assert done.returncode == 1
        assert "start it with `make serve`" in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr


def test_real_products_are_read_and_found(settings: Settings) -> None:
    """The first real products, when the data set is there."""
    from tests.conftest import REAL_CATALOG

    if not REAL_CATALOG.is_dir():
        pytest.skip("left out: no real catalog beside the checkout (fashion_products_small)")
    rows = [row for row, _ in zip(Source(REAL_CATALOG).rows(), range(200), strict=False)]
    report = push(settings, rows)
    assert (report.stored, report.rejects) == (200, [])
    words = rows[17].title.decode()
    with ProductSearch(settings) as search:
        assert words in {hit.title for hit in search(words, limit=10)}
