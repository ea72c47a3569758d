"""Catalog files → rows: every format, and every way in which one row can be bad."""

from __future__ import annotations

import csv
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_client.sources import STDIN, Columns, Source, SourceRow
from retrieval_contract.errors import SourceError
from retrieval_contract.preprocess import MAX_IMAGE_BYTES
from tests.conftest import photo


def rows_of(path: Path, columns: Columns | None = None) -> list[SourceRow]:
    return list(Source(path, columns or Columns()).rows())


def write_parquet(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_with_pictures_and_attributes(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "c.parquet",
        product_id=[1, 2],
        name=["red dress", None],
        jpeg=[photo(), None],
        price=[9.5, float("nan")],
        tags=[["a", "b"], None],
    )
    first, second = rows_of(path)
    assert (first.id, first.title, first.image) == ("1", b"red dress", photo())
    assert first.attributes == {"price": 9.5, "tags": ["a", "b"]}
    assert second == SourceRow("2", number=2)
    assert Source(path).rows_expected == 2


def test_pictures_as_the_datasets_library_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo(format="PNG"))
    pictures = [{"bytes": photo(), "path": None}, {"bytes": None, "path": "a.png"}]
    path = write_parquet(tmp_path / "c.parquet", id=["a", "b"], title=["", ""], image=pictures)
    assert [row.image for row in rows_of(path)] == [photo(), photo(format="PNG")]


def test_csv_with_paths_and_one_bad_row_of_each_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo())
    text = b"id,title,image,price\n"
    text += b'1,"red, dress",a.jpg,9\n2,no picture,,\n3,lost picture,b.jpg,\n'
    text += b'4,caf\xe9,,\n5,too,many,values,here\n6,short\n7,5" pipe,,\n8,two ""\n\n'
    text += b'9,"5"" pipe,\nblue",,\n10,cu'
    path = tmp_path / "c.csv"
    path.write_bytes(text)
    rows = {row.name: row for row in rows_of(path)}
    assert rows["1"].title == b"red, dress"
    assert rows["1"].image == photo()
    assert rows["1"].attributes == {"price": "9"}
    assert rows["2"].image == b""
    assert rows["3"].problem is not None
    assert rows["3"].problem.reason == "image_missing_file"
    assert rows["4"].title == b"caf\xe9", "bytes are kept: the row, not the file, is refused later"
    for name, said in {
        "row 5": "expected 4 values, as the header has, got 5: 5,too,many,",
        "row 6": "got 2: 6,short; quote commas",
        "row 8": 'got 2: 8,two ""',
        "row 10": "got 2: 10,cu",
    }.items():
        problem = rows[name].problem
        assert problem is not None, name
        assert said in problem.detail
    assert rows["7"].title == b'5" pipe'
    assert rows["9"].title == b'5" pipe,\nblue'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('1,"red mug,3\n2,blue mug,4\n', 2),
        ('1,red mug,3\n\n2,"blue" mug,4\n3,white mug,5\n', 4),
        ('1,"a\nb",3\n2,"12"" pipe,4\n3,"white",5\n', 4),
    ],
)
def test_a_stray_quote_swallows_no_rows(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "c.csv"
    path.write_text("id,title,price\n" + text)
    with pytest.raises(SourceError, match=rf"c\.csv: expected quotes in pairs.* line {line} on "):
        rows_of(path)
    with pytest.raises(SourceError):
        list(Source(path).ids())
    path.write_text('id,"title\n' + text)
    with pytest.raises(SourceError, match="line 1 on"):
        rows_of(path)


def test_the_last_line_of_a_csv_needs_no_end(tmp_path: Path) -> None:
    """RFC 4180, 2.2; spreadsheets write such files."""
    path = tmp_path / "c.csv"
    for end in ("\n", "\r\n"):
        path.write_bytes(f"id,title{end}1,red dress{end}2,blue shirt".encode())
        assert [row.title for row in rows_of(path)] == [b"red dress", b"blue shirt"]


def test_json_lines_with_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    lines = ['{"title": "no id"}', '{"id": 7, "title": "mug", "deep": {"a": [1]}}', ""]
    lines += ["{oops", "[1]", '{"id": 8}', '{"\\u0000": 1}', '{"id": "n", "title": "\\ud800"}']
    path.write_text("\n".join(lines))
    rows = rows_of(path)
    assert [row.name for row in rows] == ["row 1", "7", "row 4", "row 5", "8", "row 7", "n"]
    assert (rows[1].title, rows[1].attributes) == (b"mug", {"deep": {"a": [1]}})
    assert [row.problem.reason for row in rows if row.problem] == ["bad_attributes"] * 2
    assert rows[6].title == b"\xed\xa0\x80", "the server says of this row that it is not UTF-8"


def test_a_data_folder_joins_products_and_pictures(tmp_path: Path) -> None:
    write_parquet(tmp_path / "products.parquet", id=[1, 2], title=["a", "b"], colour=["x", "y"])
    write_parquet(tmp_path / "images.parquet", id=[1, 2], jpeg=[photo(), photo((0, 0, 9))])
    rows = rows_of(tmp_path)
    assert [(r.id, r.image, r.attributes) for r in rows] == [
        ("1", photo(), {"colour": "x"}),
        ("2", photo((0, 0, 9)), {"colour": "y"}),
    ]
    assert Source(tmp_path).rows_expected == 2


@pytest.mark.parametrize(
    ("ids", "message"), [([2, 1], "write both in one order"), ([1], "differ in length")]
)
def test_a_data_folder_that_does_not_fit_is_refused(
    tmp_path: Path, ids: list[int], message: str
) -> None:
    write_parquet(tmp_path / "products.parquet", id=[1, 2], title=["a", "b"])
    write_parquet(tmp_path / "images.parquet", id=ids, jpeg=[photo()] * len(ids))
    with pytest.raises(SourceError, match=message):
        rows_of(tmp_path)


def test_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "shoes").mkdir()
    (tmp_path / "shoes" / "red.JPG").write_bytes(photo())
    (tmp_path / "blue.png").write_bytes(photo(format="PNG"))
    (tmp_path / "notes.txt").write_text("not a picture")
    assert [(r.id, r.title) for r in rows_of(tmp_path)] == [
        ("blue.png", b""),
        ("shoes/red.JPG", b""),
    ]
    assert Source(tmp_path).rows_expected == 2


