"""Search on Milvus Lite and on the server, with the real Triton: what is found and what is said."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from deploy.server import Server
from retrieval_client import (
    Catalog,
    Consistency,
    Encoder,
    End,
    Hit,
    Hybrid,
    ProductRow,
    ProductSearch,
    Query,
    Settings,
    Where,
    finding,
)  # fmt: skip
from retrieval_client.__main__ import main
from retrieval_client.capabilities import Feature
from retrieval_client.collection import Ask, Collection
from retrieval_client.options import OptionFields
from retrieval_contract.errors import (
    ContractError,
    DeadlineExceeded,
    FilterError,
    ItemError,
    Unsupported,
)
from retrieval_contract.release import Release
from tests.conftest import photo
from tests.hostile import HOSTILE_WORDS

COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 160), "green": (20, 140, 40)}
KINDS = ("shirt", "dress", "shoes", "mug")
PATIENCE_S = 60


@dataclasses.dataclass(frozen=True)
class Shop:
    """A filled catalog, its rows, and who searches it."""

    search: ProductSearch
    rows: list[ProductRow]

    @property
    def stored(self) -> Collection:
        return self.search.catalog.serving()

    @property
    def vectors(self) -> np.ndarray:
        return np.stack([row.vector for row in self.rows])

    def nearest(self, vector: np.ndarray, holds: Callable[[ProductRow], bool]) -> list[str]:
        """Ids by an exact search in memory."""
        order = np.argsort(-(self.vectors @ vector), kind="stable")
        return [self.rows[at].id for at in order if holds(self.rows[at])]


def products() -> list[tuple[str, str, bytes, dict[str, Any]]]:
    """36 with titles, photos and attributes; three of each colour and kind; then hostile ones."""
    made = []
    for number in range(36):
        colour, kind = [*COLOURS][number % 3], KINDS[number // 3 % 4]
        attributes = {"colour": colour, "price": number, "family": number % 12, "gone": None}
        shade = tuple(min(255, c + number) for c in COLOURS[colour])
        made.append((f"p{number}", f"{colour} {kind} no {number}", photo(shade), attributes))
    for text in HOSTILE_WORDS:
        made.append((text, f"title {text}", b"", {"colour": text, "note": text * 3}))
    return made


@pytest.fixture(scope="module")
def rows(triton: Server) -> list[ProductRow]:
    """Real vectors of the real towers."""
    made = products()
    with Encoder(Settings(triton=triton.grpc_address, timeout_s=PATIENCE_S)) as encoder:
        encoded = encoder.encode_products([m[1] for m in made], [m[2] for m in made])
    return [
        ProductRow(each[0], each[1], "hash", vector, each[3], b"jpeg")
        for each, vector in zip(made, encoded.vectors, strict=True)
    ]


@pytest.fixture(scope="module")
def shop(
    backend: Callable[[], Settings], triton: Server, release: Release, rows: list[ProductRow]
) -> Iterator[Shop]:
    """They are stored on one Milvus, then on the other."""
    settings = backend().override(triton=triton.grpc_address, timeout_s=PATIENCE_S)
    with ProductSearch(settings) as search:
        stored = search.catalog.prepare(release.release_id, release.vector_dim)
        stored.upsert(rows)
        stored.flush()
        assert stored.count() == len(rows)
        yield Shop(search, rows)


def ids(hits: list[Hit]) -> list[str]:
    return [hit.id for hit in hits]


# ── what is looked for ───────────────────────────────────────────────────────────────────
def test_every_kind_of_query_finds_what_its_vector_is_nearest_to(shop: Shop) -> None:
    red = photo((210, 25, 25))
    text = shop.search.encoder.encode_queries(["red shirt"]).vectors[0]
    image = shop.search.encoder.encode_products([""], [red]).vectors[0]
    like = shop.rows[5].vector
    asked = {
        Query("red shirt"): text,
        Query(image=red): image,
        Query(like="p5"): like,
        Query("red shirt", red): 0.55 * text + 0.45 * image,
        Query("red shirt", red, text_weight=0.2): 0.2 * text + 0.8 * image,
        Query("red shirt", red, "p5"): 0.55 * text + 0.225 * (image + like),
        Query(image=red, like="p5"): image + like,
    }
    found = shop.search.many([*asked, "red shirt"], limit=12)
    for (query, vector), hits in zip(asked.items(), found, strict=False):
        vector = vector / np.linalg.norm(vector)
        expected = shop.nearest(vector, lambda row, query=query: row.id != query.like)
        assert ids(hits) == expected[:12], query
        by_id = {row.id: row.vector for row in shop.rows}
        cosines = [float(by_id[hit.id] @ vector) for hit in hits]
        assert [hit.score for hit in hits] == pytest.approx(cosines, abs=1e-4)
    assert found[-1] == found[0], "a text is a query for it"
    assert "red" in found[1][0].title, "its colour is seen"


def test_a_bad_query_of_any_kind_costs_the_others_nothing(shop: Shop) -> None:
    asked = [
        Query(), Query(image=b"no picture"), Query(like="nobody"), Query(like="a\nb"),
        Query("red shirt", b"no picture"), Query("a\0b", like="p1"), Query(like="p1"), "red shirt",
    ]  # fmt: skip
    found = shop.search.many(asked, limit=3)
    reasons = [str(each.reason) if isinstance(each, ItemError) else len(each) for each in found]
    assert reasons == [
        "empty", "image_format", "unknown_id", "bad_id", "image_format", "nul", 3, 3
    ]  # fmt: skip
    with pytest.raises(ItemError, match="expected the id of a product that is there, got 'nobody'"):
        shop.search(Query(like="nobody"))
    assert shop.search.many([]) == []


# ── which of them ────────────────────────────────────────────────────────────────────────
def test_conditions_hold_and_nothing_else_is_left_out(shop: Shop) -> None:
    vector = shop.search.encoder.encode_queries(["red shirt"]).vectors[0]
    hits = shop.search(
        "red shirt",
        where="price < {most} and colour in {colours}",
        params={"most": 20, "colours": ["red", "blue"]},
        limit=100,
    )
    expected = shop.nearest(
        vector,
        lambda row: (
            row.attributes.get("price", 99) < 20 and row.attributes["colour"] in ("red", "blue")
        ),
    )
    assert ids(hits) == expected
    assert hits.end is End.ALL
    same = Where.parse('colour in ["blue", "red"] and price < 20')
    assert shop.search("red shirt", where=same, limit=100) == hits
    assert ids(shop.search("red shirt", where="exists(gone)")) == [], "a null is nothing"
    assert shop.search("red shirt", where="exists(price)", limit=36).end is End.LIMIT
    with pytest.raises(FilterError):
        shop.search("red shirt", where="price <")


def test_hostile_values_and_ids_find_themselves_alone(shop: Shop) -> None:
    before = shop.stored.count()
    for text in HOSTILE_WORDS:
        for where in ("colour == {v}", "id == {v}", "title == {t}"):
            params = {"v": text, "t": f"title {text}"}
            found = shop.search("red shirt", where=where, params=params, limit=100)
            assert ids(found) == [text], (where, text)
        assert found[0].attributes["note"] == text * 3
        assert text not in ids(shop.search(Query(text, like=text), limit=100))
        assert len(shop.search(text, limit=100)) == before
        assert ids(shop.search("x", where="note == {v}", params={"v": text})) == []
    for huge in ('"' * 65536, "\\" * 65536, "x'] or true --" * 4000):
        assert ids(shop.search("red shirt", where="colour == {v}", params={"v": huge})) == []
        (refused,) = shop.search.many([Query(like=huge)])
        assert isinstance(refused, ItemError)
    assert shop.stored.count() == before


def test_pages_are_the_whole_list_cut(shop: Shop) -> None:
    whole = shop.search("blue dress", limit=len(shop.rows))
    pages = [shop.search("blue dress", limit=10, offset=at) for at in range(0, 60, 10)]
    assert [hit for page in pages for hit in page] == whole
    assert [page.end for page in pages] == [End.LIMIT] * 4 + [End.ALL] * 2
    like = shop.search(Query(like="p3"), limit=46)
    assert shop.search(Query(like="p3"), limit=5, offset=7) == like[7:12]
    for offset, limit in ((-1, 10), (16384, 1), (16000, 385), (0, 0), (0, 16385)):
        with pytest.raises(ContractError, match=r"(limit|offset): expected"):
            shop.search("blue dress", limit=limit, offset=offset)


def test_a_least_score_cuts_and_says_so(shop: Shop) -> None:
    whole = shop.search("blue dress", limit=20)
    least = (whole[6].score + whole[7].score) / 2
    cut = shop.search("blue dress", limit=20, min_score=least)
    assert (cut, cut.end) == (whole[:7], End.ALL)
    assert shop.search("blue dress", limit=5, min_score=least).end is End.LIMIT
    assert shop.search("blue dress", min_score=2) == []
    with pytest.raises(ContractError, match="min_score"):
        shop.search("blue dress", min_score=float("nan"))


def test_hits_have_the_chosen_fields(shop: Shop) -> None:
    whole = shop.search("blue dress", thumbnails=True)
    assert (whole[0].thumbnail, set(whole[0].attributes)) == (
        b"jpeg",
        {"colour", "price", "family"},
    )
    bare = shop.search("blue dress", fields=[])
    assert bare == [Hit(hit.id, hit.score, "", {}) for hit in whole]
    some = shop.search("blue dress", fields=["price", "nowhere"])
    assert [(h.title, h.attributes) for h in some] == [
        ("", {"price": h.attributes["price"]}) for h in whole
    ]
    with pytest.raises(ContractError, match="a list of names"):
        shop.search("blue dress", fields="price")


def test_of_a_group_the_best_is_found(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shop.search("blue dress", limit=len(shop.rows))

    def best(attribute: str) -> list[Hit]:
        seen: set[Any] = set()
        return [
            hit
            for hit in whole
            if (value := hit.attributes.get(attribute, hit.id)) not in seen and not seen.add(value)
        ]

    families = best("family")
    assert len(families) == 12 + len(HOSTILE_WORDS)
    assert shop.search("blue dress", group_by="family", limit=9) == families[:9]
    assert shop.search("blue dress", group_by="family", limit=9, offset=4) == families[4:13]
    every = shop.search("blue dress", group_by="family", limit=40)
    assert (every, every.end) == (families, End.ALL)
    two = shop.search.many(["blue dress", "red mug"], group_by="colour", where="exists(price)")
    assert [(len(each), each.end) for each in two] == [(3, End.ALL)] * 2
    bare = shop.search("blue dress", group_by="family", fields=["title"], limit=3)
    assert [hit.attributes for hit in bare] == [
        {k: v for k, v in hit.attributes.items() if k == "family"} for hit in families[:3]
    ]
    monkeypatch.setattr(finding, "DEEPEST", 8)
    short = shop.search("blue dress", group_by="colour", where="exists(price)", limit=6)
    assert short.end is End.DEPTH, "it looked at eight of 36, and does not say that is all"
    assert ids(short) == ids(two[0])[: len(short)]


# ── words of titles ──────────────────────────────────────────────────────────────────────
def test_two_routes_and_what_each_has_given(shop: Shop) -> None:
    if not shop.stored.info.has_words:
        pytest.skip("no BM25 in this Milvus; refused early below")
    vector = shop.search("blue dress", limit=60)
    (words,) = shop.stored.search_words(["blue dress"], Ask(60))
    assert all(hit.score > 0 for hit in words)
    assert "blue dress" in words[0].title
    hits = shop.search("blue dress", hybrid=True, limit=60)
    assert hits.end is End.ALL
    assert sorted(ids(hits)) == sorted(ids(vector))
    ranks = {"vector": ids(vector), "words": ids(finding.ordered(words))}
    for hit in hits:
        assert sum(route.share for route in hit.routes) == pytest.approx(float(hit.score > 0))
        for route in hit.routes:
            assert ranks[route.name][route.rank - 1] == hit.id
    alone = shop.search("blue dress", hybrid=Hybrid(words=0), limit=60)
    assert ids(alone) == ids(vector)
    first = shop.search("blue dress", hybrid=Hybrid(words=1), limit=len(words))
    assert {h.id for h in first if h.score} < {h.id for h in words}
    assert shop.search("blue dress", hybrid=True, offset=5, limit=9) == hits[5:14]
    (only,) = shop.search(Query(like="p3"), hybrid=True, limit=1)
    assert [route.name for route in only.routes] == ["vector"]
    grouped = shop.search("blue dress", hybrid=True, group_by="colour", where="exists(price)")
    assert [hit.attributes["colour"] for hit in grouped] == [
        *dict.fromkeys(h.attributes["colour"] for h in hits if "price" in h.attributes)
    ]
    assert all(shop.search.many([*HOSTILE_WORDS, "漢字"], hybrid=True))
    with pytest.raises(ContractError, match="at most 100 in a hybrid search"):
        shop.search("blue dress", hybrid=True, offset=95)


def test_what_a_milvus_cannot_is_said_before_anything_is_computed(shop: Shop) -> None:
    encoder, milvus = shop.search.encoder, shop.search.catalog.milvus
    if Feature.BM25 in milvus.backend.features:
        shop.search.catalog.forget()
        info = dataclasses.replace(shop.stored.info, has_words=False)
        shop.stored.info = info  # as of a collection that was filled when its Milvus had none
    before = encoder.statistics().requests["query_encoder"]
    try:
        with pytest.raises(Unsupported, match=r"BM25|the field `words`"):
            shop.search("a text that nobody has asked for", hybrid=True)
    finally:
        shop.search.catalog.forget()
    assert encoder.statistics().requests["query_encoder"] == before


# ── deadlines, freshness ─────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("options", [{}, {"group_by": "family"}, {"where": "price < 9"}])
def test_one_deadline_covers_all_of_it(shop: Shop, options: OptionFields) -> None:
    shop.search("red shirt", **options)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        shop.search(Query("red shirt", photo(), "p1"), timeout_s=0.001, **options)
    assert time.monotonic() - started < 1


def test_own_writes_are_read_when_asked_for(shop: Shop) -> None:
    """By Session at once, by Strong as well; without, a server shows some of them later."""
    stored, row = shop.stored, shop.rows[0]
    seen: dict[Consistency, list[bool]] = {level: [] for level in Consistency}
    added = []
    try:
        for number in range(4):
            for level in Consistency:
                vector = np.random.default_rng(number).standard_normal(len(row.vector))
                vector = (vector / np.linalg.norm(vector)).astype(np.float32)
                added.append(f"{level}{number}")
                stored.upsert([ProductRow(added[-1], "new", "hash", vector)])
                where = f'id == "{added[-1]}"'
                seen[level].append(bool(shop.search("new", where=where, consistency=level)))
    finally:
        assert len(stored.delete(added)) == len(added)
    assert all(seen[Consistency.OWN])
    assert all(seen[Consistency.ALL])
    assert all(seen[Consistency.ANY]) == stored.milvus.lite


# ── the command ──────────────────────────────────────────────────────────────────────────
def retrieval(shop: Shop, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any]:
    """`retrieval search` in this process (Milvus Lite takes but one), its exit code and JSON."""
    settings = shop.search.settings
    where = ["--triton", settings.triton, "--milvus", settings.milvus]
    where += ["--collection", settings.collection, "--json"]
    with pytest.raises(SystemExit) as ended:
        main(["search", *map(str, words), *where])
    return ended.value.code, json.loads(capsys.readouterr().out)


def test_the_command_takes_all_of_it(
    shop: Shop, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    picture = tmp_path / "red.jpg"
    picture.write_bytes(photo((210, 25, 25)))
    code, (said,) = retrieval(
        shop, capsys, "shirt", "--image", picture, "--where", "price < {most} and colour == {c}",
        "--param", "most=30", "--param", "c=red", "--fields", "title,price", "--limit", 2,
        "--page", 2, "--fresh",
    )  # fmt: skip
    expected = shop.search(
        Query("shirt", picture.read_bytes()),
        where="price < 30 and colour == 'red'", limit=2, offset=2, fields=["title", "price"],
    )  # fmt: skip
    assert (code, said["query"], said["end"]) == (0, f"shirt + image {picture}", "limit")
    assert [(h["id"], h["attributes"]) for h in said["hits"]] == [
        (h.id, h.attributes) for h in expected
    ]
    code, (said,) = retrieval(shop, capsys, "--like", "p5", "--group-by", "colour", "--limit", 3)
    grouped = shop.search(Query(like="p5"), group_by="colour", limit=3)
    assert (code, said["query"]) == (0, "like p5")
    assert [h["id"] for h in said["hits"]] == ids(grouped)
    code, said = retrieval(shop, capsys, "dress", "mug", "--like", "nobody", "--min-score", "0.1")
    assert (code, [*said[0]]) == (3, ["query", "error"])
    code, said = retrieval(shop, capsys, "blue dress", "--hybrid", "--offset", "1")
    if shop.stored.info.has_words:
        assert code == 0
        assert {"name", "rank", "score", "share"} == set(said[0]["hits"][0]["routes"][0])
    else:
        assert (code, said["error"]) == (1, "Unsupported")
    said = retrieval(shop, capsys, "mug", "dress", "mug")[1]
    assert [each["query"] for each in said] == ["mug", "dress", "mug"]
    assert retrieval(shop, capsys)[1]["error"] == "ContractError"
    assert retrieval(shop, capsys, "x", "--page", 0)[1]["error"] == "ContractError"
    assert retrieval(shop, capsys, "x", "--where", "a = 1")[1]["error"] == "FilterError"


def test_an_empty_catalog_is_searched(milvus: Settings, triton: Server, release: Release) -> None:
    settings = milvus.override(triton=triton.grpc_address, timeout_s=PATIENCE_S)
    with Catalog(settings) as catalog:
        catalog.prepare(release.release_id, release.vector_dim)
    with ProductSearch(settings) as search:
        for options in ({}, {"group_by": "x"}, {"offset": 5}):
            found = search("anything", **options)
            assert (found, found.end) == ([], End.ALL)
