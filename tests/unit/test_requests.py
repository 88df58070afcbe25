"""The rule on one request: what it comes to is remembered by the very records, and never outlives one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.messages.credential import CredentialRequest, DelegatorRevisions, Reason, Revisions
from ringfence.messages.enrolment import AttestationSelector, InstanceEnrolment
from ringfence.messages.lease import Delegator
from ringfence.messages.registry import (
    AgentDecommission,
    AgentRecord,
    AgentRotateKey,
    AgentSetCeiling,
    AgentSuspend,
    TargetRecord,
    TargetRemove,
    TaskDelegate,
    TaskEnd,
    TaskRecord,
    UserDisable,
    UserRecord,
    VerbFloor,
)
from ringfence.model.identity.attestation import selector_id
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle import subject_key
from ringfence.model.records.directory import Directory, VerifiedRecord
from ringfence.model.requests.facts import (
    DelegationStep,
    DeniedError,
    RequestContext,
    load_context,
    load_records,
    violations,
)
from tests.support.in_memory_registry import InMemoryRegistry, permission
from tests.support.user_keys import end_key
from tools.schemas.examples import EXAMPLES

AS_OF, AGE_S = 1_000_000, 3600
WANTED = Permission(target="staging", verbs=("read",), resources=("env/staging/web",))
HELD = (Permission(target="staging", verbs=("read",), resources=("env/**",)),)
NARROW = (Permission(target="staging", verbs=("read",), resources=("env/test/*",)),)


def entry(model: Any, **changes: Any) -> VerifiedRecord[Any]:
    record = cast(Any, EXAMPLES[model])
    record = record.model_copy(update={"state": record.state.model_copy(update=changes)})
    return VerifiedRecord(record.state, record.revision, record, b"")


def agent(ceiling: tuple[Permission, ...] = HELD) -> VerifiedRecord[Any]:
    return entry(AgentRecord, status="active", ceiling=ceiling)


def task(scope: tuple[Permission, ...] = HELD) -> VerifiedRecord[Any]:
    return entry(
        TaskRecord, status="active", scope=scope, agent_id=agent().state.agent_id, not_after=2 * AS_OF
    )


def user(scope: tuple[Permission, ...] = HELD) -> VerifiedRecord[Any]:
    entitlements = EXAMPLES[UserRecord].state.entitlements  # type: ignore[attr-defined]
    return entry(
        UserRecord,
        status="active",
        entitlements=entitlements.model_copy(update={"scope": scope, "as_of": AS_OF}),
    )


def facts(*wanted: Permission) -> RequestContext:
    claims = cast(CredentialRequest, EXAMPLES[CredentialRequest]).model_copy(
        update={"scope": wanted or (WANTED,)}
    )
    return RequestContext(
        agent(), entry(UserRecord, user_id="sam", status="active", roles=("sponsor",)), task(), user(),
        entry(TargetRecord, status="active"), Signed(claims, ""), "5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d",
    )  # fmt: skip


def sides(given: RequestContext, now_s: float = AS_OF) -> list[str | None]:
    return [reason.side for reason in violations(given, now_s, AGE_S) if reason.code == "beyond_scope"]


@pytest.mark.parametrize(
    ("changed", "side"),
    [
        ({"task": task(NARROW)}, "task"),
        ({"agent": agent(NARROW)}, f"ceiling:{agent().state.agent_id}"),
        ({"user": user(NARROW)}, f"entitlements:{user().state.user_id}"),
        (
            {"delegations": (DelegationStep(agent(NARROW), None, task(), "kid"),)},
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


# --- records that the registry made -----------------------------------------------------------------------------------

VERBS = ("read", "deploy", "wipe")
EVERYTHING = permission("**", verbs=VERBS)


@pytest.fixture
def ledger() -> InMemoryRegistry:
    """sam's bot and suzy's other; uma, who may do everything at `staging`."""
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(EVERYTHING)))
    verbs = (
        VerbFloor(verb="read"),
        VerbFloor(verb="deploy", floor="sponsor"),
        VerbFloor(verb="wipe", floor="operator"),
    )
    ledger.give(ledger.target_set("olga", "staging", verbs=verbs))
    ledger.give(ledger.register("sam", "bot", "sam", ceiling=(EVERYTHING,)))
    ledger.give(ledger.register("suzy", "other", "suzy", ceiling=(EVERYTHING,)))
    return ledger


def made(ledger: InMemoryRegistry, claims: Any) -> str:
    change = ledger.give(claims)
    assert change is not None
    return subject_key(change.state)[1]


@pytest.fixture
def assigned(ledger: InMemoryRegistry) -> str:
    """The task that uma assigned to bot, for an hour."""
    return made(ledger, ledger.assign("uma", "bot", terms=ledger.terms("bot", scope=(EVERYTHING,))))


def handed_on(ledger: InMemoryRegistry, parent: str) -> str:
    """bot hands its task on to other, for ten minutes."""
    terms = ledger.terms("other", scope=(EVERYTHING,), not_after=ledger.clock.ms // 1000 + 600)
    iss = ledger.key("bot", "agent").id
    return made(ledger, ledger.claims(TaskDelegate, "bot", iss=iss, parent=parent, terms=terms))


def asked(
    ledger: InMemoryRegistry, task_id: str, agent: str = "bot", **fields: Any
) -> Signed[CredentialRequest]:
    given = {
        "iss": ledger.key(agent, "agent").id,
        "task_id": task_id,
        "scope": (permission("env/staging/web", verbs=("read",)),),
        "ttl_s": 600,
        "reason": "a test",
        "reply_key": ReplyKey().public,
    }
    claims = ledger.claims(CredentialRequest, agent, **{**given, **fields})
    return Signed(claims, sign(claims, ledger.key(agent, "agent")))


def reasons(ledger: InMemoryRegistry, given: RequestContext, now_s: float | None = None) -> list[Reason]:
    return list(violations(given, ledger.clock.ms / 1000 if now_s is None else now_s, 30 * 86_400))


def codes(
    ledger: InMemoryRegistry, request: Signed[CredentialRequest], now_s: float | None = None
) -> list[str]:
    return [reason.code for reason in reasons(ledger, load_context(ledger.directory, request), now_s)]


def denied(directory: Directory, *names: str) -> Reason:
    with pytest.raises(DeniedError) as caught:
        load_records(directory, *names)
    assert (caught.value.code, caught.value.message) == (
        caught.value.reason.code,
        caught.value.reason.message,
    )
    return caught.value.reason


def only(ledger: InMemoryRegistry, *, but_for: Sequence[str] = ()) -> Directory:
    """A reader that has not seen some of the records."""
    reader = ledger.reader()
    kinds: tuple[SubjectKind, ...] = ("user", "target", "agent", "task")
    for kind in kinds:
        for one in ledger.directory.entries(kind):
            if one.record.sub.rpartition("/")[2] not in but_for:
                ledger.admit(
                    ledger.sign_record(one.record.state, one.record.commands, one.record.revision), reader
                )
    return reader


def test_context_holds_the_records_that_the_request_names(ledger: InMemoryRegistry, assigned: str):
    request = asked(ledger, assigned)
    given = load_context(ledger.directory, request)
    directory = ledger.directory
    assert (given.agent, given.sponsor) == (directory.agent("bot"), directory.user("sam"))
    assert (given.task, given.user) == (directory.task(assigned), directory.user("uma"))
    assert (given.target, given.delegations) == (directory.target("staging"), ())
    assert (given.request, given.instance) == (request, None)
    assert given.request_id == message_id(request.claims.iss, request.claims.jti)
    assert load_context(directory, request, "given").request_id == "given"
    assert (given.act, given.delegators()) == (("bot",), None)
    assert reasons(ledger, given) == []


def test_a_part_is_held_against_every_agent_that_handed_it_on(ledger: InMemoryRegistry, assigned: str):
    part = handed_on(ledger, assigned)
    given = load_context(ledger.directory, asked(ledger, part, "other"))
    (step,) = given.delegations
    bot, parent = ledger.directory.agent("bot"), ledger.directory.task(assigned)
    assert (step.agent, step.sponsor, step.task) == (bot, ledger.directory.user("sam"), parent)
    assert step.kid == ledger.key("bot", "agent").kid
    assert given.act == ("other", "bot")
    assert given.delegators() == (
        Delegator(agent_id="bot", task_id=assigned, sponsor="sam", key_thumbprint=step.kid),
    )
    assert [side.name for side in given.limits(ledger.clock.ms / 1000, 30 * 86_400)] == [
        "task", "ceiling:other", "ceiling:bot", "entitlements:uma",
    ]  # fmt: skip


@pytest.mark.parametrize(("age_s", "scope"), [(2, (EVERYTHING,)), (1, ())])
def test_the_sides_that_are_shown_are_those_that_count(
    ledger: InMemoryRegistry, assigned: str, age_s: int, scope: tuple[Permission, ...]
):
    ground = load_records(ledger.directory, "bot", assigned, "staging")
    as_of = ground.user.state.entitlements.as_of
    sides = {side.name: side.scope for side in ground.limits(as_of + 1, age_s)}
    assert sides == {"task": (EVERYTHING,), "ceiling:bot": (EVERYTHING,), "entitlements:uma": scope}


def test_revisions_are_those_of_each_record(ledger: InMemoryRegistry, assigned: str):
    for _ in range(4):
        ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()))
        ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(EVERYTHING,)))
    part = handed_on(ledger, assigned)
    ledger.give(ledger.claims(AgentSetCeiling, "suzy", agent_id="other", ceiling=(EVERYTHING, EVERYTHING)))
    ledger.give(ledger.target_set("olga", "staging", description="another"))
    ledger.give(ledger.target_set("olga", "staging", description="a third"))
    ledger.give(ledger.target_set("olga", "staging", description="a fourth"))
    ledger.give(ledger.claims(TaskEnd, "uma", task_id=part, reason="done"))
    directory = ledger.directory

    def revision(entry: VerifiedRecord[Any] | None) -> int:
        assert entry is not None
        return entry.revision

    found = load_records(directory, "other", part, "staging").revisions("p1")
    bot, parent = revision(directory.agent("bot")), revision(directory.task(assigned))
    assert found == Revisions(
        agent=revision(directory.agent("other")),
        user=revision(directory.user("uma")),
        task=revision(directory.task(part)),
        target=revision(directory.target("staging")),
        policy="p1",
        delegators=(DelegatorRevisions(agent=bot, task=parent),),
    )
    assert load_records(directory, "bot", assigned, "staging").revisions("p1").delegators is None


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        (("nobody", None, "staging"), "agent_unknown", "nobody"),
        (("bot", "00000000-0000-5000-8000-000000000000", "staging"), "task_unknown", "00000000-0000-5000"),
        (("bot", None, "nowhere"), "target_unknown", "nowhere"),
    ],
)
def test_missing_record_is_denied_by_name(
    ledger: InMemoryRegistry, assigned: str, names: tuple[str, str | None, str], code: str, said: str
):
    agent, task, target = names
    reason = denied(ledger.directory, agent, task or assigned, target)
    assert reason.code == code
    assert said in reason.message


class Without:
    """A directory that lacks one kind of record, which an honest one only does while records arrive."""

    def __init__(self, directory: Directory, kind: str, id: str) -> None:
        self._directory, self._missing = directory, (kind, id)

    def __getattr__(self, kind: str) -> Any:
        find = getattr(self._directory, kind)
        return lambda name: None if (kind, name) == self._missing else find(name)


@pytest.mark.parametrize(
    ("kind", "id", "code"),
    [
        ("agent", "bot", "agent_unknown"),
        ("target", "staging", "target_unknown"),
        ("user", "uma", "user_unknown"),
    ],
)
def test_missing_record_denies(
    ledger: InMemoryRegistry, assigned: str, kind: str, id: str, code: str
) -> None:
    found = denied(cast(Directory, Without(ledger.directory, kind, id)), "bot", assigned, "staging")
    assert (found.code, id in found.message) == (code, True)


def test_a_record_of_the_chain_that_is_not_there_denies(ledger: InMemoryRegistry, assigned: str):
    def reason(kind: str, id: str, task: str, agent: str = "bot") -> Reason:
        return denied(cast(Directory, Without(ledger.directory, kind, id)), agent, task, "staging")

    part = handed_on(ledger, assigned)
    for missing in (("task", assigned), ("agent", "bot")):
        found = reason(*missing, part, "other")
        assert found.code == "task_unknown"
        assert part in found.message
        assert assigned in found.message


def test_records_that_do_not_hold_deny(ledger: InMemoryRegistry, assigned: str):
    reason = denied(only(ledger, but_for=("olga",)), "bot", assigned, "staging")
    assert reason.code == "record_untrusted"
    assert "olga" in reason.message or "sam" in reason.message


def test_a_request_is_for_one_target(ledger: InMemoryRegistry, assigned: str):
    scope = (permission("a", verbs=("read",)), permission("a", target="other", verbs=("read",)))
    with pytest.raises(DeniedError) as caught:
        load_context(ledger.directory, asked(ledger, assigned, scope=scope))
    assert caught.value.reason.code == "several_targets"
    scope = (permission("a", verbs=("read",)), permission("b", verbs=("read",)))
    assert codes(ledger, asked(ledger, assigned, scope=scope)) == []


def test_request_of_a_user_is_denied(ledger: InMemoryRegistry, assigned: str):
    with pytest.raises(DeniedError) as caught:
        load_context(ledger.directory, asked(ledger, assigned, iss=ledger.key("sam").id))
    assert caught.value.reason.code == "agent_unknown"


@pytest.mark.parametrize(
    ("model", "by", "fields", "code", "named"),
    [
        (AgentSuspend, "sam", {"agent_id": "bot"}, "agent_suspended", "bot"),
        (AgentDecommission, "sam", {"agent_id": "bot"}, "agent_decommissioned", "bot"),
        (UserDisable, "olga", {"user_id": "sam"}, "agent_orphaned", "sam"),
        (UserDisable, "olga", {"user_id": "uma"}, "user_disabled", "uma"),
        (TargetRemove, "olga", {"target_id": "staging"}, "target_removed", "staging"),
    ],
)
def test_inactive_party_denies_the_request(
    ledger: InMemoryRegistry,
    assigned: str,
    model: Any,
    by: str,
    fields: dict[str, str],
    code: str,
    named: str,
):
    ledger.give(ledger.claims(model, by, reason="x", **fields))
    (reason,) = reasons(ledger, load_context(ledger.directory, asked(ledger, assigned)))
    assert reason.code == code
    assert named in reason.message


def test_a_sponsor_who_is_none_any_more_leaves_an_orphan(ledger: InMemoryRegistry, assigned: str):
    ledger.give(ledger.user_set("olga", "sam", ["operator"]))
    assert codes(ledger, asked(ledger, assigned)) == ["agent_orphaned"]


def test_a_task_ends_in_its_last_second_and_by_its_end(ledger: InMemoryRegistry, assigned: str):
    request = asked(ledger, assigned)
    task = ledger.directory.task(assigned)
    assert task is not None
    end_s = task.state.not_after
    assert codes(ledger, request, end_s - 0.001) == []
    assert codes(ledger, request, end_s) == ["task_ended"]
    ledger.give(ledger.claims(TaskEnd, "uma", task_id=assigned, reason="done"))
    (reason,) = reasons(ledger, load_context(ledger.directory, request))
    assert (reason.code, assigned in reason.message) == ("task_ended", True)


def test_a_part_ends_with_what_it_is_a_part_of(ledger: InMemoryRegistry, assigned: str):
    given = load_context(ledger.directory, asked(ledger, handed_on(ledger, assigned), "other"))
    (step,) = given.delegations

    def ends(**changes: Any) -> list[str]:
        state = step.task.state.model_copy(update=changes)
        above = replace(step, task=replace(step.task, state=state))
        return [reason.code for reason in reasons(ledger, replace(given, delegations=(above,)))]

    now_s = ledger.clock.ms // 1000
    assert ends() == ends(not_after=now_s + 1) == []
    assert ends(not_after=now_s) == ends(status="ended") == ["task_ended"]


def test_a_task_is_its_agents_alone(ledger: InMemoryRegistry, assigned: str):
    assert codes(ledger, asked(ledger, assigned, "other")) == ["task_other_agent"]


def test_a_verb_that_the_target_does_not_have_is_named_with_those_that_it_has(
    ledger: InMemoryRegistry, assigned: str
):
    wide = permission("**", verbs=("read", "fly", "swim"))
    ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(wide)))
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(wide,)))
    task = made(ledger, ledger.assign("uma", "bot", terms=ledger.terms("bot", scope=(wide,))))
    wanted = (permission("a", verbs=("read",)), permission("b", verbs=("fly", "read", "swim")))
    (reason,) = reasons(ledger, load_context(ledger.directory, asked(ledger, task, scope=wanted)))
    assert (reason.code, reason.permission, reason.side) == ("verb_unknown", wanted[1], "target")
    assert "fly, swim" in reason.message
    assert "deploy, read, wipe" in reason.message


def test_permission_beyond_a_limit_is_named_with_its_side(ledger: InMemoryRegistry, assigned: str):
    ledger.give(
        ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(permission("a", verbs=("read",)),))
    )
    request = asked(ledger, assigned, scope=(permission("a", "b", verbs=("read",)),))
    (reason,) = reasons(ledger, load_context(ledger.directory, request))
    lacking = permission("b", verbs=("read",))
    assert (reason.code, reason.permission, reason.side) == ("beyond_scope", lacking, "ceiling:bot")
    assert "read on b at staging" in reason.message


def test_invalid_glob_is_denied_with_its_text(ledger: InMemoryRegistry, assigned: str):
    request = asked(ledger, assigned, scope=(permission("a/../b", verbs=("read",)),))
    (reason,) = reasons(ledger, load_context(ledger.directory, request))
    assert reason.code == "scope_invalid"
    assert "'a/../b'" in reason.message


@pytest.mark.parametrize(("length", "short"), [(472, False), (473, True)])
def test_a_long_scope_is_told_as_far_as_a_message_goes(
    ledger: InMemoryRegistry, assigned: str, length: int, short: bool
):
    wanted = permission("a" * length, "b" * 480, verbs=("read",))
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()))
    request = asked(ledger, assigned, scope=(wanted,))
    (reason,) = reasons(ledger, load_context(ledger.directory, request))
    assert reason.permission == wanted
    begun = f"ceiling:bot does not allow read on {'a' * length}, "
    assert reason.message.startswith(begun)
    assert len(reason.message) <= 1000
    assert reason.message.endswith("...") == short
    if short:
        assert len(reason.message) == 1000


@pytest.mark.parametrize(
    ("verbs", "floors"),
    [
        (("read",), set()),
        (("deploy",), {"sponsor"}),
        (("read", "wipe"), {"operator"}),
        (("deploy", "wipe"), {"sponsor", "operator"}),
    ],
)
def test_floors_are_those_of_what_is_asked_for(
    ledger: InMemoryRegistry, assigned: str, verbs: tuple[str, ...], floors: set[str]
):
    given = load_context(ledger.directory, asked(ledger, assigned, scope=(permission("a", verbs=verbs),)))
    assert given.floors() == floors


def test_break_glass_is_what_the_request_says(ledger: InMemoryRegistry, assigned: str):
    assert load_context(ledger.directory, asked(ledger, assigned, break_glass=True)).break_glass is True
    assert load_context(ledger.directory, asked(ledger, assigned)).break_glass is False


def test_request_signed_by_a_compromised_key_is_denied(ledger: InMemoryRegistry, assigned: str):
    before = asked(ledger, assigned)
    new = SigningKey.generate(ledger.key("bot", "agent").id)
    rotate = ledger.claims(
        AgentRotateKey, "sam", agent_id="bot", key=ledger.key_record(new), compromised=True
    )
    ledger.give(rotate)
    ledger.keys["agent/bot"] = new
    assert codes(ledger, asked(ledger, assigned)) == []
    (reason,) = reasons(ledger, load_context(ledger.directory, before))
    assert (reason.code, "agent bot" in reason.message) == ("key_compromised", True)
    # What an enforcement point asks is signed by nobody.
    assert codes(ledger, Signed(before.claims, "")) == []


def test_request_by_key_that_rests_on_compromised_key_is_denied(ledger: InMemoryRegistry, assigned: str):
    since_ms, thief = ledger.clock.ms, SigningKey.generate(ledger.key("bot", "agent").id)
    key = ledger.key_record(thief)
    ledger.give(ledger.claims(AgentRotateKey, "sam", agent_id="bot", key=key, overlap_s=3600))
    honest = asked(ledger, assigned)
    waiting = Signed(honest.claims, sign(honest.claims, thief))
    assert codes(ledger, waiting) == []
    kid = ledger.key("sam").kid
    ledger.give(end_key(ledger, "otto", "sam", kid, compromised=True, since_ms=since_ms))
    (reason,) = reasons(ledger, load_context(ledger.directory, waiting))
    assert (reason.code, f"key {thief.kid} of bot" in reason.message) == ("key_voucher_compromised", True)
    assert codes(ledger, honest) == codes(ledger, Signed(honest.claims, "")) == []


def test_every_former_sponsor_counts_as_a_sponsor(ledger: InMemoryRegistry, assigned: str):
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(EVERYTHING, EVERYTHING)))
    ledger.give(ledger.transfer("sam", "bot", "suzy"))
    assert load_records(ledger.directory, "bot", assigned, "staging").sponsors == {"sam", "suzy"}


# --- instances --------------------------------------------------------------------------------------------------------

ENROLMENT = cast(InstanceEnrolment, EXAMPLES[InstanceEnrolment])
LET_IN = AttestationSelector(issuer=ENROLMENT.issuer, claims=dict(ENROLMENT.claims), max_life_s=43_200)


def test_an_instance_is_the_one_that_the_request_carries_the_enrolment_of(
    ledger: InMemoryRegistry, assigned: str
):
    compact = sign(ENROLMENT, ledger.registry)
    assert load_context(ledger.directory, asked(ledger, assigned, enrolment=compact)).instance == ENROLMENT


@pytest.mark.parametrize(("task_ends", "key_ends"), [(100, 200), (200, 100), (100, 100)])
def test_request_ends_with_the_task_or_the_instance_key(task_ends: int, key_ends: int):
    key = ENROLMENT.key.model_copy(update={"not_after": key_ends})
    given = replace(facts(), task=entry(TaskRecord, not_after=task_ends))
    assert given.not_after == task_ends
    assert replace(given, instance=ENROLMENT.model_copy(update={"key": key})).not_after == 100


def test_an_instance_that_is_let_in_no_more_stands_against_it():
    enrolment = ENROLMENT.model_copy(update={"selector": selector_id(LET_IN)})
    for attestation, found in (((LET_IN,), []), ((), ["instance_void"])):
        bot = entry(AgentRecord, status="active", ceiling=HELD, attestation=attestation)
        given = replace(facts(), agent=bot, instance=enrolment)
        assert [reason.code for reason in violations(given, AS_OF, AGE_S)] == found
