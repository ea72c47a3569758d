"""Conditions on products: a few of Python's expressions → Milvus's filter language, or Python.

    10 <= price < 20 and brand in {brands} and not title.startswith("used")

A name is an attribute of the product, but for the product's own `id`, `title` and `bucket`; other
names are written `attr["Item weight"]`. `{brands}` stands for a bound value. A comparison with
text holds for texts alone, one with a number for numbers alone (True is 1, False is 0), and `not`
is pushed down to them: a product without the attribute is found neither by `price < 20` nor by
`not price < 20`. `exists(price)` asks whether there is anything; null is nothing.

The backends differ where values meet another kind or are missing (`tests/test_where.py` shows
how). So what is sent has no `not` but before `exists`, no `!=` of an attribute without a guard of
its kind, `true` and `false` beside the numbers, and a prefix as a range: `like` has no escapes.
"""

from __future__ import annotations

import ast
import json
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from retrieval_contract.errors import FilterError

MAX_TEXT_BYTES = 4096
MAX_EXPRESSION_BYTES = 2**18
MAX_DEPTH = 16
MAX_VALUES = 1000
ATTRIBUTE_VALUE = 10
"""A value compared with an attribute counts as ten: Milvus reads the JSON of each row for each."""
MAX_NUMBER = 2**53 - 1
"""Beyond it one backend compares whole numbers with floats exactly, and the other does not."""

LINE_END = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")
"""As Python's own parser counts lines, and `str.splitlines` does not."""

