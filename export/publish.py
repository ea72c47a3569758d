"""Proved graphs → a release folder that servers load.

    <releases>/<release_id>/
        release.json          sizes, preprocessing, hashes, release_id
        probes.json           fixed queries and products with their vectors
        manifest.json         parity, file hashes, versions, the command: how to remake and trust it
        model_repository/     what `tritonserver --model-repository` takes
    <releases>/latest         link to the one built last

The folder is written under another name and renamed, so it is whole or not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
from PIL import Image
from rich.console import Console

from deploy.engines.profiles import profiles_of
from deploy.locking import locked
from export.config_from_contract import configs_of, text_of
from export.half import half_of, half_share, islands_with, typed
from export.onnx_from_towers import onnx_from_towers
from export.parity import (
    BF16,
    EXACT,
    HALF,
    HALF_REFERENCE,
    SEED,
    cases,
    few,
    onnx_runtime,
    openvino,
    parity,
    reference,
    torch_vectors,
)
from export.surgery import operate
from retrieval_contract import models
from retrieval_contract.preprocess import ProductPreprocessor, TextPreprocessor
from retrieval_contract.probes import QUERIES, TITLES, Probes, probe_pictures
from retrieval_contract.release import Precision, Release, contract_fingerprint, sha256_of_json
from retrieval_contract.tensors import Dtype, Engine, Ensemble, Model
from towers.two_towers import TwoTowers

Islands = Mapping[str, Sequence[str]]
NO_ISLANDS: Islands = MappingProxyType({})
ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "model_repository"
MANIFEST_FILE = "manifest.json"
REPOSITORY = "model_repository"
LATEST = "latest"
ROOMS = ("export", "towers", "retrieval_contract", "model_repository")
BESIDE = ("deploy/engines/profiles.py", "deploy/profiles/default.toml", "deploy/tuning.py")
"""What writes the configs, and is of another room."""
TOOLS = (
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "onnx_graphsurgeon",
    "onnxscript",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
)


def write_onnx(
    towers: TwoTowers,
    folder: Path,
    console: Console,
    islands: Islands = NO_ISLANDS,
    precision: str = Precision.FP32,
) -> list[dict[str, Any]]:
    """Export both towers into `folder`, each in FP32 and FP16, beside `release.json`.

    In bf16 it is the FP32 graph that is served, once it has been proved in bf16 as well.

    `islands`: by tower, nodes to leave in FP32 beside those of the rule. Returns what the
    manifest says of each. Raises ExportError, and then writes no graph of that tower.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for model in models.TOWERS:
        with console.status(f"{model.name}: tracing, cutting, comparing"):
            facts = write_tower(towers, model, folder, islands.get(model.name, ()), precision)
        console.print(f"{model.name}: {facts['nodes']} nodes, {facts['half_share']:.0%} in half")
        for name, proof in facts["parity"].items():
            console.print(
                f"  torch ↔ {name}: max abs {proof['max_abs']:.1e}, "
                f"min cosine {proof['min_cosine']:.7f} over {proof['cases']} cases"
            )
        found.append(facts)
    release_of(towers, precision, islands).save(folder)
    return found


def write_tower(
    towers: TwoTowers,
    model: Model,
    folder: Path,
    more_islands: Sequence[str] = (),
    precision: str = Precision.FP32,
) -> dict[str, Any]:
    """One tower's two graphs, proved; what the manifest says of them."""
    passes: list[dict[str, object]] = []

    def tell(name: str, before: int, after: int) -> None:
        passes.append({"pass": name, "before": before, "after": after})

    graph = operate(onnx_from_towers(towers, model), model, towers.release(), tell)
    islands = islands_with(more_islands, graph)
    half = half_of(graph, islands)
    tried = list(cases(model, towers))
    wanted = [torch_vectors(towers, model, inputs) for inputs in tried]
    proofs = {
        "ONNX FP32": parity(towers, model, onnx_runtime(graph), EXACT, tried, wanted),
        "ONNX FP16": parity(towers, model, onnx_runtime(half), HALF, tried, wanted),
        "ONNX FP16, reference": parity(towers, model, reference(half), HALF_REFERENCE, few(tried)),
    }
    if precision == Precision.BF16:
        proofs["OpenVINO bf16"] = parity(towers, model, openvino(graph), BF16, tried, wanted)
    onnx.save(graph, folder / graph_file(model, models.ONNX_FILE))
    onnx.save(half, folder / graph_file(model, models.HALF_FILE))
    return {
        "tower": model.name,
        "opset": graph.opset_import[0].version,
        "nodes": len(graph.graph.node),
        "passes": passes,
        "islands": islands,
        "half_share": round(half_share(typed(half)), 3),
        "parity": {name: proof.as_json() for name, proof in proofs.items()},
    }


