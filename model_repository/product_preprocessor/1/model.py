"""title, image → title_ids, title_mask, has_title, pixels, has_image, item_status."""

from __future__ import annotations

from typing import Any

from retrieval_contract.models import TOKENIZER_FILE
from retrieval_contract.preprocess import ProductPreprocessor
from retrieval_contract.serving import (
    Metered,
    execute_merged,
    image_spec,
    strings,
    text_spec,
    version_folder,
)
from retrieval_contract.tensors import Array


class TritonPythonModel(Metered):
    """Triton's Python model interface."""

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        tokenizer = (version_folder(args) / TOKENIZER_FILE).read_text("utf-8")
        self.products = ProductPreprocessor(tokenizer, text_spec(args), image_spec(args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return execute_merged(requests, ["title", "image"], self._prepare)

    def _prepare(self, titles: Array, images: Array) -> dict[str, Array]:
        batch = self.products(titles.reshape(-1).tolist(), images.reshape(-1).tolist())
        self.meters.prepared(batch.tensors["title_mask"], batch.status)
        return batch.tensors | {"item_status": strings(batch.status)}
