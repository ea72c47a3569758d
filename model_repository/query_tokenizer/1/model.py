"""query → query_ids, query_mask, item_status."""

from __future__ import annotations

from typing import Any

from retrieval_contract.models import TOKENIZER_FILE
from retrieval_contract.preprocess import TextPreprocessor
from retrieval_contract.serving import (
    Metered,
    execute_merged,
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
        self.text = TextPreprocessor(tokenizer, text_spec(args), required=True)

    def execute(self, requests: list[Any]) -> list[Any]:
        return execute_merged(requests, ["query"], self._tokenize)

    def _tokenize(self, queries: Array) -> dict[str, Array]:
        batch = self.text(queries.reshape(-1).tolist())
        self.meters.prepared(batch.mask, batch.status)
        return {
            "query_ids": batch.ids,
            "query_mask": batch.mask,
            "item_status": strings(batch.status),
        }
