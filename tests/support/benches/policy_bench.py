"""An organisation in front of policy: what agents ask and people answer, and what policy makes of it.

sam sponsors the agent deploy-bot; maria, who may read all and deploy to staging, gives it tasks. The target `platform`
has the verbs read (no approval), deploy (the sponsor's), drop (a second person's) and wipe (an operator's).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition

from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.jwe import ReplyKey, unverified_kid
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.topics_admin import partitions_of
from ringfence.messages.approval import Approval, ApprovalRequest
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest, ReplyContent
from ringfence.messages.operations import DeadLetter
from ringfence.messages.registry import VerbFloor
from ringfence.messages.topics import (
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
)
from tests.support.world import Party, Scope, World, scope

READ = scope("platform", ["read"], ["env/staging/web"])
DEPLOY = scope("platform", ["deploy"], ["env/staging/web"])
EVERYTHING = scope("platform", ["read", "deploy", "drop", "wipe"], ["env/**"])
VERBS = (
    VerbFloor(verb="read"),
    VerbFloor(verb="deploy", floor="sponsor"),
    VerbFloor(verb="drop", floor="second_person"),
    VerbFloor(verb="wipe", floor="operator"),
)


@dataclass(frozen=True)
class Asked:
    """A request that was sent, and what only its sender knows."""

    claims: CredentialRequest
    jws: str
    sent: Coordinates
    key: ReplyKey

    @property
    def id(self) -> str:
        return message_id(self.claims.iss, self.claims.jti)


class PolicyBench:
    """See the module."""

    world: World
    sam: Party
    petra: Party
    maria: Party
    bot: Party
    task: str

    @classmethod
    async def open(cls, world: World) -> PolicyBench:
        """With the registry running."""
        office = cls()
        office.world = world
        office.sam = await world.user("sam", roles=("sponsor",))
        office.petra = await world.user("petra", roles=("sponsor",))
        office.maria = await world.user("maria", entitlements=EVERYTHING)
        await world.target("platform", verbs=VERBS)
        office.bot = await world.agent("deploy-bot", sponsor=office.sam, ceiling=EVERYTHING)
        office.task = await world.task(office.bot, by=office.maria, scope=EVERYTHING)
        return office

    # --- what agents and people do ---

    def request(
        self, wanted: Scope = READ, by: Party | None = None, **fields: Any
    ) -> tuple[CredentialRequest, ReplyKey]:
        key = ReplyKey()
        given = {
            "task_id": self.task,
            "scope": wanted,
            "ttl_s": 300,
            "reason": "a test",
            "reply_key": key.public,
        }
        return self.world.claims(CredentialRequest, by or self.bot, **{**given, **fields}), key

    async def ask(self, wanted: Scope = READ, by: Party | None = None, **fields: Any) -> Asked:
        claims, key = self.request(wanted, by, **fields)
        jws = sign(claims, (by or self.bot).key)
        return Asked(claims, jws, await self.send(CREDENTIAL_REQUEST, jws), key)

    async def send(self, topic: Any, value: str | bytes, key: str | None = None) -> Coordinates:
        return await self.world.send(topic, key or self.bot.name, value)

    def approval(self, asked: ApprovalRequest, by: Party, **fields: Any) -> str:
        given = {
            "verdict": "approved",
            "request": asked.request,
            "request_id": asked.request_id,
            "request_digest": digest(asked.request),
            "ttl_s": asked.ttl_s,
            "delivery": asked.delivery,
            "revisions": asked.revisions,
        }
        return sign(self.world.claims(Approval, by, **{**given, **fields}), by.key)

    async def approve(self, asked: ApprovalRequest, by: Party, **fields: Any) -> str:
        jws = self.approval(asked, by, **fields)
        await self.send(APPROVAL_RESPONSE, jws)
        return jws

    # --- what comes of it ---

    async def decision(self, request: Asked | str, *outcomes: str) -> CredentialDecision:
        """The first decision on a request, of the outcomes if they are given."""
        id = request if isinstance(request, str) else request.id

        def fits(record: Received) -> bool:
            found = self.opened(record)
            return found.request_id == id and (not outcomes or found.outcome in outcomes)

        return self.opened(await self.world.consume_until(CREDENTIAL_DECISION, fits))

    async def final(self, request: Asked | str) -> CredentialDecision:
        return await self.decision(request, "allowed", "denied")

    def opened(self, record: Received) -> CredentialDecision:
        return self.world.opened(record, CredentialDecision, "policy")

    async def outcomes(self, request: Asked) -> Counter[str]:
        """How often which outcome stands on the topic by now."""
        # A request that came after it is decided after it: then nothing more of it is under way.
        await self.final(await self.ask(READ))
        decisions = map(self.opened, await self.world.records(CREDENTIAL_DECISION))
        return Counter(d.outcome for d in decisions if d.request_id == request.id)

    async def records_read(self) -> None:
        """Return when policy has read all records that there are: it does that before it denies something."""
        decision = await self.final(await self.ask(scope("platform", ["read"], ["elsewhere"])))
        assert "beyond_scope" in codes(decision)

    async def question(self, request: Asked, to: Party) -> ApprovalRequest:
        """What a person was asked."""

        def fits(record: Received) -> bool:
            return record.key == to.name and self.asked(record).request_id == request.id

        return self.asked(await self.world.consume_until(APPROVAL_REQUEST, fits))

    def asked(self, record: Received) -> ApprovalRequest:
        """What a person was asked, by a record of the topic."""
        return self.world.opened(record, ApprovalRequest, "policy")

    async def reply(self, request: Asked, outcome: str) -> ReplyContent:
        """The sealed reply that tells the agent of a decision with this outcome."""

        def content(record: Received) -> ReplyContent | None:
            if unverified_kid(record.value) != request.id:
                return None
            return ReplyContent.model_validate_json(request.key.open(record.value))

        def fits(record: Received) -> bool:
            found = content(record)
            return found is not None and claims_of(found.decision)["outcome"] == outcome

        found = content(await self.world.consume_until(CREDENTIAL_REPLY, fits))
        assert found is not None
        return found

    async def letter(self, sent: Coordinates) -> DeadLetter:
        """The dead letter about a record."""

        def fits(record: Received) -> bool:
            source = DeadLetter.model_validate_json(record.value).source
            return (source.topic, source.partition, source.offset) == (
                sent.topic,
                sent.partition,
                sent.offset,
            )

        return DeadLetter.model_validate_json((await self.world.consume_until(DEAD_LETTER, fits)).value)

    async def refused(self, jws: str) -> str:
        """Why an approval was refused: the code of the event about it."""
        jti = claims_of(jws)["jti"]
        event = await self.world.event_where(lambda e: e.kind == "refused" and e.ref == jti)
        assert event.subject == "approval"
        assert event.actor == claims_of(jws)["iss"]
        return event.reasons[0].code


def claims_of(jws: str) -> dict[str, Any]:
    """What a JWS of a service or a person says, unverified: tests look at what they sent or were sent."""
    return dict(orjson.loads(parse(jws).payload))


def codes(decision: CredentialDecision) -> set[str]:
    """Why it was decided so."""
    return {reason.code for reason in decision.reasons}


class HeldUp:
    """Policy's reading of the records stands still until policy itself asks to be caught up."""

    def __init__(self, world: World) -> None:
        runtime = world.runtimes["policy"]
        follower = runtime._table_follower
        assert follower is not None
        consumer = follower._consumer
        assert consumer is not None
        consumer.pause(*consumer.assignment())
        self.asked_for = False
        catch_up = runtime.tables_caught_up

        async def resume_and_catch_up(timeout_s: float) -> bool:
            self.asked_for = True
            consumer.resume(*consumer.assignment())
            return await catch_up(timeout_s)

        runtime.tables_caught_up = resume_and_catch_up  # type: ignore[method-assign]


async def ids_of(world: World, topic: Any) -> Counter[str]:
    """The event ids on a topic, and how often each stands there."""
    return Counter(record.headers["ce_id"] for record in await world.records(topic))


async def rewind(world: World, group: str, *topics: Any) -> None:
    """Make the group of a stopped service begin again at the first record."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=world.bootstrap, group_id=f"{world.prefix}.{group}", enable_auto_commit=False
    )
    await consumer.start()
    try:
        count = partitions_of(CREDENTIAL_REQUEST, world.settings("policy"))
        places = [TopicPartition(topic.name(world.prefix), p) for topic in topics for p in range(count)]
        consumer.assign(places)
        await consumer.commit(dict.fromkeys(places, 0))
    finally:
        await consumer.stop()
