"""The issuer on a real broker and a real Redis; the test plays policy, honest or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import redis.asyncio

from ringfence.client.errors import TokenRejectedError
from ringfence.client.resource_server.verifier import TokenVerifier
from ringfence.dev.processes import free_port
from ringfence.dev.redis import EmbeddedRedis
from ringfence.issuer.settings import IssuerSettings
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jwe import unverified_kid
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import PublicJwk, ServiceRole, Topic
from ringfence.messages.credential import Coordinates, CredentialDelivery, ReplyContent
from ringfence.messages.lease import EndCause
from ringfence.messages.registry import AgentSetCeiling, AgentSuspend, TaskEnd
from ringfence.messages.topics import CREDENTIAL_DECISION, CREDENTIAL_REPLY, DEAD_LETTER, LEASE
from ringfence.model.lease_store import LeaseStore, SignedLease, Step
from ringfence.model.lease_store.keys import uuid_bytes
from ringfence.model.leases.lifecycle import follow
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks, opened_office
from tests.support.http_client import plain_client
from tests.support.world import WITHIN_S, Party, World, scope


@pytest.fixture(scope="module")
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """Registry and issuer, once for all tests here."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    async with opened_office(kafka, redis_server, "issuer", http=f"127.0.0.1:{port}", issuer_url=url) as desk:
        yield desk


def url(desk: IssuerBench) -> str:
    return f"http://127.0.0.1:{desk.world.ports['issuer']}"


async def redeliver(
    desk: IssuerBench, *places: Coordinates, role: str = "issuer", topic: Topic[Any] = CREDENTIAL_DECISION
) -> None:
    """Hand records that were handled once to the service again, as a broker does after a crash before the commit."""
    records = [await desk.world.record_at(topic, at) for at in places]
    # The consumer's own way in: what stands before it is Kafka's, and tested elsewhere.
    (handler,) = [
        consumer._handlers[topic.name(desk.world.prefix)]
        for consumer in desk.world.runtimes[role].consumers
        if topic.name(desk.world.prefix) in consumer._handlers
    ]
    await handler(records)


async def arrived(desk: IssuerBench) -> None:
    """Until the issuer knows all that the registry has said: it learns of a change just after it was accepted."""
    assert await desk.world.runtimes["issuer"].tables_caught_up(30)


def delivered(content: ReplyContent) -> CredentialDelivery:
    assert content.delivery is not None
    return parse(content.delivery).unverified_claims(CredentialDelivery)


async def token_claims(desk: IssuerBench, token: str) -> dict[str, Any]:
    """The claims, verified by a stranger's tools: discovery, JWKS, PyJWT."""
    async with plain_client(base_url=url(desk), timeout=WITHIN_S) as http:
        discovery = (await http.get("/.well-known/openid-configuration")).json()
        keys = jwt.PyJWKSet.from_dict((await http.get(discovery["jwks_uri"])).json())
    header = jwt.get_unverified_header(token)
    assert header["typ"] == "at+jwt"
    claims: dict[str, Any] = jwt.decode(
        token, keys[header["kid"]], algorithms=["ES256"], audience=desk.target.id, issuer=discovery["issuer"]
    )
    return claims


async def introspect(desk: IssuerBench, token: str, by: Party | None = None) -> httpx.Response:
    headers = desk.world.bearer(by, "issuer") if by else {}
    async with plain_client(base_url=url(desk), timeout=WITHIN_S) as http:
        return await http.post("/oauth2/introspect", data={"token": token}, headers=headers)


# --- what is issued ---------------------------------------------------------------------------------------------------


