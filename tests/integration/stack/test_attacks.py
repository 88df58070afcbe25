"""Attacks by people with write access to every topic, and by agents and users against each other.

Each is refused, each is told to the audit topic, and the services stay up.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from ringfence.audit.records import DEAD_LETTERED_HERE
from ringfence.client.admin.user_keys import invite, prove
from ringfence.client.agent.agent import Agent
from ringfence.client.errors import ApiError, RefusedError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.ids import digest, lease_id, message_id
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.messages.approval import Approval, ApprovalRequest
from ringfence.messages.base import Topic
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest, Revisions
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import AgentRecord, TaskTerms
from ringfence.messages.topics import (
    AGENT,
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    AUDIT,
    AUDIT_CHECKPOINT,
    AUDITED,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    HEARTBEAT,
    LEASE,
    REGISTRY_COMMAND,
    REVOCATION_REQUEST,
    RUN,
    RUN_ORDER,
    SERVICE_EVENT,
    SIGNAL_STREAM,
    TARGET,
    TASK,
    TRUST,
    USER,
)
from tests.support import audit_stories
from tests.support.audit_stories import (
    answer_refused,
    approved,
    asked_for,
    forged,
    realm_leaves,
    refused_by_policy,
)
from tests.support.stack import WITHIN_S, RunningStack, Seen, now_s

WATCHED = (LEASE, AUDIT, SERVICE_EVENT, CREDENTIAL_DECISION, DEAD_LETTER, APPROVAL_REQUEST)


def stamp(realm: RunningStack, by: SigningKey, life_s: int = 120) -> dict[str, Any]:
    now = now_s()
    return {
        "iss": by.id,
        "aud": realm.settings.trust_domain,
        "iat": now,
        "exp": now + life_s,
        "jti": str(uuid.uuid4()),
    }


def make_request(
    realm: RunningStack, verb: str = "read", resource: str = "env/staging/web", **more: Any
) -> CredentialRequest:
    return CredentialRequest(
        **{
            **stamp(realm, realm.key("agent", realm.agent)),
            "task_id": realm.task,
            "scope": (realm.permission([verb], resource),),
            "ttl_s": 300,
            "reason": "an attack",
            "reply_key": ReplyKey().public,
            **more,
        }
    )


async def put(
    publisher: Publisher, topic: Topic[Any], key: str, value: str | bytes, partition_of: str = ""
) -> Coordinates:
    sent = await (
        await publisher.send(topic, topic.what, Outbound(partition_of or key, value, id=str(uuid.uuid4())))
    )
    return Coordinates(
        topic=sent.topic, partition=sent.partition, offset=sent.offset, appended_at_ms=sent.timestamp
    )


async def decided(
    realm: RunningStack, agent: Agent, seen: Seen, request_id: str, outcome: str
) -> CredentialDecision:
    def found() -> list[CredentialDecision]:
        decisions = [
            realm.verified(agent, r, CredentialDecision, "policy") for r in seen.of(CREDENTIAL_DECISION)
        ]
        return [d for d in decisions if d and d.request_id == request_id and d.outcome == outcome]

    return (await seen.until(found, f"{outcome} for {request_id}"))[0]


async def audited(seen: Seen, holds: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    """The audit event about something, awaited."""

    def found() -> list[dict[str, Any]]:
        return [event for r in seen.of(AUDIT) if holds(event := json.loads(r.value))]

    return (await seen.until(found, f"the audit event of {what}"))[0]


def at(source: Coordinates) -> Callable[[dict[str, Any]], bool]:
    """An audit event about the record at these coordinates."""

    def holds(event: dict[str, Any]) -> bool:
        said = event["unmapped"].get("source") or {}
        return (said.get("topic"), said.get("partition"), said.get("offset")) == (
            source.topic, source.partition, source.offset,
        )  # fmt: skip

    return holds


async def buried(seen: Seen, source: Coordinates) -> dict[str, Any]:
    """The dead letter about the record at these coordinates, awaited."""

    def found() -> list[dict[str, Any]]:
        letters = [json.loads(r.value) for r in seen.of(DEAD_LETTER)]
        return [
            x
            for x in letters
            if all(x["source"][k] == getattr(source, k) for k in ("topic", "partition", "offset"))
        ]

    return (await seen.until(found, f"the dead letter of {source}"))[0]


def no_lease(seen: Seen, request_id: str) -> bool:
    return not [r for r in seen.of(LEASE) if r.key == lease_id(request_id)]


REPLAYED = """
    3002 Logon: Failure/Denied message.replayed [replayed] by nobody known, signed by bot for bot
    3002 Logon: Failure/Denied message.replayed [replayed] by policy for bot
