"""The rule on one request: what it comes to is remembered by the very records, and never outlives one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from ringfence.kernel.jws import Signed
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.examples import EXAMPLES
from ringfence.messages.permission import Permission
from ringfence.messages.registry import AgentRecord, TargetRecord, TaskRecord, UserRecord
from ringfence.model.directory import Entry
from ringfence.model.requests import Delegation, Facts, violations

AS_OF, AGE_S = 1_000_000, 3600
WANTED = Permission(target="staging", verbs=("read",), resources=("env/staging/web",))
HELD = (Permission(target="staging", verbs=("read",), resources=("env/**",)),)
NARROW = (Permission(target="staging", verbs=("read",), resources=("env/test/*",)),)


def entry(model: Any, **changes: Any) -> Entry[Any]:
    record = cast(Any, EXAMPLES[model])
    record = record.model_copy(update={"state": record.state.model_copy(update=changes)})
    return Entry(record.state, record.revision, record, b"")


def agent(ceiling: tuple[Permission, ...] = HELD) -> Entry[Any]:
    return entry(AgentRecord, status="active", ceiling=ceiling)


def task(scope: tuple[Permission, ...] = HELD) -> Entry[Any]:
    return entry(
        TaskRecord, status="active", scope=scope, agent_id=agent().state.agent_id, not_after=2 * AS_OF
    )


def user(scope: tuple[Permission, ...] = HELD) -> Entry[Any]:
    entitlements = EXAMPLES[UserRecord].state.entitlements  # type: ignore[attr-defined]
    return entry(
        UserRecord,
        status="active",
        entitlements=entitlements.model_copy(update={"scope": scope, "as_of": AS_OF}),
    )


def facts(*wanted: Permission) -> Facts:
    claims = cast(CredentialRequest, EXAMPLES[CredentialRequest]).model_copy(
        update={"scope": wanted or (WANTED,)}
    )
    return Facts(
        agent(), entry(UserRecord, user_id="sam", status="active", roles=("sponsor",)), task(), user(),
        entry(TargetRecord, status="active"), Signed(claims, ""), "5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d",
    )  # fmt: skip


def sides(given: Facts, now_s: float = AS_OF) -> list[str | None]:
    return [reason.side for reason in violations(given, now_s, AGE_S) if reason.code == "beyond_scope"]


@pytest.mark.parametrize(
    ("changed", "side"),
    [
        ({"task": task(NARROW)}, "task"),
        ({"agent": agent(NARROW)}, f"ceiling:{agent().state.agent_id}"),
        ({"user": user(NARROW)}, f"entitlements:{user().state.user_id}"),
        (
            {"delegations": (Delegation(agent(NARROW), None, task(), "kid"),)},
            f"ceiling:{agent().state.agent_id}",
        ),
    ],
)
def test_a_record_that_follows_is_what_the_same_wish_is_held_against(changed: dict[str, Any], side: str):
    before = facts()
    after = replace(before, **changed)  # by the same revision, too: what the record says is what counts
    assert sides(before) == []
    assert sides(after) == [side]
    assert sides(before) == []


def test_entitlements_past_their_age_count_for_nothing_though_the_records_are_the_same():
    given = facts()
    assert sides(given, AS_OF + AGE_S - 1) == []
    assert sides(given, AS_OF + AGE_S) == [f"entitlements:{given.user.state.user_id}"]
    assert sides(given, AS_OF + AGE_S - 1) == []


def test_a_field_that_may_limit_a_permission_makes_another_wish_of_it():
    given = facts()
    limited = Permission.model_validate({**WANTED.model_dump(), "unless": "it is Friday"})
    claims = given.request.claims.model_copy(update={"scope": (limited,)})
    assert violations(given, AS_OF, AGE_S) == ()
    codes = [reason.code for reason in violations(replace(given, request=Signed(claims, "")), AS_OF, AGE_S)]
    assert codes == ["scope_invalid"]


def test_another_resource_is_another_wish_on_the_same_records():
    given = facts()
    claims = given.request.claims.model_copy(
        update={"scope": (WANTED.model_copy(update={"resources": ("prod/web",)}),)}
    )
    assert sides(given) == []
    assert sides(replace(given, request=Signed(claims, ""))) == [
        "task",
        f"ceiling:{given.agent.state.agent_id}",
        f"entitlements:{given.user.state.user_id}",
    ]