async def test_an_allowed_request_becomes_a_lease_and_a_credential(
    desk: IssuerBench, store: LeaseStore
) -> None:
    asked = await desk.ask("read", scope=desk.scope("read", resource="env/**"))
    decided_at = await desk.decide(asked)
    content = await desk.answer(asked)
    assert content.request_id == asked.id
    assert content.credential is not None
    lease = await desk.lease(asked.lease_id, "active")
    (record,) = await desk.records(asked.lease_id)
    assert content.lease == record.compact
    assert delivered(content).lease_digest == digest(content.lease)

    assert (lease.agent_id, lease.act, lease.sponsor) == (desk.bot.name, (desk.bot.name,), "sam")
    assert (lease.on_behalf_of, lease.task_id, lease.target_id) == ("maria", desk.task, "staging")
    assert (lease.seq, lease.backend, lease.delivery, lease.cause) == (1, "jwt", "agent", None)
    assert lease.scope == asked.claims.scope
    assert lease.request_id == asked.id
    assert lease.decision_digest == digest(content.decision)
    assert lease.requested_at_ms == asked.source.appended_at_ms
    assert lease.deadline == (decided_at.appended_at_ms + 600_000) // 1000
    assert lease.key_thumbprint == desk.bot.key.kid

    claims = await token_claims(desk, content.credential.value)
    assert content.credential.expires_at == claims["exp"] == lease.deadline
    assert claims["iat"] == claims["nbf"] == decided_at.appended_at_ms // 1000
    assert claims["jti"] == asked.lease_id
    assert (claims["sub"], claims["client_id"], claims["act"]) == (
        desk.bot.id, desk.bot.name, {"sub": desk.bot.id},
    )  # fmt: skip
    assert (claims["sponsor"], claims["on_behalf_of"]) == (desk.sam.id, desk.maria.id)
    assert claims["task"] == desk.task
    assert claims["cnf"] == {"kid": desk.bot.key.kid}
    assert claims["authorization_details"] == [
        {"type": "urn:ringfence:permission", "target": "staging", "verbs": ["read"], "resources": ["env/**"]}
    ]
    assert (await store.look(asked.lease_id)).active


async def test_lease_is_on_kafka_before_its_credential_is_delivered(desk: IssuerBench) -> None:
    asked, content = await desk.issued("read")
    lease = await desk.world.consume_until(LEASE, lambda r: r.key == asked.lease_id)

    def is_reply(record: Received) -> bool:
        return bool(asked.reply_key.open(record.value))

    reply = await desk.world.consume_until(CREDENTIAL_REPLY, is_reply)
    assert lease.appended_at_ms <= reply.appended_at_ms
    assert content.credential is not None
    for secret in content.credential.value.split("."):
        assert secret.encode() not in reply.value


async def test_a_lease_ends_no_later_than_its_task(issuer_bench: IssuerBench) -> None:
    desk = await another(issuer_bench, life_s=30)
    asked, _ = await desk.issued("read", ttl_s=600)
    lease = await desk.lease(asked.lease_id, "active")
    task_ends = int(time.time()) + 30
    assert task_ends - 20 < lease.deadline <= task_ends


async def test_policy_may_shorten(desk: IssuerBench) -> None:
    asked = await desk.ask("read")
    at = await desk.decide(asked, ttl_s=60)
    await desk.answer(asked)
    lease = await desk.lease(asked.lease_id, "active")
    assert lease.deadline == (at.appended_at_ms + 60_000) // 1000


async def test_request_that_policy_did_not_allow_is_not_issued(desk: IssuerBench) -> None:
    denied, pending = await desk.ask("read"), await desk.ask("read")
    await desk.decide(denied, outcome="denied")
    await desk.decide(pending, outcome="approval_required")
    await desk.issued("read")  # on the same partition, so handled after them
    assert await desk.records(denied.lease_id) == await desk.records(pending.lease_id) == []


async def test_the_sponsors_approval_opens_what_needs_it(desk: IssuerBench) -> None:
    asked = await desk.ask("deploy")
    await desk.decide(asked, approvals=(desk.approval(asked, desk.sam),), required=("sponsor",))
    content = await desk.answer(asked)
    assert content.credential is not None