Value = str | int | float
Row = Mapping[str, Any]
OWN: Mapping[str, type] = MappingProxyType({"id": str, "title": str, "bucket": int})
"""The fields of a product that are not attributes, and the kind of their values."""
ATTRIBUTES = "attributes"
COMPARE: Mapping[str, Callable[[Any, Any], bool]] = MappingProxyType(
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
)
NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
SYMBOLS: Mapping[type[ast.cmpop], str] = MappingProxyType(
    {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
)


@dataclass(frozen=True)
class Field:
    """A field of the product's own, or one of its attributes."""

    name: str
    own: bool

    def __str__(self) -> str:
        return self.name if self.own else f"{ATTRIBUTES}[{_quoted(self.name)}]"

    def of(self, row: Row) -> Any:
        """The value in a row as Milvus returns it; None where there is none."""
        return row[self.name] if self.own else (row.get(ATTRIBUTES) or {}).get(self.name)

    def like(self, row: Row, example: Value) -> Any:
        """The value, or None where it is not of the kind of `example`."""
        value = self.of(row)
        if isinstance(example, str):
            return value if isinstance(value, str) else None
        # JSON has no infinities: pymilvus stores null.
        return value if isinstance(value, int | float) and abs(value) < float("inf") else None

    def truths(self, holds: Callable[[int], bool]) -> list[str]:
        """True and False by name, where they pass as numbers: servers count neither as one."""
        named = ((1, "true"), (0, "false"))
        return [f"{self} == {name}" for number, name in named if not self.own and holds(number)]


@dataclass(frozen=True)
class Range:
    """`field op value`, one of < <= > >=."""

    field: Field
    op: str
    value: Value

    def expression(self) -> str:
        terms = [f"{self.field} {self.op} {_quoted(self.value)}"]
        if not isinstance(self.value, str):
            terms += self.field.truths(lambda number: COMPARE[self.op](number, self.value))
        return _joined("or", terms)

    def matches(self, row: Row) -> bool:
        value = self.field.like(row, self.value)
        return value is not None and COMPARE[self.op](value, self.value)


@dataclass(frozen=True)
class Among:
    """The field has one of these values, all of one kind; or `negated`, another one of it."""

    field: Field
    values: tuple[Value, ...]
    negated: bool

    def expression(self) -> str:
        if self.field.own:
            listed = ", ".join(map(_quoted, self.values))
            return f"{self.field} {'not in' if self.negated else 'in'} [{listed}]"
        # `in` wants a field on its left on Milvus Lite, not an attribute.
        same = [f"{self.field} == {_quoted(value)}" for value in self.values]
        if self.negated:
            first = _quoted(self.values[0])
            kind = _joined("or", (f"{self.field} < {first}", f"{self.field} > {first}"))
            others = [f"{self.field} != {_quoted(value)}" for value in self.values[1:]]
            same = [_joined("and", [kind, *others])]
        if not isinstance(self.values[0], str):
            same += self.field.truths(lambda number: (number in self.values) != self.negated)
        return _joined("or", same)

    def matches(self, row: Row) -> bool:
        value = self.field.like(row, self.values[0])
        return value is not None and (value in self.values) != self.negated


@dataclass(frozen=True)
class Exists:
    """The attribute is there and not null; or `negated`, it is not."""

    field: Field
    negated: bool

    def expression(self) -> str:
        return f"{'not ' if self.negated else ''}(exists {self.field})"

    def matches(self, row: Row) -> bool:
        return (self.field.of(row) is None) == self.negated


@dataclass(frozen=True)
class Group:
    """All of its parts (`and`), or any (`or`)."""

    word: str
    parts: tuple[Condition, ...]

    def expression(self) -> str:
        return _joined(self.word, [part.expression() for part in self.parts])

    def matches(self, row: Row) -> bool:
        return (all if self.word == "and" else any)(part.matches(row) for part in self.parts)


Condition = Range | Among | Exists | Group


@dataclass(frozen=True)
class Where:
    """A condition on products with its values bound. Equal ones find the same products."""

    condition: Condition

    @classmethod
    def parse(cls, text: str, params: Mapping[str, Any] = MappingProxyType({})) -> Where:
        """The condition that `text` spells, `{name}` standing for `params["name"]`.

        Raises FilterError, which names the piece that is wrong and says what may stand there.
        """
        if (size := len(text.encode("utf-8", "surrogatepass"))) > MAX_TEXT_BYTES:
            raise FilterError(
                f"condition: expected at most {MAX_TEXT_BYTES} bytes, got {size}; bind long "
                "lists as parameters"
            )
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
            place = f", character {exc.offset}" if isinstance(exc, SyntaxError) else ""
            raise FilterError(
                f"condition{place}: expected something like `price < 20 and brand == {{brand}}`, "
                f"got {text[:80]!r} ({getattr(exc, 'msg', exc)}); put quotes around texts, and "
                'write names that are no plain words as attr["Item weight"]'
            ) from exc
        where = cls(_Reader(text.strip(), params).condition(tree.body, False, MAX_DEPTH))
        if (size := len(where.expression().encode())) > MAX_EXPRESSION_BYTES:
            raise FilterError(
                f"condition: expected at most {MAX_EXPRESSION_BYTES} bytes in Milvus's language, "
                f"got {size}; bind fewer or shorter values"
            )
        return where

    def expression(self) -> str:
        """What Milvus is sent as `filter`; every value in it is quoted."""
        return self.condition.expression()

    def matches(self, row: Row) -> bool:
        """The same of one row as Milvus returns it: {"id", "title", …, "attributes": {…}}."""
        return self.condition.matches(row)


class _Reader:
    """Python's syntax tree → a condition; what is not listed here is refused."""

    def __init__(self, text: str, params: Mapping[str, Any]) -> None:
        self._text, self._params, self._values_left = text, params, MAX_VALUES

    def condition(self, node: ast.expr, negated: bool, depth: int) -> Condition:
        if not depth:
            raise self._refused(node, f"at most {MAX_DEPTH} levels", "write it flatter")
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self.condition(value, negated, depth - 1) for value in values]
                return _group("and" if isinstance(op, ast.And) != negated else "or", parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self.condition(operand, not negated, depth - 1)
            case ast.Compare(left=left, ops=ops, comparators=rest):
                pairs = zip([left, *rest], ops, rest, strict=False)
                return _group("or" if negated else "and", [self._pair(*p, negated) for p in pairs])
            case ast.Call(func=ast.Name(id="exists"), args=[of], keywords=[]):
                field = self._field(of)
                if field.own:
                    raise self._refused(
                        of, "an attribute", "each product has this field; leave it out"
                    )
                return Exists(field, negated)
            case ast.Call(
                func=ast.Attribute(value=of, attr="startswith"), args=[prefix], keywords=[]
            ):
                return self._prefix(self._field(of), prefix, negated)
        raise self._refused(
            node,
            "a comparison",
            "use == != < <= > >= in, and or not, exists(name), name.startswith(text)",
        )

    def _pair(self, left: ast.expr, op: ast.cmpop, right: ast.expr, negated: bool) -> Condition:
        if isinstance(op, ast.In | ast.NotIn):
            field = self._field(left)
            values = self._list(field, right)
            return Among(field, values, isinstance(op, ast.NotIn) != negated)
        if type(op) not in SYMBOLS:
            raise self._refused(
                right, "== != < <= > >= or in", "use exists(name) for what is missing"
            )
        symbol = SYMBOLS[type(op)]
        if not isinstance(left, ast.Name | ast.Subscript):
            left, right, symbol = right, left, MIRRORED[symbol]
        if negated:
            symbol = NEGATED[symbol]
        field = self._field(left)
        value = self._value(field, right)
        if symbol in COMPARE:
            return Range(field, symbol, value)
        return Among(field, (value,), symbol == "!=")

    def _prefix(self, field: Field, node: ast.expr, negated: bool) -> Condition:
        prefix = self._value(field, node)
        if not isinstance(prefix, str):
            raise self._refused(node, "a text", "only texts start with something")
        ends = [Range(field, "<" if negated else ">=", prefix)]
        if after := _after(prefix):
            ends.append(Range(field, ">=" if negated else "<", after))
        return _group("or" if negated else "and", ends)

    def _field(self, node: ast.expr) -> Field:
        match node:
            # Python spells some letters of a name in another way: then it is not what was meant.
            case ast.Name(id=name) if name == ast.get_source_segment(self._text, node):
                return Field(name, name in OWN)
            case ast.Subscript(
                value=ast.Name(id="attr"), slice=ast.Constant(value=str(name)) as key
            ):
                if not name or _control(name) or set('"\\') & set(name) or "][" in name:
                    raise self._refused(
                        key, 'a name without control characters, ", \\ and ][', "rename"
                    )
                return Field(name, own=False)
        raise self._refused(
            node,
            "the name of an attribute",
            f'or {", ".join(OWN)}; names that are no plain words are written attr["Item weight"]',
        )

    def _list(self, field: Field, node: ast.expr) -> tuple[Value, ...]:
        """The values after `in`, each once, in order."""
        match node:
            case ast.List(elts=nodes) | ast.Tuple(elts=nodes):
                values = [self._value(field, each) for each in nodes]
            case ast.Set(elts=[ast.Name(id=name)]):
                bound = self._bound(node, name)
                if not isinstance(bound, list | tuple | set | frozenset):
                    raise self._refused(
                        node, "a bound list", f"bind one, got {type(bound).__name__}"
                    )
                values = [self._checked(field, node, each) for each in bound]
            case _:
                raise self._refused(
                    node, "a list", 'write ["red", "blue"], or bind one as {colours}'
                )
        if not values or len({isinstance(value, str) for value in values}) > 1:
            raise self._refused(
                node, "values, all of them texts or all numbers", "join two with `or`"
            )
        return tuple(sorted(set(values)))

    def _value(self, field: Field, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=value):
                return self._checked(field, node, value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return self._checked(field, node, -value)
            case ast.Set(elts=[ast.Name(id=name)]):
                return self._checked(field, node, self._bound(node, name))
        raise self._refused(node, "a value", 'write "text", a number, True, False or {parameter}')

    def _bound(self, node: ast.expr, name: str) -> Any:
        if name not in self._params:
            bound = ", ".join(map(str, self._params)) or "none"
            raise self._refused(node, "a bound parameter", f"bind {name!r}; bound are: {bound}")
        return self._params[name]

    def _checked(self, field: Field, node: ast.expr, value: Any) -> Value:
        """A value that both backends read as it is meant."""
        self._values_left -= 1 if field.own else ATTRIBUTE_VALUE
        if self._values_left < 0:
            raise self._refused(
                node,
                f"at most {MAX_VALUES} values in all",
                f"one of an attribute counts as {ATTRIBUTE_VALUE}",
            )
        kind = type(value)
        if kind not in (str, int, float, bool):
            raise self._refused(
                node, "text, int, float or bool", f"convert it, got {kind.__name__}"
            )
        if field.own and kind is not OWN[field.name]:
            wanted = OWN[field.name].__name__
            raise self._refused(
                node, f"{wanted} for {field.name}", f"convert it, got {kind.__name__}"
            )
        if isinstance(value, str):
            if _control(value):
                raise self._refused(
                    node, "text without control characters and surrogates", "clean it"
                )
            return value
        if not abs(value) <= MAX_NUMBER:  # NaN is refused, too
            raise self._refused(node, f"a number up to ±{MAX_NUMBER}", "keep longer ones as text")
        return int(value) if kind is bool else value

    def _refused(self, node: ast.expr, expected: str, advice: str) -> FilterError:
        before = LINE_END.split(self._text)[: node.lineno]
        column = len(before.pop().encode()[: node.col_offset].decode())
        piece = ast.get_source_segment(self._text, node) or ""
        return FilterError(
            f"condition, character {len(''.join(before)) + column + 1}: expected {expected}, "
            f"got `{piece[:80]}`; {advice}"
        )


def _group(word: str, parts: Iterable[Condition]) -> Condition:
    """A group in a group of the same word is part of it, so that equal conditions are equal."""
    flat: list[Condition] = []
    for part in parts:
        flat += part.parts if isinstance(part, Group) and part.word == word else (part,)
    return flat[0] if len(flat) == 1 else Group(word, tuple(flat))


def _joined(word: str, terms: Iterable[str]) -> str:
    text = f" {word} ".join(terms := list(terms))
    return text if len(terms) == 1 else f"({text})"


def _quoted(value: Value) -> str:
    """JSON without \\u escapes is read alike by Milvus Lite and the server."""
    return json.dumps(value, ensure_ascii=False)


def _control(text: str) -> bool:
    return any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text)


def _after(prefix: str) -> str:
    """The least text behind all that start with `prefix`, in code points; "" where there is none.

    Texts are in this order in Python, and by their UTF-8 bytes in Milvus.
    """
    prefix = prefix.rstrip(chr(0x10FFFF))
    if not prefix:
        return ""
    last = ord(prefix[-1]) + 1
    return prefix[:-1] + chr(0xE000 if last == 0xD800 else last)
