"""Conditions on products: Milvus finds what `matches` finds, which is what Python would say.

All on Milvus Lite and on the server.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pymilvus import DataType, MilvusClient

from retrieval_client import Settings
from retrieval_client.records import stored_attributes
from retrieval_client.where import ATTRIBUTE_VALUE, MAX_DEPTH, MAX_TEXT_BYTES, MAX_VALUES, Where
from retrieval_contract.errors import ContractError, FilterError

TEXTS = [
    "red", "Red", "red dress", "redder", "blue", "", " ", "1", "true", "100%", "100_", "x~y",
    "x\x7f", "it's", 'say "hi"', "back\\slash", "a\\", "\\u0041", "漢字", "👟 shoe", "é", "e\u0301",
    "\ud7ff", "\ue000", "\U0010ffff", "\U0010ffffz", 'x"] or true', "' or 1==1 --", "line\nbreak",
    "nul\0", "%_",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 10, 19.99, 20, 20.0, 1.5, -0.0, 0.1, 1e-7, 5e-324, -1e300, 1e300, 2**53 - 1, 2**53,
    2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), True, False,
]  # fmt: skip
OTHERS: list[Any] = [[], [1], ["red"], {}, {"red": 1}, [[None]]]
NAMES = [
    "red", "Item weight", "it's", "a-b", "a/b", "a~1b", "a.b", "0", "漢字 👟", "a]b", "a[b", "100%",
    "id", "title", "attributes", "class", "$meta", "-- drop", "x] or true",
]  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Products with messy attributes: each kind of value under the same few names."""
    dice = random.Random(7)
    every = [*TEXTS, *NUMBERS, *OTHERS]
    made = [{"a": value, "b": dice.choice(every)} for value in every]
    made += [{name: dice.choice([1, 2, "red"])} for name in NAMES for _ in range(3)]
    made += [{"a": None, "nothing": None}, {}, {"A": 1}]
    while len(made) < 300:
        keys = dice.sample(["a", "b", "price", "größe"], dice.randrange(5))
        made.append({key: dice.choice(every) for key in keys})
    return [
        {
            "id": f"p{number}" if number % 9 else f"p{number} '\"\\ 👟",
            "title": TEXTS[number % len(TEXTS)],
            "bucket": number % 10,
            "attributes": attributes,
            "vector": [1.0, 0.0],
        }
        for number, attributes in enumerate(made)
    ]


ROWS = rows()


class Products(NamedTuple):
    client: MilvusClient
    collection: str

    def found(self, expression: str) -> list[str]:
        """The ids that Milvus finds."""
        hits = self.client.query(
            self.collection,
            filter=expression,
            output_fields=["id"],
            limit=len(ROWS),
            consistency_level="Session",  # our own rows, without Strong's wait
            timeout=60,
        )
        return sorted(hit["id"] for hit in hits)


@pytest.fixture(scope="module")
def products(backend: Callable[[], Settings]) -> Iterator[Products]:
    """ROWS, in a collection without what conditions do not ask for."""
    settings = backend()
    if settings.milvus.endswith(".db"):
        Path(settings.milvus).parent.mkdir(parents=True)
    client, name = MilvusClient(settings.milvus), settings.collection
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=256)
    schema.add_field("title", DataType.VARCHAR, max_length=8192)
    schema.add_field("bucket", DataType.INT64)
    schema.add_field("attributes", DataType.JSON)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_collection(name, schema=schema, index_params=index)
    attributes = ({"attributes": stored_attributes(row["attributes"])} for row in ROWS)
    client.insert(name, [row | stored for row, stored in zip(ROWS, attributes, strict=True)])
    client.load_collection(name)
    yield Products(client, name)
    client.close()


def matched(where: Where) -> list[str]:
    return sorted(row["id"] for row in ROWS if where.matches(row))


def numbers_of(where: Where) -> set[int]:
    return {number for number, row in enumerate(ROWS) if where.matches(row)}


