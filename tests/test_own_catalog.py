"""Training and evaluation on a catalog of one's own: whatever it holds or lacks."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_contract.errors import CheckpointError, SourceError
from tests.conftest import ROOT
from tests.judged import write_judged_catalog
from tests.tiny import tiny_make
from towers.checkpoint import SHIPPED, TRAINING_FILE, file_hash, load_towers
from towers.evaluate import asked_about, evaluate
from towers.evaluate import parser as evaluate_parser
from towers.evaluate import run as run_evaluation
from towers.learning.catalog import ProductData, read_data
from towers.learning.split import sides_of
from towers.learning.systems import systems_of
from towers.learning.trained import new_rows, save_trained_on
from towers.learning.views import no_image
from towers.train import parser, query_layers, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judged_catalog(tmp_path_factory.mktemp("own"))


def catalog(folder: Path, count: int, **columns: Callable[[int], object]) -> Path:
    """Only products.parquet; each column from the row's number."""
    rows = {name: [value(at) for at in range(count)] for name, value in columns.items()}
    pq.write_table(
        pa.table({"id": [str(at) for at in range(count)], **rows}), folder / "products.parquet"
    )
    return folder


def train(data: Path, start: Path, out: Path, *more: str) -> dict[str, object]:
    flags = ["--data", str(data), "--start", str(start), "--out", str(out / "towers")]
    flags += ["--work", str(out / "work"), "--epochs", "2", "--general-texts", "50", *more]
    return run(parser().parse_args(flags))


# ── training ─────────────────────────────────────────────────────────────────────────────
RED = ("Красный", "Синий", "Белый")
OWN = {
    "another script": {
        "title": lambda at: f"{RED[at % 3]} товар {at}",
        "kind": lambda at: ("Рубашки", "Платья")[at % 2],
        "colour": lambda at: RED[at % 3],
        "who": lambda at: ("Мужчины", "Женщины", "-")[at % 3],
    },
    "no attributes": {"title": lambda at: f"thing no {at} of steel"},
    "no titles": {"title": lambda at: "", "colour": lambda at: ("red", "blue")[at % 2]},
    "numbers asked for": {"title": lambda at: f"thing {at}", "size": lambda at: 36 + at % 8},
}
"""Columns of products, by what is unusual about them."""


@pytest.mark.parametrize("what", OWN)
def test_any_catalog_can_be_trained_on(what: str, start: Path, tmp_path: Path) -> None:
    chosen = ["--attribute", "size"] if what == "numbers asked for" else []
    facts = train(catalog(tmp_path, 60, **OWN[what]), start, tmp_path, *chosen)
    asked = [name for name in OWN[what] if name != "title"]
    assert facts["attributes"] == asked
    assert load_towers(str(tmp_path / "towers")).release().release_id == facts["release"]


def test_no_other_subject_is_a_choice(folder: Path, start: Path, tmp_path: Path) -> None:
    facts = train(
        folder, start, tmp_path, "--general-texts", "0", "--query-layers", "1", "--everything"
    )
    assert facts["lesson"]
    assert (facts["side"], facts["products"]) == ("all", 360), "the groups held out as well"


