"""Training: heads, keywords, the lesson of the query encoder, resuming, the whole command."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.judged import write_judged_catalog
from tests.tiny import tiny_make
from towers.checkpoint import load_towers
from towers.evaluate import evaluate
from towers.heads import FUSIONS, Heads
from towers.learning.catalog import read_data
from towers.learning.encoders import Encoders, no_advance
from towers.learning.examples import general_queries, general_texts, make_examples, piece_of
from towers.learning.keywords import AttributeKeywords, Prototypes, TitleKeywords
from towers.learning.student import Lesson, Teaching, evenly, with_query_layers
from towers.learning.systems import Towers, TrainedHeads
from towers.learning.training import Recipe, Trainer
from towers.learning.views import colour_not_in_title
from towers.make import Make
from towers.train import (
    Bars,
    Material,
    parser,
    prepare,
    start_towers,
    teach,
    train_heads,
)
from towers.two_towers import unit

RECIPE = Recipe(epochs=4, batch=64, head_width=32, vector_dim=16, prototypes=0.5, general=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judged_catalog(tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def material(folder: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    work = str(tmp_path_factory.mktemp("work"))
    flags = ["--data", str(folder), "--start", str(start), "--work", work, "--out", work]
    flags += ["--general-texts", "500"]
    return prepare(parser().parse_args(flags), start_towers(str(start)), Bars())


def trainer(material: Material, recipe: Recipe = RECIPE) -> Trainer:
    keywords = AttributeKeywords(material.examples, material.columns)
    prototypes = Prototypes(material.examples, material.encoders, material.columns)
    return Trainer(recipe, material.examples, keywords, prototypes)


# ── heads ────────────────────────────────────────────────────────────────────────────────
def test_untrained_heads_are_the_text_encoder() -> None:
    heads = Heads("modal_adaptation", 8, 5, 4, 8)
    text = torch.randn(3, 8)
    unit = torch.nn.functional.normalize(text)
    there, nothing = torch.ones(3, 1), torch.zeros(3, 1)
    assert torch.allclose(heads.query(text), unit, atol=1e-6)
    alone = heads.product(text, there, torch.randn(3, 5), nothing)
    assert torch.allclose(alone, unit, atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_is_missing_is_not_seen_by_any_fusion(fusion: str) -> None:
    heads = Heads(fusion, 8, 5, 4, 8)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    title, image = torch.randn(2, 8), torch.randn(2, 5)
    there, nothing = torch.ones(2, 1), torch.zeros(2, 1)
    for flags in ((there, nothing), (nothing, there)):
        out = [
            heads.product(t, flags[0], i, flags[1])
            for t, i in (
                (title, image),
                (title if flags[0].any() else -title, image if flags[1].any() else -image),
            )
        ]
        assert torch.equal(*out)


# ── features ─────────────────────────────────────────────────────────────────────────────
def test_heads_on_features_are_the_towers(folder: Path) -> None:
    """What is trained and evaluated is what is served."""
    data = read_data(folder)
    data = data.select(list(range(0, 360, 30)))
    data.titles[3], data.images[5] = "", b""
    towers = tiny_make()
    encoders = Encoders(towers)
    cached = TrainedHeads("cached", towers.heads, encoders, encoders.queries)
    queries = ["red shirt", "navy blue dresses for women"]
    np.testing.assert_allclose(
        cached.scores(data, queries), Towers("whole", towers).scores(data, queries), atol=1e-5
    )


def test_features_are_computed_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read_data(folder).select(list(range(10)))
    first = Encoders(tiny_make(), tmp_path)
    pictures, titles = first.pictures(data.images), first.titles([*data.titles, data.titles[0]])
    assert torch.equal(titles[0], titles[-1])
    again = Encoders(tiny_make(), tmp_path)
    monkeypatch.setattr(again, "_pictures", None)  # to call it would raise
    assert torch.equal(again.pictures(data.images), pictures)
    other = Encoders(tiny_make(seed=1), tmp_path)
    assert not torch.equal(other.pictures(data.images), pictures), "other weights, other features"


def test_general_texts_need_no_other_catalog() -> None:
    texts = general_texts(["red", "shoe", "##s", "[PAD]", "né"], ["A title"], 100, seed=0)
    assert texts[0] == "A title"
    assert {word for text in texts[1:] for word in text.split()} == {"red", "shoe"}
    assert texts == general_texts(["shoe", "red"], ["A title"], 100, seed=0)
    rng = random.Random(0)
    assert all(piece_of("One Two Three", rng) in "one two three" for _ in range(20))


def test_a_student_is_taught_short_texts_on_other_subjects() -> None:
    texts = general_queries(["shoe", "red"], ["Cordless Drill with two Batteries"], 200, seed=0)
    assert [len(texts), max(len(text.split()) for text in texts)] == [200, 4]
    of_title = [bool(set(text.split()) - {"shoe", "red"}) for text in texts]
    assert 80 < sum(of_title) < 120, "titles and random words in equal parts"
    assert general_queries([], ["", "Title"], 2, seed=0) == ["title", "title"]
    assert general_queries([], [], 3, seed=0) == []


def test_a_product_that_says_nothing_to_ask_it_by_is_left_out(tmp_path: Path) -> None:
    data = read_data(write_judged_catalog(tmp_path)).select(list(range(0, 360, 30)))
    data.titles[2], data.titles[5] = "", " "
    for values in data.attributes.values():
        values[2] = "NA"
    made = make_examples(
        data,
        Encoders(tiny_make()),
        list(data.attributes),
        40,
        ["x"],
        0,
        lambda what, rows: no_advance,
    )
    assert made.data.ids == [i for i in data.ids if i != data.ids[2]]
    assert all(draw[4].attributes for draw in made.draws), "no title: asked by its values"


# ── keywords ─────────────────────────────────────────────────────────────────────────────
def test_attributes_tell_false_negatives(material: Material) -> None:
    """A column that half of the products leave empty is asked for by nobody here."""
    e = material.examples
    maker = {"maker": ["" if row % 2 else "Acme" for row in range(len(e))]}
    e = replace(e, data=replace(e.data, attributes=e.data.attributes | maker))
    rows = torch.arange(0, len(e), 3)
    held = AttributeKeywords(e, [*material.columns, "maker"]).held(0, rows)
    for at, row in enumerate(rows.tolist()):
        asked = e.draws[0][row].attributes
        right = [
            bool(asked) and all(e.data.attributes[name][other] == value for name, value in asked)
            for other in rows.tolist()
        ]
        assert held[at].tolist() == right
    assert held.any()
    assert not held.all()


def test_title_words_tell_false_negatives(material: Material) -> None:
    e = material.examples
    query = next(q for q in e.draws[0] if len(q.attributes) >= 2)
    row = e.draws[0].index(query)
    held = TitleKeywords(e).held(0, torch.arange(len(e)))[row]
    for other, is_held in enumerate(held.tolist()):
        title = e.data.titles[other].lower()
        named = [value.lower().rstrip("s") for _, value in query.attributes]
        if is_held:
            assert all(part in title for value in named for part in value.split()), title
    assert held.sum() > 1, "more than the product itself"


# ── training ─────────────────────────────────────────────────────────────────────────────
def test_training_finds_colours_that_titles_do_not_say(folder: Path, material: Material) -> None:
    recipe = replace(RECIPE, epochs=40)
    heads, scale = train_heads(recipe, material, lambda epoch, loss: None)
    data = read_data(folder)
    encoders = Encoders(material.towers)
    systems = [
        TrainedHeads(name, of, encoders, encoders.queries)
        for name, of in (("before", material.towers.heads), ("after", heads))
    ]
    assert colour_not_in_title(data)
    found = evaluate(data, systems, ["colour_not_in_title", "no_title"])
    for part in ("colour_not_in_title", "no_title"):
        before, after = (found[name][part]["ndcg@10"].mean() for name in ("before", "after"))
        assert after > before + 0.1, part
    assert scale != pytest.approx(1 / recipe.temperature, rel=1e-5), "it is learned"


def test_a_run_repeats_and_goes_on_where_it_was_cut(material: Material, tmp_path: Path) -> None:
    whole = trainer(material).run().state_dict()

    def cut(epoch: int, loss: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(material).run(tmp_path, cut)
    epochs: list[int] = []
    taken_up = (
        trainer(material).run(tmp_path, lambda epoch, loss: epochs.append(epoch)).state_dict()
    )
    assert epochs == [3, 4]
    assert all(torch.equal(whole[name], taken_up[name]) for name in whole)
    other = trainer(material, replace(RECIPE, seed=1))
    assert other.run(tmp_path, lambda epoch, loss: epochs.append(epoch)) is other.heads
    assert epochs == [3, 4, 1, 2, 3, 4], "a run of another recipe is another run"
    trainer(material).run(tmp_path, lambda epoch, loss: pytest.fail("it was finished"))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_trains(material: Material, fusion: str) -> None:
    losses: list[float] = []
    recipe = replace(RECIPE, fusion=fusion, epochs=8, neighbours=8, keywords="titles")
    train_heads(recipe, material, lambda epoch, loss: losses.append(loss))
    assert losses[-1] < losses[0]


def test_a_catalog_of_titles_alone_trains(material: Material) -> None:
    """No attribute, no picture."""
    e = material.examples
    bare = replace(e, pictures=0 * e.pictures, has_picture=0 * e.has_picture)
    own = replace(material, examples=bare, columns=[])
    losses: list[float] = []
    train_heads(RECIPE, own, lambda epoch, loss: losses.append(loss))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


# ── the smaller query encoder ────────────────────────────────────────────────────────────
def test_layers_are_taken_evenly() -> None:
    assert [evenly(6, kept) for kept in (1, 2, 3, 6)] == [[0], [0, 5], [0, 2, 5], [*range(6)]]
    teacher = tiny_make()
    ids, mask = torch.randint(1000, 2000, (4, 8)), torch.ones(4, 8, dtype=torch.long)
    with torch.no_grad():
        same = with_query_layers(teacher, 2).encode_query(ids, mask)
        assert torch.equal(same, teacher.encode_query(ids, mask))
        assert not torch.allclose(with_query_layers(teacher, 1).encode_query(ids, mask), same)


def test_a_student_comes_near_its_teacher(material: Material, tmp_path: Path) -> None:
    teacher = copy.deepcopy(material.towers)
    with torch.no_grad():  # layers at their random start do next to nothing
        for parameter in teacher.query_text.bert.encoder.parameters():
            parameter *= 5
    before = teacher.title_text.bert.embeddings.word_embeddings.weight.clone()
    own = replace(material, towers=teacher, encoders=Encoders(teacher))
    student = teach(teacher, own, Lesson(layers=1, batch=64), Bars(), tmp_path)
    texts = [query.text for query in material.examples.draws[1]]
    wanted = teacher.heads.query(Encoders(teacher).queries(texts))

    def distance(towers: Make) -> float:
        vectors = towers.heads.query(Encoders(towers).queries(texts))
        return float(1 - torch.nn.functional.cosine_similarity(vectors, wanted).mean().detach())

    assert distance(student) < 0.5 * distance(with_query_layers(teacher, 1))
    assert torch.equal(student.title_text.bert.embeddings.word_embeddings.weight, before)


def test_a_lesson_goes_on_where_it_was_cut(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("towers.learning.student.KEPT_EVERY", 2)
    teacher, texts = material.towers, [q.text for q in material.examples.draws[0]][:96]
    with torch.no_grad():
        taught = unit(teacher.heads.query(Encoders(teacher).queries(texts)))
    lesson = Lesson(layers=1, rounds=2, batch=32)

    def teaching() -> Teaching:
        return Teaching(with_query_layers(teacher, 1), texts, taught, taught, lesson)

    def cut(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole = teaching().run().state_dict()
    with pytest.raises(KeyboardInterrupt):
        teaching().run(tmp_path, cut)
    steps: list[int] = []
    again = teaching().run(tmp_path, lambda step, loss: steps.append(step)).state_dict()
    assert steps == [3, 4, 5, 6], "the third was not kept"
    assert all(torch.equal(whole[name], again[name]) for name in whole)


# ── the command ──────────────────────────────────────────────────────────────────────────
def command(folder: Path, start: Path, out: Path, *more: str) -> list[str]:
    flags = ["--data", str(folder), "--start", str(start), "--out", str(out), "--query-layers", "1"]
    flags += ["--work", str(out / "work"), "--epochs", "12", "--general-texts", "500", *more]
    return [sys.executable, "-m", "towers.train", *flags]


def test_a_killed_run_ends_as_if_it_had_not_been(folder: Path, start: Path, tmp_path: Path) -> None:
    """SIGKILL once the heads are half way; beside it a run that nobody disturbs."""
    with ThreadPoolExecutor(1) as beside:
        whole = beside.submit(finished, command(folder, start, tmp_path / "whole"))
        again = killed_and_run_again(folder, start, tmp_path / "cut")
    reports = [json.loads(stdout.splitlines()[-1]) for stdout in (whole.result(), again)]
    assert reports[0]["release"] == reports[1]["release"]
    towers = load_towers(str(tmp_path / "cut"))
    assert towers.release().release_id == reports[0]["release"]
    assert len(towers.query_text.bert.encoder.layer) == 1
    facts = json.loads((tmp_path / "cut" / "training.json").read_text())
    assert facts["side"] == "train"
    assert list(facts["seconds"]) == ["pictures", "features", "heads", "lesson"]
    assert facts["attributes"] == ["gender", "baseColour", "articleType"]


def finished(words: list[str]) -> str:
    """What a command printed that ended well."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def killed_and_run_again(folder: Path, start: Path, out: Path) -> str:
    process = subprocess.Popen(
        command(folder, start, out), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not [*out.glob("work/runs/heads-*.pt")] and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "config.json").exists()
    return finished(command(folder, start, out))
