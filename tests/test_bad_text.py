"""Bad and odd text on the real server: refused by row with a reason, or served well."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import numpy as np
import pytest

from deploy.server import Server
from retrieval_client import Encoder
from retrieval_contract.errors import ItemError, Reason
from retrieval_contract.preprocess import TextPreprocessor
from retrieval_contract.release import TextSpec
from tests.conftest import photo
from tests.hostile import SERVED, Wire, cosine

CHARS = 1000
"""The reference release's limit for queries; its titles have twice that."""

QUERIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", Reason.EMPTY),
    "white_space": (" \t\r\n\u00a0\u3000\u2028".encode(), Reason.EMPTY),
    "only_control_characters": (b"\x01\x02\x1b\x7f", Reason.EMPTY),
    "only_invisible_marks": ("\u200b\u200e\u2066\ufeff".encode(), Reason.EMPTY),
    "only_accents": ("\u0301\u0308\u0301".encode(), Reason.EMPTY),
    "only_replacement_characters": ("\ufffd\ufffd".encode(), Reason.EMPTY),
    "10_000_characters": (b"red shoes " * CHARS, Reason.TOO_LONG),
    "one_past_the_limit": (b"a" * (CHARS + 1), Reason.TOO_LONG),
    "5_megabytes": (b"a\x01" * 2_500_000, Reason.TOO_LONG),
    "5_megabytes_of_white_space": (b" \t" * 2_500_000, Reason.TOO_LONG),
    "not_utf8": (b"red \xff\xfe shoes", Reason.NOT_UTF8),
    "latin_1": ("chaussures d'été".encode("latin-1"), Reason.NOT_UTF8),
    "utf_16": ("red shoes".encode("utf-16"), Reason.NOT_UTF8),
    "overlong_utf8": (b"red \xc0\xaf shoes", Reason.NOT_UTF8),
    "half_a_character": ("red 鞋".encode()[:-1], Reason.NOT_UTF8),
    "lone_surrogate": (b"red \xed\xa0\x80", Reason.NOT_UTF8),
    "nul_inside": (b"red\0shoes", Reason.NUL),
    "only_nul": (b"\0", Reason.NUL),
    "emoji": ("👟 red 🔥".encode(), SERVED),
    "emoji_alone": ("👟".encode(), SERVED),
    "joined_emoji": ("👩🏽‍🚀 suit".encode(), SERVED),
    "right_to_left": ("حذاء أحمر للرجال".encode(), SERVED),
    "direction_override": ("\u202ered shoes\u202c".encode(), SERVED),
    "combining_characters": ("re\u0301d s\u0327hoe\u0308s".encode(), SERVED),
    "hundreds_of_accents": (("r" + "\u0301" * 400 + "ed").encode(), SERVED),
    "one_word_of_1000": (b"a" * CHARS, SERVED),
    "1000_ideographs": ("鞋".encode() * CHARS, SERVED),
    "1000_that_decompose": ("\ufdfa".encode() * CHARS, SERVED),
    "spelt_special_tokens": (b"[SEP] [PAD] [CLS] red", SERVED),
    "markup": (b"<script>alert(1)</script>' OR 1=1 --", SERVED),
}


@pytest.fixture(scope="module")
def wire(triton: Server) -> Iterator[Wire]:
    with Wire(triton) as connected:
        yield connected


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_is_served_or_refused_with_its_reason(wire: Wire, name: str) -> None:
    text, expected = QUERIES[name]
    started = time.perf_counter()
    (answer,) = wire.queries(text)
    assert answer.outcome == expected
    assert time.perf_counter() - started < 2.0  # megabytes are refused unread


@pytest.mark.parametrize(
    ("odd", "plain"),
    [
        (b"  red\t\n shoes\x01", b"red shoes"),
        ("\ufeffred\u3000shoes\u200e".encode(), b"red shoes"),
        ("RE\u0301D Shoe\u0308s".encode(), b"red shoes"),
        (b" " * 5000 + b"red shoes" + b"\n" * 5000, b"red shoes"),
    ],
    ids=["control", "unicode_blanks", "case_and_accents", "margins_past_the_limit"],
)
def test_what_cannot_be_seen_changes_nothing(wire: Wire, odd: bytes, plain: bytes) -> None:
    np.testing.assert_allclose(
        wire.queries(odd)[0].vector, wire.queries(plain)[0].vector, atol=1e-5
    )


