"""The ablation: variants over seeds, paired, and what its tables say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.judged import write_judged_catalog
from tests.tiny import tiny_make
from towers import ablation, students
from towers.ablation import HEADLINE, KNOWN_ITEM, main, parser, recipe_of, table_of
from towers.checkpoint import save_make


def test_tables_say_ratios_with_intervals_and_where_there_is_none() -> None:
    queries = np.random.default_rng(0).uniform(0.4, 0.6, 200)
    slices = ("all", "no_title")

    def found(scale: float, blind: bool = False) -> dict[str, dict[str, np.ndarray]]:
        figures = {HEADLINE: np.stack([queries * scale, queries * scale * 1.02])}
        shown = figures | {KNOWN_ITEM: np.ones((2, 5))}
        return {"all": shown, "no_title": {HEADLINE: queries[None] * 0.0} if blind else figures}

    text = table_of({"make": found(1.1), "mean": found(1.0), "title": found(1.0, blind=True)})
    rows = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert text.splitlines()[0] == f"| nDCG@10 | {' | '.join(slices)} | known item hit@10 |"
    ours, theirs = queries.mean() * 1.1 * 1.01, queries.mean() * 1.01
    spread = np.std([queries.mean() * 1.1, queries.mean() * 1.1 * 1.02], ddof=1)
    assert rows["| make"].startswith(f"| make | {ours:.3f} ± {spread:.3f} |")
    assert rows["| mean"].startswith(f"| mean | {theirs:.3f}")
    assert "+10.0 % [+10.0, +10.0]" in rows["| Modal Adaptation ÷ mean fusion"]
    assert rows["| MAKE ÷ title alone"].endswith("(blind there) |")


def test_a_recipe_is_changed_for_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    args = parser().parse_args(["--data", "x", "--set", "blank=0", "--set", "batch=512"])
    title = recipe_of("title", args, seed=2)
    assert (title.fusion, title.blank, title.batch, title.seed) == ("title", 0.0, 512, 2)
    assert title.colour_cut == recipe_of("title", parser().parse_args(["--data", "x"])).colour_cut
    for wrong in ("blank", "blank=much", "fusion=mean", "seed=1", "colour=0"):
        with pytest.raises(SystemExit):
            parser().parse_args(["--data", "x", "--set", wrong])
        said = capsys.readouterr().err
        assert "expected FIELD=NUMBER with one of epochs, batch," in said
        assert repr(wrong) in said


@pytest.mark.parametrize("command", [ablation, students])
def test_who_reports_on_the_held_out_side_cannot_train_on_it(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--data", "x", "--everything"])
    assert "unrecognized arguments: --everything" in capsys.readouterr().err


def test_variants_are_trained_once_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command on a tiny catalog, and again: finished runs are taken up."""
    save_make(tiny_make(), tmp_path / "start")
    (tmp_path / "judged").mkdir()
    data = write_judged_catalog(tmp_path / "judged")
    flags = ["--start", tmp_path / "start", "--data", data, "--work", tmp_path / "work"]
    flags += ["--out", tmp_path / "table.md", "--seeds", 2, "--jobs", 2, "--slice", "all"]
    flags += ["--variant", "make", "--variant", "mean", "--variant", "bm25"]
    flags += ["--general-texts", 500]
    monkeypatch.setattr(sys, "argv", ["ablation", *map(str, flags)])
    main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(said) == ["make", "mean", "bm25"]
    assert all(0 < said[name]["all"][HEADLINE] <= 1 for name in said)
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {what} |" in table for what in ("Modal Adaptation ÷ mean fusion", "MAKE ÷ BM25"))
    runs = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work/runs").iterdir()}
    assert len(runs) == 4
    main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == said
    assert runs == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work/runs").iterdir()}