CONDITIONS = [
    "a == 1", "a != 1", "not a == 1", "not a != 1", "a == 1.0", "a == True", "a != True",
    "a == False", "a < 2", "not a < 2", "a > 0", "a >= 0", "a <= -1", "a < 1e-7", "a > 5e-324",
    "a == -0.0", "0 <= a < 20", "not 0 <= a < 20", "20 > a > 1.5", "1 != a", "19.99 == a",
    "a == 9007199254740991", "a > 9007199254740991", "a < -9007199254740991", 'a == ""',
    'a != ""', 'a == "red"', 'a != "red"', 'not (a != "red")', 'a > "red"', 'a <= "red"',
    'a == "1"',
    'a == "true"', 'a == "100%"', 'a in ["red", "blue", "100%"]', 'a not in ["red", "blue"]',
    "a in [1, 2, 20]", "a not in (1, 2, 20)", "not a in [0, True]", "a in [False]", "a in [1, 1.0]",
    'a.startswith("red")', 'not a.startswith("red")', 'a.startswith("")', 'not a.startswith("")',
    'a.startswith("100%")', 'a.startswith("100_")', 'a.startswith("x~")', "a.startswith('say \"')",
    r'a.startswith("\\u0041")', 'a.startswith("\\U0010ffff")', 'a.startswith("\\ud7ff")',
    'title.startswith("red")', 'not title.startswith("red")', 'title != "red"',
    'title in ["é", "1"]',
    'title not in ["é", ""]', 'title >= "r" and title < "s"', 'id == "p1"', 'id != "p1"',
    'id in ["p1", "p2", "nobody"]', 'id not in ["p1"]', "bucket < 3", "bucket == 3",
    "3 <= bucket < 5",
    "bucket not in [1, 2]", "bucket != 3 and a < 2", "exists(b)", "not exists(b)",
    'a != "red" or not exists(b)', "not (exists(price) and price < 20)", 'attr["id"] == 1',
    'attr["title"] == 2 and title != "red"', 'attr["class"] in [1, 2]', "attributes == 1",
    "größe < 20 or price >= 20",
    'a < 2 and (b == "red" or b > 0) or not (price < 20 and bucket < 5)',
]  # fmt: skip


@pytest.mark.parametrize("text", CONDITIONS)
def test_milvus_finds_what_matches_says(products: Products, text: str) -> None:
    where = Where.parse(text)
    assert products.found(where.expression()) == matched(where), where.expression()


def test_every_text_and_number_and_name_can_be_asked_for(products: Products) -> None:
    asked = 0
    for name in NAMES:
        where = Where.parse(f"attr[{name!r}] in [1, 2] or attr[{name!r}] == 'red'")
        assert len(found := products.found(where.expression())) >= 3
        assert found == matched(where)
    for value in [*TEXTS, *NUMBERS]:
        for text in (
            "a == {v}",
            "a != {v}",
            "a < {v}",
            "a >= {v}",
            "a in {v}",
            "a.startswith({v})",
        ):
            try:
                where = Where.parse(text, {"v": [value] if " in " in text else value})
            except FilterError:
                continue
            assert products.found(where.expression()) == matched(where), where.expression()
            asked += 1
    assert asked > 200


# ── random conditions ────────────────────────────────────────────────────────────────────
def spelled(dice: random.Random, params: dict[str, Any], names: Mapping[str, list[Any]]) -> str:
    """One comparison, on one of `names` with values like those listed for it."""
    name = dice.choice(list(names))
    values = dice.choices(names[name], k=dice.randrange(1, 4))
    key = f"p{len(params)}"
    form = dice.randrange(6)
    if form == 0:
        params[key] = values
        return f"{name} {dice.choice(['in', 'not in'])} {{{key}}}"
    params[key] = values[0]
    if form == 1 and isinstance(values[0], str):
        params[key] = values[0][:2]
        return f"{name}.startswith({{{key}}})"
    if form == 2 and type(values[0]) is type(values[-1]):
        params[key + "x"] = values[-1]
        first, second = dice.choices(["<", "<=", ">", ">=", "!="], k=2)
        return f"{{{key}}} {first} {name} {second} {{{key}x}}"
    return f"{name} {dice.choice(['==', '!=', '<', '<=', '>', '>='])} {{{key}}}"