async def test_a_record_in_redis_that_nobody_can_read_holds_up_no_other(
    desk: IssuerBench, store: LeaseStore
) -> None:
    asked = await desk.ask("read")
    place = await desk.decide(asked)
    await desk.answer(asked)
    lease = await desk.lease(asked.lease_id, "active")
    at, id = store.at(lease.lease_id), uuid_bytes(lease.lease_id)
    async with redis.asyncio.Redis.from_url(desk.world.redis_url) as client:
        kept = await client.hget(at.leases, id)
        try:
            await client.hset(at.leases, id, f"a1 {lease.deadline}\nno record")
            async with asyncio.timeout(WITHIN_S):
                await redeliver(desk, place)
            await desk.event("replayed", asked)
        finally:
            await client.hset(at.leases, id, kept)


@pytest.mark.parametrize("whose", ["another lease's", "a stranger's, of a longer life", "unsigned"])
async def test_a_record_in_redis_that_is_not_the_leases_is_answered_to_nobody(
    desk: IssuerBench, store: LeaseStore, whose: str
) -> None:
    """Whoever can write to Redis puts it there, and the decision is delivered once more."""
    asked = await desk.ask("read")
    place = await desk.decide(asked)
    await desk.answer(asked)
    lease = await desk.lease(asked.lease_id, "active")
    other, _ = await desk.issued("read")
    longer = lease.model_copy(update={"deadline": lease.deadline + 3600})
    head, body, _ = sign(longer, desk.world.key("issuer")).split(".")
    planted = {
        "another lease's": (await desk.issued_records(other.lease_id))[0].compact,
        "a stranger's, of a longer life": sign(longer, SigningKey.generate(lease.iss)),
        "unsigned": f"{head}.{body}.{'A' * 86}",
    }[whose]
    at, id = store.at(lease.lease_id), uuid_bytes(lease.lease_id)
    before = [record.value for record in await desk.world.records(LEASE)]
    async with redis.asyncio.Redis.from_url(desk.world.redis_url) as client:
        kept = await client.hget(at.leases, id)
        try:
            await client.hset(at.leases, id, f"a1 {lease.deadline}\n{planted}")
            async with asyncio.timeout(WITHIN_S):
                await redeliver(desk, place)
            await desk.event("replayed", asked)
        finally:
            await client.hset(at.leases, id, kept)
    assert [record.value for record in await desk.world.records(LEASE)] == before
    answers = [r for r in await desk.world.records(CREDENTIAL_REPLY) if unverified_kid(r.value) == asked.id]
    assert len(answers) == 1, "the first, and no other"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forger", ["a stranger", "another service", "the agent"])
async def test_a_decision_that_policy_did_not_sign_is_dead_lettered(desk: IssuerBench, forger: str) -> None:
    policy = desk.world.key("policy")
    key = {
        "a stranger": desk.world.party("service", "policy").key,
        "another service": desk.world.key("audit"),
        "the agent": desk.bot.key,
    }[forger]
    asked = await desk.ask("read")
    at = await desk.decide(asked, key, iss=policy.id if forger == "a stranger" else key.id)
    letter = await desk.world.consume_until(
        DEAD_LETTER, lambda r: f'"offset":{at.offset},'.encode() in r.value and at.topic.encode() in r.value
    )
    assert b"key_unknown" in letter.value
    await desk.issued("read")
    assert await desk.records(asked.lease_id) == []


async def test_a_decision_beyond_the_rule_is_refused_whole_and_told_as_a_finding(
    issuer_bench: IssuerBench,
) -> None:
    ceiling = scope("staging", ("read",), ("env/staging/*",))
    desk = await another(issuer_bench, ceiling=ceiling)
    wide = (*desk.scope("read"), *desk.scope("read", resource="env/production/web"))
    asked = await desk.ask(scope=wide)
    await desk.decide(asked)
    refusal = await desk.refused(asked)
    (reason,) = refusal.reasons
    assert (reason.code, reason.side) == ("beyond_scope", f"ceiling:{desk.bot.name}")
    assert reason.permission is not None
    assert reason.permission.resources == ("env/production/web",)
    assert await desk.is_finding(asked)


