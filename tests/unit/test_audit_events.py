"""What audit says of each step: who, for whom, why; and of what nobody is believed to have said."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import orjson
import pytest

from ringfence.audit.events.ocsf import event_time, privileges, scrubbed
from ringfence.audit.records import AuditHandlers
from ringfence.audit.verification import RecordVerifier
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.jws import parse, sign, sign_payload
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import Approval
from ringfence.messages.base import ExpiringClaims, Permission
from ringfence.messages.credential import CredentialDecision, CredentialRequest, Reason
from ringfence.messages.lease import RevocationAck, RevocationRequest, Selector
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import (
    AgentDecommission,
    AgentResume,
    AgentRotateKey,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
    TargetRemove,
    TargetSet,
    TargetState,
    TaskAssign,
    TaskConsent,
    TaskEnd,
    TaskTerms,
    UserDisable,
)
from ringfence.messages.topics import (
    AGENT,
    APPROVAL_RESPONSE,
    AUDITED,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    REGISTRY_COMMAND,
    REVOCATION_ACK,
    REVOCATION_REQUEST,
    SERVICE_EVENT,
    TARGET,
    TASK,
    USER,
)
from ringfence.model.audit_log.chain import Source
from tests.support.audit_fixtures import TRACE_ID, AuditFixtures, steps


@pytest.fixture
def office() -> AuditFixtures:
    office = AuditFixtures()
    office.staff()
    return office


async def test_one_credential_is_one_event_a_step_and_each_names_everybody(office: AuditFixtures) -> None:
    story = office.credential("released")
    events = await office.audit(*story.all)
    assert steps(events) == [
        "credential.requested", "approval.required", "approval.requested", "approval.given", "request.allowed",
        "credential.issued", "reply.sent", "release.requested", "credential.released",
    ]  # fmt: skip
    for event in events:
        words = event["unmapped"]
        assert (words["agent"], words["task"], words["sponsor"], words["on_behalf_of"]) == (
            "deploy-bot", office.task, "sam", "maria",
        )  # fmt: skip
        assert words["request"] == story.request_id
        assert words["trace_id"] == TRACE_ID
        assert event["metadata"]["correlation_uid"] == story.request_id
        assert event["class_uid"] == 3003
        assert event["privileges"] == ["staging:deploy:env/staging/*"]
    assert set(office.published.keys) == {"deploy-bot"}
    assert len(set(office.published.ids)) == len(events)


async def test_the_issue_says_it_in_one_sentence(office: AuditFixtures) -> None:
    story = office.credential("expired")
    events = {event["metadata"]["event_code"]: event for event in await office.audit(*story.all)}
    issued = events["credential.issued"]
    until = event_time(issued["session"]["expiration_time"] // 1000)
    assert issued["message"] == (
        f"agent deploy-bot was issued credential lease {story.lease_id} for staging: deploy on env/staging/*, "
        f"until {until}, on behalf of maria, approved by sam"
    )
    assert issued["session"]["uid"] == story.lease_id
    assert (issued["activity_id"], issued["status"], issued["action"]) == (1, "Success", "Allowed")
    assert issued["unmapped"]["approvers"] == ["sam"]
    assert issued["unmapped"]["policy_revision"] == issued["policy"]["uid"]
    assert issued["unmapped"]["request_digest"]
    assert events["lease.expired"]["session"]["expiration_reason"] == "deadline"


async def test_only_issued_credentials_count_as_privileges_assigned(office: AuditFixtures) -> None:
    """What a SIEM counts: activity 1 with status Success, once for each credential."""
    events = await office.audit(*office.credential("revoked").all, *office.credential(approved=False).all)
    assigned = [event for event in events if (event["activity_id"], event["status_id"]) == (1, 1)]
    assert steps(assigned) == ["credential.issued"] * 2


async def test_a_refusal_names_each_reason_with_permission_and_side(office: AuditFixtures) -> None:
    story = office.credential(approved=False)
    reason = Reason(
        code="beyond_scope", message="entitlements:maria lacks it", permission=office.scope[0],
        side="entitlements:maria",
    )  # fmt: skip
    await office.audit(story.request)
    event = await office.event(story.decision("denied", ttl_s=None, reasons=(reason,)))
    assert (event["activity_id"], event["status"], event["action"]) == (1, "Failure", "Denied")
    assert event["status_code"] == "beyond_scope"
    (said,) = event["unmapped"]["reasons"]
    assert said["side"] == "entitlements:maria"
    assert said["permission"] == {"target": "staging", "verbs": ["deploy"], "resources": ["env/staging/*"]}


async def test_a_redelivery_makes_the_same_event(office: AuditFixtures) -> None:
    story = office.credential()
    first = await office.audit(*story.all)
    again = await office.audit(*story.all)
    assert again == first


async def test_a_batch_that_could_not_be_published_comes_again_and_makes_the_same_events(
    office: AuditFixtures,
) -> None:
    story = office.credential()
    replay = office.received(CREDENTIAL_REQUEST, story.request_jws)
    batch = [story.request, replay]
    office.published.fail_next = 1
    with pytest.raises(OSError, match="went away"):
        await office.handlers.handle_batch(batch)
    await office.handlers.handle_batch(batch)
    assert steps(office.published.events) == ["credential.requested", "message.replayed"]


async def test_records_of_several_topics_that_come_together_have_the_events_that_they_have_one_by_one(
    office: AuditFixtures,
) -> None:
    story = office.credential()
    expected = await office.audit(*story.all)
    handlers = AuditHandlers(
        office.published, RecordVerifier(office.trust, office.directory, office.own), SystemClock(), office.trust,
        office.uses.get, send_dead_letter=office.bury, settle_ms=0,
    )  # fmt: skip
    places = list(AUDITED)
    batch = sorted(story.all, key=lambda record: places.index(record.topic))
    await handlers.handle_batch(batch)
    told = office.published.events[-len(batch) :]
    assert [one["metadata"]["uid"] for one in told] == [
        Source(r.topic_name, r.partition, r.offset).uid for r in batch
    ]
    assert sorted(map(orjson.dumps, told)) == sorted(map(orjson.dumps, expected))


async def test_a_restarted_audit_says_the_same_of_a_decision_without_the_request(
    office: AuditFixtures,
) -> None:
    """Nothing rests on the memory: what a decision embeds is verified anew."""
    story = office.credential()
    *_, expected = await office.audit(
        story.request, *[r for r in story.all if "decision" in r.topic.what or "approval" in r.topic.what]
    )
    verifier = RecordVerifier(office.trust, office.directory, office.own)
    handlers = AuditHandlers(
        office.published,
        verifier,
        SystemClock(),
        office.trust,
        office.uses.get,
        send_dead_letter=office.bury,
        settle_ms=0,
    )
    await handlers.handle_batch([story.allowed])
    assert office.published.events[-1] == expected
    assert expected["unmapped"]["approvers"] == ["sam"]
    assert "credential.request" in expected["unmapped"]["verified"]["embedded"]


# --- whoever may sign a message must not be able to stop audit with a large one ---


def wide(permissions: int, verbs: int, resources: int) -> tuple[Permission, ...]:
    """A scope of many words, as large as the messages allow."""
    return tuple(
        Permission(
            target=f"t{n}",
            verbs=tuple(f"v{i}" for i in range(verbs)),
            resources=tuple(f"r{i}/{'x' * 90}" for i in range(resources)),
        )
        for n in range(permissions)
    )


async def test_the_largest_request_there_can_be_is_an_event_that_kafka_takes(office: AuditFixtures) -> None:
    bot = office.key("agent", "deploy-bot")
    record = office.signed(CREDENTIAL_REQUEST, office.request(scope=wide(45, 64, 64)), bot)
    assert len(record.value) > 350_000
    event = await office.event(record)
    assert steps([event]) == ["credential.requested"]
    assert len(json.dumps(event)) < 16 * 1024
    assert set(event["unmapped"]["left_out"]) == {"permissions", "privileges"}
    assert event["unmapped"]["request_digest"] == digest(record.value)
    assert (event["unmapped"]["agent"], event["unmapped"]["on_behalf_of"]) == ("deploy-bot", "maria")


async def test_a_refusal_of_very_many_permissions_is_an_event_that_kafka_takes(office: AuditFixtures) -> None:
    story = office.credential(scope=wide(19, 64, 64), approved=False)
    scope = story.request_claims.scope
    reasons = tuple(Reason(code="beyond_scope", message="x" * 2000, permission=p) for p in scope)
    _, event = await office.audit(story.request, story.decision("denied", ttl_s=None, reasons=reasons))
    assert steps([event]) == ["request.refused"]
    assert "reasons" in event["unmapped"]["left_out"]
    assert event["status_code"] == "beyond_scope"
    assert len(event["status_detail"]) <= 2000


async def test_a_scope_of_many_combinations_does_not_multiply(office: AuditFixtures) -> None:
    request = office.request(scope=wide(20, 64, 64))
    event = await office.event(office.signed(CREDENTIAL_REQUEST, request, office.key("agent", "deploy-bot")))
    assert len(event["privileges"]) <= 256


async def test_long_texts_are_cut_and_cost_no_time(office: AuditFixtures) -> None:
    sam = office.key("user", "sam")
    story = office.credential()
    comment = "a" * 100_000 + ".." + "b" * 100_000
    yes = office.claims(
        Approval, sam, verdict="approved", request=story.request_jws, request_id=story.request_id,
        request_digest="0" * 64, ttl_s=300, delivery="agent", revisions=story.revisions, comment=comment,
    )  # fmt: skip
    event = await office.event(office.signed(APPROVAL_RESPONSE, yes, sam))
    assert len(event["unmapped"]["comment"]) <= 500


async def test_oversized_unknown_fields_are_left_out_of_an_event(office: AuditFixtures) -> None:
    olga = office.key("user", "olga")
    selector = Selector.model_validate({"agent_id": "deploy-bot", "note": "x" * 300_000})
    order = office.claims(RevocationRequest, olga, kind="revocation", selector=selector, reason="x")
    event = await office.event(office.signed(REVOCATION_REQUEST, order, olga))
    assert event["unmapped"]["left_out"] == ["selector"]
    assert event["unmapped"]["agent"] == "deploy-bot"


# --- tables that are a moment behind ---


class HandClock:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.at_ms = 0

    def now_ms(self) -> int:
        return self.at_ms


async def test_a_signer_who_is_known_a_moment_later_is_believed() -> None:
    clock = HandClock()
    office = AuditFixtures(clock, settle_ms=20_000)
    office.staff()
    key = office.key("agent", "late-bot")
    request = office.claims(
        CredentialRequest, key, task_id=office.task, scope=office.scope, ttl_s=60, reason="x",
        reply_key=office.request().reply_key,
    )  # fmt: skip
    record = office.signed(CREDENTIAL_REQUEST, request, key)
    clock.at_ms = record.appended_at_ms
    waiting = asyncio.create_task(office.audit(record))
    await asyncio.sleep(0)
    assert not waiting.done()
    office.user("somebody-else")
    await asyncio.sleep(0)
    assert not waiting.done(), "a change that does not help"
    office.agent("late-bot")
    (event,) = await asyncio.wait_for(waiting, 20)
    assert steps([event]) == ["credential.requested"]
    assert event["unmapped"]["sponsor"] == "sam"


async def test_an_agent_that_is_known_a_moment_later_has_its_sponsor_in_the_event() -> None:
    clock = HandClock()
    office = AuditFixtures(clock, settle_ms=20_000)
    office.staff()
    sam = office.key("user", "sam")
    suspend = office.claims(AgentSuspend, sam, agent_id="late-bot", reason="odd")
    record = office.signed(REGISTRY_COMMAND, suspend, sam)
    clock.at_ms = record.appended_at_ms
    waiting = asyncio.create_task(office.audit(record))
    await asyncio.sleep(0)
    office.agent("late-bot")
    (event,) = await asyncio.wait_for(waiting, 20)
    assert (event["unmapped"]["agent"], event["unmapped"]["sponsor"]) == ("late-bot", "sam")


async def test_a_task_that_is_known_a_moment_later_says_on_whose_behalf_it_was() -> None:
    clock = HandClock()
    office = AuditFixtures(clock, settle_ms=20_000)
    office.staff()
    maria = office.key("user", "maria")
    terms = TaskTerms(
        agent_id="deploy-bot", purpose="x", scope=office.scope, not_after=office.now_ms // 1000 + 60
    )
    assign = office.claims(TaskAssign, maria, terms=terms, on_behalf_of="maria")
    task = message_id(assign.iss, assign.jti)
    record = office.action(task_id=task)
    clock.at_ms = record.appended_at_ms
    waiting = asyncio.create_task(office.audit(record))
    await asyncio.sleep(0)
    assert not waiting.done()
    office.carry_out(TASK, task, assign, maria)
    (event,) = await asyncio.wait_for(waiting, 20)
    assert (event["unmapped"]["task"], event["unmapped"]["on_behalf_of"]) == (task, "maria")


async def test_an_old_record_of_nobody_is_not_waited_for() -> None:
    clock = HandClock()
    office = AuditFixtures(clock, settle_ms=20_000)
    office.staff()
    record = office.signed(
        CREDENTIAL_REQUEST, office.request(), SigningKey.generate(office.key("agent", "deploy-bot").id)
    )
    clock.at_ms = record.appended_at_ms + 20_001
    (event,) = await asyncio.wait_for(office.audit(record), 15)
    assert steps([event]) == ["record.not_believed"]


# --- users, agents, targets, tasks ---


async def test_every_change_of_an_agent_has_an_event_of_its_own(office: AuditFixtures) -> None:
    office.user("petra", "sponsor")
    sam, bot = office.key("user", "sam"), {"agent_id": "deploy-bot"}
    wider = (Permission(target="staging", verbs=("read", "deploy"), resources=("**",)),)
    fresh = [SigningKey.generate(office.key("agent", "deploy-bot").id).record(2**40) for _ in range(2)]
    changes: list[tuple[type[ExpiringClaims], dict[str, Any], str, int]] = [
        (AgentSuspend, {"reason": "odd"}, "agent.suspended", 12),
        (AgentResume, {"reason": "explained"}, "agent.resumed", 13),
        (AgentRotateKey, {"key": fresh[0], "overlap_s": 60}, "agent.key_rotated", 3),
        (AgentRotateKey, {"key": fresh[1], "compromised": True}, "agent.key_compromised", 3),
        (AgentSetCeiling, {"ceiling": wider}, "agent.ceiling_set", 3),
        (AgentTransfer, {"sponsor": "petra", "consent": office.transfer_consent("petra")}, "agent.transferred", 3),
    ]  # fmt: skip
    for model, fields, code, activity in changes:
        claims = office.claims(model, sam, **bot, **fields)
        event = await office.event(office.carry_out(AGENT, "deploy-bot", claims, sam))
        assert steps([event]) == [code]
        assert (event["class_uid"], event["activity_id"], event["status"]) == (3004, activity, "Success")
        assert event["actor"]["user"]["name"] == "sam"
        assert event["entity"]["name"] == "deploy-bot"
        assert event["unmapped"]["command"] == claims.jti
    last = office.published.events[-1]
    assert last["unmapped"]["sponsor"] == "petra"
    assert last["entity_result"]["version"] == "7"
    assert fresh[0].kid in last["entity_result"]["data"]["compromised"]
    olga = office.key("user", "olga")
    gone = office.claims(AgentDecommission, olga, **bot, reason="replaced")
    event = await office.event(office.carry_out(AGENT, "deploy-bot", gone, olga))
    assert (steps([event]), event["activity_id"], event["comment"]) == (
        ["agent.decommissioned"],
        4,
        "replaced",
    )


async def test_users_targets_and_tasks_end_in_events_too(office: AuditFixtures) -> None:
    olga, maria = office.key("user", "olga"), office.key("user", "maria")
    state = office.states[TARGET, "staging"][1]
    assert isinstance(state, TargetState)
    again = office.claims(
        TargetSet, olga, target_id="staging", description="x", backend=state.backend, verbs=state.verbs
    )
    records = [
        office.carry_out(TASK, office.task, office.claims(TaskEnd, maria, task_id=office.task, reason="done"), maria),
        office.carry_out(TARGET, "staging", again, olga),
        office.carry_out(TARGET, "staging", office.claims(TargetRemove, olga, target_id="staging", reason="x"), olga),
        office.user("maria", "sponsor"),
        office.carry_out(USER, "maria", office.claims(UserDisable, olga, user_id="maria", reason="left"), olga),
    ]  # fmt: skip
    events = await office.audit(*records)
    assert steps(events) == [
        "task.ended",
        "target.changed",
        "target.removed",
        "user.changed",
        "user.disabled",
    ]
    ended = events[0]["unmapped"]
    assert (ended["agent"], ended["on_behalf_of"], ended["sponsor"], ended["task"]) == (
        "deploy-bot", "maria", "sam", office.task,
    )  # fmt: skip
    assert events[3]["entity_result"]["data"]["roles"] == ["sponsor"]


async def test_a_lower_revision_after_a_higher_is_an_alarm(office: AuditFixtures) -> None:
    sam = office.key("user", "sam")
    first = office.record_of(AGENT, "deploy-bot")
    suspend = office.claims(AgentSuspend, sam, agent_id="deploy-bot", reason="odd")
    second = office.carry_out(AGENT, "deploy-bot", suspend, sam)
    old_again = office.received(AGENT, first.value, key="deploy-bot")
    events = await office.audit(first, second, old_again)
    assert steps(events) == ["agent.registered", "agent.suspended", "record.revision_fell"]
    assert (events[2]["severity"], events[2]["is_alert"]) == ("High", True)
    assert (events[2]["unmapped"]["revision"], events[2]["unmapped"]["known_revision"]) == (1, 2)
    assert steps(await office.audit(first, second)) == ["agent.registered", "agent.suspended"], "a redelivery"


async def test_a_consent_counts_only_where_its_signature_holds(office: AuditFixtures) -> None:
    sam, maria = office.key("user", "sam"), office.key("user", "maria")
    terms = TaskTerms(
        agent_id="deploy-bot", purpose="x", scope=office.scope, not_after=office.now_ms // 1000 + 60
    )
    thief = SigningKey.generate(maria.id)
    said = []
    for signer in (maria, thief):
        consent = sign(office.claims(TaskConsent, maria, terms=terms), signer)
        claims = office.claims(TaskAssign, sam, terms=terms, on_behalf_of="maria", consent=consent)
        said.append(await office.event(office.signed(REGISTRY_COMMAND, claims, sam)))
    assert [event["unmapped"].get("consent_by") for event in said] == ["maria", None]
    assert [event["actor"]["user"]["name"] for event in said] == ["sam", "sam"]


# --- revocations ---


async def test_a_revocation_of_a_lease_names_what_it_ends(office: AuditFixtures) -> None:
    story = office.credential("revoked")
    events = await office.audit(*story.all)
    asked, ended = events[-2:]
    assert asked["unmapped"]["lease"] == story.lease_id
    assert asked["session"]["uid"] == story.lease_id
    assert ended["unmapped"]["revocation"] == asked["unmapped"]["revocation"]
    assert (ended["actor"]["user"]["name"], ended["unmapped"]["cause"]) == ("sam", "revocation")


async def test_orders_and_confirmations_of_services_that_are_given_again_are_no_alarm(
    office: AuditFixtures,
) -> None:
    """They are signed anew, with the same id. What a person signs is another message then, whoever put it there."""
    revoker, gateway = office.key("service", "revoker"), office.key("service", "gateway")
    sam = office.key("user", "sam")
    order = {"kind": "revocation", "lease_id": office.task, "reason": "x", "jti": "j"}
    told = []
    for topic, model, by, fields in (
        (REVOCATION_REQUEST, RevocationRequest, revoker, order),
        (REVOCATION_REQUEST, RevocationRequest, sam, order),
        (REVOCATION_ACK, RevocationAck, gateway, {"revocation_id": "r", "cut_at_ms": 1, "jti": "j"}),
    ):
        for iat in (1, 2):
            claims = office.claims(model, by, **{**fields, "iat": office.now_ms // 1000 + iat})
            told.append(await office.event(office.signed(topic, claims, by)))
    assert steps(told)[1::2] == ["message.repeated", "message.replayed", "message.repeated"]
    other = office.claims(
        RevocationRequest, revoker, **{**order, "lease_id": None, "selector": Selector(all=True)}
    )
    again = await office.event(office.signed(REVOCATION_REQUEST, other, revoker))
    assert steps([again]) == ["message.replayed"], "another order under the same id"


async def test_a_stranger_revokes_in_nobodys_name(office: AuditFixtures) -> None:
    thief = SigningKey.generate(office.key("user", "sam").id)
    ask = office.claims(RevocationRequest, thief, kind="revocation", lease_id=office.task, reason="mischief")
    event = await office.event(office.signed(REVOCATION_REQUEST, ask, thief))
    assert steps([event]) == ["record.not_believed"]
    assert "sam" not in json.dumps(event)


# --- what services say ---


async def test_a_refusal_by_the_issuer_is_a_credential_refused_to_the_agent(office: AuditFixtures) -> None:
    story = office.credential()
    await office.audit(story.request, story.allowed)
    why = Reason(code="task_ended", message="the task has ended")
    event = await office.event(
        office.service_event(
            "refused", "credential.decision", "issuer", request_id=story.request_id, reasons=(why,),
            actor=office.key("service", "policy").id,
        )
    )  # fmt: skip
    assert steps([event]) == ["credential.refused"]
    assert (event["user"]["name"], event["actor"]["user"]["name"]) == ("deploy-bot", "issuer")
    assert (event["activity_id"], event["status"], event["status_code"]) == (1, "Failure", "task_ended")
    assert (event["unmapped"]["agent"], event["unmapped"]["on_behalf_of"]) == ("deploy-bot", "maria")


async def test_service_event_about_a_lease_names_its_people_and_trace(
    office: AuditFixtures,
) -> None:
    story = office.credential()
    await office.audit(*story.all)
    claims = office.claims(
        ServiceEvent, office.key("service", "revoker"), kind="accepted", subject="revocation.request",
        lease_id=story.lease_id, at_ms=office.now_ms,
    )  # fmt: skip
    event = await office.event(
        office.signed(SERVICE_EVENT, claims, office.key("service", "revoker"), trace=None)
    )
    words = event["unmapped"]
    assert (words["agent"], words["sponsor"], words["on_behalf_of"], words["trace_id"]) == (
        "deploy-bot", "sam", "maria", TRACE_ID,
    )  # fmt: skip
    assert event["session"]["uid"] == story.lease_id


async def test_only_services_speak_as_services(office: AuditFixtures) -> None:
    sam = office.key("user", "sam")
    claims = office.claims(ServiceEvent, sam, kind="stopped", subject="policy", at_ms=office.now_ms)
    assert steps([await office.event(office.signed(SERVICE_EVENT, claims, sam))]) == ["record.not_believed"]


async def test_a_decision_is_judged_whole_though_what_policy_was_given_is_not_read(
    office: AuditFixtures,
) -> None:
    policy, story = office.key("service", "policy"), office.credential()
    claims = orjson.loads(parse(story.decision("allowed").value).payload)

    def told(number: int, given: object) -> Received:
        payload = orjson.dumps({**claims, "jti": f"another {number}", "input": given})
        return office.received(CREDENTIAL_DECISION, sign_payload(CredentialDecision, payload, policy))

    inputs: tuple[object, ...] = ({"a": [1, {"b": None}]}, None, "text", [], 7)
    every = [told(number, given) for number, given in enumerate(inputs)]
    assert [steps([await office.event(one)])[0] for one in every] == [
        "request.allowed", "request.allowed", *["record.not_believed"] * 3,
    ]  # fmt: skip


async def test_task_of_another_agent_gives_no_on_behalf_of(office: AuditFixtures) -> None:
    office.agent("stray")
    by = office.key("agent", "stray")
    request = office.signed(CREDENTIAL_REQUEST, office.request(iss=by.id), by)
    event = await office.event(request)
    assert (event["unmapped"]["agent"], event["unmapped"]["task"]) == ("stray", office.task)
    assert "on_behalf_of" not in event["unmapped"], "maria gave that task to deploy-bot"
    assert "maria" not in event["message"]


# --- words ---


def test_uids_depend_on_topic_partition_and_offset() -> None:
    places = [("a", 0, 1), ("a", 1, 0), ("a", 1, 1), ("b", 0, 1), ("a", 0, 11), ("a", 10, 1), ("a", 11, 1)]
    assert len({Source(*place).uid for place in places}) == len(set(places))


def test_privileges_are_one_word_for_each_verb_on_each_resource() -> None:
    scope = (Permission(target="t", verbs=("read", "write"), resources=("a", "b/*")),)
    assert privileges(scope) == ["t:read:a", "t:read:b/*", "t:write:a", "t:write:b/*"]


def test_text_that_looks_like_a_token_is_scrubbed() -> None:
    key = SigningKey.generate("spiffe://a/user/b")
    claims = AuditFixtures().claims(UserDisable, key, user_id="b", reason="x")
    jws = sign(claims, key)
    assert scrubbed(f"see {jws} please") == "see [redacted] please"
    assert scrubbed("version 1.2.3 of the build.") == "version 1.2.3 of the build."
    assert len(scrubbed("x y " * 9000)) == 500
    assert "eyJ" not in scrubbed("a " * 900 + jws * 3)


def test_a_moment_beyond_all_calendars_is_no_error() -> None:
    assert event_time(2**53) == "the end of time"
    assert event_time(1_790_000_000) == "2026-09-21T14:13:20Z"
