"""Two routes fused: by hand, by its extremes, and judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import hybrid as judging
from retrieval_client import Fusion, Hit, Hybrid
from retrieval_contract.errors import ContractError
from tests.judged import write_judged_catalog
from towers.learning.catalog import ProductData, Query, read_data
from towers.learning.metrics import figures_of


def hits(**scores: float) -> list[Hit]:
    return [Hit(name, score, name, {}) for name, score in scores.items()]


VECTOR, WORDS = hits(a=0.9, b=0.8, c=0.5), hits(b=12.0, d=6.0)


def test_reciprocal_ranks_add_up() -> None:
    fused = Hybrid(Fusion.RRF, words=0.5, k=60).fuse(VECTOR, WORDS)
    by_hand = {"a": 1 / 61, "b": 1 / 62 + 1 / 61, "c": 1 / 63, "d": 1 / 62}
    assert [hit.id for hit in fused] == sorted(by_hand, key=lambda i: -by_hand[i])
    assert {h.id: h.score for h in fused} == pytest.approx(
        {i: score * 61 / 2 for i, score in by_hand.items()}
    )
    best = fused[0]
    assert [(r.name, r.rank, r.score) for r in best.routes] == [
        ("vector", 2, 0.8),
        ("words", 1, 12),
    ]
    assert [r.share for r in best.routes] == pytest.approx([61 / 123, 62 / 123])


def test_scores_add_up() -> None:
    fused = Hybrid(Fusion.SCORES, words=0.25).fuse(VECTOR, WORDS)
    assert {h.id: h.score for h in fused} == pytest.approx(
        {"a": 0.75, "b": 0.75 * 0.75 + 0.25, "c": 0, "d": 0}
    )
    assert [h.id for h in fused] == ["b", "a", "c", "d"]
    assert sum(r.share for r in fused[0].routes) == pytest.approx(1)
    assert [r.share for r in fused[2].routes] == [0]


@pytest.mark.parametrize("fusion", Fusion)
def test_a_route_with_all_the_weight_decides(fusion: Fusion) -> None:
    by_vector = Hybrid(fusion, words=0).fuse(VECTOR, WORDS)
    by_words = Hybrid(fusion, words=1).fuse(VECTOR, WORDS)
    assert [h.id for h in by_vector] == ["a", "b", "c", "d"]
    assert by_words[0].id == "b"
    assert Hybrid(fusion).fuse([], []) == []
    assert [h.id for h in Hybrid(fusion).fuse(VECTOR, [])] == ["a", "b", "c"]
    (lone,) = Hybrid(fusion, words=0.5).fuse(hits(a=0.1), hits(a=3.0))
    assert lone.score == pytest.approx(1), "the first of both"


@pytest.mark.parametrize(
    "wrong", [{"words": -0.1}, {"words": float("nan")}, {"k": -1}, {"depth": 0}, {"depth": 20_000}]
)
def test_senseless_weights_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ContractError, match="expected"):
        Hybrid(**wrong)


# ── judged ───────────────────────────────────────────────────────────────────────────────
def test_its_ndcg_is_the_evaluations() -> None:
    dice = np.random.default_rng(5)
    ids = [f"p{n}" for n in range(50)]
    queries, scores, ours = [], [], []
    for number in range(20):
        grades = {i: int(g) for i, g in zip(ids, dice.integers(0, 4, 50), strict=True) if g}
        queries.append(Query(f"q{number}", "text", grades))
        scores.append(dice.permutation(50).astype(np.float32))
        ranked = [Hit(ids[at], 0.0, "", {}) for at in np.argsort(-scores[-1])]
        ours.append(judging.ndcg(queries[-1], ranked))
    figures = figures_of(queries, ids, np.stack(scores))
    assert ours == pytest.approx(figures["ndcg@10"].tolist())


def test_chance_is_told_from_a_difference() -> None:
    dice = np.random.default_rng(1)
    theirs = dice.random(200)
    assert judging.chance(theirs, theirs) == 1
    assert judging.chance(theirs + 0.02 * dice.standard_normal(200), theirs) > 0.01
    assert judging.chance(theirs + 0.02 + 0.05 * dice.standard_normal(200), theirs) < 0.001


def test_a_folder_is_judged_by_what_the_others_choose(tmp_path: Path) -> None:
    good, bad = np.array([1.0, 0.9, 0.8, 1.0]), np.array([0.1, 0.2, 0.1, 0.0])
    first, second = [*judging.WAYS][:2]
    base = dict.fromkeys([*judging.WAYS, judging.VECTOR, judging.WORDS], bad)
    one = judging.Judged("one", 4, 9, base | {first: good})
    two = judging.Judged("two", 4, 9, base | {second: good})
    report = judging.report_of([one, two])
    assert report["folders"]["one"]["chosen by the others"] == second
    assert report["folders"]["two"]["chosen by the others"] == first
    assert report["folders"]["one"]["p"] == 1


def test_a_sample_keeps_all_that_is_judged_for_its_queries(tmp_path: Path) -> None:
    data = read_data(write_judged_catalog(tmp_path))
    part: ProductData = judging.sample(data, 90)
    assert len(part) == 90
    assert 1 <= len(part.queries) < len(data.queries)
    whole = {query.id: query for query in data.queries}
    assert all(query.grades == whole[query.id].grades for query in part.queries)
    assert judging.sample(data, None) is data


def test_the_program_judges_a_folder(tmp_path: Path) -> None:
    folder = write_judged_catalog(tmp_path)
    args = judging.parser().parse_args(
        ["--data", str(folder), "--products", "60", "--features", str(tmp_path / "kept")]
    )
    report = judging.run(args)
    found = report["folders"][folder.name]
    assert found["products"] == 60
    assert report["chosen"] in judging.WAYS
    assert all(0 < value <= 1 for value in found["ndcg@10"].values())
    assert 0 < found["p"] <= 1
