"""Audit on a real broker: every record becomes one OCSF event, and the events the story of a credential."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from ringfence.audit.settings import AuditSettings
from ringfence.kernel.base.ids import digest, lease_id, message_id
from ringfence.kernel.crypto.jwe import ReplyKey, seal
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.topics_admin import partitions_of
from ringfence.kernel.tracing.api import new_traceparent, trace_id
from ringfence.messages.approval import Approval
from ringfence.messages.base import Claims, Topic
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest, Revisions
from ringfence.messages.lease import EndCause, Lease, RevocationRequest
from ringfence.messages.registry import AgentSuspend
from ringfence.messages.topics import (
    APPROVAL_RESPONSE,
    AUDIT,
    AUDITED,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    LEASE,
    REVOCATION_REQUEST,
)
from tests.support.ocsf import check_ocsf
from tests.support.world import WITHIN_S, Party, World, scope

DEPLOY = scope("staging", ("deploy",), ("env/staging/*",))
QUICK = AuditSettings(linger_ms=10)


@dataclass
class House:
    """A world with sam, maria, deploy-bot, staging and a task, and what audit says of it."""

    world: World
    sam: Party
    maria: Party
    bot: Party
    task: str

    async def events(self, *codes: str, count: int = 1, **words: Any) -> list[dict[str, Any]]:
        """The audit events with one of these codes and all of these words, once there are so many of them."""
        found: list[dict[str, Any]] = []

        def enough(record: Received) -> bool:
            event = json.loads(record.value)
            if event["metadata"]["event_code"] not in codes:
                return False
            if any(event["unmapped"].get(name) != value for name, value in words.items()):
                return False
            if event["metadata"]["uid"] not in [known["metadata"]["uid"] for known in found]:
                found.append(event)
            return len(found) >= count

        await self.world.consume_until(AUDIT, enough)
        for event in found:
            check_ocsf(event)
        return found

    async def about(self, source: Coordinates) -> dict[str, Any]:
        """The audit event about one record."""
        place = {"topic": source.topic, "partition": source.partition, "offset": source.offset}
        record = await self.world.consume_until(
            AUDIT, lambda r: json.loads(r.value)["unmapped"]["source"] == place
        )
        event: dict[str, Any] = json.loads(record.value)
        check_ocsf(event)
        return event

    async def trace(self, id: str, who: Party, *holds: str) -> list[dict[str, Any]]:
        """The roots of a trace, once these texts are in them: the index follows the topic."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                answer = await self.world.get("audit", f"/v1/trace/{id}", who)
                if answer.status_code == 200 and all(text in answer.text for text in holds):
                    roots: list[dict[str, Any]] = answer.json()["roots"]
                    return roots
                assert answer.status_code in (200, 404), answer.text
                await asyncio.sleep(0.05)

    async def whole_trace(self, made: Credential, who: Party) -> list[dict[str, Any]]:
        """The roots of the trace of a credential, once every step is in it: topics are read side by side."""
        async with asyncio.timeout(WITHIN_S):
            while nodes_of(roots := await self.trace(made.lease_id, who, "released by")) < NODES:
                await asyncio.sleep(0.05)
            return roots


NODES = 10
"""User, task, request, two decisions, approval, lease, delivery, revocation, end."""


def nodes_of(roots: list[dict[str, Any]]) -> int:
    return sum(1 + nodes_of(root["children"]) for root in roots)


@pytest.fixture
async def house(world: World) -> AsyncIterator[House]:
    async with world.running("registry", "audit", own={"audit": QUICK}):
        sam = await world.user("sam", ("sponsor",), DEPLOY)
        maria = await world.user("maria", (), DEPLOY)
        await world.target("staging")
        bot = await world.agent("deploy-bot", sam, DEPLOY)
        task = await world.task(bot, maria, DEPLOY)
        yield House(world, sam, maria, bot, task)