def drawn(
    dice: random.Random, params: dict[str, Any], names: Mapping[str, list[Any]], depth: int = 3
) -> str:
    """A condition as someone might write it, with too few and too many parentheses."""
    if not depth or dice.random() < 0.3:
        return spelled(dice, params, names)
    left = drawn(dice, params, names, depth - 1)
    if dice.random() < 0.3:
        return f"not ({left})" if dice.random() < 0.7 else f"not {left}"
    right = drawn(dice, params, names, depth - 1)
    text = f"{left} {dice.choice(['and', 'or'])} {right}"
    return f"({text})" if dice.random() < 0.5 else text


ASKED: dict[str, list[Any]] = {
    "a": [text for text in TEXTS if text.isprintable()],
    "b": [number for number in NUMBERS if abs(number) < 2**53],
    "price": [0, 1, True, False, 19.99, 20],
    "größe": ["red", "", "1", "漢字"],
    "title": [text for text in TEXTS if text.isprintable()],
    "bucket": [0, 3, 9],
    'attr["Item weight"]': [1, 2],
}


def test_random_conditions_find_the_same(products: Products) -> None:
    dice, some = random.Random(11), 0
    for _ in range(300):
        params: dict[str, Any] = {}
        text = drawn(dice, params, ASKED)
        where = Where.parse(text, params)
        expected = matched(where)
        assert products.found(where.expression()) == expected, (text, params, where.expression())
        some += 0 < len(expected) < len(ROWS)
    assert some > 150, "conditions that find all or nothing prove little"


def test_matches_is_what_python_says() -> None:
    """Where every attribute is there and of its kind, a condition is a Python expression."""
    dice = random.Random(5)
    names = {"a": ["red", "reddish", "blue", ""], "b": [0, 1, 2.5, True, -3], "bucket": [1, 2]}
    for _ in range(500):
        params: dict[str, Any] = {}
        text = drawn(dice, params, names)
        where = Where.parse(text, params)
        python = text
        for key in sorted(params, key=len, reverse=True):
            python = python.replace(f"{{{key}}}", repr(params[key]))
        for _ in range(20):
            a, b, bucket = (dice.choice(values) for values in names.values())
            row = {"id": "p", "title": "t", "bucket": bucket, "attributes": {"a": a, "b": b}}
            assert where.matches(row) == eval(python, {"a": a, "b": b, "bucket": bucket}), python


# ── what it means ────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("text", ["a < 2", 'a == "red"', "a in [1, 20]", 'a.startswith("re")'])
def test_a_condition_and_its_opposite_share_the_products_of_that_kind(text: str) -> None:
    kind = str if '"' in text else (int, float)
    yes, no = numbers_of(Where.parse(text)), numbers_of(Where.parse(f"not ({text})"))
    assert yes
    assert no
    assert not yes & no
    assert yes | no == {
        number for number, row in enumerate(ROWS) if isinstance(row["attributes"].get("a"), kind)
    }


def test_equal_conditions_are_one() -> None:
    asked = {
        Where.parse('10 <= price < 20 and brand in ["x", "y"]'),
        Where.parse("price >= {low} and {high} > price and brand in {b}",
                    {"low": 10.0, "high": 20, "b": ["y", "x", "y"]}),
        Where.parse('not (not 10 <= price < 20 or brand not in ("x", "y"))'),
    }  # fmt: skip
    assert len(asked) == 1
    assert Where.parse("price < 20") != Where.parse("price < 21")
    assert Where.parse("id == 'x'") != Where.parse("attr['id'] == 'x'")
    assert Where.parse("a == True") == Where.parse("a == 1")
    assert Where.parse("a == 1") != Where.parse("a == '1'")


