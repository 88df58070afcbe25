"""The table of grants: what is over goes, and nobody fills it."""

from __future__ import annotations

import uuid
from typing import Any, cast

import pytest

from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed
from ringfence.messages.approval import Grant
from ringfence.model.requests import grants
from ringfence.model.requests.grants import KEEP_MS, GrantTable
from tools.schemas.examples import EXAMPLES

EXAMPLE = cast(Grant, EXAMPLES[Grant])
AT_MS = EXAMPLE.iat * 1000


def signed(name: str = "sam", **fields: Any) -> Signed[Grant]:
    given = {"iss": f"spiffe://acme.example/user/{name}", "jti": str(uuid.uuid4()), **fields}
    return Signed(EXAMPLE.model_copy(update=given), "a.b.c")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> GrantTable:
    monkeypatch.setattr(grants, "MOST_OF_ONE", 3)
    return GrantTable(cast(Any, None), "acme.example")


def test_the_first_record_of_a_grant_stands(table: GrantTable) -> None:
    grant = signed()
    first = table.keep(grant, 1, 7, 0)
    assert first is not None
    assert table.keep(grant, 1, 9, 0) is first
    assert table.of_task(EXAMPLE.task_id) == [grant]


def test_one_person_fills_nobodys_memory(table: GrantTable) -> None:
    given = [table.keep(signed(), 0, n, 0) for n in range(5)]
    assert [one is not None for one in given] == [True, True, True, False, False]
    assert table.keep(signed("petra"), 0, 9, 0) is not None
    ids = [str(uuid.uuid4()) for _ in range(5)]
    for id in ids:
        table.take_back(id, "sam", AT_MS)
    table.take_back(ids[4], "petra", AT_MS)
    taken = [len(table._withdrawn.get(id, (0, ()))[1]) for id in ids]
    assert taken == [1, 1, 1, 0, 1]


def test_many_withdrawals_of_one_person_still_withdraw_new_grants(table: GrantTable) -> None:
    for number in range(5):
        table.take_back(str(uuid.uuid4()), "sam", AT_MS)
        grant = signed(f"sponsor-{number}").claims
        table.keep(Signed(grant, "a.b.c"), 0, number, 0)
        table.take_back(message_id(grant.iss, grant.jti), "sam", AT_MS)
        assert table.is_withdrawn(grant, sponsor="sam", on_behalf_of="maria")


def test_expired_grants_are_dropped_and_make_room(table: GrantTable) -> None:
    old, later = signed(exp=EXAMPLE.iat + 60), signed(exp=EXAMPLE.iat + 7200, task_id=str(uuid.uuid4()))
    for grant in (old, later, signed(exp=EXAMPLE.iat + 61)):
        table.keep(grant, 0, 0, 0)
    table.take_back("x", "sam", AT_MS)
    assert table.keep(signed(), 0, 0, 0) is None
    table._forget(AT_MS + 100_000 + KEEP_MS)
    assert [one.claims for one in table.all()] == [later.claims]
    assert table.of_task(EXAMPLE.task_id) == []
    assert table._withdrawn == {}
    assert table.keep(signed(), 0, 0, 0) is not None


def test_withdrawal_of_a_grant_counts_by_its_people_only(table: GrantTable) -> None:
    grant = signed().claims
    id = message_id(grant.iss, grant.jti)
    for user, counts in (("olga", False), ("maria", True), ("petra", True), ("sam", True)):
        table._withdrawn.clear()
        table.take_back(id, user, AT_MS)
        assert table.is_withdrawn(grant, sponsor="petra", on_behalf_of="maria") is counts
        assert not table.is_withdrawn(signed().claims, sponsor="petra", on_behalf_of="maria")
