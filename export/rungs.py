"""python -m export parity: every rung of the ladder, for both towers, on real rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
from rich.console import Console
from rich.progress import Progress
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from export.config_from_contract import BACKENDS
from export.half import half_of, islands_with
from export.ladder import Found, Rung, Sample, Search, by_inputs, climb, encoded, samples_of
from export.onnx_from_towers import onnx_from_towers
from export.parity import (
    BF16,
    EXACT,
    HALF,
    HALF_REFERENCE,
    Budget,
    Encode,
    normalised,
    onnx_runtime,
    openvino,
    reference,
    torch_vectors,
)
from export.publish import NO_ISLANDS, Islands, release_of
from export.report import table_of, write_page
from export.surgery import operate
from retrieval_client import Encoder, Settings
from retrieval_client.channel import channel_to
from retrieval_contract import models
from retrieval_contract.errors import ExportError, ReleaseMismatch, SourceError
from retrieval_contract.graph import why_no_bf16
from retrieval_contract.release import Precision
from retrieval_contract.tensors import Array, Model
from towers.evaluate import part_of, side_of
from towers.learning.catalog import ProductData, read_data
from towers.learning.split import fraction_of
from towers.two_towers import TwoTowers

REFERENCE_ROWS = 6
MOST_QUERIES = 400


@dataclass(frozen=True)
class Asked:
    """What the ladder is climbed with; `islands`: by tower, beside those of the rule."""

    checkpoint: str
    data: Path
    products: int
    served: str | None
    islands: Islands = field(default_factory=dict)


def climb_all(towers: TwoTowers, asked: Asked, out: Path, console: Console) -> dict[str, object]:
    """All rungs; writes `parity.html` under `out`. "ok" is false where one is past its budget."""
    products = sampled(asked)
    queries = products.queries[:MOST_QUERIES]
    samples = samples_of(towers.spec, [query.text for query in queries], products)
    search = Search(queries, products.ids)
    ladder: list[Found] = []
    with Progress(console=console, transient=True) as bar:
        with_torch = {}
        for model in models.TOWERS:
            sample = samples[model.name]
            task = bar.add_task(f"{model.name}: torch", total=len(sample))
            vectors = encoded(
                by_inputs(torch_encode(towers, model)),
                sample,
                lambda rows, task=task: bar.advance(task, rows),
            )
            with_torch[model.name] = replace(sample, vectors=vectors)
        for rung in rungs_of(towers, asked.served, asked.islands):
            total = rung.rows or len(samples[rung.tower.name])
            task = bar.add_task(f"{rung.tower.name}: {rung.name}", total=total)
            ladder.append(
                climb(rung, with_torch, search, lambda rows, task=task: bar.advance(task, rows))
            )
    console.print(table_of(ladder))
    if why := why_no_bf16():
        console.print(f"left out: OpenVINO bf16 ({why})", markup=False)
    shown = max(Budget.recall, 1 / len(queries))
    about = (
        f"{asked.data.name}: {len(products)} products, {len(queries)} queries, which show a change "
        f"of Recall@10 from {shown:.4f}"
    )
    release_id = release_of(towers, Precision.FP32, asked.islands).release_id
    write_page(out / "parity.html", ladder, f"{about}; release {release_id}")
    console.print(f"{about}; page: {out / 'parity.html'}", markup=False)
    return {
        "rungs": [found.as_json() for found in ladder],
        "queries": len(queries),
        "recall@10_shown_from": round(shown, 5),
        "ok": not any(found.faults for found in ladder if not found.rung.opt_in),
    }


def sampled(asked: Asked) -> ProductData:
    """Products by a hash of their ids, of those that were not trained on; their queries."""
    data = read_data(asked.data)
    data = part_of(data, side_of(asked.data, asked.checkpoint), [asked.checkpoint])
    order = sorted(range(len(data)), key=lambda row: fraction_of(data.ids[row]))
    some = data.select(order[: asked.products])
    if not some.queries:
        remedy = "give a data folder with queries.csv and qrels.csv"
        if data.queries:
            remedy = f"of all {len(data)} some are judged: take more with --products"
        raise SourceError(
            f"{asked.data}: expected queries with judgements of {len(some)} products, found none; "
            f"{remedy}"
        )
    return some


def rungs_of(
    towers: TwoTowers, served: str | None, islands: Islands = NO_ISLANDS
) -> Iterator[Rung]:
    """From the exporter's graph to the server, tower by tower."""
    for model in models.TOWERS:
        raw = onnx_from_towers(towers, model)
        graph = operate(raw, model, towers.release())
        half = half_of(graph, islands_with(islands.get(model.name, ()), graph))
        for name, budget, encode, rows in (
            ("ONNX FP32, as traced", EXACT, as_traced(towers, raw), None),
            ("ONNX FP32, after surgery", EXACT, onnx_runtime(graph), None),
            ("ONNX FP16", HALF, onnx_runtime(half), None),
            ("ONNX FP16, reference", HALF_REFERENCE, reference(half), REFERENCE_ROWS),
        ):
            yield Rung(name, model, budget, by_inputs(encode), rows)
        if not why_no_bf16():
            yield Rung("OpenVINO bf16", model, BF16, by_inputs(openvino(graph)), opt_in=True)
        if served:
            yield over_grpc(towers, model, served, islands)