async def test_a_request_that_the_agent_did_not_sign_is_a_finding_and_answered_by_nobody(
    desk: IssuerBench,
) -> None:
    asked = await desk.ask("read", by=desk.sam)
    await desk.decide(asked)
    event = await desk.event("finding", asked)
    assert event.reasons[0].code in ("key_unknown", "signature_invalid")
    await desk.issued("read")
    assert await desk.records(asked.lease_id) == []


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("source_later", "the request after its decision"),
        ("request_mismatch", "another request id"),
        ("expired", "an expired request"),
        ("ttl_too_long", "a longer life than was asked for"),
        ("delivery_changed", "another delivery"),
        ("decision_incomplete", "no revisions"),
        ("approval_lacking", "an approval that is lacking"),
    ],
)
async def test_a_decision_that_no_honest_policy_makes(desk: IssuerBench, code: str, wrong: str) -> None:
    asked = await desk.ask("deploy" if code == "approval_lacking" else "read")
    source = asked.source
    wrongs: dict[str, dict[str, Any]] = {
        "source_later": {
            "source": source.model_copy(update={"appended_at_ms": source.appended_at_ms + 60_000})
        },
        "request_mismatch": {"request_id": "5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d"},
        "expired": {},
        "ttl_too_long": {"ttl_s": asked.claims.ttl_s + 1},
        "delivery_changed": {"delivery": "gateway"},
        "decision_incomplete": {"revisions": None},
        "approval_lacking": {},
    }
    fields = wrongs[code]
    if code == "expired":
        asked = await desk.ask("read", iat=int(time.time()) - 20, exp=int(time.time()) - 10)
    await desk.decide(asked, **fields)
    about = fields.get("request_id", asked.id)
    event = await desk.world.event_where(lambda e: e.kind == "finding" and e.request_id == about)
    assert event.reasons[0].code == code
    await desk.issued("read")
    assert await desk.records(asked.lease_id) == []


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("approval_invalid", "the agent's own"),
        ("approval_invalid", "a stranger's"),
        ("approval_lacking", "a user's who may not"),
        ("approval_denied", "a no"),
        ("approval_other_request", "for another request"),
        ("approval_other_terms", "for a shorter life"),
        ("approval_stale", "on other revisions"),
    ],
)
async def test_an_approval_that_does_not_count(desk: IssuerBench, code: str, wrong: str) -> None:
    asked = await desk.ask("deploy")
    approval = {
        "the agent's own": lambda: desk.approval(asked, desk.bot),
        "a stranger's": lambda: desk.approval(asked, desk.world.party("user", "sam")),
        "a user's who may not": lambda: desk.approval(asked, desk.sue),
        "a no": lambda: desk.approval(asked, desk.sam, verdict="denied"),
        "for another request": lambda: desk.approval(asked, desk.sam, request_digest="0" * 64),
        "for a shorter life": lambda: desk.approval(asked, desk.sam, ttl_s=60),
        "on other revisions": lambda: desk.approval(
            asked, desk.sam, revisions=desk.revisions.model_copy(update={"agent": 7})
        ),
    }[wrong]()
    await desk.decide(asked, approvals=(approval,), required=("sponsor",))
    refusal = await desk.refused(asked)
    assert [reason.code for reason in refusal.reasons] == [code]
    assert await desk.is_finding(asked)


async def test_an_approval_given_before_a_change_is_stale_and_no_finding(desk: IssuerBench) -> None:
    asked = await desk.ask("deploy")
    approval = desk.approval(asked, desk.sam)
    ceiling = desk.scope("read", "deploy", resource="env/**")
    await desk.world.accepted(
        desk.world.claims(AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=ceiling), desk.sam
    )
    await arrived(desk)
    await desk.decide(asked, approvals=(approval,), required=("sponsor",))
    refusal = await desk.refused(asked)
    assert [reason.code for reason in refusal.reasons] == ["approval_stale"]
    assert not await desk.is_finding(asked)