@dataclass
class Credential:
    """One credential whose messages the test signs itself, with the keys of agent, sponsor and services."""

    house: House
    traceparent: str

    async def send(self, topic: Topic[Any], key: str, claims: Claims, by: SigningKey) -> Coordinates:
        return await self.put(topic, key, sign(claims, by))

    async def put(self, topic: Topic[Any], key: str, value: str) -> Coordinates:
        metadata = await (
            await self.house.world.publisher.send(
                topic, "test", Outbound(key, value, id=str(uuid.uuid4()), traceparent=self.traceparent)
            )
        )
        return Coordinates(
            topic=metadata.topic, partition=metadata.partition, offset=metadata.offset,
            appended_at_ms=metadata.timestamp,
        )  # fmt: skip

    async def play(self) -> None:
        """Ask, require approval, approve, allow, issue, reply, release."""
        house, world = self.house, self.house.world
        policy, issuer, revoker = (world.key(role) for role in ("policy", "issuer", "revoker"))
        reply_key = ReplyKey()
        self.request = world.claims(
            CredentialRequest, house.bot, task_id=house.task, scope=DEPLOY, ttl_s=300, reason="deploy build 421",
            reply_key=reply_key.public,
        )  # fmt: skip
        self.compact = sign(self.request, house.bot.key)
        self.request_id = message_id(house.bot.id, self.request.jti)
        self.lease_id = lease_id(self.request_id)
        self.asked = await self.put(CREDENTIAL_REQUEST, "deploy-bot", self.compact)
        terms: dict[str, Any] = {
            "ttl_s": 300, "delivery": "agent",
            "revisions": Revisions(agent=1, user=1, task=1, target=1, policy="0" * 64),
        }  # fmt: skip
        about: dict[str, Any] = {
            **terms, "request_id": self.request_id, "request": self.compact, "source": self.asked,
        }  # fmt: skip
        by_policy = Party("policy", policy)
        wait = world.claims(
            CredentialDecision, by_policy, outcome="approval_required", required=("sponsor",),
            expires_at=int(time.time()) + 600, **about,
        )  # fmt: skip
        await self.send(CREDENTIAL_DECISION, "deploy-bot", wait, policy)
        yes = world.claims(
            Approval, house.sam, verdict="approved", request=self.compact, request_id=self.request_id,
            request_digest=digest(self.compact), **terms,
        )  # fmt: skip
        approval = sign(yes, house.sam.key)
        await self.put(APPROVAL_RESPONSE, "deploy-bot", approval)
        decision = world.claims(
            CredentialDecision, by_policy, outcome="allowed", approvals=(approval,), **about
        )
        decision_jws = sign(decision, policy)
        await self.put(CREDENTIAL_DECISION, "deploy-bot", decision_jws)
        fields: dict[str, Any] = {
            "lease_id": self.lease_id, "request_id": self.request_id, "decision_id": decision.jti,
            "decision_digest": digest(decision_jws), "agent_id": "deploy-bot", "act": ("deploy-bot",),
            "sponsor": "sam", "on_behalf_of": "maria", "task_id": house.task, "target_id": "staging",
            "backend": "jwt", "delivery": "agent", "scope": DEPLOY, "requested_at_ms": self.asked.appended_at_ms,
            "deadline": int(time.time()) + 300, "traceparent": self.traceparent,
        }  # fmt: skip
        active = world.claims(Lease, Party("issuer", issuer), seq=1, status="active", **fields)
        await self.send(LEASE, self.lease_id, active, issuer)
        await self.house.events("credential.issued", lease=self.lease_id)
        await self.put(CREDENTIAL_REPLY, "deploy-bot", seal(b"{}", reply_key.public, kid=self.request_id))
        release = world.claims(
            RevocationRequest, house.bot, kind="release", lease_id=self.lease_id, reason="done"
        )
        await self.send(REVOCATION_REQUEST, "deploy-bot", release, house.bot.key)
        cause = EndCause(
            kind="release", at_ms=int(time.time() * 1000), by=house.bot.id, ref=release.jti, reason="done"
        )
        end = world.claims(Lease, Party("revoker", revoker), seq=2, status="released", cause=cause, **fields)
        await self.send(LEASE, self.lease_id, end, revoker)


async def credential(house: House) -> Credential:
    """One credential, from its request to its release, on the topics."""
    made = Credential(house, new_traceparent())
    await made.play()
    return made


async def test_each_command_and_each_record_is_one_event(house: House) -> None:
    suspend = house.world.claims(AgentSuspend, house.sam, agent_id="deploy-bot", reason="odd")
    await house.world.accepted(suspend, house.sam)
    (asked,) = await house.events("agent.suspend", command=suspend.jti)
    (done,) = await house.events("agent.suspended", command=suspend.jti)
    (answer,) = await house.events("command.accepted", command=suspend.jti)
    assert [e["status"] for e in (asked, done, answer)] == ["Requested", "Success", "Success"]
    for event in (asked, done, answer):
        assert event["class_uid"] == 3004
        assert event["unmapped"]["agent"] == "deploy-bot"
        assert event["unmapped"]["sponsor"] == "sam"
    assert asked["actor"]["user"]["name"] == done["actor"]["user"]["name"] == "sam"
    (assigned,) = await house.events("task.assigned", task=house.task)
    words = assigned["unmapped"]
    assert (words["agent"], words["sponsor"], words["on_behalf_of"]) == ("deploy-bot", "sam", "maria")


async def test_a_refused_command_is_a_failure_and_its_reason(house: House) -> None:
    suspend = house.world.claims(AgentSuspend, house.maria, agent_id="deploy-bot", reason="mischief")
    assert (await house.world.command(suspend, house.maria)).kind == "refused"
    (event,) = await house.events("command.refused", command=suspend.jti)
    assert (event["class_uid"], event["activity_name"], event["status"]) == (3004, "Suspend", "Failure")
    assert event["status_code"] == "not_sponsor"


