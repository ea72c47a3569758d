"""python -m towers.train --data DIR --out CHECKPOINT: MAKE, trained on a catalog's own products.

The picture encoder's upper blocks learn the catalog first. Then the encoders are run once; small
heads are trained on what they say, and a query encoder with fewer layers is taught to say the
same. Killed, it goes on where it was. The catalog's held-out groups are not trained on
(`towers/learning/split.py`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from retrieval_contract.errors import CheckpointError
from towers.checkpoint import TRAINING_FILE, file_hash, load_towers, save_make, training_of
from towers.command import answer, at_least
from towers.heads import Heads
from towers.learning.catalog import ProductData, read_data
from towers.learning.encoders import Advance, Encoders
from towers.learning.examples import Examples, general_queries, general_texts, make_examples
from towers.learning.keywords import Prototypes, keywords_of
from towers.learning.pictures import (
    PictureLesson,
    PictureTeaching,
    finished,
    labels_of,
    maps_of,
    run_name,
)
from towers.learning.split import sides_of
from towers.learning.student import Lesson, Teaching, with_query_layers
from towers.learning.trained import save_trained_on
from towers.learning.training import Recipe, Told, Trainer
from towers.make import Make
from towers.pretrained import pretrained_make
from towers.two_towers import unit

DRAWS, DRAWN_BY = 8, 0
"""Queries a product, and the seed that they are drawn by: every run has the same."""
WORK = Path("build/training")
NO_ATTRIBUTES = "none, no text column repeats few values; --attribute NAME takes one all the same"
Module = TypeVar("Module", bound=torch.nn.Module)
console = Console(stderr=True)


class Bars:
    """One progress bar a step; calling it starts the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Of what was `timed`, in this run: what an earlier one has kept takes next to none."""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __call__(self, what: str, total: int) -> Advance:
        task = self.progress.add_task(what, total=total, note="")
        return lambda rows: self.progress.advance(task, rows)

    def steps(self, what: str, total: int) -> Told:
        """A callback for (steps done, loss)."""
        task = self.progress.add_task(what, total=total, note="")
        return lambda done, loss: self.progress.update(
            task, completed=done, note=f"loss {loss:.3f}"
        )

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Keeps how long the block takes."""
        start = time.perf_counter()
        yield
        self.seconds[what] = round(time.perf_counter() - start, 1)


def start_towers(where: str | None) -> Make:
    """The checkpoint to start from; none: the public pretrained encoders."""
    if where is None:
        return pretrained_make()
    towers = load_towers(where)
    if not isinstance(towers, Make):
        raise CheckpointError(f"{where}: expected a MAKE checkpoint, got {type(towers).__name__}")
    return towers


def with_heads(towers: Make, heads: Heads, recipe: Recipe) -> Make:
    """The same encoders behind these heads."""
    config = replace(
        towers.config,
        fusion=recipe.fusion,
        head_width=recipe.head_width,
        vector_dim=recipe.vector_dim,
    )
    made = Make(config, towers.spec.title.tokenizer_json)
    state = {n: t for n, t in towers.state_dict().items() if not n.startswith("heads.")}
    state |= {f"heads.{name}": tensor for name, tensor in heads.state_dict().items()}
    made.load_state_dict(state)
    return made.eval()


