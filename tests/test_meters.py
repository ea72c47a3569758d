"""Our counters on Triton's metrics port say exactly what was asked."""

from __future__ import annotations

import re
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np

from deploy import local
from retrieval_client import Encoder
from retrieval_contract import models
from retrieval_contract.lengths import like_lengths
from retrieval_contract.preprocess import ProductPreprocessor, TextPreprocessor
from retrieval_contract.release import Release
from tests.conftest import photo

LINE = re.compile(r"^(retrieval_\w+)\{(.*)\} (\S+)$", re.M)
Counts = dict[tuple[str, str, str], int]
"""By metric without prefix and `_total`, model and reason."""


def counts(triton: local.Server) -> Counts:
    """All of ours, as they stand."""
    url = f"http://{triton.host}:{triton.ports.metrics}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    found = {}
    for name, labels, value in LINE.findall(text):
        said = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        short = name.removeprefix("retrieval_").removesuffix("_total")
        found[short, said["model"], said.get("reason", "")] = int(float(value))
    return found


def settled(triton: local.Server) -> Counts:
    """Once every model has told what it had: two looks, further apart than two tellings."""
    time.sleep(0.7)
    before = counts(triton)
    while True:
        time.sleep(0.7)
        if (now := counts(triton)) == before:
            return now
        before = now


def since(now: Counts, before: Counts) -> Counts:
    """What has changed."""
    return {key: n for key, count in now.items() if (n := count - before.get(key, 0))}


def tokenizer(folder: Path, model: models.Model) -> str:
    return next(folder.glob(f"model_repository/{model.name}/*/{models.TOKENIZER_FILE}")).read_text()


def test_known_requests_are_counted_exactly(
    triton: local.Server, encoder: Encoder, release_folder: Path, release: Release
) -> None:
    queries = ["red dress", "navy blue shirt for men", "", "shoes " * 12, "\0", " "]
    titles, images = ["a red dress", "", "steel knife"], [photo(), photo(), b"no picture"]
    before = settled(triton)
    encoder.encode_queries(queries)
    encoder.encode_products(titles, images)
    found = since(settled(triton), before)

    prepare = TextPreprocessor(
        tokenizer(release_folder, models.QUERY_TOKENIZER), release.query, required=True
    )
    lengths = np.maximum(prepare([q.encode() for q in queries]).mask.sum(1), 1)
    runs = like_lengths(lengths)
    computed = sum(int(lengths[rows].max()) * len(rows) for rows in runs)
    real = int(prepare([q.encode() for q in queries]).mask.sum())
    product = ProductPreprocessor(
        tokenizer(release_folder, models.PRODUCT_PREPROCESSOR), release.title, release.image
    )
    mask = product([t.encode() for t in titles], images).tensors[models.TITLE_MASK.name]
    expected = Counter(
        {
            ("runs", "query_encoder", ""): len(runs),
            ("rows", "query_encoder", ""): len(queries),
            ("tokens", "query_encoder", ""): real,
            ("padding_tokens", "query_encoder", ""): computed - real,
            ("items_refused", "query_encoder", "empty"): 2,
            ("items_refused", "query_encoder", "nul"): 1,
            ("items_refused", "product_preprocessor", "image_format"): 1,
        }
    )
    expected["pictures", "product_preprocessor", ""] = len(images)
    for model in ("product_preprocessor", "product_tower"):
        expected["runs", model, ""] = 1
        expected["rows", model, ""] = len(titles)
        expected["tokens", model, ""] = int(mask.sum())
        expected["padding_tokens", model, ""] = mask.size - int(mask.sum())
    assert len(runs) > 1, "lengths too much alike: nothing is cut"
    assert computed > real, "no padding: nothing is counted"
    assert found == dict(expected)


def test_every_model_names_its_release_and_hides_no_first_refusal(
    triton: local.Server, release: Release
) -> None:
    url = f"http://{triton.host}:{triton.ports.metrics}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    said = re.findall(r"^retrieval_release_info\{(.*)\} 1$", text, re.M)
    python = {m.name for m in models.MODELS} | {e.name for e in models.IN_ONE}
    assert {dict(re.findall(r'(\w+)="(\w+)"', labels))["model"] for labels in said} == python
    assert all(f'release_id="{release.release_id}"' in labels for labels in said)
    found = counts(triton)
    for reason in ("busy", "late"):
        assert ("requests_refused", "query_encoder", reason) in found
