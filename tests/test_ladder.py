"""The parity ladder on a tiny MAKE: every rung, what each must notice, and the command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from deploy.rendered.catalog import write_rendered_catalog
from deploy.server import Server
from deploy.server import triton as serving
from export.__main__ import main
from export.culprits import read_islands
from export.half import half_of, islands_of, typed
from export.judges import by_recall
from export.ladder import (
    Found,
    Rung,
    Sample,
    Search,
    by_inputs,
    climb,
    encoded,
    overlap_of,
    samples_of,
    trimmed,
)
from export.parity import BF16, EXACT, HALF, Budget, cosines_of
from export.publish import publish
from export.report import write_page
from export.rungs import Asked, climb_all, judged_by, rungs_of, torch_encode
from export.surgery import operate
from retrieval_contract import models
from retrieval_contract.errors import ExportError, ReleaseMismatch
from retrieval_contract.graph import why_no_bf16
from retrieval_contract.release import Precision
from retrieval_contract.tensors import Array
from tests import clip_family
from tests.tiny import tiny_make
from tests.traced import traced
from towers.checkpoint import SHIPPED, load_towers, save_make
from towers.learning.catalog import ProductData, read_data
from towers.learning.metrics import Interval
from towers.make import Make

QUERY, PRODUCT = models.QUERY_TOWER, models.PRODUCT_TOWER
TOWERS = tiny_make()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rendered_catalog(tmp_path_factory.mktemp("data") / "rendered", products=60)


@pytest.fixture(scope="module")
def products(data: Path) -> ProductData:
    return read_data(data)


@pytest.fixture(scope="module")
def samples(products: ProductData) -> dict[str, Sample]:
    """Both towers' rows, with torch's vectors."""
    found = samples_of(TOWERS.spec, [query.text for query in products.queries], products)
    return {
        model.name: replace(
            found[model.name],
            vectors=encoded(by_inputs(torch_encode(TOWERS, model)), found[model.name]),
        )
        for model in models.TOWERS
    }


@pytest.fixture(scope="module")
def search(products: ProductData) -> Search:
    return Search(products.queries, products.ids)


@pytest.fixture(scope="module")
def ladder(samples: dict[str, Sample], search: Search) -> list[Found]:
    return [climb(rung, samples, search) for rung in rungs_of(TOWERS, None)]


def test_every_rung_of_both_towers_is_within_its_budget(ladder: list[Found]) -> None:
    assert [(f.rung.tower.name, f.rung.name) for f in ladder] == [
        (tower, rung)
        for tower in ("query_tower", "product_tower")
        for rung in (
            "ONNX FP32, as traced",
            "ONNX FP32, after surgery",
            "ONNX FP16",
            "ONNX FP16, reference",
            *([] if why_no_bf16() else ["OpenVINO bf16"]),
        )
    ]
    assert not [found.faults for found in ladder if found.faults]
    by_name = {(f.rung.tower.name, f.rung.name): f for f in ladder}
    half = by_name["product_tower", "ONNX FP16"]
    assert half.max_abs > 0  # it is another graph indeed
    assert half.recall is not None
    slow = by_name["product_tower", "ONNX FP16, reference"]
    assert (slow.rows, slow.recall) == (6, None)


@pytest.mark.parametrize(
    ("queries", "value", "low", "fault"),
    [
        (24, 0.0042, 0.0, False),
        (24, 0.0042, 0.001, True),
        (24, 0.05, 0.0, True),
        (1000, 0.0042, 0.0, True),
        (500, 0.0021, 0.0, True),
        (500, 0.0020, 0.001, False),
    ],
)
def test_one_query_of_few_is_chance(queries: int, value: float, low: float, fault: bool) -> None:
    """Few: one is worth more than the budget."""
    change = Interval(value, low, 0.0125)
    rung = Rung("some", QUERY, HALF, lambda sample: sample.vectors)
    found = Found(rung, 8, 0.0, (1.0, 1.0, 1.0), 0.0, queries=queries, recall=change)
    assert bool(found.faults) == fault


def wrong(change: float) -> Rung:
    """A rung whose vectors are off in one direction."""
    right = torch_encode(TOWERS, PRODUCT)

    def encode(inputs: Mapping[str, Array]) -> Array:
        vectors = right(inputs)
        vectors[:, 0] += change
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return Rung("planted", PRODUCT, HALF, by_inputs(encode))


def test_a_rung_past_its_budget_says_what_and_by_how_much(
    samples: dict[str, Sample], search: Search
) -> None:
    assert not climb(wrong(0.0), samples, search).faults
    faults = climb(wrong(1.0), samples, search).faults
    assert any(fault.startswith("cosine 0.") for fault in faults)
    assert any(fault.startswith("max abs") for fault in faults)


def test_what_a_rung_costs_in_recall_is_found(samples: dict[str, Sample], search: Search) -> None:
    """Vectors of other products: each cosine may be high, no query finds what it found."""
    ids, torch_vectors = search.ids, samples[PRODUCT.name].vectors
    found = np.argsort(-(samples[QUERY.name].vectors @ torch_vectors.T), axis=1)[:, :5]
    right = [
        replace(query, grades={ids[row]: 1 for row in rows}, judged=frozenset())
        for query, rows in zip(search.queries, found.tolist(), strict=True)
    ]
    shuffled = np.random.default_rng(0).permutation(len(ids))
    rows = {row.tobytes(): at for at, row in enumerate(samples[PRODUCT.name].inputs["pixels"])}
    loose = replace(HALF, cosine=-1.0, max_abs=9.0, invariance=9.0)
    rung = Rung(
        "shuffled",
        PRODUCT,
        loose,
        lambda sample: torch_vectors[
            [shuffled[rows[row.tobytes()]] for row in sample.inputs["pixels"]]
        ],
    )
    climbed = climb(rung, samples, Search(right, ids))
    assert climbed.overlap < 0.9
    assert "Recall@10 changes by -" in "".join(climbed.faults)


@pytest.mark.parametrize(
    ("precision", "backend", "name", "budget"),
    [
        ("fp32", "python", "served over gRPC", EXACT),
        ("fp32", "onnxruntime", "served over gRPC", EXACT),
        ("bf16", "python", "served over gRPC, bf16", BF16),
        ("fp32", "tensorrt", "served over gRPC, engine", HALF),
    ],
)
def test_what_is_served_is_judged_by_its_precision(
    precision: str, backend: str, name: str, budget: Budget
) -> None:
    assert judged_by(Precision(precision), backend) == (name, budget)


def test_a_row_that_depends_on_its_company_is_found(samples: dict[str, Sample]) -> None:
    right = torch_encode(TOWERS, QUERY)
    rung = Rung(
        "neighbours",
        QUERY,
        EXACT,
        by_inputs(lambda inputs: right(inputs) * (1 + 1e-3 * len(inputs["query_ids"]))),
    )
    assert any("alone and in company" in fault for fault in climb(rung, samples, None).faults)


def test_vectors_that_are_not_finite_are_a_fault_of_their_rung(
    samples: dict[str, Sample], search: Search, tmp_path: Path
) -> None:
    right = torch_encode(TOWERS, QUERY)

    def encode(inputs: Mapping[str, Array]) -> Array:
        vectors = right(inputs)
        vectors[0, 0] = np.inf
        return vectors

    found = climb(Rung("inf", QUERY, HALF, by_inputs(encode)), samples, search)
    (fault,) = found.faults
    assert re.search(r"1 of 12 vectors are not finite; .*`python -m export culprits`", fault)
    said = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert [said[key] for key in ("cosine_p0", "max_abs", "interval")] == [None] * 3
    write_page(tmp_path / "parity.html", [found], "about")
    assert "<tr class=bad>" in (tmp_path / "parity.html").read_text()


def test_vectors_of_another_shape_stop_the_ladder(samples: dict[str, Sample]) -> None:
    rung = Rung("wide", QUERY, HALF, lambda sample: np.ones((len(sample), 3), np.float32))
    with pytest.raises(ExportError, match=r"expected vectors \(12, 16\), got \(12, 3\)"):
        climb(rung, samples, None)


@pytest.mark.parametrize("opt_in", [True, False])
def test_a_report_is_written_whatever_a_rung_gives(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opt_in: bool
) -> None:
    """Only who is served by it without asking for it fails the ladder."""
    dim = TOWERS.spec.vector_dim
    rungs = [
        Rung("nan", QUERY, BF16, lambda sample: np.full((len(sample), dim), np.nan), opt_in=opt_in),
        Rung("right", QUERY, EXACT, by_inputs(torch_encode(TOWERS, QUERY)), rows=6),
    ]
    monkeypatch.setattr("export.rungs.rungs_of", lambda *given: rungs)
    report = climb_all(TOWERS, Asked("none", data, 60, None), tmp_path, Console(quiet=True))
    assert report["ok"] is opt_in
    assert [bool(rung["faults"]) for rung in report["rungs"]] == [True, False]
    assert report["rungs"][1]["recall@10_delta"] is report["rungs"][1]["interval"] is None
    assert report["recall@10_shown_from"] == round(1 / report["queries"], 5) == 0.08333
    assert "a change of Recall@10 from 0.0833" in (tmp_path / "parity.html").read_text()


def test_cosines_and_overlap() -> None:
    zero, one = np.zeros((1, 2)), np.array([[1.0, 0.0]])
    assert cosines_of(zero, zero).tolist() == [1.0]  # refused by both
    assert cosines_of(zero, one).tolist() == [0.0]
    scores = np.arange(20.0)[None]
    assert overlap_of(scores, scores) == 1.0
    assert overlap_of(scores, -scores) == 0.0


def test_rows_are_cut_to_their_longest() -> None:
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    feed = {"query_ids": mask * 5, "query_mask": mask, "has_title": np.ones((2, 1))}
    assert {name: array.shape for name, array in trimmed(feed).items()} == {
        "query_ids": (2, 3),
        "query_mask": (2, 3),
        "has_title": (2, 1),
    }


def test_the_page_marks_what_is_past_its_budget(
    ladder: list[Found], samples: dict[str, Sample], search: Search, tmp_path: Path
) -> None:
    path = tmp_path / "pages" / "parity.html"
    write_page(path, [*ladder, climb(wrong(1.0), samples, search)], "sixty <products>")
    text = path.read_text()
    assert text.count("<tr class=bad>") == 1
    assert "sixty &lt;products&gt;" in text


def test_what_is_served_is_the_last_rung(triton: Server, data: Path, tmp_path: Path) -> None:
    """The shipped towers through the real server, to the same vectors as torch's."""
    asked = Asked(str(SHIPPED), data, 12, triton.grpc_address)
    report = climb_all(load_towers(str(SHIPPED)), asked, tmp_path, Console(quiet=True))
    assert report["ok"] is True
    rungs = report["rungs"]
    assert isinstance(rungs, list)
    served = [rung for rung in rungs if rung["rung"] == "served over gRPC"]
    assert [rung["tower"] for rung in served] == ["query_tower", "product_tower"]
    assert all(rung["cosine_p0"] >= 0.999999 and "interval" in rung for rung in served)
    assert (tmp_path / "parity.html").is_file()