def rounded(module: Module) -> Module:
    """Matrices at half precision, which is how they are stored; vectors stay as they are."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.dim() > 1:
                tensor.copy_(tensor.half().float())
    return module


@dataclass(frozen=True)
class Material:
    """What every run on one catalog starts from."""

    columns: list[str]
    towers: Make
    encoders: Encoders
    other_titles: list[str]
    """Of the general folders."""
    general: list[str]
    examples: Examples


def prepare(
    args: argparse.Namespace, towers: Make, bars: Bars, everything: bool = False
) -> Material:
    """Read the catalog and encode it, or take from `args.work` what an earlier run encoded.

    `everything`: its held-out groups as well, for those alone who report no figures on them.
    """
    data = read_data(args.data, args.attribute or ())
    columns = args.attribute or list(data.attributes)
    console.print(f"{args.data}: attributes: {', '.join(columns) or NO_ATTRIBUTES}", markup=False)
    if not everything:
        data = train_side(data)
    towers.to("cuda" if torch.cuda.is_available() else "cpu")
    titles = [title for folder in args.general for title in read_data(folder).titles]
    general = general_texts(vocabulary_of(towers), titles, args.general_texts, DRAWN_BY)
    lesson = PictureLesson(epochs=picture_epochs(args))
    with bars.timed("pictures"):
        towers = teach_pictures(towers, data, columns, lesson, bars, args.work / "runs")
    with bars.timed("features"):
        encoders = Encoders(towers, args.work / "features")
        examples = make_examples(data, encoders, columns, DRAWS, general, DRAWN_BY, bars)
    return Material(columns, towers, encoders, titles, general, examples)


def train_side(data: ProductData) -> ProductData:
    """The products that are trained on."""
    rows = sides_of(data)["train"]
    console.print(f"{len(rows)} of {len(data)} products are trained on", markup=False)
    return data.select(rows)


def picture_epochs(args: argparse.Namespace) -> int:
    """Asked for, else none where the start has learned to see already."""
    asked: int | None = args.picture_epochs
    return asked if asked is not None else 0 if args.start else PictureLesson.epochs


def query_layers(args: argparse.Namespace, towers: Make) -> int:
    """Layers of the query encoder to end with: asked for, else as the start has, 3 at most."""
    has = len(towers.query_text.bert.encoder.layer)
    asked: int = args.query_layers or min(has, Lesson.layers)
    if not 1 <= asked <= has:
        raise CheckpointError(
            f"--query-layers {asked}: expected 1 to {has}, the layers that the start has; "
            "start from one that has more"
        )
    return asked


def teach_pictures(
    towers: Make,
    data: ProductData,
    columns: Sequence[str],
    lesson: PictureLesson,
    bars: Bars,
    folder: Path | None = None,
) -> Make:
    """The same towers with a picture encoder that knows what this catalog's pictures show."""
    data = data.select([row for row, image in enumerate(data.images) if image])
    labels = labels_of(data, columns, lesson.rarest_word)
    if not lesson.epochs or not labels:
        return towers
    path = folder / run_name(towers, data, labels, lesson) if folder else None
    weights = finished(path) if path else None
    if weights is None:
        maps = maps_of(towers, data.images, bars("picture maps", len(data)))
        teaching = PictureTeaching(towers.image_encoder, maps, labels, lesson)
        weights = teaching.run(path, bars.steps("pictures", lesson.epochs * teaching.steps))
    towers.image_encoder.load_state_dict(weights)
    rounded(towers.image_encoder)
    return towers


def train_heads(
    recipe: Recipe,
    material: Material,
    told: Told,
    folder: Path | None = None,
    start: Heads | None = None,
) -> tuple[Heads, float]:
    """Heads by this recipe, and the scale that was learned beside them."""
    examples, columns = material.examples, material.columns
    keywords = keywords_of(recipe.keywords, examples, columns)
    prototypes = Prototypes(examples, material.encoders, columns)
    trainer = Trainer(recipe, examples, keywords, prototypes, start)
    return trainer.run(folder, told), float(trainer.scale.detach().exp())


def teach(
    towers: Make, material: Material, lesson: Lesson, bars: Bars, folder: Path | None = None
) -> Make:
    """The same towers with a query encoder of fewer layers."""
    e = material.examples
    drawn = {query.text for draw in e.draws for query in draw}
    words, count = vocabulary_of(towers), round(lesson.general * len(drawn))
    others = general_queries(words, material.other_titles, count, lesson.seed)
    texts = sorted(drawn.union(material.general, e.pieces, others))
    features = material.encoders.queries(texts, bars("lesson", len(texts)))
    with torch.no_grad():
        taught = unit(towers.heads.query(features))
        products = unit(towers.heads.product(e.titles[0], e.has_title, e.pictures, e.has_picture))
        products = torch.cat([products, general_products(towers, e)])
    teaching = Teaching(with_query_layers(towers, lesson.layers), texts, taught, products, lesson)
    told = bars.steps(f"query encoder of {lesson.layers} layers", teaching.total)
    return teaching.run(folder, told)


