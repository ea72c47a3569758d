"""torch → raw FP32 ONNX: the two graphs that are served, before surgery."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrieval_contract import models
from retrieval_contract.tensors import Model, Sizes, UpTo
from towers.two_towers import TwoTowers

OPSET = 20
"""LayerNormalization and Gelu are single nodes from here on; 23 turns attention into an op
that ONNX Runtime 1.31 refuses with our masks."""
EPS = 1e-12


class QueryGraph(nn.Module):
    """Ids and mask → unit-norm query vector; zero for a row without a single token."""

    def __init__(self, towers: TwoTowers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, query_ids: Tensor, query_mask: Tensor) -> Tensor:
        vector = self.towers.encode_query(query_ids, query_mask)  # (B, V)
        return unit_or_zero(vector, query_mask.amax(1, keepdim=True).to(vector.dtype))


class ProductGraph(nn.Module):
    """Title and image → unit-norm product vector; zero for a row that has neither."""

    def __init__(self, towers: TwoTowers) -> None:
        super().__init__()
        self.towers = towers

    def forward(
        self,
        title_ids: Tensor,
        title_mask: Tensor,
        has_title: Tensor,
        pixels: Tensor,
        has_image: Tensor,
    ) -> Tensor:
        """`pixels` is float (B, 3, H, W), normalised; surgery puts the uint8 input before it."""
        title, image = has_title.to(pixels.dtype), has_image.to(pixels.dtype)
        vector = self.towers.encode_product(title_ids, title_mask, title, pixels, image)
        return unit_or_zero(vector, torch.maximum(title, image))


def unit_or_zero(vector: Tensor, there: Tensor) -> Tensor:
    """L2 norm of (B, V) in float32; rows whose flag (B, 1) is 0 become exact zeros."""
    return F.normalize(vector.float(), dim=-1, eps=EPS) * there


GRAPHS: dict[str, type[QueryGraph] | type[ProductGraph]] = {
    models.QUERY_TOWER.name: QueryGraph,
    models.PRODUCT_TOWER.name: ProductGraph,
}


def example_inputs(model: Model, sizes: Sizes, batch: int = 2) -> dict[str, Tensor]:
    """Tensors of the torch graph's inputs: ids random, all rows full, image normalised."""
    generator = torch.Generator().manual_seed(0)
    example: dict[str, Tensor] = {}
    for tensor in model.inputs:
        shape = (batch, *tensor.largest(sizes))
        if tensor is models.PIXELS:
            image = (batch, 3, sizes["image_height"], sizes["image_width"])
            example[tensor.name] = torch.randn(image, generator=generator)
        elif tensor.name.endswith("_ids"):
            example[tensor.name] = torch.randint(0, sizes["vocabulary"], shape, generator=generator)
        else:
            example[tensor.name] = torch.ones(shape, dtype=torch.long)
    return example


def onnx_from_towers(towers: TwoTowers, model: Model) -> onnx.ModelProto:
    """Trace one tower with the contract's names, a dynamic batch and dynamic token axes.

    The output is called `raw_<name>`: torch names inner values after its operators, and a
    clash makes an invalid file; surgery gives the contract's name.
    """
    release = towers.release()
    example = example_inputs(model, release.sizes)
    batch = torch.export.Dim("batch", min=1, max=model.batch.max)
    dynamic = {tensor.name: {0: batch} for tensor in model.inputs}
    for tensor in model.inputs:
        for i, (axis, dim) in enumerate(zip(tensor.axes, release.dims(tensor), strict=True), 1):
            if isinstance(axis, UpTo) and dim == -1:
                bound = release.sizes[axis.size]
                dynamic[tensor.name][i] = torch.export.Dim(axis.size, min=2, max=bound)
    buffer = io.BytesIO()
    with quiet():
        torch.onnx.export(
            GRAPHS[model.name](towers).eval(),
            tuple(example.values()),
            buffer,
            input_names=list(example),
            output_names=[f"raw_{t.name}" for t in model.outputs],
            dynamic_shapes=tuple(dynamic.values()),
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
        )
    return onnx.load_from_string(buffer.getvalue())


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter narrates on stdout and logs what it optimises; neither is a finding."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