def release_of(towers: TwoTowers, precision: str, islands: Islands = NO_ISLANDS) -> Release:
    """Who the towers are in that precision; with further islands they are another release."""
    release = replace(towers.release(), precision=precision)
    if more := some(islands):
        release = replace(release, hashes=release.hashes | {"islands": sha256_of_json(more)})
    return release


def some(islands: Islands) -> dict[str, list[str]]:
    """Towers that have any, each node once and in order: what the same islands always read as."""
    return {tower: sorted(set(names)) for tower, names in islands.items() if names}


def graph_file(model: Model, name: str) -> str:
    """Where `write_onnx` puts a graph: the tower's name and the ending of the file's."""
    return f"{model.name}{name.removeprefix('model')}"


def publish(
    towers: TwoTowers,
    releases: Path,
    console: Console,
    islands: Islands = NO_ISLANDS,
    precision: str = Precision.FP32,
    command: Sequence[str] | None = None,
) -> Path:
    """Build `<releases>/<release_id>` unless this very code built it already; return it.

    `command`: the line that asks for it, where one does, for the manifest. Who comes while another
    builds in the same folder waits, and finds it built.
    """
    release = release_of(towers, precision, islands)
    home = releases / release.release_id
    releases.mkdir(parents=True, exist_ok=True)
    with locked(releases / ".lock"):
        if _is_built(home):
            console.print(f"release {release.release_id} is already built: {home}")
        else:
            _build(towers, release, home, console, islands, command)
            console.print(f"release {release.release_id} built: {home}")
        _point_latest(home)
    return home


def _build(
    towers: TwoTowers,
    release: Release,
    home: Path,
    console: Console,
    islands: Islands,
    command: Sequence[str] | None,
) -> None:
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".building-") as name:
        folder = Path(name) / release.release_id
        graphs = write_onnx(towers, folder, console, islands, release.precision)
        probes_of(towers, release, folder).save(folder)
        assemble(towers, release, folder)
        write_manifest(folder, release, graphs, islands, command)
        make_read_only(folder)
        if home.exists():  # made by other code: replace it whole
            home.rename(Path(name) / "old")
        folder.rename(home)


def assemble(towers: TwoTowers, release: Release, folder: Path) -> None:
    """Turn `folder`'s two graphs into a complete model repository inside it."""
    tokenizers = {
        models.QUERY_TOKENIZER.name: towers.spec.query.tokenizer_json,
        models.PRODUCT_PREPROCESSOR.name: towers.spec.title.tokenizer_json,
    }
    write_configs(folder / REPOSITORY, release, release.release_id)
    for part in (*models.MODELS, *models.ENSEMBLES):
        version_folder = folder / REPOSITORY / part.name / str(release.version)
        version_folder.mkdir()
        if isinstance(part, Ensemble) and part not in models.IN_ONE:
            # Triton wants the folder; copies to object stores and images lose empty ones.
            (version_folder / ".keep").touch()
            continue
        source = SOURCES / part.name / "1" / models.PYTHON_FILE
        shutil.copyfile(source, version_folder / models.PYTHON_FILE)
        if isinstance(part, Model) and part.engine is Engine.NETWORK:
            for name in (models.ONNX_FILE, models.HALF_FILE):
                (folder / graph_file(part, name)).rename(version_folder / name)
            continue
        if isinstance(part, Model):
            (version_folder / models.TOKENIZER_FILE).write_text(tokenizers[part.name], "utf-8")
        _write_warmup(part, folder / REPOSITORY / part.name / "warmup")