async def test_each_step_of_a_credential_is_one_event_with_everybody_in_it(house: House) -> None:
    made = await credential(house)
    steps = (
        "credential.requested", "approval.required", "approval.given", "request.allowed", "credential.issued",
        "reply.sent", "release.requested", "credential.released",
    )  # fmt: skip
    found = await house.events(*steps, count=len(steps), request=made.request_id)
    assert sorted(event["metadata"]["event_code"] for event in found) == sorted(steps)
    for event in found:
        words = event["unmapped"]
        assert (words["agent"], words["task"], words["sponsor"], words["on_behalf_of"]) == (
            "deploy-bot", house.task, "sam", "maria",
        )  # fmt: skip
        assert words["trace_id"] == trace_id(made.traceparent)
    (issued,) = [event for event in found if event["metadata"]["event_code"] == "credential.issued"]
    assert issued["unmapped"]["lease"] == made.lease_id
    assert issued["unmapped"]["approvers"] == ["sam"]
    assert issued["message"].endswith("on behalf of maria, approved by sam")


async def test_the_trace_of_a_lease_is_a_tree_from_the_human_to_the_end(house: House) -> None:
    made = await credential(house)
    (user,) = await house.whole_trace(made, house.sam)
    assert (user["kind"], user["id"]) == ("user", "maria")
    (task,) = user["children"]
    assert (task["kind"], task["id"]) == ("task", house.task)
    (request,) = task["children"]
    assert (request["kind"], request["id"]) == ("request", made.request_id)
    # Which of several topics audit reads first does not matter: the append times make the order.
    assert [child["kind"] for child in request["children"]] == ["decision", "approval", "decision", "lease"]
    lease = request["children"][-1]
    assert lease["id"] == made.lease_id
    assert [child["kind"] for child in lease["children"]] == ["delivery", "revocation", "end"]
    times = [node["at_ms"] for node in (task, request, *request["children"], *lease["children"])]
    assert times == sorted(times)
    for kind, id in (
        ("request", made.request_id),
        ("task", house.task),
        ("agent", "deploy-bot"),
        ("user", "maria"),
    ):
        answer = await house.world.get("audit", f"/v1/trace/{id}", house.sam, kind=kind)
        assert answer.json()["kind"] == kind
        assert made.lease_id in answer.text


async def test_a_trace_is_for_those_whom_it_concerns(house: House) -> None:
    world = house.world
    made = await credential(house)
    stranger = await world.user("petra", ("sponsor",), DEPLOY)
    auditor = await world.user("ali", ("auditor",))
    for who in (house.sam, house.maria, auditor, world.operator):
        await house.trace(made.lease_id, who, "released by")
    for who in (stranger,):
        answer = await world.get("audit", f"/v1/trace/{made.lease_id}", who)
        assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
        mine = (await world.get("audit", "/v1/events", who)).json()["events"]
        assert not [event for event in mine if event["unmapped"].get("lease") == made.lease_id]
    assert (await world.get("audit", f"/v1/trace/{made.lease_id}")).status_code == 401
    thief = Party("sam", SigningKey.generate(house.sam.id))
    assert (await world.get("audit", f"/v1/trace/{made.lease_id}", thief)).status_code == 401
    assert (
        await world.get("audit", f"/v1/trace/{made.lease_id}", house.sam, kind="planet")
    ).status_code == 400
    assert (await world.get("audit", "/v1/events", house.sam, limit="0")).status_code == 400


async def test_events_are_followed_from_a_cursor(house: House) -> None:
    world = house.world
    made = await credential(house)
    await house.whole_trace(made, house.sam)
    first = (await world.get("audit", "/v1/events", house.sam, lease=made.lease_id, limit="2")).json()
    codes = [event["metadata"]["event_code"] for event in first["events"]]
    assert len(codes) == 2
    again = (
        await world.get("audit", "/v1/events", house.sam, lease=made.lease_id, after=first["after"])
    ).json()
    assert again["events"] == []
    other = await credential(house)
    await house.whole_trace(other, house.sam)
    more = (await world.get("audit", "/v1/events", house.sam, after=first["after"], limit="1000")).json()
    assert {e["unmapped"].get("request") for e in more["events"]} >= {other.request_id}