def test_a_picture_or_folder_that_cannot_be_read_is_not_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is absent is deleted by a push with --sync."""
    for name in ("b", "b/deep", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(photo())
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    rows = rows_of(tmp_path)
    assert [row.id for row in rows] == ["gone.jpg", "a/1.jpg", "b/1.jpg", "b/deep/1.jpg"]
    assert rows[0].problem is not None
    assert rows[0].problem.reason == "image_missing_file"
    scandir = os.scandir

    def denied(place: str) -> object:
        if str(place).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", denied)
    for read in (lambda: rows_of(tmp_path), lambda: Source(tmp_path).rows_expected):
        with pytest.raises(SourceError, match=r"deep: expected a folder that can be read"):
            read()


def test_a_folder_of_many_pictures_is_streamed(tmp_path: Path) -> None:
    """A list of all paths is some 400 bytes for each."""
    for folder in range(100):
        (tmp_path / f"{folder}").mkdir()
        for name in range(100):
            (tmp_path / f"{folder}" / f"{name}.jpg").touch()
    tracemalloc.start()
    assert Source(tmp_path).rows_expected == 10_000
    assert tracemalloc.get_traced_memory()[1] < 10_000 * 50
    tracemalloc.stop()


def in_every_format(folder: Path) -> list[Path]:
    """Seven products in each kind of source; row groups and pages end in the middle of parts."""
    ids, titles = [f"p{n}" for n in range(7)], [f"title {n}" for n in range(7)]
    ids[3] = ""
    table = pa.table({"id": ids, "title": titles})
    pq.write_table(table, folder / "c.parquet", row_group_size=3)
    (folder / "joined").mkdir()
    pq.write_table(table, folder / "joined" / "products.parquet", row_group_size=2)
    pictures = pa.table({"id": ids, "jpeg": [photo((n, 0, 0)) for n in range(7)]})
    pq.write_table(pictures, folder / "joined" / "images.parquet", row_group_size=5)
    lines = [f"{i},{title}" for i, title in zip(ids, titles, strict=True)]
    (folder / "c.csv").write_text("\n".join(["id,title", *lines, ""]))
    records = [json.dumps({"id": i, "title": t}) for i, t in zip(ids, titles, strict=True)]
    (folder / "c.jsonl").write_text("\n".join([*records[:4], "", *records[4:]]))
    (folder / "photos").mkdir()
    for n in range(7):
        (folder / "photos" / f"{n}.jpg").write_bytes(photo((n, 0, 0)))
    return [folder / name for name in ("c.parquet", "joined", "c.csv", "c.jsonl", "photos")]


def test_a_source_can_be_read_in_parts(tmp_path: Path) -> None:
    for path in in_every_format(tmp_path):
        source, whole = Source(path), rows_of(path)
        last = whole[-1].number
        assert len(whole) == 7
        for size in (1, 2, 5, 9):
            starts = range(0, last, size)
            parts = [row for start in starts for row in source.rows(start, start + size)]
            assert parts == whole, (path, size)
        assert list(source.ids()) == [(row.number, row.id) for row in whole]


def test_ids_are_read_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "a", "image": "nowhere.jpg"}\n{"id": "b", "title": "mug"}')
    assert list(Source(path).ids()) == [(1, "a"), (2, "b")]
    with pytest.raises(SourceError, match="read twice, got stdin"):
        Source(STDIN).ids()


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", id=[1], code=["x1"], label=["red"], title=["no"])
    columns = Columns().given(id="code", title="label", image=None)
    (row,) = rows_of(path, columns)
    assert (row.id, row.title) == ("x1", b"red")


def test_a_named_column_must_be_there(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", id=[1], title=["red"])
    with pytest.raises(SourceError, match=r"column for the image \(photo\), got .* --image-column"):
        rows_of(path, Columns().given(image="photo"))


def test_a_named_column_must_be_in_some_json_line(tmp_path: Path) -> None:
    """Of the first thousand: lines leave out what is null, and a wrong name would be in none."""
    path = tmp_path / "c.jsonl"
    lines = ["oops", *['{"id": "a", "title": "x"}'] * 3, '{"id": "b", "label": "red"}', ""]
    path.write_text("\n".join(lines))
    assert [row.title for row in rows_of(path, Columns().given(title="label"))][-1] == b"red"
    with pytest.raises(SourceError, match=r"column for the title \(lable\), got .*'label'"):
        rows_of(path, Columns().given(title="lable"))
    path.write_text("\n")
    assert rows_of(path, Columns().given(title="lable")) == []


def test_columns_of_a_csv_may_hold_numbers(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text(
        "id,title,price,sku\n1,a,12.5,007\n2,b,9,008\n3,c,,009\n4,d,cheap,010\n5,e,1_0,011\n"
    )
    rows = list(Source(path, numbers=("price",)).rows())
    assert [row.attributes for row in rows[:3]] == [
        {"price": 12.5, "sku": "007"},
        {"price": 9, "sku": "008"},
        {"sku": "009"},
    ]
    assert "price: expected a number such as 12.5, got cheap" in str(rows[3].problem)
    assert "got 1_0" in str(rows[4].problem)
    with pytest.raises(SourceError, match=r"expected columns \['cost'\], as --number says, got"):
        list(Source(path, numbers=("cost",)).rows())
    lines = tmp_path / "c.jsonl"
    lines.write_text('{"id": 1, "title": "a"}')
    with pytest.raises(SourceError, match=r"expected a \.csv file with --number"):
        list(Source(lines, numbers=("price",)).rows())


def test_a_data_folder_is_paired_by_the_named_id(tmp_path: Path) -> None:
    columns = {"sku": ["a", "b"], "row": [1, 2]}
    write_parquet(tmp_path / "products.parquet", **columns, title=["x", "y"])
    write_parquet(tmp_path / "images.parquet", sku=["a", "c"], row=[1, 2], jpeg=[photo()] * 2)
    assert [row.id for row in rows_of(tmp_path, Columns().given(id="row"))] == ["1", "2"]
    with pytest.raises(SourceError, match=r"row 2 is 'b' in products\.parquet and 'c'"):
        rows_of(tmp_path)


def test_an_id_that_is_not_utf8_costs_its_row(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(b"id,title\ncaf\xe9,cup\nb,mug\n")
    bad, good = rows_of(path)
    assert bad.problem is not None
    assert (bad.problem.reason, bad.name, good.id) == ("bad_id", "row 1", "b")
    assert "caf\\xe9" in bad.problem.detail


def test_image_cells_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    names = ["pipe.jpg", "huge.jpg", ".", "no\0name.jpg", "x" * 5000]
    path = tmp_path / "c.jsonl"
    lines = [json.dumps({"id": n, "image": name}) for n, name in enumerate(names)]
    path.write_text("\n".join(lines))
    assert [row.problem.reason for row in rows_of(path) if row.problem] == [
        "image_missing_file",
        "image_too_large",
        *["image_missing_file"] * 3,
    ]


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.xlsx").write_bytes(b"")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    (tmp_path / "c.csv").write_text("sku_number,label\n1,a\n")
    for name, message in {
        "nowhere": "not found; expected a .parquet",
        "empty": "found neither",
        "c.xlsx": "expected .parquet, .csv, .jsonl or a folder, got '.xlsx'",
        "c.parquet": "not a readable Parquet file",
        "c.csv": "expected a column for the id .* name it with --id-column",
    }.items():
        with pytest.raises(SourceError, match=message):
            rows_of(tmp_path / name)


def test_a_long_csv_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title"])
        writer.writerows([i, f"title {i}"] for i in range(50_000))
    rows = Source(path).rows()
    assert next(iter(rows)).id == "0", "the first row comes before the last is read"
    assert sum(1 for _ in rows) == 49_999


def test_values_that_json_does_not_know_become_text(tmp_path: Path) -> None:
    import datetime

    path = write_parquet(
        tmp_path / "c.parquet", id=[1], title=["a"], day=[datetime.date(2026, 1, 2)]
    )
    (row,) = rows_of(path)
    assert json.dumps(row.attributes) == '{"day": "2026-01-02"}'


def test_a_parquet_cell_that_cannot_be_read_costs_its_row(tmp_path: Path) -> None:
    """And not those that are read together with it."""
    titles = pa.array([b"red", b"caf\xe9", b"blue"]).view(pa.string())
    days = pa.array([0, 1, 2**40], pa.int64()).view(pa.timestamp("s"))
    path = write_parquet(tmp_path / "c.parquet", id=["a", "b", "c"], title=titles, since=days)
    rows = rows_of(path)
    assert [row.id for row in rows] == ["a", "b", "c"]
    tags = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), titles)
    for column in (tags, titles.dictionary_encode()):
        path = write_parquet(
            tmp_path / "t.parquet", id=["a", "b", "c"], title=["x"] * 3, tag=column
        )
        said = [row.problem for row in rows_of(path)]
        assert "tag: cannot be read" in str(said[1])
        assert said[::2] == [None, None]
    assert rows[0].problem is None
    assert rows[1].title == b"caf\xe9", "refused for its bytes, like that of a CSV"
    assert "since: cannot be read" in str(rows[2].problem)


def test_a_parquet_file_that_is_damaged_behind_its_footer_is_said(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "c.parquet", id=["a"] * 5000, title=[f"t{n}" for n in range(5000)]
    )
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(SourceError, match="damaged"):
        rows_of(path)


def test_json_lines_that_leave_out_what_is_null_keep_their_columns(tmp_path: Path) -> None:
    """Another column is an attribute, and no id or title of its own."""
    lines = [
        {"id": "p1", "sku": "A7", "title": "red shoe", "name": "ACME"},
        {"sku": "A8", "title": "blue shoe"},
        {"id": "p3", "sku": "A9", "name": "ACME"},
        {"id": "p4", "image_path": "a.jpg"},
    ]
    (tmp_path / "a.jpg").write_bytes(photo())
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    first, nameless, untitled, pictured = rows_of(path)
    assert (first.id, first.title) == ("p1", b"red shoe")
    assert nameless.id == "", "refused, and so nothing is deleted for it"
    assert (untitled.id, untitled.title) == ("p3", b"")
    assert untitled.attributes == {"sku": "A9", "name": "ACME"}
    assert pictured.image == photo()
    later = list(Source(path).rows(2))
    assert later == [untitled, pictured], "a part is read like the whole"