async def test_a_task_that_was_ended_meanwhile_gives_nothing_and_that_is_no_finding(
    desk: IssuerBench,
) -> None:
    asked = await desk.ask("read")
    end = desk.world.claims(TaskEnd, desk.maria, task_id=desk.task, reason="a test")
    await desk.world.accepted(end, desk.maria)
    await arrived(desk)
    await desk.decide(asked)
    refusal = await desk.refused(asked)
    assert [reason.code for reason in refusal.reasons] == ["task_ended"]
    event = await desk.event("refused", asked)
    assert (event.agent_id, event.task_id, event.actor) == (
        desk.bot.name,
        desk.task,
        desk.world.key("policy").id,
    )
    assert not await desk.is_finding(asked)


async def test_request_fenced_before_issuance_is_not_issued(desk: IssuerBench, store: LeaseStore) -> None:
    covered = await desk.ask("read")
    await store.fence({f"task:{desk.task}": covered.source.appended_at_ms})
    await desk.decide(covered)
    refusal = await desk.refused(covered)
    assert [reason.code for reason in refusal.reasons] == ["fenced"]
    assert desk.task in refusal.reasons[0].message
    await desk.issued("read")  # asked for after the fence


async def test_a_reply_key_that_is_no_key_stops_nobody(desk: IssuerBench) -> None:
    nonsense = PublicJwk(kty="EC", crv="P-256", x="AAAA", y="AAAA")
    asked = await desk.ask("read", reply_key=nonsense)
    await desk.decide(asked)
    event = await desk.event("refused", asked)
    assert event.reasons[0].code == "reply_key_invalid"
    await desk.issued("read")


# --- once, whatever happens -------------------------------------------------------------------------------------------


async def test_a_redelivered_decision_is_answered_again_with_the_same_lease(desk: IssuerBench) -> None:
    asked = await desk.ask("read")
    at = await desk.decide(asked)
    first = await desk.answer(asked)
    await redeliver(desk, at)
    second = await desk.answer(asked, after=1)
    assert second.lease == first.lease
    assert first.credential is not None
    assert second.credential is not None
    assert await token_claims(desk, first.credential.value) == await token_claims(
        desk, second.credential.value
    )
    assert len({record.compact for record in await desk.issued_records(asked.lease_id)}) == 1


async def test_a_redelivered_decision_of_an_ended_lease_is_refused(
    desk: IssuerBench, store: LeaseStore
) -> None:
    asked = await desk.ask("read")
    at = await desk.decide(asked)
    await desk.answer(asked)
    lease = await desk.lease(asked.lease_id, "active")
    cause = EndCause(kind="deadline", at_ms=lease.deadline * 1000)
    revoker = desk.world.key("revoker")
    ended = follow(lease, "expired", by=revoker.id, cause=cause)
    await store.step([Step(SignedLease(ended, sign(ended, revoker)), lease)], visibility_ms=1000)
    await redeliver(desk, at)
    refusal = desk.refusal(await desk.answer(asked, after=1))
    assert [reason.code for reason in refusal.reasons] == ["lease_ended"]


async def test_the_same_decision_at_another_place_is_a_replay(desk: IssuerBench) -> None:
    asked = await desk.ask("read")
    compact = sign(desk.decision(asked), desk.world.key("policy"))
    await desk.append_decision(compact)
    await desk.answer(asked)
    again = await desk.append_decision(compact)
    event = await desk.event("replayed", asked)
    assert event.source == again
    assert len(await desk.issued_records(asked.lease_id)) == 1