def test_a_query_at_the_limit_is_cut_to_the_token_limit(wire: Wire) -> None:
    """1000 characters are 250 words; the tower sees the first 30 and two special tokens."""
    text = b"red " * 249 + b"reds"
    assert len(text) == wire.release.query.max_chars == CHARS
    seen = wire.release.query.max_tokens - 2
    full, cut, one_less = (wire.queries(t)[0] for t in (text, b"red " * seen, b"red " * (seen - 1)))
    assert full.outcome == SERVED
    np.testing.assert_allclose(full.vector, cut.vector, atol=1e-5)
    assert np.abs(full.vector - one_less.vector).max() > 1e-4


@pytest.mark.parametrize(
    ("title", "with_image", "alone"),
    [
        (b"red shoes " * 300, Reason.TOO_LONG, Reason.TOO_LONG),
        (b"r" * 2000, SERVED, SERVED),
        (b"r" * 2001, Reason.TOO_LONG, Reason.TOO_LONG),
        (b"red \xff", Reason.NOT_UTF8, Reason.NOT_UTF8),
        (b"red\0", Reason.NUL, Reason.NUL),
        (b"", SERVED, Reason.NOTHING_TO_ENCODE),
        (b" \n", SERVED, Reason.NOTHING_TO_ENCODE),
        ("\u0301".encode(), SERVED, Reason.NOTHING_TO_ENCODE),
    ],
    ids=["3000", "limit", "past_limit", "not_utf8", "nul", "missing", "blank", "accent"],
)
def test_a_bad_title_is_refused_and_a_missing_one_is_not(
    wire: Wire, title: bytes, with_image: str, alone: str
) -> None:
    """A good picture does not hide a bad title."""
    both, title_only = wire.products((title, photo()), (title, b""))
    assert (both.outcome, title_only.outcome) == (with_image, alone)


@pytest.mark.parametrize(
    "bad", ["empty", "10_000_characters", "not_utf8", "nul_inside", "only_accents"]
)
def test_one_bad_query_leaves_its_31_neighbours_alone(wire: Wire, bad: str) -> None:
    words = ("red", "blue linen dress", "wireless mouse for left hands", "鞋 " * 40)
    texts = [f"{words[i % 4]} {i}".encode() for i in range(32)]
    alone = [wire.queries(text)[0].vector for text in texts]
    texts[13], expected = QUERIES[bad]
    answers = wire.queries(*texts)
    assert [a.outcome for a in answers] == [SERVED] * 13 + [expected] + [SERVED] * 18
    for i, answer in enumerate(answers):
        if i != 13:
            np.testing.assert_allclose(answer.vector, alone[i], atol=1e-5)


def test_the_client_reports_the_row_and_keeps_the_others(encoder: Encoder) -> None:
    """Text that Python holds but UTF-8 cannot, through the client's own door."""
    found = encoder.encode_queries(["red shoes", "red \ud800", "", "blue"])
    reasons = [e.reason if e else None for e in found.errors]
    assert reasons == [None, Reason.NOT_UTF8, Reason.EMPTY, None]
    assert cosine(found.vector(0), found.vector(3)) < 0.99
    with pytest.raises(ItemError, match="not_utf8: expected UTF-8 text, got byte 4"):
        found.vector(1)


def words_only() -> TextPreprocessor:
    """A tokenizer that knows one word, has no token for others, and fails at them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"red": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return TextPreprocessor(tokenizer.to_str(), TextSpec(8, 0, 100), required=True)


def test_a_text_that_breaks_the_tokenizer_is_alone_in_that() -> None:
    batch = words_only()([b"red", b"blue", b"\xff", b"red red", b""])
    reasons = [s.split(":")[0] for s in batch.status]
    assert reasons == ["", Reason.INTERNAL, Reason.NOT_UTF8, "", Reason.EMPTY]
    assert batch.mask.sum(1).tolist() == [1, 0, 0, 2, 0]
    assert batch.present[:, 0].tolist() == [1, 0, 0, 1, 0]


def test_random_text_never_raises(wire: Wire) -> None:
    """Every Unicode range and raw bytes, seeded, 128 a request."""
    rng = random.Random(5)
    ranges = [(1, 0x250), (0x300, 0x370), (1, 0xD800), (0xE000, 0x110000)]
    for _ in range(5):
        rows = [bytes(rng.randbytes(rng.randrange(60))) for _ in range(32)]
        for _ in range(96):
            text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(40))
            rows.append(text.encode())
        outcomes = {a.outcome for a in wire.queries(*rows)}
        assert SERVED in outcomes
        assert outcomes <= {SERVED, Reason.NOT_UTF8, Reason.NUL, Reason.EMPTY}