@pytest.mark.parametrize("family", clip_family.FAMILIES)
def test_a_clip_family_climbs_to_what_is_served(family: str, data: Path, tmp_path: Path) -> None:
    """Tiny and random, so that ten of sixty products tie: overlap and recall say little, all
    else as of any towers."""
    for part in clip_family.parts(family):
        part.save_pretrained(tmp_path / "checkpoint")
    towers = load_towers(str(tmp_path / "checkpoint"))
    release = publish(towers, tmp_path / "releases", Console(quiet=True))
    with (tmp_path / "log").open("w") as log, serving(release, log=log) as server:
        asked = Asked(str(tmp_path / "checkpoint"), data, 60, server.grpc_address)
        report = climb_all(towers, asked, tmp_path, Console(quiet=True))
    assert report["ok"] is True, report
    rungs = report["rungs"]
    assert isinstance(rungs, list)
    served = [rung["tower"] for rung in rungs if rung["rung"] == "served over gRPC"]
    assert served == ["query_tower", "product_tower"]


def test_a_server_of_other_weights_is_no_rung(triton: Server, data: Path) -> None:
    with pytest.raises(ReleaseMismatch, match="build and serve this checkpoint"):
        list(rungs_of(TOWERS, triton.grpc_address))


def test_culprits_are_written_and_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer norm that overflows in half precision, and the island file that says so."""
    save_make(loud_make(), tmp_path / "loud")
    flags = ["--checkpoint", str(tmp_path / "loud"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["export", "culprits", *flags])
    main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["culprits"]["product_tower"]
    islands = read_islands(tmp_path / "islands.json")
    assert islands["product_tower"] == [c["name"] for c in report["culprits"]["product_tower"]]


def loud_make() -> Make:
    """Standardised features in the thousands."""
    loud = tiny_make()
    loud.heads.image_head.std.fill_(1e-4)
    return loud


def test_a_graph_is_judged_by_what_a_search_loses(data: Path, tmp_path: Path) -> None:
    """Where what torch finds is what is right, an overflow costs recall, and rounding does not."""
    loud = loud_make()
    asked = Asked("none", as_found(loud, data, tmp_path), 30, None)
    judging = by_recall(loud, asked)
    graph = operate(traced(loud, PRODUCT), PRODUCT, loud.release())
    judge = judging.judge(PRODUCT, graph)
    assert judge(graph) < judging.bound
    assert judge(half_of(graph, islands_of(typed(graph)))) < 0.1
    assert judge(half_of(graph, ())) > 0.3


def as_found(towers: Make, data: Path, folder: Path) -> Path:
    """The same products; to each query the five that these towers find first are relevant."""
    products = read_data(data)
    products = products.select(list(range(30)))
    texts = [query.text for query in products.queries]
    whole = samples_of(towers.spec, texts, products)
    vectors = [encoded(by_inputs(torch_encode(towers, m)), whole[m.name]) for m in models.TOWERS]
    found = np.argsort(-(vectors[0] @ vectors[1].T), axis=1)[:, :5]
    for name in ("products.parquet", "images.parquet"):
        table = pq.read_table(data / name)
        pq.write_table(table.slice(0, 30), folder / name)
    lines = [f"q{n},{text}" for n, text in enumerate(texts)]
    (folder / "queries.csv").write_text("\n".join(["query_id,query", *lines]))
    lines = [f"q{n},{products.ids[row]},1" for n, rows in enumerate(found) for row in rows]
    (folder / "qrels.csv").write_text("\n".join(["query_id,id,rel", *lines]))
    return folder