async def test_a_second_decision_on_a_request_is_a_replay_even_in_the_same_batch(desk: IssuerBench) -> None:
    asked = await desk.ask("read", ttl_s=300)
    policy = desk.world.key("policy")
    first, second = (sign(desk.decision(asked, ttl_s=ttl_s), policy) for ttl_s in (300, 200))
    places = await asyncio.gather(desk.append_decision(first), desk.append_decision(second))
    event = await desk.event("replayed", asked)
    assert event.source == max(places, key=lambda at: at.offset)
    lease = await desk.lease(asked.lease_id, "active")
    assert lease.deadline == (min(places, key=lambda at: at.offset).appended_at_ms + 300_000) // 1000
    assert len(await desk.issued_records(asked.lease_id)) == 1


@pytest.mark.parametrize("lost", [LEASE, CREDENTIAL_REPLY], ids=lambda topic: topic.what)
async def test_failure_between_redis_and_kafka_is_retried_with_the_same_lease(
    desk: IssuerBench, store: LeaseStore, monkeypatch: pytest.MonkeyPatch, lost: Topic[Any]
) -> None:
    publisher = desk.world.runtimes["issuer"].publisher
    send_to, failures = publisher.send_to, list[Topic[Any]]()

    async def failing(partition: int, topic: Topic[Any], *args: Any) -> None:
        if topic is lost and len(failures) < 2:
            failures.append(topic)
            raise UnavailableError("the broker went away")
        await send_to(partition, topic, *args)

    monkeypatch.setattr(publisher, "send_to", failing)
    asked = await desk.ask("read")
    await desk.decide(asked)
    content = await desk.answer(asked)
    assert len(failures) == 2
    assert content.credential is not None
    stored = (await store.get([asked.lease_id]))[asked.lease_id]
    assert {record.compact for record in await desk.issued_records(asked.lease_id)} == {stored.jws.decode()}
    assert content.lease == stored.jws.decode()
    async with asyncio.timeout(WITHIN_S):
        while any(one.lease_id == asked.lease_id for one in await store.unpublished(older_than_ms=0)):
            await asyncio.sleep(0.05)


async def test_a_lease_of_a_crashed_issuer_is_answered_whatever_changed_since(desk: IssuerBench) -> None:
    asked = await desk.ask("read")
    at = await desk.decide(asked)
    first = await desk.answer(asked)
    suspend = desk.world.claims(AgentSuspend, desk.sam, agent_id=desk.bot.name, reason="a test")
    await desk.world.accepted(suspend, desk.sam)
    await arrived(desk)
    await redeliver(desk, at)  # no revoker runs here: the lease still stands
    second = await desk.answer(asked, after=1)
    assert second.lease == first.lease
    assert second.credential is not None
    assert delivered(second).lease_digest is None, "it vouches for nothing that it found in Redis"


# --- views that are too old -------------------------------------------------------------------------------------------


async def test_a_record_that_policy_saw_first_is_waited_for(desk: IssuerBench) -> None:
    asked = await desk.ask("read")
    await desk.decide(asked, revisions=desk.revisions.model_copy(update={"agent": 2}))
    ceiling = desk.scope("read", resource="**")
    await desk.world.accepted(
        desk.world.claims(AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=ceiling), desk.sam
    )
    assert (await desk.answer(asked)).credential is not None


async def test_a_record_that_never_comes_is_not_waited_for_long(desk: IssuerBench) -> None:
    asked = await desk.ask("read")
    await desk.decide(asked, revisions=desk.revisions.model_copy(update={"task": 9}))
    refusal = await desk.refused(asked)
    assert [reason.code for reason in refusal.reasons] == ["stale_view"]
    assert refusal.retry_after_s == 1


async def test_without_the_registry_nothing_is_issued_after_the_grace(world: World) -> None:
    own: dict[ServiceRole, Any] = {"issuer": IssuerSettings(patience_s=0.2)}
    async with opened_desks(world) as first:
        desk = await another(first)
    async with world.running("issuer", own=own, grace_s=0.5):
        asked = await desk.ask("read")
        await desk.decide(asked)
        refusal = await desk.refused(asked)
        assert [reason.code for reason in refusal.reasons] == ["stale_view"]
        assert refusal.retry_after_s == 1
        (why,) = (await world.get("issuer", "/readyz")).json()["denies"]
        assert "registry" in why