def probes_of(towers: TwoTowers, release: Release, folder: Path) -> Probes:
    """Golden probes by the FP32 graphs in `folder`, in the release's precision, through the
    preprocessing that serves."""
    spec, images = towers.spec, probe_pictures()
    query = TextPreprocessor(spec.query.tokenizer_json, spec.query.spec, required=True)
    product = ProductPreprocessor(spec.title.tokenizer_json, spec.title.spec, spec.image)
    texts = query([text.encode() for text in QUERIES])
    given = {
        models.QUERY_TOWER: {models.QUERY_IDS.name: texts.ids, models.QUERY_MASK.name: texts.mask},
        models.PRODUCT_TOWER: product([title.encode() for title in TITLES], images).tensors,
    }
    runtime = openvino if release.precision == Precision.BF16 else onnx_runtime
    vectors = {
        model: runtime(onnx.load(folder / graph_file(model, models.ONNX_FILE)))(tensors)
        for model, tensors in given.items()
    }
    return Probes(
        release.release_id,
        QUERIES,
        vectors[models.QUERY_TOWER],
        TITLES,
        images,
        vectors[models.PRODUCT_TOWER],
    )


def write_configs(repository: Path, release: Release, release_id: str) -> None:
    """Write every config file of every entry under `repository`."""
    for part in (*models.MODELS, *models.ENSEMBLES):
        for name, config in configs_of(part, release, release_id).items():
            path = repository / part.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text_of(config), "utf-8")


def _write_warmup(model: Model | Ensemble, folder: Path) -> None:
    """One row for each BYTES input, as Triton reads it: four length bytes, then the value."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture, "PNG")
    folder.mkdir()
    for tensor in model.inputs:
        if tensor.dtype is Dtype.BYTES:
            value = picture.getvalue() if tensor is models.IMAGE else b"red shoes"
            (folder / tensor.name).write_bytes(struct.pack("<I", len(value)) + value)


def write_manifest(
    folder: Path,
    release: Release,
    graphs: list[dict[str, Any]],
    islands: Islands,
    command: Sequence[str] | None,
) -> None:
    """Everything needed to remake and to trust the folder."""
    manifest = {
        "release_id": release.release_id,
        "command": command and list(command),
        "code": code_fingerprint(),
        "contract": contract_fingerprint(),
        "seed": SEED,
        "more_islands": some(islands),
        "graphs": graphs,
        "profiles": {
            model.name: [asdict(profile) for profile in profiles_of(model, release)]
            for model in models.TOWERS
        },
        "versions": {tool: version(tool) for tool in TOOLS} | {"python": sys.version.split()[0]},
        "files": hashes_of_files(folder),
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def hashes_of_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its path inside `folder`, but for the manifest and bytecode."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_FILE and path.suffix != ".pyc"
    }


def code_fingerprint(root: Path = ROOT) -> str:
    """SHA-256 over the sources that decide what a release folder holds, by their paths."""
    sources = [path for room in ROOMS for path in (root / room).rglob("*.py")]
    sources += [root / name for name in BESIDE]
    return sha256_of_json(
        {
            path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sources
        }
    )


def make_read_only(folder: Path) -> None:
    """Nobody edits a release: other content is another release, other code replaces it whole.
    Everybody may read it, whatever the umask: a container's user is another one."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o444)


def _is_built(home: Path) -> bool:
    """Whether this very code built it, and every file is what was written."""
    try:
        manifest = json.loads((home / MANIFEST_FILE).read_text("utf-8"))
        said = manifest["code"], manifest["files"]
    except (OSError, ValueError, KeyError):
        return False
    return said == (code_fingerprint(), hashes_of_files(home))


def _point_latest(home: Path) -> None:
    link = home.parent / f".{LATEST}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(home.name)
    link.replace(home.parent / LATEST)
