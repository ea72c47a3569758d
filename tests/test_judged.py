"""Judged queries, as a folder holds them, and what a ranking is worth by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrieval_client.judged import Asked, ndcg
from retrieval_contract.errors import SourceError


def test_ndcg_by_hand() -> None:
    assert ndcg(["a", "x", "b"], {"a": 1, "b": 2}) == pytest.approx(
        (1 + 3 / 2) / (3 + 1 / np.log2(3))
    )
    assert ndcg(["x"], {"a": 1}) == 0
    assert ndcg(["a"], {}) == 0


def test_judged_queries_are_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "queries.csv").write_text("query_id,query\n1,red\n2,blue\n2,blue\n")
    assert Asked.of_folder(tmp_path) == Asked(["red", "blue"])
    (tmp_path / "qrels.csv").write_text("query_id,id,rel\n1,a,2\n1,b,0\n3,c,1\n")
    assert Asked.of_folder(tmp_path) == Asked(["red"], [{"a": 2}])
    (tmp_path / "qrels.csv").write_text("query_id,id\n1,a\n")
    with pytest.raises(SourceError, match=r"qrels.csv: expected the columns .* got no rel"):
        Asked.of_folder(tmp_path)
    with pytest.raises(SourceError, match="expected a CSV file in UTF-8"):
        Asked.read(tmp_path / "missing.csv")