# --- how much is taken ------------------------------------------------------------------------------------------------


async def test_an_agent_holds_so_many_leases_and_no_more(world: World) -> None:
    own: dict[ServiceRole, Any] = {"issuer": IssuerSettings(agent_leases=2)}
    async with opened_desks(world) as first, world.running("issuer", own=own):
        desk, neighbour = await another(first), await another(first)
        asked, _ = await desk.issued("read")
        await desk.issued("read")
        third = await desk.ask("read")
        await desk.decide(third)
        refusal = await desk.refused(third)
        assert [reason.code for reason in refusal.reasons] == ["too_many_leases"]
        assert refusal.retry_after_s == 10
        await neighbour.issued("read")
        store = LeaseStore(world.settings("issuer"))
        await store.connect()
        lease = await desk.lease(asked.lease_id, "active")
        revoker, cause = world.key("revoker"), EndCause(kind="deadline", at_ms=lease.deadline * 1000)
        ended = follow(lease, "expired", by=revoker.id, cause=cause)
        await store.step([Step(SignedLease(ended, sign(ended, revoker)), lease)], visibility_ms=1000)
        await store.close()
        while True:  # the count is read again a little later
            again = await desk.ask("read")
            await desk.decide(again)
            if (await desk.answer(again)).credential is not None:
                break


async def test_redelivered_decision_at_the_lease_limit_is_answered_again(world: World) -> None:
    own: dict[ServiceRole, Any] = {"issuer": IssuerSettings(agent_leases=1)}
    async with opened_desks(world) as first, world.running("issuer", own=own):
        desk = await another(first)
        asked = await desk.ask("read")
        at = await desk.decide(asked)
        credential = (await desk.answer(asked)).credential
        assert credential is not None
        await redeliver(desk, at)
        again = (await desk.answer(asked, after=1)).credential
        assert again is not None
        assert len({record.compact for record in await desk.records(asked.lease_id)}) == 1


# --- what resource servers see ----------------------------------------------------------------------------------------


async def test_introspection_says_what_the_token_says_while_the_lease_lives(desk: IssuerBench) -> None:
    _, content = await desk.issued("read")
    assert content.credential is not None
    token = content.credential.value
    response = await introspect(desk, token, desk.target)
    assert response.headers["cache-control"] == "no-store"
    answer = response.json()
    claims = await token_claims(desk, token)
    assert answer == {"active": True, "token_type": "Bearer", **claims}


async def test_introspection_is_inactive_from_the_cut_on(desk: IssuerBench, store: LeaseStore) -> None:
    asked, content = await desk.issued("read")
    assert content.credential is not None
    lease = await desk.lease(asked.lease_id, "active")
    cause = EndCause(kind="release", at_ms=1)
    ending = follow(lease, "ending", by=desk.world.key("revoker").id, cause=cause)
    await store.step([Step(SignedLease(ending, "a.b.c"), lease)], visibility_ms=60_000)
    assert (await introspect(desk, content.credential.value, desk.target)).json() == {"active": False}


async def test_introspection_is_inactive_from_the_deadline_on(desk: IssuerBench) -> None:
    _, content = await desk.issued("read", ttl_s=8)
    assert content.credential is not None
    async with asyncio.timeout(WITHIN_S):
        while (await introspect(desk, content.credential.value, desk.target)).json()["active"]:
            await asyncio.sleep(0.05)
    assert time.time() >= content.credential.expires_at - 0.5


async def test_introspection_is_for_the_target_of_the_token_alone(desk: IssuerBench) -> None:
    _, content = await desk.issued("read")
    assert content.credential is not None
    token = content.credential.value
    other = await desk.world.target("somewhere-else")
    await arrived(desk)
    assert (await introspect(desk, token, other)).json() == {"active": False}
    for nobody in (None, desk.bot, desk.sam, desk.world.party("target", "staging")):
        response = await introspect(desk, token, nobody)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"