def test_bad_command_lines_are_told(
    folder: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        SourceError, match=r"expected columns \['size'\], got \['id', 'title', 'gen"
    ):
        train(folder, start, tmp_path, "--attribute", "size")
    args = parser().parse_args(["--data", "x", "--out", "y", "--query-layers", "9"])
    with pytest.raises(CheckpointError, match="--query-layers 9: expected 1 to 2"):
        query_layers(args, tiny_make())
    with pytest.raises(CheckpointError, match="--query-layers 9: expected 1 to 2"):
        train(tmp_path / "nowhere", start, tmp_path, "--query-layers", "9")  # before anything else
    for nothing in ("--epochs", "--rounds"):
        with pytest.raises(SystemExit):
            train(folder, start, tmp_path, nothing, "0")
        assert f"{nothing}: expected a whole number from 1, got 0" in capsys.readouterr().err
    silent = catalog(tmp_path, 30, title=lambda at: "")
    with pytest.raises(SourceError, match="expected products with a title or an attribute"):
        train(silent, start, tmp_path)
    command = [sys.executable, "-m", "towers.train", "--data", str(tmp_path / "nowhere")]
    command += ["--start", str(start), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "products.parquet: not found" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_documented_commands(folder: Path, tmp_path: Path) -> None:
    """From the shipped checkpoint, on another catalog: then it searches that one better."""
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    lines = re.findall(r"^\$ \.venv/bin/python (.*)$", text, re.MULTILINE)[:2]
    reports = []
    for line in lines:
        words = line.replace("my_catalog", str(folder)).replace("build/my_towers", str(tmp_path))
        few = ["--work", str(tmp_path / "work"), "--general-texts", "300", "--epochs", "8"]
        flags = few if "towers.train" in line else ["--out", str(tmp_path / "page")]
        done = subprocess.run(
            [sys.executable, *shlex.split(words), *flags], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    training, evaluation = reports[0], reports[1][str(folder)]
    assert training["recipe"]["epochs"] == 8
    data = read_data(folder)
    data = data.select(sides_of(data)["test"])
    shipped = load_towers(str(SHIPPED))
    (before,) = evaluate(data, [systems_of(shipped, {})[-1]], ["uneven"]).values()
    after = evaluation["make"]["uneven"]
    assert after["queries"] == len(before["uneven"]["ndcg@10"])
    assert after["ndcg@10"] > before["uneven"]["ndcg@10"].mean() + 0.05


# ── what was trained on ──────────────────────────────────────────────────────────────────
def test_products_that_were_trained_on_are_known_in_another_file(
    folder: Path, tmp_path: Path
) -> None:
    """By title or picture, whatever their ids and rows are by now; of the start as well."""
    data, texts = read_data(folder), no_image(read_data(folder))
    for at, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        rows = [*range(100 * at, 100 * at + 100)]
        save_trained_on(texts.select(rows), tmp_path / name, str(tmp_path / "first"))
    assert new_rows(texts, [tmp_path / "second"]) == [*range(200, 360)]
    assert new_rows(texts, [tmp_path / "first"]) == [*range(100, 360)]
    assert new_rows(texts, [tmp_path]) == [*range(360)], "nothing is known"
    save_trained_on(data.select([7]), tmp_path, None)
    renamed = ProductData("", data.ids[::-1], ["x"] * 360, {}, data.images, [])
    alike = [row for row, image in enumerate(data.images) if image == data.images[7]]
    assert new_rows(renamed, [tmp_path]) == sorted({*range(360)} - {*alike})


def test_a_grown_catalog_is_asked_about_where_it_is_new(folder: Path, tmp_path: Path) -> None:
    data = read_data(folder)
    save_trained_on(no_image(data.select([*range(0, 360, 2)])), tmp_path, None)
    assert asked_about(folder, None, [tmp_path]).ids == data.ids[1::2]
    assert len(asked_about(folder, "all", [tmp_path])) == 360
    save_trained_on(data, tmp_path, None)
    with pytest.raises(SourceError, match="side new that were not trained on, found none; --side"):
        asked_about(folder, None, [tmp_path])


def test_a_start_that_was_trained_on_everything_leaves_nothing_held_out(
    folder: Path, tmp_path: Path
) -> None:
    """The second says that it was trained on one side; with its start it has seen them all."""
    data = read_data(folder)
    (tmp_path / "first").mkdir()
    sides = {name: [data.ids[row] for row in rows] for name, rows in sides_of(data).items()}
    facts = {"products_sha256": file_hash(folder / "products.parquet"), "side": "train"}
    (tmp_path / TRAINING_FILE).write_text(json.dumps(facts))
    save_trained_on(data.select(sides_of(data)["train"]), tmp_path, None)
    assert asked_about(folder, None, [tmp_path]).ids == sides["test"]
    assert asked_about(folder, "dev", [tmp_path]).ids == sides["dev"]
    save_trained_on(data, tmp_path / "first", None)
    save_trained_on(data.select(sides_of(data)["train"]), tmp_path, str(tmp_path / "first"))
    for asked in (None, "dev", "test"):
        with pytest.raises(SourceError, match=r"that were not trained on, found none; --side all"):
            asked_about(folder, asked, [tmp_path])
    assert asked_about(folder, "train", [tmp_path]).ids == sides["train"]


def test_every_folder_is_looked_at_before_the_first_is_evaluated(
    folder: Path, tmp_path: Path
) -> None:
    bare = catalog(tmp_path, 9, title=lambda at: f"thing {at}")
    args = evaluate_parser().parse_args(["--data", str(folder), "--data", str(bare)])
    with pytest.raises(
        SourceError, match=r"expected queries\.csv with judgements, found none; add"
    ):
        run_evaluation(args)


# ── data folders ─────────────────────────────────────────────────────────────────────────
def judged(folder: Path, queries: str | bytes, **files: str) -> list[dict[str, int]]:
    """Grades by query of three products a, b, c."""
    products = pa.table({"id": ["a", "b", "c"], "title": ["x", "y", "z"]})
    pq.write_table(products, folder / "products.parquet")
    (folder / "queries.csv").write_bytes(queries.encode() if isinstance(queries, str) else queries)
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text)
    return [query.grades for query in read_data(folder).queries]


QRELS = "query_id,id,rel\n1,a,1\n"
UNUSABLE = {
    "query_id,id,rel\n1,a,nan\n": r"row 2: expected a number as rel, got 'nan'",
    "query_id,id,rel\n1,a,inf\n": r"row 2: expected a number as rel, got 'inf'",
    "query_id,id,rel\n1,a,40\n": r"each rel at most 10 above irrelevant, got 40; map them to few",
    "query_id,id,rel\n1,a,0.5\n1,b,1\n": r"whole grades, got 0\.5 of at most 1 .*; multiply them",
}
"""Judgements, and what is said of them."""


def test_a_spreadsheets_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    with_mark = "\ufeffquery_id,query\n1,x\n"
    assert judged(tmp_path, with_mark, qrels="query_id,id,rel\n1,a,1\n1,gone,1\n") == [{"a": 1}]


@pytest.mark.parametrize(
    ("queries", "files", "said"),
    [
        ("id,text\n1,x\n", {}, r"qrels\.csv or labels\.csv"),
        ("id,text\n1,x\n", {"qrels": "query_id,id,rel\n1,a,1\n"}, r"queries\.csv: .*'query_id'"),
        ("query_id,query\n1,x\n", {"qrels": "query_id,id\n1,a\n"}, r"qrels\.csv: .*'rel'.*'id'"),
        ("query_id,query\n1,x\n", {"labels": "query_id,x\n1,a\n"}, r"labels\.csv: .*'product_id'"),
        (
            "query_id,query\n1,x\n",
            {"qrels": "query_id,id,rel\n1,a,\n"},
            r"row 2: .* as rel, got ''",
        ),
        ("query_id,query\n1,x\n", {"qrels": "query_id,id,rel\n1,q,1\n"}, "got none of them"),
        ("query_id,query\n1,x\n", {"labels": "query_id,id,grade\n1,a,3\n"}, r"every grade is 3\.0"),
        *[("query_id,query\n1,x\n", {"qrels": rows}, said) for rows, said in UNUSABLE.items()],
        ("query_id,query\n1\n", {"qrels": QRELS}, r"queries\.csv, row 2: .*a text as query, got N"),
        ("query_id,query\n1,x\n1,y\n", {"qrels": QRELS}, "every query_id once, got '1' in 2 rows"),
        (b"query_id,query\n1,caf\xe9\n", {"qrels": "query_id,id,rel\n1,a,1\n"}, "CSV in UTF-8"),
    ],
)
def test_judgements_that_cannot_be_read_are_told(
    tmp_path: Path, queries: str | bytes, files: dict[str, str], said: str
) -> None:
    with pytest.raises(SourceError, match=said):
        judged(tmp_path, queries, **files)


def test_pictures_may_lie_beside_the_titles(folder: Path, tmp_path: Path) -> None:
    data = read_data(folder)
    columns = {"id": data.ids, "title": data.titles}
    pq.write_table(pa.table({**columns, "jpeg": data.images}), tmp_path / "products.parquet")
    assert read_data(tmp_path).images == data.images
    pq.write_table(pa.table({**columns, "image": data.ids}), tmp_path / "products.parquet")
    with pytest.raises(SourceError, match="pictures: expected the files themselves as binary"):
        read_data(tmp_path)


def test_products_that_cannot_be_told_apart_or_read_are_told(folder: Path, tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"id": ["a", "b", "a"], "title": ["x"] * 3}), tmp_path / "products.parquet"
    )
    with pytest.raises(SourceError, match="expected every id once, got 'a' in 2 rows; keep one"):
        read_data(tmp_path)
    whole = (folder / "products.parquet").read_bytes()
    (tmp_path / "products.parquet").write_bytes(whole[:-9])
    with pytest.raises(SourceError, match=r"products\.parquet: expected a Parquet file, got "):
        read_data(tmp_path)


def test_what_is_no_number_is_no_title(tmp_path: Path) -> None:
    values = {"title": lambda at: (math.nan, 7.5, None)[at]}
    assert read_data(catalog(tmp_path, 3, **values)).titles == ["", "7.5", ""]


def test_attributes_of_a_small_catalog_are_seen(tmp_path: Path) -> None:
    kinds = {"title": lambda at: f"thing {at}", "colour": lambda at: f"colour {at % 12}"}
    small = catalog(tmp_path, 200, **kinds, code=lambda at: f"code {at // 2}")
    assert list(read_data(small).attributes) == ["colour"]
    assert list(read_data(small, ["code"]).attributes) == ["colour", "code"]
