"""How to search: what every kind of search takes, checked once, before any server is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict

from retrieval_client.collection import MAX_RESULTS, Ask, Consistency, check_limit
from retrieval_client.hybrid import Hybrid
from retrieval_client.records import ATTRIBUTES, TITLE, Hit
from retrieval_client.where import Where
from retrieval_contract.errors import ContractError


class OptionFields(TypedDict, total=False):
    """`Options` as keyword arguments."""

    limit: int
    offset: int
    where: str | Where
    params: Mapping[str, Any]
    min_score: float | None
    fields: Sequence[str]
    thumbnails: bool
    group_by: str
    hybrid: bool | Hybrid
    consistency: Consistency


@dataclass(frozen=True)
class Options:
    """What a search may be told; ContractError for what cannot be, FilterError for `where`.

    `limit`, `offset`: so many hits, after so many; together at most MAX_RESULTS.
    `where`, `params`: a condition on products and its bound values (`where.py`).
    `min_score`: hits of a lower score are left out.
    `fields`: what a hit has besides id and score: "title", "attributes" (all), or names of some.
    `thumbnails`: small photos as well.
    `group_by`: an attribute; of the products with the same value only the best is a hit. Those
    that have no value are a group each.
    `hybrid`: search the words of titles as well (`hybrid.py`); Unsupported on a Milvus without.
    `consistency`: which writes must have been seen.
    """

    limit: int = 10
    offset: int = 0
    where: str | Where = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    min_score: float | None = None
    fields: Sequence[str] = (TITLE.name, ATTRIBUTES.name)
    thumbnails: bool = False
    group_by: str = ""
    hybrid: bool | Hybrid = False
    consistency: Consistency = Consistency.ANY

    def __post_init__(self) -> None:
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise ContractError(f"min_score: expected a number, got {self.min_score}")
        if isinstance(self.fields, str):
            raise ContractError(f"fields: expected a list of names, got {self.fields!r}")
        if self.routes and self.end > self.routes.depth:
            raise ContractError(
                f"offset + limit: expected at most {self.routes.depth} in a hybrid search, got "
                f"{self.end}; give Hybrid a larger `depth`, for all pages the same"
            )
        check_limit(self.limit)
        _ = self.condition  # raises what it raises
        if not 0 <= self.offset <= MAX_RESULTS - self.limit:
            raise ContractError(
                f"offset: expected 0 to {MAX_RESULTS - self.limit} with a limit of {self.limit}, "
                f"got {self.offset}; say more closely what is wanted instead of paging on"
            )

    @property
    def end(self) -> int:
        """How many of the best hits must be known."""
        return self.offset + self.limit

    @property
    def routes(self) -> Hybrid | None:
        """How two routes become one; None where there is one."""
        return (Hybrid() if self.hybrid is True else self.hybrid) or None

    @cached_property
    def condition(self) -> str:
        """In Milvus's language."""
        if isinstance(self.where, Where):
            return self.where.expression()
        return Where.parse(self.where, self.params).expression() if self.where else ""

    def ask(self, limit: int) -> Ask:
        """What Milvus is asked."""
        wanted = set(self.fields) - {TITLE.name}
        return Ask(
            limit,
            self.condition,
            self.thumbnails,
            (TITLE.name,) * (TITLE.name in self.fields)
            + (ATTRIBUTES.name,) * bool(wanted or self.group_by),
            self.consistency,
        )

    def attributes_of(self, hit: Hit) -> dict[str, Any]:
        """Those that were asked for by name, and the one that groups."""
        wanted = [*self.fields, self.group_by]
        return {name: hit.attributes[name] for name in wanted if name in hit.attributes}
