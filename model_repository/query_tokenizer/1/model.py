"""query → query_ids, query_mask, item_status."""

from __future__ import annotations

from retrieval_contract.models import ITEM_STATUS, QUERY_IDS, QUERY_MASK, TOKENIZER_FILE
from retrieval_contract.preprocess import TextPreprocessor
from retrieval_contract.serving import BehindDoor, strings, text_spec, version_folder
from retrieval_contract.tensors import Array


class TritonPythonModel(BehindDoor):
    """Triton's Python model interface."""

    def load(self, args: dict[str, str]) -> None:
        tokenizer = (version_folder(args) / TOKENIZER_FILE).read_text("utf-8")
        self.text = TextPreprocessor(tokenizer, text_spec(args), required=True)

    def compute(self, *arrays: Array) -> dict[str, Array]:
        batch = self.text(arrays[0].reshape(-1).tolist())
        self.meters.prepared(batch.mask, batch.status)
        return {
            QUERY_IDS.name: batch.ids,
            QUERY_MASK.name: batch.mask,
            ITEM_STATUS.name: strings(batch.status),
        }
