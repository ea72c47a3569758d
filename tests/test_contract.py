"""The contract: values that cannot be wrong, and a release id that moves with what matters."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from export.__main__ import reference_release
from retrieval_contract import models
from retrieval_contract.errors import ContractError, ItemError, Reason
from retrieval_contract.models import QUERY, QUERY_ENCODER, QUERY_IDS, QUERY_TOWER, QUERY_VECTOR
from retrieval_contract.preprocess import ImagePreprocessor, TextPreprocessor
from retrieval_contract.release import Release
from retrieval_contract.tensors import Batch, Dtype, Ensemble, Model, Tensor
from tests.conftest import photo

SIZES = reference_release().sizes


def test_importing_the_contract_loads_numpy_and_nothing_heavier() -> None:
    heavy = {"torch", "PIL", "tokenizers", "onnx", "tritonclient"}
    code = (
        "import sys, retrieval_contract.models, retrieval_contract.preprocess; "
        f"print({heavy} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "set()", loaded


def test_every_tensor_has_dims_from_the_reference_release() -> None:
    for part in (*models.MODELS, *models.ENSEMBLES):
        for tensor in (*part.inputs, *part.outputs):
            assert len(tensor.dims(SIZES)) == len(tensor.axes)
            assert all(d == -1 or d > 0 for d in tensor.dims(SIZES))
    assert QUERY_VECTOR.dims(SIZES) == (384,)
    assert QUERY_IDS.dims(SIZES) == (-1,)
    assert QUERY_IDS.largest(SIZES) == (32,)


def test_equal_names_are_equal_tensors() -> None:
    seen: dict[str, Tensor] = {}
    for part in (*models.MODELS, *models.ENSEMBLES):
        for tensor in (*part.inputs, *part.outputs):
            assert seen.setdefault(tensor.name, tensor) == tensor


def test_a_size_that_the_release_lacks_is_named() -> None:
    with pytest.raises(ContractError, match="no size 'height'"):
        Tensor("x", Dtype.FP32, ("height",), "").dims({"width": 3})


def test_a_broken_chain_cannot_be_declared() -> None:
    with pytest.raises(ContractError, match="nothing feeds query_tower"):
        Ensemble("broken", inputs=(QUERY,), outputs=(QUERY_VECTOR,), steps=(QUERY_TOWER,))
    other = dataclasses.replace(QUERY_VECTOR, dtype=Dtype.UINT8)
    with pytest.raises(ContractError, match="nothing feeds the reply"):
        Ensemble("broken", (QUERY,), (other,), QUERY_ENCODER.steps)


def test_a_model_cannot_use_one_name_twice() -> None:
    with pytest.raises(ContractError, match="stands twice"):
        Model("m", QUERY_TOWER.engine, (QUERY_IDS,), (QUERY_IDS,), Batch(opt=1, max=2))


def test_batches_are_ordered() -> None:
    with pytest.raises(ContractError, match="min <= opt <= max"):
        Batch(opt=8, max=4)


@pytest.mark.parametrize(
    "change",
    [
        {"vector_dim": 128},
        {"precision": "bf16"},
        {"hashes": {"weights": "other"}},
        {"hashes": {"query_tokenizer": "other"}},
        {"vocabulary": 7},
        {"query": dataclasses.replace(reference_release().query, max_tokens=16)},
        {"title": dataclasses.replace(reference_release().title, max_chars=9)},
        {"image": dataclasses.replace(reference_release().image, width=96)},
        {"image": dataclasses.replace(reference_release().image, fit="crop")},
    ],
    ids=lambda change: f"{next(iter(change))}",
)
def test_the_release_id_moves_with_every_part(change: dict[str, object]) -> None:
    release = reference_release()
    assert dataclasses.replace(release, **change).release_id != release.release_id
    assert dataclasses.replace(release).release_id == release.release_id


def test_the_release_id_moves_with_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    before = reference_release().release_id
    monkeypatch.setattr("retrieval_contract.release.PREPROCESSING_VERSION", 2)
    assert reference_release().release_id != before


def test_a_release_comes_back_from_its_file(tmp_path: Path) -> None:
    release = reference_release()
    release.save(tmp_path)
    assert Release.load(tmp_path) == release


def test_an_edited_release_file_is_refused(tmp_path: Path) -> None:
    reference_release().save(tmp_path)
    path = tmp_path / "release.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"vector_dim": 128}))
    with pytest.raises(ContractError, match="was edited or made by another version"):
        Release.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ContractError, match="not a release file"):
        Release.load(tmp_path)
    path.unlink()
    with pytest.raises(ContractError, match="not found; build it with"):
        Release.load(tmp_path)


def test_a_release_with_a_size_of_zero_cannot_be() -> None:
    with pytest.raises(ContractError, match="vector_dim must be at least 1"):
        dataclasses.replace(reference_release(), vector_dim=0)


def test_an_item_error_survives_the_wire() -> None:
    error = ItemError(Reason.TOO_LONG, "expected at most 3: got 4")
    assert str(pickle.loads(pickle.dumps(error))) == str(error), "as it comes from a worker"
    back = ItemError.from_status(str(error))
    assert (back.reason, back.detail) == (error.reason, error.detail)
    assert ItemError.from_status("something new").reason is Reason.INTERNAL


def toy_tokenizer() -> str:
    """A WordPiece tokenizer of a few words, as the JSON that a release holds."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "dress", "##es", "blue", "shirt"]
    tokenizer = Tokenizer(WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    text: str = tokenizer.to_str()
    return text


def test_text_becomes_padded_ids() -> None:
    text = TextPreprocessor(toy_tokenizer(), reference_release().query, required=True)
    batch = text([b"Red  dresses", b"blue", b"", b"\xff"])
    assert batch.ids.shape == (4, 8)  # rounded up to the padding step
    assert batch.ids[0, :5].tolist() == [2, 4, 5, 6, 3]
    assert batch.mask.sum(1).tolist() == [5, 3, 0, 0]
    assert [s.split(":")[0] for s in batch.status] == ["", "", "empty", "not_utf8"]
    assert batch.ids.dtype == QUERY_IDS.dtype.numpy


def test_long_text_is_cut_to_the_towers_length_but_never_silently_past_the_limit() -> None:
    text = TextPreprocessor(toy_tokenizer(), reference_release().query, required=True)
    batch = text([b"red " * 200, b"red " * 400])
    assert batch.ids.shape == (2, 32)
    assert batch.mask.sum(1).tolist() == [32, 0]
    assert batch.ids[0, -1] == 3  # the closing token survives the cut
    assert batch.status[1].startswith("too_long: expected at most 1000 characters, got 1599")


@pytest.mark.parametrize(
    ("fit", "black_rows", "black_columns"),
    [("pad", 16, 64), ("crop", 80, 128), ("squash", 80, 64)],
)
def test_pictures_fit_the_release_in_three_ways(
    fit: str, black_rows: int, black_columns: int
) -> None:
    """A 400 x 100 picture whose middle half is black, into 128 x 160."""
    spec = dataclasses.replace(reference_release().image, fit=fit)
    pixels = ImagePreprocessor(spec).pixels(photo((0, 0, 0), (400, 100), "PNG"))
    assert pixels.shape == (spec.height, spec.width, 3)
    dark = pixels.max(2) < 128
    assert abs(int(dark[:, spec.width // 2].sum()) - black_rows) <= 2
    assert abs(int(dark[spec.height // 2].sum()) - black_columns) <= 2