async def test_introspection_of_what_this_issuer_did_not_sign(desk: IssuerBench) -> None:
    _, content = await desk.issued("read")
    assert content.credential is not None
    head, body, tail = content.credential.value.split(".")
    claims = await token_claims(desk, content.credential.value)
    forged = jwt.encode(claims, desk.bot.key._key, algorithm="ES256", headers={"typ": "at+jwt", "kid": "x"})
    for token in (forged, f"{head}.{body}.{tail[:-4]}AAAA", f"{head}.{body}.", "garbage", content.decision):
        assert (await introspect(desk, token, desk.target)).json() == {"active": False}


async def test_introspection_wants_a_token(desk: IssuerBench) -> None:
    async with plain_client(base_url=url(desk), timeout=WITHIN_S) as http:
        for body in ("", "tok=x", "token=a&token=b", "token=" + "x" * 70_000, "\xff"):
            headers = desk.world.bearer(desk.target, "issuer")
            response = await http.post("/oauth2/introspect", content=body, headers=headers)
            assert (response.status_code, response.json()["error"]) == (400, "invalid_request")
            assert "`token`" in response.json()["error_description"], "the name of RFC 6749, 5.2"
        assert (await http.get("/oauth2/introspect")).status_code == 405


async def test_discovery_names_everything(desk: IssuerBench) -> None:
    async with plain_client(base_url=url(desk), timeout=WITHIN_S) as http:
        openid = await http.get("/.well-known/openid-configuration")
        oauth = await http.get("/.well-known/oauth-authorization-server")
        keys = await http.get("/.well-known/jwks.json")
    assert openid.json()["issuer"] == oauth.json()["issuer"] == url(desk)
    assert openid.json()["introspection_endpoint"] == f"{url(desk)}/oauth2/introspect"
    assert {"jwks_uri", "response_types_supported", "subject_types_supported"} <= set(openid.json())
    assert "ES256" in openid.json()["id_token_signing_alg_values_supported"]
    assert "max-age=300" in keys.headers["cache-control"]
    (key,) = keys.json()["keys"]
    assert (key["kty"], key["crv"], key["use"], key["alg"]) == ("EC", "P-256", "sig", "ES256")
    assert "d" not in key


async def test_the_sdk_verifies_what_the_issuer_made(desk: IssuerBench) -> None:
    _, content = await desk.issued("read", scope=desk.scope("read", resource="env/*/web"))
    assert content.credential is not None
    async with TokenVerifier(url(desk), desk.target.id, introspection_key=desk.target.key) as verifier:
        verified = await verifier.verify(content.credential.value)
        assert verified.allows("read", "env/staging/web")
        assert not verified.allows("deploy", "env/staging/web")
        with pytest.raises(TokenRejectedError):
            await verifier.verify(content.credential.value[:-2])


async def test_without_redis_introspection_says_so_and_answers_nothing(kafka: Kafka, tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path)
    redis.start()
    try:
        async with (
            World.open(kafka.bootstrap, redis.url, paced=kafka.embedded) as world,
            opened_desks(world) as first,
            world.running("issuer", "revoker"),
        ):
            desk = await another(first)
            _, content = await desk.issued("read")
            assert content.credential is not None
            redis.stop()
            response = await introspect(desk, content.credential.value, desk.target)
            assert response.status_code == 503
            assert "active" not in response.json()
            # What is asked meanwhile is served when Redis is back, empty as it is, and rebuilt.
            asked = await desk.ask("read")
            await desk.decide(asked)
            redis.start()
            assert (await desk.answer(asked)).credential is not None
            response = await introspect(desk, content.credential.value, desk.target)
            assert response.json()["active"]
    finally:
        redis.stop()