"""
OTHERS_TASK = asked_for() + refused_by_policy(
    "task_other_agent, beyond_scope task, beyond_scope entitlements:{maria}"
)
NOT_COUNTED = {
    "a non-sponsor": approved("maria") + answer_refused("not_approver"),
    "the agent itself": forged() + answer_refused("not_a_person"),
    "the sponsor, for another digest": approved("sam") + answer_refused("approval_other_request"),
    "an unknown key": forged() + audit_stories.buried(),
}
UNSIGNED_BEHALF = """
    3004 Create: Requested task.assign by maria for bot
    3004 Create: Failure command.refused [on_behalf_of_unsigned] by registry for bot
"""
READERS = ("registry", "policy", "issuer", "revoker", "gateway", "audit")
"""Each has the records, and says what is wrong with one."""
AGAIN = """
    ~3002 Repeat: Success message.repeated by nobody known, signed by registry for bot
    ~3002 Repeat: Success message.repeated by nobody known, signed by revoker for bot
    ~3002 Repeat: Success message.repeated by nobody known, signed by gateway for bot
"""
"""The registry puts its own record back; revoker and gateway do again, and say, what follows from it."""
ROLLED_BACK = (
    "3004 Refuse Record: Failure record.revision_fell [revision_fell] by nobody known, signed by registry for bot\n"
    + "".join(f"~3002 Finding: Failure finding [revision_fell] by {one} for bot\n" for one in READERS)
    + AGAIN
)
FORGED_RECORD = (
    forged()
    + "".join(f"~3002 Finding: Failure finding [key_unknown] by {one} for bot\n" for one in READERS)
    + f"~{audit_stories.buried()}"
    + AGAIN
)
EXPIRED = "3002 Logon: Failure/Denied message.expired [expired] by bot\n" + refused_by_policy("expired")
RELEASED_ANOTHERS = """
    3003 Request Revocation: Requested/Observed release.requested by {thief} for bot
    3003 Refuse: Failure/Denied message.refused [not_entitled] by revoker for bot
"""
NO_ORDER = """
    3003 Request Revocation: Requested/Observed revocation.requested by bot
    3003 Refuse: Failure/Denied message.refused [kind_unexpected] by revoker for bot