async def test_older_events_come_page_by_page_and_only_ones_own(house: House) -> None:
    world = house.world
    made = await credential(house)
    await house.whole_trace(made, house.sam)
    whole = (await world.get("audit", "/v1/events", house.sam, limit="1000")).json()
    assert (whole["before"], whole["after"] is None) == (None, False)
    page = (await world.get("audit", "/v1/events", house.sam, limit="2")).json()
    found = page["events"]
    stranger = await world.user("petra", ("sponsor",), DEPLOY)
    async with asyncio.timeout(WITHIN_S):
        while (await world.get("audit", "/v1/events", stranger)).status_code != 200:
            await asyncio.sleep(0.02)  # until audit has read of her
    while page["before"] is not None:
        before = page["before"]
        mine = (await world.get("audit", "/v1/events", stranger, before=before)).json()["events"]
        assert not [event for event in mine if event["unmapped"].get("agent") == "deploy-bot"]
        page = (await world.get("audit", "/v1/events", house.sam, before=before, limit="2")).json()
        assert (page["after"], len(page["events"]) <= 2) == (None, True)
        found = page["events"] + found
    assert found[-len(whole["events"]) :] == whole["events"]
    for query, error in (
        ({"before": "x"}, "cursor_lost"),
        ({"before": "1.a", "after": "1"}, "query_invalid"),
    ):
        answer = await world.get("audit", "/v1/events", house.sam, **query)
        assert (answer.status_code, answer.json()["error"]) == (400, error)


async def test_garbage_on_every_topic_is_told_and_stops_nothing(house: House) -> None:
    world = house.world
    garbage = (b"", b"\x00\xff\xfe", b"{}", b"a.b.c", b"[" * 5000, b"eyJhbGciOiJub25lIn0.e30.", b"null")
    places = [await world.send(topic, "deploy-bot", junk) for topic in AUDITED for junk in garbage]
    for place in places:
        event = await house.about(place)
        said = event["metadata"]["event_code"]
        if said != "lease.forgotten":  # an empty record on `lease` is how the last record of a lease goes
            assert (said, event["status"]) == ("record.not_believed", "Failure"), place
            assert "actor" not in event
    assert not world.runtimes["audit"].unready()
    made = await credential(house)
    await house.events("credential.released", lease=made.lease_id)


async def test_a_replay_is_told(house: House) -> None:
    made = await credential(house)
    await house.events("credential.requested", request=made.request_id)
    again = await made.put(CREDENTIAL_REQUEST, "deploy-bot", made.compact)
    event = await house.about(again)
    assert event["metadata"]["event_code"] == "message.replayed"
    assert event["unmapped"]["request"] == made.request_id
    assert event["unmapped"]["first_seen"]["offset"] == made.asked.offset


async def test_redelivered_record_is_handed_over_again_and_chained_once(world: World) -> None:
    async with world.running("registry", "audit", own={"audit": QUICK}):
        sam = await world.user("sam", ("sponsor",), DEPLOY)
        maria = await world.user("maria", (), DEPLOY)
        await world.target("staging")
        bot = await world.agent("deploy-bot", sam, DEPLOY)
        house = House(world, sam, maria, bot, await world.task(bot, maria, DEPLOY))
        made = await credential(house)
        before = await house.whole_trace(made, sam)
    await forget_offsets(world)
    async with world.running("registry", "audit", own={"audit": QUICK}):
        assert await house.whole_trace(made, sam) == before
        await read_again(world)
        # What comes of this stands behind them in the chain.
        suspend = world.claims(AgentSuspend, sam, agent_id="deploy-bot", reason="odd")
        await world.accepted(suspend, sam)
        await house.events("agent.suspended", command=suspend.jti)
        records = await world.records(AUDIT)
        uids = Counter(record.headers["ce_id"] for record in records)
        assert set(uids.values()) == {1}
        for record in records:
            assert record.headers["ce_id"] == json.loads(record.value)["metadata"]["uid"]


async def read_again(world: World) -> None:
    """The group is through with everything, which it hands over before it says so."""
    ends = Counter({topic.name(world.prefix): len(await world.records(topic)) for topic in AUDITED})
    admin = AIOKafkaAdminClient(bootstrap_servers=world.bootstrap)
    await admin.start()
    try:
        async with asyncio.timeout(WITHIN_S):
            while True:
                offsets = await admin.list_consumer_group_offsets(f"{world.prefix}.audit")
                done = Counter[str]()
                for at, one in offsets.items():
                    done[at.topic] += one.offset
                if done >= ends:
                    return
                await asyncio.sleep(0.05)
    finally:
        await admin.close()


async def forget_offsets(world: World) -> None:
    """Put the group back to the beginning, as if nothing had been committed before a crash."""
    settings = world.settings("audit")
    group = f"{world.prefix}.audit"
    consumer = AIOKafkaConsumer(bootstrap_servers=world.bootstrap, group_id=group, enable_auto_commit=False)
    await consumer.start()
    try:
        beginnings = {
            TopicPartition(topic.name(world.prefix), number): 0
            for topic in AUDITED
            for number in range(partitions_of(topic, settings))
        }
        consumer.assign(list(beginnings))
        await consumer.commit(beginnings)
    finally:
        await consumer.stop()
