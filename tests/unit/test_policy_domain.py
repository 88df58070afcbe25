"""What becomes of a request, given what the rule found and what the bundle said."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, ClassVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.crypto.jws import Signed
from ringfence.kernel.kafka.producer import to_json
from ringfence.messages.approval import Approval
from ringfence.messages.base import Permission
from ringfence.messages.codes import ReceivedCode
from ringfence.messages.credential import CredentialRequest, Reason, RequiredClass
from ringfence.messages.enrolment import InstanceEnrolment
from ringfence.messages.registry import AgentRecord, TargetRecord, TaskRecord, UserRecord, VerbFloor
from ringfence.model.lifecycle import KeyHistory, KeyOrigin
from ringfence.model.records.directory import Directory, VerifiedRecord
from ringfence.model.requests.approvals import BREAK_GLASS_TTL_S
from ringfence.model.requests.facts import DelegationStep, RequestContext
from ringfence.policy.domain import (
    INPUT_FIELDS,
    MAX_ASKED,
    MAX_REASONS,
    ApprovalRequired,
    Evaluation,
    InputBuilder,
    RequestAllowed,
    RequestRefused,
    Ruling,
    approver,
    may_approve_any,
    people_to_ask,
    refuse,
    rule,
    signer,
    verdict_of,
)
from ringfence.rego.engine import PolicyFailedError, PolicyResult, result_of
from tests.support.user_keys import first_key, said_by
from tools.schemas.examples import EXAMPLES

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


def entry(model: Any, **changes: Any) -> VerifiedRecord[Any]:
    record = cast(Any, EXAMPLES[model])
    record = record.model_copy(update={"state": record.state.model_copy(update=changes)})
    return VerifiedRecord(record.state, record.revision, record, b"")


def facts(**request: Any) -> RequestContext:
    claims = cast(CredentialRequest, EXAMPLES[CredentialRequest]).model_copy(update=request)
    user = entry(UserRecord)
    sponsor = entry(UserRecord, user_id="sam", roles=("sponsor",))
    return RequestContext(
        entry(AgentRecord), sponsor, entry(TaskRecord), user, entry(TargetRecord),
        Signed(claims, "a.b.c"), "5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d",
    )  # fmt: skip


def open_facts(**request: Any) -> RequestContext:
    """Without a floor on what is asked for."""
    return replace(facts(**request), target=entry(TargetRecord, verbs=(VerbFloor(verb="deploy"),)))


def ruling(
    result: PolicyResult = ALLOW, against: tuple[Reason, ...] = (), given: RequestContext | None = None
) -> Ruling:
    return rule(given or open_facts(), against, result, (), NOBODY, 0)


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
def test_bundle_cannot_override_the_invariant(result: PolicyResult):
    found = ruling(result, (LACK,))
    assert isinstance(found, RequestRefused)
    assert LACK in found.reasons


@given(results, st.integers(1, 86_400))
def test_the_bundle_never_widens(result: PolicyResult, asked_s: int):
    given_facts = facts(ttl_s=asked_s)
    found = ruling(result, given=given_facts)
    assert found.outcome != "allowed"  # the target's floor wants the sponsor, and nobody has approved
    assert "sponsor" in found.required
    assert set(result.approvals) - {"none"} <= set(found.required)
    if isinstance(found, ApprovalRequired):
        assert result.allow
        assert not result.deny
        assert 1 <= found.ttl_s <= min(asked_s, result.max_ttl_s, given_facts.target.state.max_ttl_s)
    else:
        assert found.reasons


@given(results)
def test_allowed_request_was_allowed_by_rule_and_bundle(result: PolicyResult):
    found = ruling(result)
    if isinstance(found, RequestAllowed):
        assert result.allow
        assert not result.deny
        assert not set(result.approvals) - {"none"}
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
        assert isinstance(found, ApprovalRequired)
        assert set(result.deny) <= set(found.reasons)
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
    assert len(ruling(PolicyResult(False, many, (), 0)).reasons) == MAX_REASONS == 50


def test_a_shortened_life_is_told():
    found = ruling(PolicyResult(True, (), (), 60))
    assert isinstance(found, RequestAllowed)
    assert found.ttl_s == 60
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


# --- all of the input -------------------------------------------------------------------------------------------------


def built(given: RequestContext, **changes: Any) -> dict[str, Any]:
    fields = {"against": (), "approvals": [], "held": [], "history": {}, "requested_at_s": 90, "now_s": 100}
    return InputBuilder(declared).build(given, **{**fields, **changes})


def test_the_input_has_what_bundles_and_replays_go_by():
    document = built(facts())
    assert {field for field in INPUT_FIELDS if "." not in field} <= document.keys()
    for field in INPUT_FIELDS:
        whole, _, part = field.partition(".")
        assert not part or part in document[whole]
    assert {
        "agent.registered_at_s",
        "target.revocability",
        "target.enforced_by",
        "floors",
        "held",
    } <= INPUT_FIELDS
    assert len(INPUT_FIELDS) == 14


def test_process_mark_and_enrolment_are_not_in_the_input():
    given = facts(process="a-process-mark", enrolment="e30.e30.e30")
    assert built(given) == built(facts())


def test_the_input_says_what_was_asked():
    given = facts()
    claims = given.request.claims
    (wanted,) = claims.scope
    assert built(given)["request"] == {
        "id": given.request_id,
        "agent_id": given.agent.state.agent_id,
        "task_id": claims.task_id,
        "scope": [
            {"target": wanted.target, "verbs": list(wanted.verbs), "resources": list(wanted.resources)}
        ],
        "ttl_s": claims.ttl_s,
        "delivery": claims.delivery,
        "reason": claims.reason,
        "requested_at_s": 90,
    }


def test_the_input_is_json_as_it_is():
    given = facts(break_glass=True)
    document = built(given, against=(LACK, OTHER), approvals=({"user_id": "sam"},))
    assert json.loads(json.dumps(document)) == document
    assert document["approvals"] == [{"user_id": "sam"}]
    assert document["lacking"] == [
        {
            "code": "beyond_scope", "message": LACK.message, "side": "task",
            "permission": {"target": "staging", "verbs": ["deploy"], "resources": ["env/production/*"]},
        },
        {"code": "other", "message": OTHER.message},
    ]  # fmt: skip


def test_the_input_holds_each_record_under_its_name():
    given = facts()
    document = built(given, held=[{"lease_id": "x"}], history={"requests": 3})
    assert document["agent"]["agent_id"] == given.agent.state.agent_id
    assert document["agent"]["registered_at_s"] == given.agent.record.commands[0].appended_at_ms // 1000
    assert document["task"]["task_id"] == given.task.state.task_id
    assert document["user"]["user_id"] == given.user.state.user_id
    assert document["target"]["target_id"] == given.target.state.target_id
    assert document["floors"] == ["sponsor"]
    assert (document["held"], document["history"]) == ([{"lease_id": "x"}], {"requests": 3})


def test_one_builder_keeps_records_apart():
    builder, first = InputBuilder(declared), facts()
    both = {"agent": "bot-2", "task": "00000000-0000-5000-8000-000000000002", "user": "u2", "target": "t2"}
    second = replace(
        first,
        agent=entry(AgentRecord, agent_id=both["agent"]),
        task=entry(TaskRecord, task_id=both["task"]),
        user=entry(UserRecord, user_id=both["user"]),
        target=entry(TargetRecord, target_id=both["target"]),
    )

    def ids(given: RequestContext) -> dict[str, str]:
        found = builder.build(given, (), [], [], {}, requested_at_s=1, now_s=1)
        return {name: found[name][f"{name}_id"] for name in both}

    assert ids(second) == both
    assert ids(first) != both
    assert ids(second) == both


def test_the_kind_of_credential_is_asked_about_the_target():
    asked: list[Any] = []

    def declared_by(target: Any) -> dict[str, str]:
        asked.append(target)
        return {"revocability": "immediate"}

    given = facts()
    found = InputBuilder(declared_by).build(given, (), [], [], {}, requested_at_s=1, now_s=1)
    assert asked == [given.target.state]
    assert found["target"]["revocability"] == "immediate"


def test_absent_facts_are_left_out_of_the_input():
    given = replace(facts(), sponsor=None)
    document = built(given)
    assert document.keys().isdisjoint({"sponsor", "delegations"})
    assert document["request"].keys().isdisjoint({"break_glass", "instance"})
    assert built(facts(break_glass=True))["request"]["break_glass"] is True
    enrolment = cast(InstanceEnrolment, EXAMPLES[InstanceEnrolment])
    instance = built(replace(given, instance=enrolment))["request"]["instance"]
    assert (instance["instance_id"], instance["not_after"]) == (
        enrolment.instance_id,
        enrolment.key.not_after,
    )
    of_no_run = enrolment.model_copy(update={"run": None})
    assert "run" not in built(replace(given, instance=of_no_run))["request"]["instance"]
    step = DelegationStep(entry(AgentRecord, agent_id="above"), given.sponsor, entry(TaskRecord), "kid")
    (written,) = built(replace(given, delegations=(step,)))["delegations"]
    assert written["agent"]["agent_id"] == "above"


def test_an_approver_is_shown_with_their_roles():
    user = entry(UserRecord, user_id="sam", roles=("sponsor", "operator")).state
    assert approver(user) == {"user_id": "sam", "roles": ["sponsor", "operator"]}


# --- approvals that stand ---------------------------------------------------------------------------------------------


class People:
    """A directory of users; the agent's sponsor is sam."""

    ROLES: ClassVar[dict[str, tuple[str, ...]]] = {
        "sam": ("sponsor",), "olga": ("operator",), "otto": ("operator",), "petra": ("sponsor",),
        **{f"op-{n}": ("operator",) for n in range(MAX_ASKED + 5)},
    }  # fmt: skip

    def user(self, user_id: str) -> VerifiedRecord[Any] | None:
        if user_id not in self.ROLES:
            return None
        return entry(UserRecord, user_id=user_id, roles=self.ROLES[user_id], status="active")

    def key_history(self, user_id: str) -> KeyHistory:
        return first_key(KID)

    def compromised_giver(self, origin: KeyOrigin) -> None:
        return None


