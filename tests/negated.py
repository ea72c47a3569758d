"""A release of its own that takes no export: another's, with the opposite of every vector."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import onnx

from retrieval_contract import models
from retrieval_contract.probes import Probes
from retrieval_contract.release import Release


def negated(release: Path, releases: Path) -> Path:
    """A release of its own whose vectors are all the opposite of another's."""
    old = Release.load(release)
    new = dataclasses.replace(old, hashes=old.hashes | {"weights": "the opposite"})
    folder = releases / new.release_id
    shutil.copytree(release, folder, copy_function=shutil.copyfile)
    new.save(folder)
    probes = Probes.load(folder)
    dataclasses.replace(
        probes,
        release_id=new.release_id,
        query_vectors=-probes.query_vectors,
        product_vectors=-probes.product_vectors,
    ).save(folder)
    for path in folder.rglob("*.pbtxt"):
        text = path.read_text().replace(old.release_id, new.release_id)
        path.write_text(text.replace(str(old.version), str(new.version)))
    for entry in (folder / "model_repository").iterdir():
        (entry / str(old.version)).rename(entry / str(new.version))
    for tower in models.TOWERS:
        path = folder / "model_repository" / tower.name / str(new.version) / models.ONNX_FILE
        graph = onnx.load(path)
        (out,) = tower.outputs
        for node in graph.graph.node:
            node.output[:] = ["opposite" if name == out.name else name for name in node.output]
        graph.graph.node.append(onnx.helper.make_node("Neg", ["opposite"], [out.name]))
        onnx.save(graph, path)
    return folder
