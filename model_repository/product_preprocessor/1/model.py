"""title, image → title_ids, title_mask, has_title, pixels, has_image, item_status."""

from __future__ import annotations

from retrieval_contract.models import ITEM_STATUS, TITLE_MASK, TOKENIZER_FILE
from retrieval_contract.preprocess import ProductPreprocessor
from retrieval_contract.serving import BehindDoor, image_spec, strings, text_spec, version_folder
from retrieval_contract.tensors import Array


class TritonPythonModel(BehindDoor):
    """Triton's Python model interface."""

    def load(self, args: dict[str, str]) -> None:
        tokenizer = (version_folder(args) / TOKENIZER_FILE).read_text("utf-8")
        self.products = ProductPreprocessor(tokenizer, text_spec(args), image_spec(args))
        self.products.image.on_picture = self.meters.looked_at_picture

    def compute(self, *arrays: Array) -> dict[str, Array]:
        batch = self.products(*(array.reshape(-1).tolist() for array in arrays))
        self.meters.prepared(batch.tensors[TITLE_MASK.name], batch.status)
        return batch.tensors | {ITEM_STATUS.name: strings(batch.status)}