"""


async def followed(seen: Seen, realm: RunningStack) -> None:
    """Until a change of the agent has been followed: the revoker's order, its own yes, and the gateway's."""
    wanted = {"message.accepted", "cut.confirmed"}

    def done() -> bool:
        events = [json.loads(record.value) for record in seen.of(AUDIT)]
        mine = [one for one in events if one["unmapped"].get("agent") == realm.agent]
        return wanted <= {one["metadata"]["event_code"] for one in mine}

    await seen.until(done, "what follows from a change of the agent")


async def test_a_decision_forged_by_someone_with_write_access_issues_nothing(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        thief = SigningKey.generate(f"spiffe://{realm.settings.trust_domain}/service/policy")
        request = make_request(realm, "write", "env/production/web")
        compact = sign(request, realm.key("agent", realm.agent))
        source = Coordinates(
            topic="stack.credential.request.v1", partition=0, offset=0, appended_at_ms=now_s() * 1000
        )
        decision = CredentialDecision(
            iss=thief.id, aud=request.aud, iat=now_s(), jti=str(uuid.uuid4()),
            request_id=message_id(request.iss, request.jti), request=compact, source=source, outcome="allowed",
            ttl_s=300, delivery="agent", revisions=Revisions(agent=1, user=1, task=1, target=1, policy="x"),
        )  # fmt: skip
        async with realm_leaves(realm, seen, forged() + audit_stories.buried()) as about:
            where = await put(publisher, CREDENTIAL_DECISION, realm.agent, sign(decision, thief))
            about.append(where)
            letter = await buried(seen, where)
            assert letter["service"] == "issuer"
        await seen.up_to_now()
        assert no_lease(seen, decision.request_id)
        await realm.read(agent)


async def test_a_replay_elsewhere_changes_nothing_and_is_told(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        request = make_request(realm)
        compact = sign(request, realm.key("agent", realm.agent))
        request_id = message_id(request.iss, request.jti)
        await put(publisher, CREDENTIAL_REQUEST, realm.agent, compact)
        await decided(realm, agent, seen, request_id, "allowed")
        await seen.until(lambda: not no_lease(seen, request_id), "the lease")
        await audited(
            seen,
            lambda e: (
                e["metadata"]["event_code"] == "reply.sent" and e["unmapped"].get("request") == request_id
            ),
            "the reply",
        )
        async with realm_leaves(realm, seen, REPLAYED):
            again = await put(publisher, CREDENTIAL_REQUEST, realm.agent, compact)
            event = await realm.event_where(
                agent, seen, lambda e: e.kind == "replayed" and e.source is not None
                and e.source.offset == again.offset and e.request_id == request_id, "the replay",
            )  # fmt: skip
            assert event.iss.endswith("/service/policy")
        await realm.read(agent)
        decisions = [
            realm.verified(agent, r, CredentialDecision, "policy") for r in seen.of(CREDENTIAL_DECISION)
        ]
        assert len([d for d in decisions if d and d.request_id == request_id]) == 1
        await seen.up_to_now()
        assert len([r for r in seen.of(LEASE) if r.key == lease_id(request_id)]) == 1


async def test_a_scope_one_permission_too_wide_is_denied_whole(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        wide = (
            realm.permission(["read"], "env/staging/web"),
            realm.permission(["write"], "env/production/web"),
        )
        request = make_request(realm, scope=wide)
        request_id = message_id(request.iss, request.jti)
        async with realm_leaves(
            realm, seen, asked_for() + refused_by_policy("beyond_scope entitlements:maria")
        ):
            await put(
                publisher, CREDENTIAL_REQUEST, realm.agent, sign(request, realm.key("agent", realm.agent))
            )
            decision = await decided(realm, agent, seen, request_id, "denied")
        assert [(r.code, r.side) for r in decision.reasons if r.code == "beyond_scope"] == [
            ("beyond_scope", f"entitlements:{realm.name('maria')}")
        ]
        await seen.up_to_now()
        assert no_lease(seen, request_id)


async def test_a_request_signed_by_another_agent_is_dead_lettered(realm: RunningStack, stack) -> None:
    other = await RunningStack(stack, realm.settings).make()
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        request = make_request(realm)
        async with realm_leaves(realm, seen, forged() + audit_stories.buried()) as about:
            where = await put(
                publisher, CREDENTIAL_REQUEST, realm.agent, sign(request, other.key("agent", other.agent))
            )
            about.append(where)
            assert (await buried(seen, where))["service"] == "policy"
        await realm.read(agent)


async def test_an_agent_cannot_use_the_task_of_another(realm: RunningStack, stack) -> None:
    other = await RunningStack(stack, realm.settings).make()
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        request = make_request(realm, task_id=other.task)
        async with realm_leaves(realm, seen, OTHERS_TASK.format(maria=other.name("maria"))):
            compact = sign(request, realm.key("agent", realm.agent))
            await put(publisher, CREDENTIAL_REQUEST, realm.agent, compact)
            decision = await decided(realm, agent, seen, message_id(request.iss, request.jti), "denied")
        assert "task_other_agent" in {reason.code for reason in decision.reasons}


async def pending_write(
    realm: RunningStack, publisher: Publisher, seen: Seen
) -> tuple[CredentialRequest, ApprovalRequest]:
    """A request that waits for sam's approval."""
    request = make_request(realm, "write")
    request_id = message_id(request.iss, request.jti)
    await put(publisher, CREDENTIAL_REQUEST, realm.agent, sign(request, realm.key("agent", realm.agent)))

    def found() -> list[ApprovalRequest]:
        asked = [parse(r.value).unverified_claims(ApprovalRequest) for r in seen.of(APPROVAL_REQUEST)]
        return [a for a in asked if a.request_id == request_id]

    return request, (await seen.until(found, "the approval request"))[0]


