"""python -m benchmarks.packed: two ways without padding, one packed graph or runs of like length.

Both encode the same tokens of the same texts on one thread of ONNX Runtime, in alternating rounds.
Packed, the texts lie end to end and a token attends to those of its own text (what Triton's ragged
batching would feed); runs of like length are what the local server does. Printed are the packed
graph's texts a second ÷ those of runs of like length, medians over rounds, by the most tokens of a
pack and the texts of a batch, and how far vectors are from the served graph's. The last line is
JSON:

    {"ratio": {"<tokens of a pack>": {"<texts>": ratio, …}, …}, "max_abs": x}
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.limit import graph_of, tokenizer_of
from benchmarks.program import print_report
from benchmarks.workload import built_in_queries, queries_from_csv
from deploy.server import LATEST
from export.onnx_from_towers import OPSET, quiet, unit_or_zero
from retrieval_contract import models
from retrieval_contract.errors import RetrievalError
from retrieval_contract.preprocess import TextPreprocessor
from retrieval_contract.release import Release
from retrieval_contract.tensors import Array
from towers.checkpoint import SHIPPED, load_towers
from towers.make import MASK_FLOOR, Make

PACKS = (64, 128, 256, 512)
TEXTS = (16, 64, 128)
ROUNDS, REPEATS = 9, 4
console = Console(stderr=True)

Encode = Callable[[Array, Array], Array]
"""Ids and mask (B, T) → vectors (B, V)."""
Ratios = dict[int, dict[int, list[float]]]
"""Most tokens of a pack → texts of a batch → one ratio a round."""
VECTOR = models.QUERY_TOWER.outputs[0].name


class PackedQueries(nn.Module):
    """A MAKE's query tower over texts that lie end to end."""

    def __init__(self, towers: Make) -> None:
        super().__init__()
        self.bert, self.head = towers.query_text.bert, towers.heads

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Tokens (T,) and where each text ends (n,), int64 → unit vectors (n, V)."""
        at = torch.arange(ids.shape[0])
        text = (at[:, None] >= ends[None, :]).sum(1)  # (T,): which one a token is of
        starts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
        table = self.bert.embeddings
        tokens = table.word_embeddings(ids) + table.position_embeddings(at - starts[text])
        tokens = table.LayerNorm(tokens + table.token_type_embeddings.weight[0])
        apart = (text[:, None] != text[None, :]).float() * MASK_FLOOR  # (T, T)
        for layer in self.bert.encoder.layer:
            tokens = self._layer(layer, tokens, apart)
        of_text = (text[None, :] == torch.arange(ends.shape[0])[:, None]).float()  # (n, T)
        mean = of_text @ tokens / (ends - starts)[:, None].float()
        return unit_or_zero(self.head.query(mean), torch.ones_like(mean[:, :1]))

    def _layer(self, layer: nn.Module, tokens: Tensor, apart: Tensor) -> Tensor:
        """(T, D) → (T, D); heads are of rank 3, which TensorRT keeps as one fused attention."""
        attention, heads = layer.attention, self.bert.config.num_attention_heads
        size = tokens.shape[1] // heads

        def split(linear: nn.Module) -> Tensor:
            return linear(tokens).reshape(-1, heads, size).transpose(0, 1)  # (H, T, d)

        of = attention.self
        scores = split(of.query) @ split(of.key).transpose(1, 2) / size**0.5 + apart
        seen = (scores.softmax(-1) @ split(of.value)).transpose(0, 1).reshape(-1, heads * size)
        tokens = attention.output.LayerNorm(attention.output.dense(seen) + tokens)
        return layer.output.LayerNorm(layer.output.dense(layer.intermediate(tokens)) + tokens)


def packed_graph(towers: Make) -> ort.InferenceSession:
    """On one thread."""
    buffer = io.BytesIO()
    tokens, texts = torch.export.Dim("tokens", min=2), torch.export.Dim("texts", min=2)
    with quiet():
        torch.onnx.export(
            PackedQueries(towers).eval(),
            (torch.randint(5, 99, (12,)), torch.tensor([3, 7, 12])),
            buffer,
            input_names=["ids", "ends"],
            output_names=["vectors"],
            dynamic_shapes=({0: tokens}, {0: texts}),
            opset_version=OPSET,
            dynamo=True,
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])


def by_packs(session: ort.InferenceSession, most: int) -> Encode:
    """As many texts in a row as `most` tokens hold."""

    def encode(ids: Array, mask: Array) -> Array:
        lengths = mask.sum(1)
        parts, start = [], 0
        while start < len(ids):
            count = max(1, int(np.searchsorted(np.cumsum(lengths[start:]), most, "right")))
            rows = slice(start, start + count)
            feed = {"ids": ids[rows][mask[rows] > 0], "ends": np.cumsum(lengths[rows])}
            parts += session.run(None, {name: a.astype(np.int64) for name, a in feed.items()})
            start += count
        return np.concatenate(parts)

    return encode


def rate(encode: Encode, batches: Sequence[tuple[Array, Array]]) -> float:
    """Texts a second."""
    start = time.perf_counter()
    for ids, mask in batches:
        encode(ids, mask)
    return sum(len(ids) for ids, _ in batches) / (time.perf_counter() - start)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.packed", description=__doc__)
    top.add_argument("--release", type=Path, default=LATEST, help="folder; default: latest")
    top.add_argument("--checkpoint", default=str(SHIPPED), help="that it was made of")
    top.add_argument("--queries", type=Path, help="CSV with a column `query`, or its folder")
    top.add_argument("--rounds", type=int, default=ROUNDS)
    return top


def run(args: argparse.Namespace) -> dict[str, object]:
    """Measure; returns the report."""
    release, towers = Release.load(args.release), load_towers(args.checkpoint)
    if not isinstance(towers, Make) or towers.release().release_id != release.release_id:
        raise RetrievalError(
            f"{args.checkpoint}: expected the MAKE checkpoint of release {release.release_id}; "
            "build that release, or give its checkpoint"
        )
    queries = queries_from_csv(args.queries) if args.queries else built_in_queries()
    preprocess = TextPreprocessor(
        tokenizer_of(args.release, models.QUERY_TOKENIZER, release), release.query, required=True
    )
    graph = graph_of(args.release, models.QUERY_TOWER, release.version)
    session = packed_graph(towers)

    def served(ids: Array, mask: Array) -> Array:
        return graph({models.QUERY_IDS.name: ids, models.QUERY_MASK.name: mask})[VECTOR]

    def drawn(texts: int) -> list[tuple[Array, Array]]:
        calls = REPEATS * max(TEXTS) // texts
        found = [preprocess([q.encode() for q in rng.choice(queries, texts)]) for _ in range(calls)]
        return [(batch.ids, batch.mask) for batch in found]

    rng, furthest = np.random.default_rng(0), 0.0
    ratios: Ratios = {most: {texts: [] for texts in TEXTS} for most in PACKS}
    for _ in track(range(args.rounds), "rounds", console=console, transient=True):
        for texts in TEXTS:
            batches = drawn(texts)
            for most in PACKS:
                packed = by_packs(session, most)
                off = np.abs(packed(*batches[0]) - served(*batches[0])).max()
                furthest = max(furthest, float(off))
                ratios[most][texts].append(rate(packed, batches) / rate(served, batches))
    show(ratios)
    medians = {
        str(most): {str(texts): round(statistics.median(of), 3) for texts, of in found.items()}
        for most, found in ratios.items()
    }
    return {"ratio": medians, "max_abs": furthest}


def show(ratios: Ratios) -> None:
    """One row a size of pack; medians, the lowest and the highest."""
    table = Table(title="packed ÷ runs of like length, texts a second")
    table.add_column("tokens of a pack", justify="right")
    for texts in TEXTS:
        table.add_column(f"{texts} texts", justify="right")
    for most, found in ratios.items():
        cells = [f"{statistics.median(r):.2f} [{min(r):.2f}, {max(r):.2f}]" for r in found.values()]
        table.add_row(str(most), *cells)
    console.print(table)


def main() -> None:
    """Command line."""
    print_report(run, parser().parse_args())


if __name__ == "__main__":
    main()