PEOPLE = cast(Directory, People())
KID = cast(Any, EXAMPLES[UserRecord]).state.keys[0].kid
"""Of all of them."""


def signed(*people: str) -> tuple[Any, ...]:
    claims = cast(Approval, EXAMPLES[Approval])
    return tuple(
        Signed(claims.model_copy(update={"iss": f"spiffe://{claims.aud}/user/{who}"}), said_by(KID))
        for who in people
    )


def sponsored(**request: Any) -> RequestContext:
    agent = entry(AgentRecord, sponsor="sam", status="active")
    # Who sponsored it before stands in its commands; those of the example are no JWS.
    record = agent.record.model_copy(update={"commands": ()})
    return replace(facts(**request), agent=replace(agent, record=record))


def decided(result: PolicyResult, given: RequestContext, *people: str) -> Ruling:
    return rule(given, (), result, signed(*people), PEOPLE, 0)


def test_required_approvals_are_met_by_entitled_people():
    wants = PolicyResult(True, (), ("operator",), 3600)
    given = sponsored()
    for people, outcome in (
        ((), "approval_required"),
        (("sam",), "approval_required"),
        (("olga",), "approval_required"),
        (("sam", "petra"), "approval_required"),
        (("sam", "olga"), "allowed"),
    ):
        found = decided(wants, given, *people)
        assert (found.outcome, found.required) == (outcome, ("sponsor", "operator"))
        assert not isinstance(found, RequestRefused)
        assert found.ttl_s == given.request.claims.ttl_s


