"""`ringfence.faststream` on a real broker: typed, verified, at least once, whatever others write to the topics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaProducer

from ringfence.client.settings import ClientSettings
from ringfence.faststream import (
    ActionAnswered,
    ActionDecided,
    ActionRequest,
    ApprovalRequest,
    AuditEvent,
    Lease,
    LeaseEpoch,
    RelayEnded,
    RingfenceRouter,
    UnknownMessage,
)
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import detach
from ringfence.messages.topics import ACTION, APPROVAL_REQUEST, AUDIT, LEASE
from tests.support import leases
from tests.support.world import WITHIN_S, World
from tools.schemas.examples import EXAMPLES


class Consumer:
    """A program of a user: a router, and what its handlers received."""

    def __init__(self, world: World) -> None:
        self.world = world
        settings = ClientSettings(
            kafka=world.bootstrap,
            topic_prefix=world.prefix,
            trust_domain=world.td,
            trust_root=world.fingerprint,
        )
        self.router = RingfenceRouter(settings)
        self.received: list[Any] = []

    async def takes(self, message: Any) -> None:
        self.received.append(message)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        broker = self.router.broker(logger=None)
        async with self.router.lifespan(), broker:
            await broker.start()
            yield

    async def has(self, count: int) -> list[Any]:
        await self.world.until(lambda: len(self.received) >= count or None, f"{count} messages")
        return self.received


@pytest.fixture
def consumer(world: World) -> Consumer:
    return Consumer(world)


def audit_event(code: str, **more: Any) -> bytes:
    example = cast(AuditEvent, EXAMPLES[AuditEvent])
    event = example.model_copy(update={"metadata": {**example.metadata, "event_code": code}, **more})
    return event.model_dump_json(exclude_none=True).encode()


def code_of(event: AuditEvent) -> str:
    return str(event.metadata["event_code"])


async def send_question(world: World, claims: Any, key: SigningKey) -> None:
    value, signature = detach(sign(claims, key))
    await world.send(APPROVAL_REQUEST, "sam", value, claims.typ, signature=signature)


def approval_request(world: World, by: str, **more: Any) -> ApprovalRequest:
    return cast(ApprovalRequest, EXAMPLES[ApprovalRequest]).model_copy(
        update={"iss": by, "aud": world.td, **more}
    )


async def test_audit_events_go_to_the_handler_of_their_code(world: World, consumer: Consumer) -> None:
    audit = consumer.router.audit_events(group="siem")
    issued: list[AuditEvent] = []
    unknown: list[UnknownMessage] = []

    @audit("credential.issued")
    async def on_issued(event: AuditEvent) -> None:
        issued.append(event)

    @audit(UnknownMessage)
    async def on_unknown(message: UnknownMessage) -> None:
        unknown.append(message)

    audit("lease.*")(consumer.takes)
    for value in (
        audit_event("credential.issued", later="kept"),
        audit_event("credential.revoked"),
        b"\xff no JSON",
        audit_event("lease.expired"),
    ):
        await world.send(AUDIT, "bot", value)
    async with consumer.running():
        [event] = await consumer.has(1)
        assert code_of(event) == "lease.expired"
    assert [code_of(event) for event in issued] == ["credential.issued"]
    assert issued[0].model_extra == {"later": "kept"}, "a newer writer's field is there"
    assert [(one.code, one.value) for one in unknown] == [("claims_invalid", b"\xff no JSON")]


async def test_a_message_comes_again_until_its_handler_is_done_and_nothing_behind_it_before(
    world: World, consumer: Consumer
) -> None:
    audit = consumer.router.audit_events(group="siem")
    tried: list[str] = []

    @audit()
    async def on_event(event: AuditEvent) -> None:
        tried.append(code_of(event))
        if tried.count("second") < 3 and code_of(event) == "second":
            raise ConnectionError("the SIEM does not answer")
        consumer.received.append(event)

    for code in ("first", "second", "third"):
        await world.send(AUDIT, "bot", audit_event(code), partition=0)
    async with consumer.running():
        assert [code_of(event) for event in await consumer.has(3)] == ["first", "second", "third"]
    assert tried == ["first", "second", "second", "second", "third"]


async def test_unhandled_message_is_redelivered_after_a_restart(world: World) -> None:
    """And nothing that was handled comes again."""
    first = Consumer(world)
    failing = asyncio.Event()

    @first.router.audit_events(group="siem")()
    async def on_event(event: AuditEvent) -> None:
        if code_of(event) == "second":
            failing.set()
            raise ConnectionError("the SIEM does not answer")
        first.received.append(event)

    for code in ("first", "second", "third"):
        await world.send(AUDIT, "bot", audit_event(code), partition=0)
    async with first.running():
        await asyncio.wait_for(failing.wait(), WITHIN_S)
    second = Consumer(world)
    second.router.audit_events(group="siem")()(second.takes)
    async with second.running():
        assert [code_of(event) for event in await second.has(2)] == ["second", "third"]
    assert [code_of(event) for event in first.received] == ["first"]


async def test_questions_are_verified_and_told_apart(world: World, consumer: Consumer) -> None:
    policy, gateway = world.key("policy"), world.key("gateway")
    questions = consumer.router.questions(group="pager")
    approvals: list[ApprovalRequest] = []
    unknown: list[UnknownMessage] = []

    @questions(ApprovalRequest)
    async def on_approval(question: ApprovalRequest) -> None:
        approvals.append(question)

    @questions(UnknownMessage)
    async def on_unknown(message: UnknownMessage) -> None:
        unknown.append(message)

    questions(ActionRequest)(consumer.takes)
    genuine = approval_request(world, policy.id, added="by a newer policy")
    await send_question(world, genuine, policy)
    await send_question(world, approval_request(world, policy.id), gateway)
    await send_question(world, approval_request(world, gateway.id), gateway)
    value, signature = detach(sign(genuine, policy))
    await world.send(APPROVAL_REQUEST, "sam", value, genuine.typ)
    await world.send(APPROVAL_REQUEST, "sam", value + b" ", genuine.typ, signature=signature)
    fields = dict(EXAMPLES[ActionRequest])
    for claim in ("iss", "aud", "iat", "jti", "exp"):
        del fields[claim]
    action = world.claims(ActionRequest, world.party("service", "gateway"), **fields)
    await world.send(APPROVAL_REQUEST, "sam", sign(action, gateway), action.typ)
    async with consumer.running():
        assert await consumer.has(1) == [action]
        await world.until(lambda: len(unknown) == 4 or None, "the four that nobody vouches for")
    assert approvals == [genuine]
    assert sorted(one.code for one in unknown) == [
        "key_unknown",
        "key_unknown",
        "not_a_jws",
        "signature_invalid",
    ]


async def test_only_leases_of_issuers_and_revokers_are_leases(world: World, consumer: Consumer) -> None:
    issuer = world.key("issuer")
    subscription = consumer.router.leases(group="platform")
    subscription(Lease, LeaseEpoch)(consumer.takes)
    unknown: list[UnknownMessage] = []

    @subscription()
    async def others(message: UnknownMessage) -> None:
        unknown.append(message)

    lease = leases.lease().claims.model_copy(update={"iss": issuer.id, "aud": world.td, "later": [1, 2]})
    await world.send(LEASE, "a", sign(lease, world.key("gateway")))
    await world.send(LEASE, "a", sign(lease, issuer).replace(".", ".e", 1))
    await world.send(LEASE, "a", b"")
    await world.send(LEASE, "a", sign(lease, issuer))
    async with consumer.running():
        assert await consumer.has(1) == [lease]
        assert consumer.received[0].model_extra == {"later": [1, 2]}
        await world.until(lambda: len(unknown) == 3 or None, "the others")
    assert "tombstone" in {one.code for one in unknown}


async def test_a_key_counts_as_soon_as_a_bundle_has_it(world: World, consumer: Consumer) -> None:
    """The bundle may be published between two records: the record is not refused for coming just after it."""
    consumer.router.leases(group="platform")(Lease)(consumer.takes)
    lease = leases.lease().claims.model_copy(update={"iss": world.key("issuer").id, "aud": world.td})
    successor = SigningKey.generate(lease.iss)
    await world.send(LEASE, "a", sign(lease, world.key("issuer")))
    async with consumer.running():
        await consumer.has(1)
        await world.publish_trust(world.make_bundle(2, issuer=successor))
        await world.send(LEASE, "a", sign(lease, successor))
        assert await consumer.has(2) == [lease, lease]


async def test_actions_are_told_apart(world: World, consumer: Consumer) -> None:
    subscription = consumer.router.actions(group="platform")
    subscription(ActionDecided)(consumer.takes)
    subscription(ActionAnswered)(consumer.takes)
    subscription(RelayEnded)(consumer.takes)
    told = [EXAMPLES[model] for model in (ActionDecided, ActionAnswered, RelayEnded)]
    for message in told:
        await world.send(ACTION, "bot", message.model_dump_json(exclude_none=True), partition=0)
    async with consumer.running():
        assert await consumer.has(3) == told


async def test_headers_of_strangers_stop_nothing_and_send_nothing(world: World, consumer: Consumer) -> None:
    audit = consumer.router.audit_events(group="siem")

    @audit()
    async def on_event(event: AuditEvent) -> str:
        consumer.received.append(event)
        return "an answer that nobody asked for"

    async with AIOKafkaProducer(bootstrap_servers=world.bootstrap) as producer:
        headers = [
            ("x", b"\xff\xfe"),
            ("reply_to", LEASE.name(world.prefix).encode()),
            ("content-type", b"\xff"),
        ]
        await producer.send_and_wait(AUDIT.name(world.prefix), audit_event("first"), headers=headers)
        await producer.send_and_wait(AUDIT.name(world.prefix), audit_event("second"))
    async with consumer.running():
        assert {code_of(event) for event in await consumer.has(2)} == {"first", "second"}
    assert await world.records(LEASE) == []
