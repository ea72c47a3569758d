"""How a text is written on the wire: one spelling each."""

from __future__ import annotations

from retrieval_contract.preprocess import one_spelling

LONGEST = 4096
"""Bytes; a longer text goes as it is, and the server says whether it takes it."""


def text_bytes(text: str) -> bytes:
    """UTF-8; a lone surrogate goes as it is, so that the server says which row is not UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def query_bytes(text: str) -> bytes:
    """A query as the server's tokenizer will read it: a cache then knows it by one key.

    What the server refuses (NUL, lone surrogates) is left for it to refuse.
    """
    raw = text_bytes(text)
    if b"\0" in raw or len(raw) > LONGEST or any("\ud800" <= c <= "\udfff" for c in text):
        return raw
    return one_spelling(text).encode()
