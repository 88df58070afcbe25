"""What commands do to users, agents, targets and tasks, and who may give them."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Claims, KeyRecord, PublicJwk
from ringfence.messages.registry import (
    AgentDecommission,
    AgentResume,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    TargetRemove,
    TargetState,
    TaskEnd,
    TaskState,
    UserDisable,
    UserState,
)
from ringfence.model.lifecycle import CommandRefusedError
from tests.support.in_memory_registry import START_MS, InMemoryRegistry, permission

NOW_S = START_MS // 1000
WIDE, NARROW = (permission("env/**"),), (permission("env/a"),)


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    return ledger


def refused(ledger: InMemoryRegistry, claims: Claims, key: SigningKey | None = None, **when: Any) -> str:
    """The code with which a command is refused."""
    with pytest.raises(CommandRefusedError) as caught:
        ledger.give(claims, key, **when)
    assert str(caught.value)
    return caught.value.code


def user(ledger: InMemoryRegistry, id: str) -> UserState:
    entry = ledger.directory.user(id)
    assert entry is not None
    return entry.state


def agent(ledger: InMemoryRegistry, id: str = "bot") -> AgentState:
    entry = ledger.directory.agent(id)
    assert entry is not None
    return entry.state


def target(ledger: InMemoryRegistry, id: str = "staging") -> TargetState:
    entry = ledger.directory.target(id)
    assert entry is not None
    return entry.state


def task(ledger: InMemoryRegistry, id: str) -> TaskState:
    entry = ledger.directory.task(id)
    assert entry is not None
    return entry.state


def assigned(ledger: InMemoryRegistry, by: str = "uma", **fields: Any) -> str:
    change = ledger.give(ledger.assign(by, "bot", **fields))
    assert change is not None
    assert isinstance(change.state, TaskState)
    return change.state.task_id


# --- users ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["sam", "adam", "uma"])
def test_only_operators_and_the_root_set_or_disable_users(ledger: InMemoryRegistry, who: str):
    assert refused(ledger, ledger.user_set(who, "eve", ["operator"])) == "not_operator"
    disable = ledger.claims(UserDisable, who, user_id="uma", reason="x")
    assert refused(ledger, disable) == "not_operator"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"roles": ("operator", "sponsor")}, "roles"),
        ({"scope": (permission("env/b"),)}, "entitlements"),
        ({"as_of": NOW_S + 4}, "refreshes"),
    ],
)
def test_operator_cannot_widen_their_own_rights(ledger: InMemoryRegistry, change: dict[str, Any], why: str):
    start: dict[str, Any] = {"roles": ("operator",), "entitlements": ledger.entitlements(*NARROW)}
    ledger.give(ledger.user_set("otto", "olga", **start))
    wider = dict(start)
    if "roles" in change:
        wider["roles"] = change["roles"]
    else:
        wider["entitlements"] = ledger.entitlements(*change.get("scope", NARROW), as_of=change.get("as_of"))
    assert refused(ledger, ledger.user_set("olga", "olga", **wider)) == "self_widening", why
    assert ledger.give(ledger.user_set("otto", "olga", **wider)) is not None  # another operator may


def test_operators_narrow_themselves_and_change_their_own_keys(ledger: InMemoryRegistry):
    fresh = SigningKey.generate(ledger.key("olga").id, "EdDSA")
    ledger.give(ledger.user_set("olga", "olga", ["operator"], keys=(ledger.key_record(fresh),)))
    old, new = ledger.key("olga"), fresh
    ends = {key.kid: key.not_after for key in user(ledger, "olga").keys}
    assert ends[old.kid] <= ledger.clock.ms // 1000 < ends[new.kid]
    ledger.give(ledger.user_set("olga", "olga", []), new)
    assert user(ledger, "olga").roles == ()


def test_entitlements_cannot_be_of_a_moment_to_come(ledger: InMemoryRegistry):
    """They would never grow old."""
    late = ledger.entitlements(*WIDE, as_of=ledger.clock.ms // 1000 + 3600)
    assert refused(ledger, ledger.user_set("olga", "uma", entitlements=late)) == "as_of_in_future"


def test_a_disabled_user_comes_back_only_by_an_operator(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(UserDisable, "olga", user_id="sam", reason="left"))
    assert user(ledger, "sam").status == "disabled"
    ledger.give(ledger.user_set("otto", "sam", ["sponsor"]))
    assert user(ledger, "sam").status == "active"


def test_an_ended_key_is_kept_with_its_end_and_can_be_given_again(ledger: InMemoryRegistry):
    first, second = ledger.key("uma"), SigningKey.generate(ledger.key("uma").id)
    ledger.give(ledger.user_set("olga", "uma", keys=(ledger.key_record(second),)))
    ended_at = {key.kid: key.not_after for key in user(ledger, "uma").keys}[first.kid]
    ledger.give(ledger.user_set("olga", "uma", keys=(ledger.key_record(second),), name="Uma Thorne"))
    assert {key.kid: key.not_after for key in user(ledger, "uma").keys}[first.kid] == ended_at
    ledger.give(ledger.user_set("olga", "uma", keys=(ledger.key_record(first),)))
    ends = {key.kid: key.not_after for key in user(ledger, "uma").keys}
    assert ends[first.kid] > ledger.clock.ms // 1000 >= ends[second.kid]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda key: key.model_copy(update={"kid": "another-name"}),
        lambda key: key.model_copy(update={"jwk": key.jwk.model_copy(update={"y": key.jwk.x})}),
        lambda key: KeyRecord(
            kid=key.kid, not_after=key.not_after, jwk=PublicJwk(kty="OKP", crv="X25519", x="AAAA")
        ),
    ],
)
def test_a_key_that_verifies_nothing_is_refused(ledger: InMemoryRegistry, spoil: Any):
    key = spoil(ledger.key_record(SigningKey.generate("spiffe://test.example/user/uma")))
    assert refused(ledger, ledger.user_set("olga", "uma", keys=(key,))) == "key_invalid"


# --- agents -----------------------------------------------------------------------------------------------------------


def test_a_sponsor_registers_for_themself_and_an_operator_for_any_sponsor(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    ledger.give(ledger.register("olga", "robot", "suzy"))
    assert (agent(ledger, "bot").sponsor, agent(ledger, "robot").sponsor) == ("sam", "suzy")
    assert refused(ledger, ledger.register("sam", "third", "suzy")) == "not_sponsor"
    assert refused(ledger, ledger.register("uma", "third", "uma")) == "not_sponsor"
    assert refused(ledger, ledger.register("olga", "third", "uma")) == "not_a_sponsor"
    assert refused(ledger, ledger.register("olga", "third", "nobody")) == "not_a_sponsor"


def test_an_agent_needs_a_key_that_is_valid_now(ledger: InMemoryRegistry):
    key = ledger.key("bot", "agent").record(ledger.clock.ms // 1000)
    assert refused(ledger, ledger.register("sam", "bot", "sam", keys=(key,))) == "no_valid_key"


@pytest.mark.parametrize("who", ["suzy", "uma", "adam"])
def test_others_do_nothing_to_an_agent(ledger: InMemoryRegistry, who: str):
    ledger.give(ledger.register("sam", "bot", "sam"))
    for claims in (
        ledger.claims(AgentSetCeiling, who, agent_id="bot", ceiling=WIDE),
        ledger.transfer(who, "bot", who),
        ledger.claims(AgentSuspend, who, agent_id="bot", reason="x"),
        ledger.claims(AgentResume, who, agent_id="bot", reason="x"),
        ledger.claims(AgentDecommission, who, agent_id="bot", reason="x"),
    ):
        assert refused(ledger, claims) == "not_sponsor"


def test_former_sponsor_has_no_rights_over_the_agent(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    ledger.give(ledger.transfer("sam", "bot", "suzy"))
    assert refused(ledger, ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x")) == "not_sponsor"
    assert ledger.give(ledger.claims(AgentSetCeiling, "suzy", agent_id="bot", ceiling=WIDE)) is not None


def test_a_sponsor_without_the_role_is_none(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    ledger.give(ledger.user_set("olga", "sam", []))
    claims = ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE)
    assert refused(ledger, claims) == "not_sponsor"


def test_operators_suspension_is_resumed_only_by_an_operator(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="looking into it"))
    # Suspending it once more does not make it the sponsor's own suspension.
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="mine"))
    resume = ledger.claims(AgentResume, "sam", agent_id="bot", reason="x")
    assert refused(ledger, resume) == "not_operator"
    ledger.give(ledger.claims(AgentResume, "otto", agent_id="bot", reason="fine"))
    assert agent(ledger).status == "active"
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="lunch"))
    ledger.give(ledger.claims(AgentResume, "sam", agent_id="bot", reason="back"))
    assert agent(ledger).status == "active"


def test_a_decommissioned_agent_stays_so(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    ledger.give(ledger.claims(AgentDecommission, "sam", agent_id="bot", reason="done"))
    for claims in (
        ledger.claims(AgentResume, "olga", agent_id="bot", reason="x"),
        ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE),
        ledger.claims(AgentDecommission, "sam", agent_id="bot", reason="again"),
    ):
        assert refused(ledger, claims) == "decommissioned"


def test_an_order_signed_before_a_later_change_is_refused(ledger: InMemoryRegistry):
    """Kept back and sent late, it would undo what somebody saw and changed meanwhile."""
    ledger.give(ledger.register("sam", "bot", "sam"))
    old_ceiling = ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE)
    old_resume = ledger.claims(AgentResume, "sam", agent_id="bot", reason="x")
    old_transfer = ledger.transfer("sam", "bot", "suzy")
    old_suspend = ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="signed early, came late")
    ledger.clock.ms += 1000
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=NARROW))
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    for late in (old_ceiling, old_resume, old_transfer):
        assert refused(ledger, late) == "overtaken"
    ledger.give(ledger.claims(AgentResume, "sam", agent_id="bot", reason="signed after it"))
    ledger.give(old_suspend)  # what takes away is never late
    assert agent(ledger).status == "suspended"


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["sam", "adam", "uma"])
def test_only_operators_set_and_remove_targets(ledger: InMemoryRegistry, who: str):
    ledger.give(ledger.target_set("olga", "staging"))
    assert refused(ledger, ledger.target_set(who, "staging")) == "not_operator"
    assert (
        refused(ledger, ledger.claims(TargetRemove, who, target_id="staging", reason="x")) == "not_operator"
    )


def test_targets_come_go_and_come_again(ledger: InMemoryRegistry):
    assert (
        refused(ledger, ledger.claims(TargetRemove, "olga", target_id="staging", reason="x"))
        == "unknown_target"
    )
    ledger.give(ledger.target_set("olga", "staging"))
    ledger.give(ledger.claims(TargetRemove, "olga", target_id="staging", reason="moved"))
    assert target(ledger).status == "removed"
    ledger.give(ledger.target_set("otto", "staging"))
    assert target(ledger).status == "active"


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_a_task_is_on_behalf_of_who_signed(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    assert task(ledger, assigned(ledger)).on_behalf_of == "uma"
    assert refused(ledger, ledger.assign("sam", "bot", on_behalf_of="uma")) == "on_behalf_of_unsigned"


def test_a_task_on_behalf_of_who_consented_to_the_same_terms(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    terms = ledger.terms("bot")
    consent = ledger.consent("uma", terms)
    other = terms.model_copy(update={"scope": (permission("**"),)})
    wider = ledger.assign("sam", "bot", terms=other, on_behalf_of="uma", consent=consent)
    assert refused(ledger, wider) == "on_behalf_of_unsigned"
    for_another = ledger.assign("sam", "bot", terms=terms, on_behalf_of="olga", consent=consent)
    assert refused(ledger, for_another) == "on_behalf_of_unsigned"
    id = assigned(ledger, "sam", terms=terms, on_behalf_of="uma", consent=consent)
    assert (task(ledger, id).on_behalf_of, task(ledger, id).assigned_by) == ("uma", "sam")


@pytest.mark.parametrize("spoil", ["expired", "by the assigner", "not a consent", "of a disabled user"])
def test_a_consent_that_does_not_count(ledger: InMemoryRegistry, spoil: str):
    ledger.give(ledger.register("sam", "bot", "sam"))
    terms = ledger.terms("bot")
    consent = ledger.consent("uma", terms)
    match spoil:
        case "expired":
            ledger.clock.ms += 301_000
        case "by the assigner":
            consent = ledger.consent("sam", terms)
        case "not a consent":
            consent = ledger.signed(ledger.assign("uma", "bot", terms=terms))
        case _:
            ledger.give(ledger.claims(UserDisable, "olga", user_id="uma", reason="left"))
    claims = ledger.assign("sam", "bot", terms=terms, on_behalf_of="uma", consent=consent)
    assert refused(ledger, claims) == "on_behalf_of_unsigned"


def test_a_consent_is_good_for_one_task(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    terms = ledger.terms("bot")
    consent = ledger.consent("uma", terms)
    # Whoever embeds it in a task of their own does not use it up.
    assigned(ledger, "suzy", terms=terms, on_behalf_of="suzy", consent=consent)
    assigned(ledger, "sam", terms=terms, on_behalf_of="uma", consent=consent)
    again = ledger.assign("sam", "bot", terms=terms, on_behalf_of="uma", consent=consent)
    assert refused(ledger, again) == "consent_used"
    assigned(ledger, "suzy", terms=terms, on_behalf_of="suzy", consent=consent)


def test_tasks_need_an_active_agent_and_an_end_to_come(ledger: InMemoryRegistry):
    assert refused(ledger, ledger.assign("uma", "bot")) == "unknown_agent"
    ledger.give(ledger.register("sam", "bot", "sam"))
    past = ledger.terms("bot", not_after=ledger.clock.ms // 1000)
    assert refused(ledger, ledger.assign("uma", "bot", terms=past)) == "task_over"
    nothing = ledger.terms("bot", scope=())
    assert refused(ledger, ledger.assign("uma", "bot", terms=nothing)) == "scope_invalid"
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    assert refused(ledger, ledger.assign("uma", "bot")) == "agent_suspended"
    ledger.give(ledger.claims(AgentDecommission, "sam", agent_id="bot", reason="x"))
    assert refused(ledger, ledger.assign("uma", "bot")) == "agent_decommissioned"


@pytest.mark.parametrize("who", ["uma", "sam", "olga"])
def test_task_is_ended_by_its_user_the_sponsor_or_an_operator(ledger: InMemoryRegistry, who: str):
    ledger.give(ledger.register("sam", "bot", "sam"))
    id = assigned(ledger)
    assert refused(ledger, ledger.claims(TaskEnd, "suzy", task_id=id, reason="x")) == "not_entitled"
    ledger.give(ledger.claims(TaskEnd, who, task_id=id, reason="x"))
    assert task(ledger, id).status == "ended"
    assert ledger.give(ledger.claims(TaskEnd, who, task_id=id, reason="twice")) is None


# --- keys and moments, across subjects --------------------------------------------------------------------------------


def test_one_key_has_one_owner(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    key = ledger.key_record(ledger.key("bot", "agent"))
    ledger.give(ledger.claims(AgentDecommission, "sam", agent_id="bot", reason="its key is not free again"))
    ledger.give(ledger.target_set("olga", "prod", keys=(ledger.key_record(ledger.key("prod", "target")),)))
    owned = [
        key,
        ledger.key_record(ledger.key("sam")),
        ledger.key_record(ledger.key("prod", "target")),
        ledger.key_record(ledger.registry),
        ledger.key_record(ledger.root),
    ]
    for taken in owned:
        assert refused(ledger, ledger.register("sam", "other", "sam", keys=(taken,))) == "key_taken"
        assert refused(ledger, ledger.user_set("olga", "eve", keys=(taken,))) == "key_taken"
        assert refused(ledger, ledger.target_set("olga", "web", keys=(taken,))) == "key_taken"


def test_a_users_ended_key_stays_theirs(ledger: InMemoryRegistry):
    old = ledger.key_record(ledger.key("uma"))
    fresh = SigningKey.generate(ledger.key("uma").id)
    ledger.give(ledger.user_set("olga", "uma", keys=(ledger.key_record(fresh),)))
    assert refused(ledger, ledger.register("sam", "bot", "sam", keys=(old,))) == "key_taken"


def test_a_command_in_the_moment_in_which_its_signer_changed(ledger: InMemoryRegistry):
    """Readers resolve a signer as of just before; the registry must not accept what came just after."""
    ledger.give(ledger.register("sam", "bot", "sam"))
    last = ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE)
    ledger.give(ledger.claims(UserDisable, "olga", user_id="sam", reason="x"), passing_ms=0)
    assert refused(ledger, last) == "too_early"
    ledger.clock.ms += 1
    with pytest.raises(Exception, match="no valid key"):
        ledger.give(last)


def test_oversized_restricting_command_is_refused(ledger: InMemoryRegistry):
    padded = ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x", padding="x" * 8192)
    ledger.give(ledger.register("sam", "bot", "sam"))
    assert refused(ledger, padded) == "too_large"