def make_approval(realm: RunningStack, asked: ApprovalRequest, by: SigningKey, **more: Any) -> str:
    claims = Approval(
        **{
            **stamp(realm, by),
            "verdict": "approved",
            "request": asked.request,
            "request_id": asked.request_id,
            "request_digest": digest(asked.request),
            "ttl_s": asked.ttl_s,
            "delivery": asked.delivery,
            "revisions": asked.revisions,
            **more,
        }
    )
    return sign(claims, by)


@pytest.mark.parametrize(
    "who", ["a non-sponsor", "the agent itself", "the sponsor, for another digest", "an unknown key"]
)
async def test_an_approval_that_does_not_count(realm: RunningStack, who: str) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        _, asked = await pending_write(realm, publisher, seen)
        sam, maria = realm.key("user", realm.name("sam")), realm.key("user", realm.name("maria"))
        approval = {
            "a non-sponsor": lambda: make_approval(realm, asked, maria),
            "the agent itself": lambda: make_approval(realm, asked, realm.key("agent", realm.agent)),
            "the sponsor, for another digest": lambda: make_approval(
                realm, asked, sam, request_digest="0" * 64
            ),
            "an unknown key": lambda: make_approval(realm, asked, SigningKey.generate(sam.id)),
        }[who]()
        async with realm_leaves(realm, seen, NOT_COUNTED[who]) as about:
            about.append(await put(publisher, APPROVAL_RESPONSE, realm.agent, approval))
        # The true approval still counts: the false one neither issued nor spoiled anything.
        await put(publisher, APPROVAL_RESPONSE, realm.agent, make_approval(realm, asked, sam))
        decision = await decided(realm, agent, seen, asked.request_id, "allowed")
        (embedded,) = decision.approvals
        assert embedded != approval
        await seen.until(lambda: not no_lease(seen, asked.request_id), "the lease")


async def policy_has_read_that(replaced: SigningKey, realm: RunningStack) -> None:
    """Return once policy knows that a key counts no more: the registry's yes to that comes a moment before."""
    async with ReadApi(replaced, realm.settings) as api, asyncio.timeout(WITHIN_S):
        while True:
            try:
                await api.get("policy", "bundle")
            except ApiError as error:
                if error.status == 401:
                    return
                raise
            await asyncio.sleep(0.02)


