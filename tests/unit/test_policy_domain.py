"""What becomes of a request, given what the rule found and what the bundle said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.jws import Signed
from ringfence.kernel.kafka import to_json
from ringfence.messages.credential import CredentialRequest, Reason
from ringfence.messages.examples import EXAMPLES
from ringfence.messages.permission import Permission
from ringfence.messages.registry import AgentRecord, TargetRecord, TaskRecord, UserRecord, VerbFloor
from ringfence.model.approvals import BREAK_GLASS_TTL_S
from ringfence.model.directory import Directory, Entry
from ringfence.model.requests import Facts
from ringfence.policy.domain import MAX_REASONS, InputBuilder, Ruling, rule
from ringfence.rego.engine import PolicyFailedError, PolicyResult, result_of

NOBODY = cast(Directory, None)
"""No directory is asked where there is no approval to weigh."""
ALLOW = PolicyResult(True, (), (), 3600)
LACK = Reason(
    code="beyond_scope",
    message="the task does not allow it",
    permission=Permission(target="staging", verbs=("deploy",), resources=("env/production/*",)),
    side="task",
)
OTHER = Reason(code="other", message="something else")


def entry(model: Any, **changes: Any) -> Entry[Any]:
    record = cast(Any, EXAMPLES[model])
    record = record.model_copy(update={"state": record.state.model_copy(update=changes)})
    return Entry(record.state, record.revision, record, b"")


def facts(**request: Any) -> Facts:
    claims = cast(CredentialRequest, EXAMPLES[CredentialRequest]).model_copy(update=request)
    user = entry(UserRecord)
    sponsor = entry(UserRecord, user_id="sam", roles=("sponsor",))
    return Facts(
        entry(AgentRecord), sponsor, entry(TaskRecord), user, entry(TargetRecord),
        Signed(claims, "a.b.c"), "5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d",
    )  # fmt: skip


def open_facts(**request: Any) -> Facts:
    """Without a floor on what is asked for."""
    return replace(facts(**request), target=entry(TargetRecord, verbs=(VerbFloor(verb="deploy"),)))


def ruling(
    result: PolicyResult = ALLOW, against: tuple[Reason, ...] = (), given: Facts | None = None
) -> Ruling:
    return rule(given or open_facts(), against, result, (), NOBODY)


results = st.builds(
    PolicyResult,
    allow=st.booleans(),
    deny=st.lists(st.sampled_from([LACK, OTHER]), max_size=2).map(tuple),
    approvals=st.lists(st.sampled_from(["none", "sponsor", "second_person", "operator"]), max_size=4).map(
        tuple
    ),
    max_ttl_s=st.integers(-10, 10**6),
)


@given(results)
def test_nothing_that_the_bundle_says_outweighs_the_rule(result: PolicyResult):
    found = ruling(result, (LACK,))
    assert found.outcome == "denied"
    assert LACK in found.reasons
    assert found.ttl_s is None


@given(results, st.integers(1, 86_400))
def test_the_bundle_never_widens(result: PolicyResult, asked_s: int):
    given_facts = facts(ttl_s=asked_s)
    found = ruling(result, given=given_facts)
    assert found.outcome != "allowed"  # the target's floor wants the sponsor, and nobody has approved
    assert "sponsor" in found.required
    assert set(result.approvals) - {"none"} <= set(found.required)
    if found.outcome == "approval_required":
        assert result.allow
        assert not result.deny
        assert found.ttl_s is not None
        assert 1 <= found.ttl_s <= min(asked_s, result.max_ttl_s, given_facts.target.state.max_ttl_s)
    else:
        assert found.reasons


@given(results)
def test_what_is_allowed_was_allowed_by_all(result: PolicyResult):
    found = ruling(result)
    if found.outcome == "allowed":
        assert result.allow
        assert not result.deny
        assert not set(result.approvals) - {"none"}
        assert found.ttl_s is not None
        assert 1 <= found.ttl_s <= result.max_ttl_s


@pytest.mark.parametrize(
    ("result", "codes"),
    [
        (PolicyResult(True, (OTHER,), (), 60), ["other"]),
        (PolicyResult(False, (), (), 60), ["policy_denied"]),
        (PolicyResult(True, (), (), 0), ["policy_invalid"]),
    ],
)
def test_denied_by_the_bundle_alone(result: PolicyResult, codes: list[str]):
    found = ruling(result)
    assert (found.outcome, [r.code for r in found.reasons]) == ("denied", codes)


TWO = ("break_glass", "break_glass")


@given(results, st.lists(st.just(LACK), max_size=1).map(tuple), st.integers(1, 86_400))
def test_break_glass_outweighs_the_bundle_and_nothing_else(
    result: PolicyResult, against: tuple[Reason, ...], asked_s: int
):
    given_facts = facts(break_glass=True, ttl_s=asked_s)
    found = ruling(result, against, given_facts)
    assert found.outcome != "allowed"
    assert found.required[-2:] == TWO
    assert "sponsor" in found.required  # the floor
    assert set(result.approvals) - {"none"} <= set(found.required)
    if against:
        assert (found.outcome, LACK in found.reasons) == ("denied", True)
    elif result.allow and not result.deny and result.max_ttl_s >= 1:
        assert (found.outcome, [r.code for r in found.reasons]) == ("denied", ["break_glass_not_needed"])
    else:
        assert found.outcome == "approval_required"
        assert set(result.deny) <= set(found.reasons)
        assert found.ttl_s is not None
        assert 1 <= found.ttl_s <= min(BREAK_GLASS_TTL_S, asked_s, given_facts.target.state.max_ttl_s)
        assert result.max_ttl_s < 1 or found.ttl_s <= result.max_ttl_s


def test_only_the_agent_asks_for_break_glass():
    found = ruling(PolicyResult(False, (OTHER,), (), 60))
    assert (found.outcome, found.required) == ("denied", ())
    with pytest.raises(PolicyFailedError):
        result_of({"allow": True, "deny": [], "approvals": ["break_glass"], "max_ttl_s": 60})


def test_all_reasons_are_given_and_none_twice():
    repeated = LACK.model_copy(update={"message": "the same in other words"})
    elsewhere = LACK.model_copy(update={"side": "ceiling:deploy-bot"})
    found = ruling(PolicyResult(False, (repeated, elsewhere, OTHER), (), 0), (LACK,))
    assert found.reasons == (LACK, elsewhere, OTHER)


def test_reasons_end_somewhere():
    many = tuple(Reason(code=f"r{n}", message="x") for n in range(MAX_REASONS + 1))
    assert len(ruling(PolicyResult(False, many, (), 0)).reasons) == MAX_REASONS


def test_a_shortened_life_is_told():
    found = ruling(PolicyResult(True, (), (), 60))
    assert (found.outcome, found.ttl_s) == ("allowed", 60)
    assert [r.code for r in found.reasons] == ["ttl_shortened"]
    assert "300" in found.reasons[0].message


def test_why_somebody_is_asked_is_told():
    found = ruling(PolicyResult(True, (), ("operator",), 3600), given=facts())
    assert (found.outcome, found.required) == ("approval_required", ("sponsor", "operator"))
    assert [r.code for r in found.reasons] == ["floor", "policy"]
    assert "staging" in found.reasons[0].message
    assert "deploy" in found.reasons[0].message


def declared(target):
    return {"revocability": "ttl", "enforced_by": "target"}


def test_the_input_holds_records_and_no_keys():
    builder = InputBuilder(declared)
    document = builder.build(facts(), (LACK,), [], [], {}, requested_at_s=90, now_s=100)
    text = to_json(document).decode()
    assert "thumbprint" not in text
    assert '"kid"' not in text
    assert '"jwk"' not in text
    assert "reply_key" not in text
    assert document["lacking"][0]["side"] == "task"
    assert document["sponsor"] == {"user_id": "sam", "roles": ["sponsor"], "status": "active"}
    assert (document["request"]["requested_at_s"], document["now_s"]) == (90, 100)
    assert {name: document["target"][name] for name in declared(None)} == declared(None)
    assert document["task"]["not_after"] == facts().task.state.not_after
    assert to_json(builder.build(facts(), (LACK,), [], [], {}, requested_at_s=90, now_s=100)).decode() == text


def test_the_input_follows_the_records():
    builder, first = InputBuilder(declared), facts()
    builder.build(first, (), [], [], {}, requested_at_s=1, now_s=1)
    suspended = replace(first, agent=entry(AgentRecord, status="suspended"))
    assert (
        builder.build(suspended, (), [], [], {}, requested_at_s=1, now_s=1)["agent"]["status"] == "suspended"
    )
    assert builder.build(first, (), [], [], {}, requested_at_s=1, now_s=1)["agent"]["status"] == "active"