# ── what is refused ──────────────────────────────────────────────────────────────────────
REFUSED = [
    ("", "something like"), ("   ", "something like"), ("price <", "something like"),
    ("price = 20", "something like"), ("price == 1; x == 1", "something like"),
    ("price", "a comparison"), ("True", "a comparison"), ("1", "a comparison"),
    ("1 == 1", "name of an attribute"), ("price < stock", "a value"), ("price < a.b", "a value"),
    ("a.b == 1", "name of an attribute"), ("a['b'] == 1", "name of an attribute"),
    ("a + 1 == 2", "name of an attribute"), ("a == 1 + 1", "a value"), ("a == None", "text, int"),
    ("a is None", "exists"), ("a == b'x'", "text, int"), ("a == 1j", "text, int"),
    ("a == ...", "text, int"), ("a == f'{b}'", "a value"), ("a == true", "a value"),
    ("a == '\\n'", "control"), ("a == '\\x85'", "control"), ("a == '\\ud800'", "control"),
    ("a == 9007199254740992", "a number up to"), ("a == -9007199254740992", "a number up to"),
    ("a < 1e16", "a number up to"), ("a < 1e999", "a number up to"), ("a == " + "9" * 4090, ""),
    ("a in []", "texts or all numbers"), ("a in [1, 'x']", "texts or all numbers"),
    ("a in 'red'", "a list"), ("a in b", "a list"), ("a in {1, 2}", "a list"), ("'x' in a", "name"),
    ("a in [b]", "a value"), ("a in [[1]]", "a value"), ("a == {missing}", "a bound parameter"),
    ("a in {missing}", "a bound parameter"), ("a in [*b]", "a value"),
    ("exists(id)", "an attribute"),
    ("exists()", "a comparison"), ("exists(a, b)", "a comparison"), ("exists('a')", "name"),
    ("exists(a) == True", "name"), ("a.startswith(1)", "a text"),
    ("a.endswith('x')", "a comparison"),
    ("a.startswith('x', 1)", "a comparison"), ("a.startswith(b)", "a value"),
    ("bucket < 1.5", "int for bucket"), ("bucket == True", "int for bucket"),
    ("title == 1", "str for title"), ("id in ['x', 1]", "str for id"), ("attr['']  == 1", "a name"),
    ("attr['a\"b'] == 1", "a name"), ("attr['a\\\\b'] == 1", "a name"),
    ("attr['a][b'] == 1", "a name"),
    ("attr['a\\nb'] == 1", "a name"), ("attr[0] == 1", "name of"), ("attr[x] == 1", "name of"),
    ("__import__('os').system('x') == 0", "name of"), ("(lambda: 1)() == 1", "name of"),
    ("[a for a in b] == 1", "name of"), ("a == 1 if b else c", "a comparison"),
    ("(a := 1) == 1", "name of"), ("ﬁt == 1", "name of an attribute"), ("a < b < 1", "a value"),
    ("a == 1 or await b", ""), ("a == 'x' 'y' or yield", ""), ("a\0 == 1", ""),
    ("a == '\ud800'", ""),
    ("not " * 1000 + "a == 1", ""), ("(" * 1000 + "a == 1" + ")" * 1000, ""),
    ("~" * 2000 + "a", ""), ("a" * (MAX_TEXT_BYTES + 1), "bytes"),
    ("not " * MAX_DEPTH + "a == 1", "levels"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_in_the_language_is_refused(text: str, says: str) -> None:
    with pytest.raises(FilterError, match=r"expected .*, got .*; ") as refused:
        Where.parse(text)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 500
    assert isinstance(refused.value, ContractError)


def test_a_refusal_names_the_piece_and_its_place() -> None:
    with pytest.raises(FilterError) as refused:
        Where.parse('größe == "é" and (a == 1 or\n b == c.d)')
    assert str(refused.value).startswith("condition, character 35: expected a value, got `c.d`; ")
    with pytest.raises(FilterError, match=r"character 18: .*, got `f\(1\)`"):
        Where.parse('(a == "é\u2028é" and\n f(1))')
    with pytest.raises(FilterError, match=r"bind 'brand'; bound are: brands"):
        Where.parse("a in {brand}", {"brands": ["x"]})


@pytest.mark.parametrize(
    "value",
    [None, [1], b"x", object, float("nan"), float("inf"), 2**53, -(2**70), "a\tb", "\ud800", 1j],
    ids=repr,
)
def test_a_value_that_backends_read_differently_is_refused(value: Any) -> None:
    for text, bound in (("a == {v}", value), ("a in {v}", ["x", value]), ("a in {v}", value)):
        if not (isinstance(bound, list) and text == "a in {v}" and bound is value):
            with pytest.raises(FilterError):
                Where.parse(text, {"v": bound})


def test_no_condition_is_too_much(products: Products) -> None:
    """The largest ones that are let through are answered; the next ones are refused here."""
    many = [f"p{number}" for number in range(MAX_VALUES)]
    few = MAX_VALUES // ATTRIBUTE_VALUE
    for text in ("id in {v}", "a in {v}", "a not in {v}"):
        where = Where.parse(text, {"v": many if "id" in text else many[:few]})
        assert products.found(where.expression()) == matched(where)
    numbers = Where.parse("a not in {v}", {"v": list(range(few))})
    assert products.found(numbers.expression()) == matched(numbers)
    nested = "a == 1"
    for level in range(MAX_DEPTH // 2 - 1):
        nested = f"not (b == 1 and price > {level} or ({nested}))"
    deep = Where.parse(nested)
    assert products.found(deep.expression()) == matched(deep)
    wide = Where.parse(" or ".join(["a<1"] * few))
    assert products.found(wide.expression()) == matched(wide)
    with pytest.raises(FilterError, match=f"at most {MAX_VALUES} values in all"):
        Where.parse("id in {v}", {"v": [*many, "one more"]})
    with pytest.raises(FilterError, match=f"at most {MAX_VALUES} values in all"):
        Where.parse("a in {v}", {"v": many[: few + 1]})
    with pytest.raises(FilterError, match="bytes in Milvus's language"):
        Where.parse("id in {v}", {"v": [name * 100 for name in many]})


ATTACKS = [
    '"] or true', '" or id != "', "' or 1==1 --", '\\" or id != \\"', "\\", '\\\\" or true or "',
    "x\\", '"', "'", '"]', '"] == 1 or id != "', "] or true or id in [", "%", "_", "%%",
    "a%' or '1",
    "{a}", "{}", "$meta", "1; DROP COLLECTION products", "*/ or /*", "# or true", "\u2028 or true",
    "＂] or true", "ʺ or true", "\u202e eurt ro", "\\u0022 or true", "\\x22 or true", "${jndi}",
    "or", "true", "null", "not", "exists", '" like "%', "x" * 65536, '"' * 65536, "\\" * 65535,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_an_attack_finds_nothing(products: Products, attack: str) -> None:
    """As a value, a prefix, a name, and as the text itself: refused, or no product more."""
    texts = ["a == {v}", "a in {v}", "id == {v}", "id in {v}", "title.startswith({v})", "a > {v}"]
    asked = [(text, {"v": [attack] if " in " in text else attack}) for text in texts]
    asked += [(f"attr[{attack!r}] == 1", {}), (f"a == {attack!r}", {}), (attack, {"a": 1})]
    asked += [(f'a == "{attack}"', {}), (f"a == '{attack}'", {}), (f"attr['{attack}'] == 1", {})]
    answered = 0
    for text, params in asked:
        try:
            where = Where.parse(text, params)
        except FilterError:
            continue
        assert products.found(where.expression()) == matched(where), where.expression()
        answered += 1
    assert answered or len(attack) > MAX_TEXT_BYTES