def general_products(towers: Make, e: Examples) -> Tensor:
    """The general texts as products without a picture, unit (M, V)."""
    there = torch.ones(len(e.general_titles), 1)
    nothing = torch.zeros(len(there), e.pictures.shape[1])
    return unit(towers.heads.product(e.general_titles, there, nothing, 0 * there))


def add_material_flags(top: argparse.ArgumentParser) -> None:
    """Of every command that trains on a catalog."""
    top.add_argument("--data", type=Path, required=True, help="a data folder")
    top.add_argument("--start", help="a MAKE checkpoint to go on from; default: public weights")
    top.add_argument("--attribute", action="append", help="queries name these; default: all")
    top.add_argument(
        "--general",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="data folders whose titles keep the heads honest about other subjects",
    )
    top.add_argument("--general-texts", type=at_least(0), default=20_000, help="how many of them")
    top.add_argument(
        "--picture-epochs",
        type=at_least(0),
        help=f"of the picture encoder's upper blocks; default: {PictureLesson.epochs}, with "
        "--start none",
    )
    top.add_argument("--work", type=Path, help="what is kept between runs", default=WORK)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m towers.train", description=__doc__)
    add_material_flags(top)
    top.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    top.add_argument("--everything", action="store_true", help="train on held-out groups as well")
    top.add_argument("--query-layers", type=int, help="default: as the start has, 3 at most")
    top.add_argument("--epochs", type=at_least(1), default=Recipe.epochs)
    top.add_argument(
        "--rounds", type=at_least(1), default=Lesson.rounds, help="of the query encoder"
    )
    top.add_argument("--seed", type=int, default=0)
    return top


def run(args: argparse.Namespace) -> dict[str, object]:
    """Train, teach, save; returns what the last line says."""
    args.work.mkdir(parents=True, exist_ok=True)
    bars = Bars()
    with bars.progress:
        towers = start_towers(args.start)
        layers, has = query_layers(args, towers), len(towers.query_text.bert.encoder.layer)
        material = prepare(args, towers, bars, args.everything)
        recipe = Recipe(
            fusion=towers.config.fusion,
            epochs=args.epochs,
            seed=args.seed,
            head_width=towers.config.head_width,
            vector_dim=towers.config.vector_dim,
        )
        told = bars.steps("heads", recipe.epochs)
        start = towers.heads if args.start else None
        with bars.timed("heads"):
            heads, scale = train_heads(recipe, material, told, args.work / "runs", start)
        made = with_heads(towers, heads, recipe)
        lesson = Lesson(layers, args.rounds, scale=scale, seed=args.seed) if layers < has else None
        if lesson:
            with bars.timed("lesson"):
                made = teach(made, material, lesson, bars, args.work / "runs")
    save_make(rounded(made), args.out)
    save_trained_on(material.examples.data, args.out, args.start)
    facts = {
        "data": args.data.name,
        "products_sha256": file_hash(args.data / "products.parquet"),
        "side": "all" if args.everything else "train",
        "general": [folder.name for folder in args.general],
        "start": training_of(args.start) if args.start else None,
        "products": len(material.examples),
        "attributes": material.columns,
        "pictures": asdict(PictureLesson(epochs=picture_epochs(args))),
        "recipe": asdict(recipe),
        "lesson": asdict(lesson) if lesson else None,
        "seconds": bars.seconds,
        "torch": torch.__version__.split("+")[0],
    }
    (args.out / TRAINING_FILE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    return {"checkpoint": str(args.out), "release": made.release().release_id} | facts


def vocabulary_of(towers: Make) -> list[str]:
    """The whole words that its tokenizer knows."""
    return list(json.loads(towers.spec.title.tokenizer_json)["model"]["vocab"])


def main() -> None:
    """Command line."""
    answer(run, parser())


if __name__ == "__main__":
    main()