async def test_a_key_that_was_replaced_approves_nothing(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        _, asked = await pending_write(realm, publisher, seen)
        old, new = (
            realm.key("user", realm.name("sam")),
            SigningKey.generate(realm.key("user", realm.name("sam")).id),
        )
        async with realm.administrator("sam") as sam:
            package = prove(new, invite(sam.connection, realm.name("sam")), int(time.time()))
            await sam.add_user_key(
                realm.name("sam"), new.record(int(time.time()) + 86_400),
                invitation=package.invitation, possession=package.possession,
            )  # fmt: skip
        async with realm.as_operator() as olga:
            await olga.end_user_key(realm.name("sam"), old.kid, reason="replaced")
        await policy_has_read_that(old, realm)
        async with realm_leaves(realm, seen, forged() + audit_stories.buried()) as about:
            where = await put(publisher, APPROVAL_RESPONSE, realm.agent, make_approval(realm, asked, old))
            about.append(where)
            assert (await buried(seen, where))["code"] == "key_unknown"
        await put(publisher, APPROVAL_RESPONSE, realm.agent, make_approval(realm, asked, new))
        await decided(realm, agent, seen, asked.request_id, "allowed")


async def test_a_key_counts_in_its_time_alone(realm: RunningStack) -> None:
    bot = f"new-{realm.mark}"
    now = realm.key("agent", bot)
    later = SigningKey.generate(now.id)
    async with realm.administrator("sam") as sam:
        await sam.register_agent(
            bot, description="two keys", ceiling=[realm.permission(["read"], "env/**")],
            keys=[now.record(now_s() + 3600), later.record(now_s() + 7200, now_s() + 3600)],
        )  # fmt: skip
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        request = make_request(realm, **stamp(realm, now))
        async with realm_leaves(realm, seen, forged() + audit_stories.buried()) as about:
            where = await put(publisher, CREDENTIAL_REQUEST, bot, sign(request, later))
            about.append(where)
            assert (await buried(seen, where))["code"] == "key_unknown"
        await put(publisher, CREDENTIAL_REQUEST, bot, sign(request, now))
        decision = await decided(realm, agent, seen, message_id(request.iss, request.jti), "denied")
        assert "task_other_agent" in {reason.code for reason in decision.reasons}, (
            "believed, and denied for its task"
        )


async def test_an_approval_of_what_has_changed_meanwhile_is_stale(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        _, asked = await pending_write(realm, publisher, seen)
        async with realm.administrator("sam") as sam:
            await sam.set_ceiling(realm.agent, [realm.permission(["read", "write"], "env/staging/*")])
        approval = make_approval(realm, asked, realm.key("user", realm.name("sam")))
        async with realm_leaves(realm, seen, approved("sam") + refused_by_policy("approval_stale")):
            await put(publisher, APPROVAL_RESPONSE, realm.agent, approval)
            decision = await decided(realm, agent, seen, asked.request_id, "denied")
        assert "approval_stale" in {reason.code for reason in decision.reasons}
        await seen.up_to_now()
        assert no_lease(seen, asked.request_id)


async def test_a_task_on_behalf_of_someone_who_did_not_sign(realm: RunningStack) -> None:
    async with realm.administrator("maria") as maria, realm.seen(*WATCHED) as seen:
        terms = TaskTerms(
            agent_id=realm.agent, purpose="more than I may", not_after=now_s() + 600,
            scope=(realm.permission(["write"], "env/production/*"),),
        )  # fmt: skip
        forged_consent = await maria.consent_to_task(terms)
        for consent in (None, forged_consent):
            async with realm_leaves(realm, seen, UNSIGNED_BEHALF):
                with pytest.raises(RefusedError, match="on behalf of"):
                    await maria.assign_terms(terms, on_behalf_of=realm.name("sam"), consent=consent)


async def test_a_consent_covers_the_terms_that_were_signed_and_no_others(realm: RunningStack) -> None:
    async with (
        realm.administrator("maria") as maria,
        realm.administrator("sam") as sam,
        realm.seen(*WATCHED) as seen,
    ):
        terms = TaskTerms(
            agent_id=realm.agent, purpose="read", not_after=now_s() + 600,
            scope=(realm.permission(["read"], "env/production/*"),),
        )  # fmt: skip
        consent = await sam.consent_to_task(terms)
        wider = terms.model_copy(update={"scope": (realm.permission(["write"], "env/production/*"),)})
        async with realm_leaves(realm, seen, UNSIGNED_BEHALF):
            with pytest.raises(RefusedError):
                await maria.assign_terms(wider, on_behalf_of=realm.name("sam"), consent=consent)
        assert await maria.assign_terms(terms, on_behalf_of=realm.name("sam"), consent=consent)


async def test_a_forged_lease_record_changes_nothing(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        credential = await realm.read(agent)
        real = (await seen.until(lambda: realm.leases(agent, seen, credential.lease_id), "the lease"))[0]
        thief = SigningKey.generate(f"spiffe://{realm.settings.trust_domain}/service/revoker")
        end = real.model_copy(update={"iss": thief.id, "seq": 99, "status": "revoked"})
        async with realm_leaves(realm, seen, forged() + audit_stories.buried()) as about:
            about.append(await put(publisher, LEASE, credential.lease_id, sign(end, thief)))
        await agent.release(credential)
        end = await realm.end_of(agent, seen, credential.lease_id)
        assert end.status == "released"


async def test_a_registry_record_with_a_lower_revision_is_refused_and_alarmed(realm: RunningStack) -> None:
    def newest(seen: Seen) -> list[Received]:
        return [r for r in seen.of(AGENT) if r.key == realm.agent]

    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED, AGENT) as seen:
        async with realm.administrator("sam") as sam:
            await sam.suspend_agent(realm.agent, reason="odd")
            # It covers what was asked for until it was given, which may be after the agent has been resumed.
            await realm.event_where(
                agent, seen, lambda e: e.kind == "accepted" and e.subject == "revocation.request"
                and e.agent_id == realm.agent, "the revoker's order",
            )  # fmt: skip
            await sam.resume_agent(realm.agent, reason="a mistake")
            await seen.until(lambda: len(newest(seen)) == 2, "the resumed record")
        # Somebody with write access appends the old, truly signed record again: suspended would come back.
        old = newest(seen)[0]
        await followed(seen, realm)
        async with realm_leaves(realm, seen, ROLLED_BACK) as about:
            about.append(await put(publisher, AGENT, realm.agent, old.value))
        await realm.read(agent)


async def test_a_record_that_the_registry_did_not_sign_counts_for_nothing(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED, AGENT) as seen:
        async with realm.administrator("sam") as sam:
            await sam.suspend_agent(realm.agent, reason="odd")
        await seen.until(lambda: [r for r in seen.of(AGENT) if r.key == realm.agent], "the record")
        mine = [r for r in seen.of(AGENT) if r.key == realm.agent][-1]
        record = realm.verified(agent, mine, AgentRecord, "registry")
        assert record is not None
        thief = SigningKey.generate(record.iss)
        awake = record.model_copy(
            update={"revision": 99, "state": record.state.model_copy(update={"status": "active"})}
        )
        await followed(seen, realm)
        async with realm_leaves(realm, seen, FORGED_RECORD) as about:
            about.append(await put(publisher, AGENT, realm.agent, sign(awake, thief)))
        request = make_request(realm)
        async with realm_leaves(realm, seen, asked_for() + refused_by_policy("agent_suspended")):
            compact = sign(request, realm.key("agent", realm.agent))
            await put(publisher, CREDENTIAL_REQUEST, realm.agent, compact)
            decision = await decided(realm, agent, seen, message_id(request.iss, request.jti), "denied")
        assert "agent_suspended" in {reason.code for reason in decision.reasons}


async def test_an_expired_request_is_denied(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        request = make_request(realm, iat=now_s() - 300, exp=now_s() - 200)
        async with realm_leaves(realm, seen, EXPIRED) as about:
            compact = sign(request, realm.key("agent", realm.agent))
            about.append(await put(publisher, CREDENTIAL_REQUEST, realm.agent, compact))
        await realm.read(agent)
        await seen.up_to_now()
        assert no_lease(seen, message_id(request.iss, request.jti))


async def test_an_agent_releases_only_its_own(realm: RunningStack, stack) -> None:
    other = await RunningStack(stack, realm.settings).make()
    async with realm.as_agent() as agent, other.as_agent() as thief, realm.seen(*WATCHED) as seen:
        credential = await realm.read(agent)
        async with realm_leaves(realm, seen, RELEASED_ANOTHERS.format(thief=other.agent)):
            with pytest.raises(RefusedError):
                await thief.release(credential.lease_id, timeout_s=20)
        await seen.up_to_now()
        assert [lease.status for lease in realm.leases(agent, seen, credential.lease_id)] == ["active"]


async def test_an_agent_gives_no_orders(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        credential = await realm.read(agent)
        key = realm.key("agent", realm.agent)
        fields = {k: v for k, v in stamp(realm, key).items() if k != "exp"}
        everything = RevocationRequest(
            **fields, kind="revocation", selector=Selector(all=True), reason="chaos"
        )
        async with realm_leaves(realm, seen, NO_ORDER) as about:
            about.append(await put(publisher, REVOCATION_REQUEST, realm.agent, sign(everything, key)))
            await realm.event_where(
                agent, seen, lambda e: e.kind == "refused" and e.ref == everything.jti, "the refusal"
            )
        await seen.up_to_now()
        assert [lease.status for lease in realm.leases(agent, seen, credential.lease_id)] == ["active"]


async def test_the_key_of_a_decommissioned_agent_opens_nothing(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        credential = await realm.read(agent)
        async with realm.administrator("sam") as sam:
            await sam.decommission_agent(realm.agent, reason="done")
        await seen.until(
            lambda: [
                one for one in realm.leases(agent, seen, credential.lease_id) if one.status == "revoked"
            ],
            "the end of its lease",
        )
        request = make_request(realm)
        request_id = message_id(request.iss, request.jti)
        key = realm.key("agent", realm.agent)
        await seen.until(
            lambda: [
                one for one in realm.leases(agent, seen, credential.lease_id) if one.status == "revoked"
            ],
            "the end of its lease",
        )
        await followed(seen, realm)
        async with realm_leaves(realm, seen, asked_for() + refused_by_policy("agent_decommissioned")):
            await put(publisher, CREDENTIAL_REQUEST, realm.agent, sign(request, key))
            decision = await decided(realm, agent, seen, request_id, "denied")
        assert "agent_decommissioned" in {reason.code for reason in decision.reasons}
        await seen.up_to_now()
        assert no_lease(seen, request_id)


async def test_a_stolen_key_opens_nothing_after_its_rotation(realm: RunningStack) -> None:
    """Neither what it signs then, nor what was asked for with it before."""
    stolen = realm.key("agent", realm.agent)
    fresh = SigningKey.generate(stolen.id)
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        taken = await realm.read(agent)
        async with realm.administrator("sam") as sam:
            await sam.rotate_key(realm.agent, fresh, compromised=True, reason="it was in a log")
        agent.use_key(fresh)
        (end,) = await seen.until(
            lambda: [one for one in realm.leases(agent, seen, taken.lease_id) if one.status == "revoked"],
            "the end of what the thief has",
        )
        assert end.cause.kind == "key_compromised"
        request = make_request(realm)
        await followed(seen, realm)
        async with realm_leaves(realm, seen, forged() + audit_stories.buried()) as about:
            where = await put(publisher, CREDENTIAL_REQUEST, realm.agent, sign(request, stolen))
            about.append(where)
            assert (await buried(seen, where))["code"] == "key_unknown"
        mine = await realm.read(agent)
        await seen.up_to_now()
        assert no_lease(seen, message_id(request.iss, request.jti))
        assert [lease.status for lease in realm.leases(agent, seen, mine.lease_id)] == ["active"]


HALF_A_CHARACTER = b64encode(rb'{"alg":"ES256","typ":"ringfence.lease+jwt","kid":"\ud800"}')
GARBAGE = [
    b"",
    b"\x00\xff",
    b"{}",
    b"a.b.c",
    b"[" * 5000,
    "ü".encode() * 100,
    b"eyJhbGciOiJub25lIn0.e30.",
    b".".join([HALF_A_CHARACTER.encode(), b"e30", b"AA"]),
    b"x" * 600_000,
]
EVERYWHERE = [
    REGISTRY_COMMAND, USER, AGENT, TARGET, TASK, CREDENTIAL_REQUEST, CREDENTIAL_DECISION, APPROVAL_REQUEST,
    APPROVAL_RESPONSE, LEASE, REVOCATION_REQUEST, SERVICE_EVENT, DEAD_LETTER, TRUST, HEARTBEAT, SIGNAL_STREAM,
    AUDIT, AUDIT_CHECKPOINT, RUN, RUN_ORDER,
]  # fmt: skip
FOLLOWED = {HEARTBEAT, SIGNAL_STREAM, AUDIT, AUDIT_CHECKPOINT}
"""Nothing on these becomes an event; what is invalid there goes to the dead letters, by audit."""
CONSUMED = {
    REGISTRY_COMMAND, CREDENTIAL_REQUEST, CREDENTIAL_DECISION, APPROVAL_RESPONSE, REVOCATION_REQUEST, RUN,
}  # fmt: skip
BURIED = CONSUMED | DEAD_LETTERED_HERE | FOLLOWED
"""What is invalid there goes to the dead letters, whatever it is; of records all but tombstones do."""


RECORDS = {USER, AGENT, TARGET, TASK}


def garbage_story(topic: Topic[Any]) -> str:
    """Each is told by audit, buried by who consumes the topic, and a finding of everybody where it is a record."""
    unread = "not_json" if topic is DEAD_LETTER else "not_a_jws"
    codes = [unread] * (len(GARBAGE) - 1) + ["not_json" if topic is DEAD_LETTER else "too_large"]
    buried_codes = list(codes) if topic in BURIED else []
    story = ""
    if topic in RECORDS:
        buried_codes = codes[1:]  # a tombstone is nothing that a consumer of it could do something with
        codes[0] = "tombstone"
        agent = " for bot" if topic is AGENT else ""
        story += "".join(
            f"~3002 Finding: Failure finding [{code}] by {one}{agent}\n" for code in codes for one in READERS
        )
        if topic is AGENT:
            story += "~3002 Repeat: Success message.repeated by nobody known, signed by registry for bot\n"
    if topic is AUDIT:
        buried_codes = ["claims_invalid" if one == b"{}" else "not_json" for one in GARBAGE]
    told = [forged(code) for code in codes] if topic in AUDITED else []
    if topic is TRUST:
        told[0], buried_codes[0] = forged("tombstone"), "tombstone"
    if topic in (LEASE, RUN):
        del buried_codes[0]
    if topic is LEASE:
        told[0] = "3003 Forget: Success/Observed lease.forgotten by nobody known\n"
    if topic is DEAD_LETTER:
        told[2] = forged("claims_invalid")  # JSON belongs there, and no such
    return story + "".join(f"~{one}" for one in [*told, *map(audit_stories.buried, buried_codes)])


@pytest.mark.parametrize("topic", EVERYWHERE, ids=lambda topic: topic.what)
async def test_garbage_on_any_topic_stops_nobody(realm: RunningStack, topic: Topic[Any]) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        async with realm_leaves(realm, seen, garbage_story(topic)) as about:
            about += [await put(publisher, topic, realm.agent, garbage) for garbage in GARBAGE]
            if topic in BURIED:
                for where in about[1:] if topic in (LEASE, RUN) else about:
                    letter = await buried(seen, where)
                    assert letter["code"]
                    assert letter["reason"]
        await realm.read(agent)
        assert realm.stack.ended() is None
        realm.stack.wait_ready()