def test_break_glass_that_was_not_needed_stands_where_it_was_answered():
    given = replace(
        sponsored(break_glass=True), target=entry(TargetRecord, verbs=(VerbFloor(verb="deploy"),))
    )
    assert [reason.code for reason in decided(ALLOW, given).reasons] == ["break_glass_not_needed"]
    assert decided(ALLOW, given, "olga").outcome == "approval_required"
    assert decided(ALLOW, given, "olga", "otto").outcome == "allowed"


def test_break_glass_tells_what_it_outweighs():
    given = replace(
        sponsored(break_glass=True), target=entry(TargetRecord, verbs=(VerbFloor(verb="deploy"),))
    )
    found = decided(PolicyResult(False, (OTHER,), (), 0), given, "olga", "otto")
    assert found.outcome == "allowed"
    assert [reason.code for reason in found.reasons][:2] == ["break_glass", "other"]


@pytest.mark.parametrize(("given_s", "ttl_s"), [(1, 1), (0, 300), (-1, 300), (20, 20)])
def test_break_glass_is_no_way_around_a_life_that_the_bundle_gives(given_s: int, ttl_s: int):
    found = verdict_of((), PolicyResult(False, (OTHER,), (), given_s), (), 300, 3600, break_glass=True)
    assert (found.denials, found.ttl_s, found.outweighed) == ((), ttl_s, (OTHER,))
    assert found.required == TWO


def test_without_break_glass_nothing_is_outweighed():
    found = verdict_of((), PolicyResult(False, (OTHER,), (), 60), (), 300, 3600)
    assert (found.denials, found.ttl_s, found.outweighed, found.required) == ((OTHER,), None, (), ())