def torch_encode(towers: TwoTowers, model: Model) -> Encode:
    """The reference of every rung."""
    return lambda inputs: torch_vectors(towers, model, dict(inputs))


def as_traced(towers: TwoTowers, raw: onnx.ModelProto) -> Encode:
    """The exporter's graph takes int64 ids and normalised pixels."""
    run = onnx_runtime(raw)

    def encode(inputs: Mapping[str, Array]) -> Array:
        feed = {name: array.astype(np.int64) for name, array in inputs.items()}
        if models.PIXELS.name in inputs:
            pixels = normalised(inputs[models.PIXELS.name], towers.spec.image)
            feed[models.PIXELS.name] = pixels.numpy()
        return run(feed)

    return encode


def over_grpc(towers: TwoTowers, model: Model, address: str, islands: Islands = NO_ISLANDS) -> Rung:
    """Through a running server, in its precision: texts and pictures in, vectors out."""
    settings = replace(Settings.from_env(), triton=address, timeout_s=60.0)
    encoder = Encoder(settings)
    precisions = {release_of(towers, of, islands).release_id: of for of in Precision}
    if (serves := encoder.served().release_id) not in precisions:
        raise ReleaseMismatch(
            f"{address}: expected release {' or '.join(precisions)} of this checkpoint, it serves "
            f"{serves}; build and serve this checkpoint, with the same --islands"
        )
    name, budget = judged_by(precisions[serves], backend_of(settings, model))

    def encode(sample: Sample) -> Array:
        if model is models.QUERY_TOWER:
            done = encoder.encode_queries([text.decode() for text in sample.raw[models.QUERY.name]])
        else:
            titles = [title.decode() for title in sample.raw[models.TITLE.name]]
            done = encoder.encode_products(titles, sample.raw[models.IMAGE.name])
        if refused := [str(error) for error in done.errors if error]:
            raise ExportError(f"{address}: {len(refused)} rows refused, such as {refused[0]}")
        return done.vectors

    return Rung(name, model, budget, encode)


def judged_by(precision: Precision, backend: str) -> tuple[str, Budget]:
    """The name and the budget of what a server gives: an engine of any release is in FP16."""
    if backend == BACKENDS[models.Target.GPU]:
        return "served over gRPC, engine", HALF
    return {
        Precision.FP32: ("served over gRPC", EXACT),
        Precision.BF16: ("served over gRPC, bf16", BF16),
    }[precision]


def backend_of(settings: Settings, model: Model) -> str:
    """What runs a tower on the server."""
    with channel_to(settings) as channel:
        request = pb.ModelConfigRequest(name=model.name)
        reply = GRPCInferenceServiceStub(channel).ModelConfig(request, timeout=settings.timeout_s)
    backend: str = reply.config.backend
    return backend
