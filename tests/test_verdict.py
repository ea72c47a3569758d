"""A verdict is of the rows of two collections, on both Milvuses: others are not promoted."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from retrieval_client import Collection, Settings
from retrieval_client.catalog import Role
from retrieval_client.commands import release as commands
from retrieval_client.releases import apart, check_verdict
from retrieval_client.verdict import PROPERTY, Verdict, state_of
from retrieval_contract.errors import NotVerified
from tests.shop import RELEASE, Shop, candidate, row

ROWS = 20


@pytest.fixture(scope="module")
def shop(backend: Callable[[], Settings]) -> Iterator[Shop]:
    """A release that serves, and another one beside it."""
    shop = Shop(backend())
    shop.catalog.prepare(RELEASE, 8)
    with candidate(shop):
        yield shop


@pytest.fixture
def verified(shop: Shop) -> Collection:
    """The candidate, with a verdict on it; both hold the same rows."""
    shop.push(row(at) for at in range(ROWS))
    found = of_role(shop)
    states = state_of(found), state_of(shop.collection)
    Verdict("today", RELEASE, *states, failed=()).record(found)
    check_verdict(of_role(shop), shop.collection)
    return of_role(shop)


def of_role(shop: Shop) -> Collection:
    found = shop.catalog.find(Role.CANDIDATE)
    assert found
    return found


def test_what_serves_has_changed_since(shop: Shop, verified: Collection) -> None:
    """As by a load into that collection alone, or a push that was killed between the two."""
    assert apart(verified, shop.collection) == {}
    shop.collection.delete(["p3"])
    with pytest.raises(NotVerified, match=rf"{shop.collection.name} as .*\(20 rows\).*\(19\)"):
        check_verdict(verified, shop.collection)
    assert apart(verified, shop.collection) == {"surplus": 1}
    assert apart(shop.collection, verified) == {"missing": 1}
    shop.push(row(at) for at in range(ROWS))
    check_verdict(verified, shop.collection)


def test_a_rollback_says_what_it_lacks(
    shop: Shop,
    verified: Collection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Here of the candidate, which stands for what was gone back to."""
    ours = SimpleNamespace(roles=shop.catalog.named, rollback=lambda: verified)
    monkeypatch.setattr(commands, "releases", lambda settings: nullcontext(ours))
    verified.delete(["p3", "p4"])
    assert commands.run_rollback(Namespace(json=True), shop.settings) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["serving"], said["differs"]) == (verified.info.release_id, {"missing": 2})
    assert commands.run_rollback(Namespace(json=False), shop.settings) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert f"release {verified.info.release_id} serves;" in first
    assert second == "of what served before, 2 missing: push the source again"


def test_the_candidate_has_changed_since(shop: Shop, verified: Collection) -> None:
    verified.delete(["p3"])
    with pytest.raises(NotVerified, match=rf"{verified.name} as .*got other rows \(19\); push"):
        check_verdict(verified, shop.collection)


def test_a_verdict_of_an_earlier_version_is_none(shop: Shop, verified: Collection) -> None:
    """It does not say what served then."""
    said = json.loads(verified.info.properties[PROPERTY])
    del said["serving"]
    told = {PROPERTY: json.dumps(said)}
    verified.milvus.client.alter_collection_properties(verified.name, told)
    with pytest.raises(NotVerified, match="got no verdict"):
        check_verdict(of_role(shop), shop.collection)