@pytest.mark.parametrize(
    ("verb", "floor", "asks", "codes"),
    [
        ("deploy", "operator", (), ["floor"]),
        ("deploy", "operator", ("operator",), ["floor", "policy"]),
        ("other", "operator", ("operator",), ["policy"]),
        ("deploy", "sponsor", ("second_person",), ["floor", "policy"]),
    ],
)
def test_reasons_tell_floor_from_policy(verb: str, floor: str, asks: tuple[Any, ...], codes: list[str]):
    verbs = (VerbFloor(verb=verb, floor=cast(Any, floor)), VerbFloor(verb="unasked", floor="sponsor"))
    given = replace(sponsored(), target=entry(TargetRecord, verbs=verbs))
    found = decided(PolicyResult(True, (), asks, 3600), given)
    assert [reason.code for reason in found.reasons] == codes
    assert not any("unasked" in reason.message for reason in found.reasons)


def test_break_glass_itself_is_not_explained_and_what_stands_beside_it_is():
    given = sponsored(break_glass=True)
    found = decided(PolicyResult(False, (OTHER,), ("operator",), 0), given)
    assert found.required == ("sponsor", "operator", *TWO)
    assert [reason.code for reason in found.reasons] == ["floor", "policy", "break_glass", "other"]


# --- who is asked -----------------------------------------------------------------------------------------------------


def test_for_each_class_those_are_asked_who_may_give_it():
    given = sponsored()
    candidates = ["petra", "olga", "sam", "otto", "nobody"]
    assert people_to_ask(PEOPLE, given, ("sponsor",), candidates) == ("sam",)
    assert people_to_ask(PEOPLE, given, ("operator",), candidates) == ("olga", "otto")
    assert people_to_ask(PEOPLE, given, ("sponsor", "operator"), candidates) == ("sam", "olga", "otto")
    assert people_to_ask(PEOPLE, given, ("second_person",), candidates) == ("petra",)
    assert people_to_ask(PEOPLE, given, (), candidates) == ()


def test_sponsor_is_asked_when_no_other_approver_exists():
    assert people_to_ask(PEOPLE, sponsored(), ("operator",), ["petra"]) == ("sam",)
    assert people_to_ask(PEOPLE, sponsored(), ("operator",), []) == ("sam",)


def test_no_more_are_asked_than_a_crowd():
    crowd = [f"op-{n}" for n in range(MAX_ASKED + 5)]
    assert people_to_ask(PEOPLE, sponsored(), ("operator",), crowd) == tuple(crowd[:20])


def test_classes_that_a_person_may_approve():
    given = sponsored()
    every: tuple[RequiredClass, ...] = ("sponsor", "second_person", "operator", "break_glass")
    assert may_approve_any(PEOPLE, "sam", every, given) == ("sponsor",)
    assert may_approve_any(PEOPLE, "olga", every, given) == ("operator", "break_glass")
    assert may_approve_any(PEOPLE, "olga", ("sponsor",), given) == ()
    assert may_approve_any(PEOPLE, "nobody", every, given) == ()


def test_only_a_user_of_the_domain_is_a_signer():
    (approval,) = signed("sam")
    assert signer(approval) == "sam"
    for iss in (f"spiffe://{approval.claims.aud}/agent/sam", "spiffe://elsewhere.example/user/sam"):
        assert signer(Signed(approval.claims.model_copy(update={"iss": iss}), "")) is None


def test_a_denial_may_say_when_to_ask_again():
    reasons = (Reason(code="x", message="y"),)
    assert refuse(ReceivedCode("x"), "y", retry_after_s=5) == RequestRefused(reasons, retry_after_s=5)
    assert refuse(ReceivedCode("x"), "y").retry_after_s is None
    evaluation = Evaluation(refuse(ReceivedCode("x"), "y"))
    assert (evaluation.facts, evaluation.grants) == (None, ())
    assert (RequestRefused().reasons, RequestRefused().required) == ((), ())


def test_unevaluated_refusal_has_empty_fields():
    """None and nothing else: what stands in these fields goes into the decision as it is."""
    assert RequestRefused().retry_after_s is None
    evaluation = Evaluation(refuse(ReceivedCode("x"), "y"))
    made_on = (evaluation.revisions, evaluation.input, evaluation.input_digest, evaluation.input_json)
    assert made_on == (None, None, None, None)
