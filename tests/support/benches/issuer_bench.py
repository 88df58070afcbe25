"""An organisation in which an agent asks for credentials and the test plays policy: it signs what it likes.

sam sponsors agents; maria assigns the tasks, and they are on behalf of her; olga is the operator. The target `staging`
has the verbs read (no approval), deploy (the sponsor's) and wipe (an operator's).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ringfence.kernel.base.ids import digest, lease_id, message_id
from ringfence.kernel.crypto.jwe import ReplyKey, unverified_kid
from ringfence.kernel.crypto.jws import Signed, parse, sign, verify
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import Approval
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import (
    Coordinates,
    CredentialDecision,
    CredentialRequest,
    IssuerRefusal,
    ReplyContent,
    Revisions,
)
from ringfence.messages.lease import Lease, LeaseStatus, RevocationRequest
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import VerbFloor
from ringfence.messages.topics import (
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    LEASE,
    REVOCATION_REQUEST,
    SERVICE_EVENT,
)
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.world import Party, Scope, World, scope

POLICY_REVISION = "0" * 64
AUDIENCE = "https://staging.test.example"


@dataclass
class Asked:
    """A request that stands on Kafka."""

    claims: CredentialRequest
    compact: str
    reply_key: ReplyKey
    source: Coordinates

    @property
    def id(self) -> str:
        return message_id(self.claims.iss, self.claims.jti)

    @property
    def lease_id(self) -> str:
        return lease_id(self.id)


class IssuerBench:
    """See the module. Every desk has an agent and a task of its own in a world that desks share."""

    def __init__(self, world: World, people: dict[str, Party], target: Party) -> None:
        self.world = world
        self.sam, self.maria, self.sue = people["sam"], people["maria"], people["sue"]
        self.target = target
        self.revisions = Revisions(agent=1, user=1, task=1, target=1, policy=POLICY_REVISION)
        self.bot: Party
        self.task: str

    async def staff(
        self, ceiling: Scope | None = None, task_scope: Scope | None = None, **task: Any
    ) -> IssuerBench:
        """Give the desk an agent and a task."""
        everything = self.scope("read", "deploy", "wipe", resource="**")
        self.bot = await self.world.agent(
            f"bot-{uuid.uuid4().hex[:8]}", sponsor=self.sam, ceiling=ceiling or everything
        )
        self.task = await self.world.task(self.bot, by=self.maria, scope=task_scope or everything, **task)
        return self

    def scope(self, *verbs: str, resource: str = "env/staging/web") -> Scope:
        return scope(self.target.name, verbs or ("read",), (resource,))

    # --- the agent ---

    async def ask(self, *verbs: str, by: Party | None = None, **fields: Any) -> Asked:
        """A request of the agent, appended to its topic."""
        reply_key = ReplyKey()
        given = {
            "task_id": self.task,
            "scope": self.scope(*verbs),
            "ttl_s": 600,
            "reason": "a test",
            "reply_key": reply_key.public,
        }
        claims = self.world.claims(CredentialRequest, self.bot, **{**given, **fields})
        compact = sign(claims, (by or self.bot).key)
        source = await self.world.send(CREDENTIAL_REQUEST, self.bot.name, compact)
        return Asked(claims, compact, reply_key, source)

    async def answer(self, asked: Asked, after: int = 0) -> ReplyContent:
        """What was sealed to the request: the first time, or the one after so many."""
        places: list[tuple[int, int]] = []

        def is_it(record: Received) -> bool:
            if unverified_kid(record.value) != asked.id:
                return False
            asked.reply_key.open(record.value)
            place = (record.partition, record.offset)
            if place not in places:
                places.append(place)
            return places.index(place) >= after

        record = await self.world.consume_until(CREDENTIAL_REPLY, is_it)
        return ReplyContent.model_validate_json(asked.reply_key.open(record.value))

    # --- policy, as the test likes it ---

    def approval(self, asked: Asked, by: Party, **fields: Any) -> str:
        given = {
            "verdict": "approved",
            "request": asked.compact,
            "request_id": asked.id,
            "request_digest": digest(asked.compact),
            "ttl_s": asked.claims.ttl_s,
            "delivery": asked.claims.delivery or "agent",
            "revisions": self.revisions,
        }
        return sign(self.world.claims(Approval, by, **{**given, **fields}), by.key)

    def decision(self, asked: Asked, **fields: Any) -> CredentialDecision:
        """An honest `allowed`, but for `fields`."""
        policy = Party("policy", self.world.key("policy"))
        given = {
            "request_id": asked.id,
            "request": asked.compact,
            "source": asked.source,
            "outcome": "allowed",
            "ttl_s": asked.claims.ttl_s,
            "delivery": asked.claims.delivery or "agent",
            "revisions": self.revisions,
        }
        return self.world.claims(CredentialDecision, policy, **{**given, **fields})

    async def decide(self, asked: Asked, key: SigningKey | None = None, **fields: Any) -> Coordinates:
        """Append a decision on the request."""
        compact = sign(self.decision(asked, **fields), key or self.world.key("policy"))
        return await self.append_decision(compact)

    async def append_decision(self, compact: str) -> Coordinates:
        return await self.world.send(CREDENTIAL_DECISION, self.bot.name, compact)

    async def issued(self, *verbs: str, **fields: Any) -> tuple[Asked, ReplyContent]:
        """A credential, asked for, decided and delivered."""
        asked = await self.ask(*verbs, **fields)
        await self.decide(asked)
        content = await self.answer(asked)
        assert content.credential is not None, self.refusal(content)
        return asked, content

    # --- what came of it ---

    def refusal(self, content: ReplyContent) -> IssuerRefusal:
        assert content.refusal is not None
        find = self.world.trust.finder("issuer", at_s=time.time())
        return verify(parse(content.refusal), IssuerRefusal, find, audience=self.world.td).claims

    async def refused(self, asked: Asked) -> IssuerRefusal:
        """The issuer's signed refusal, sealed to the agent; nothing was issued, and audit was told the same."""
        content = await self.answer(asked)
        refusal = self.refusal(content)
        assert (content.lease, content.credential) == (None, None)
        assert refusal.request_id == asked.id
        event = await self.event("refused", asked)
        assert event.reasons == refusal.reasons
        assert await self.records(asked.lease_id) == []
        return refusal

    async def refusal_codes(self, asked: Asked) -> list[str]:
        """Why the issuer refused."""
        return [reason.code for reason in (await self.refused(asked)).reasons]

    async def event(self, kind: str, asked: Asked) -> ServiceEvent:
        """The issuer's event about a request's decision."""
        return await self.world.event_where(
            lambda e: (
                e.kind == kind
                and e.subject == "credential.decision"
                and e.request_id == asked.id
                and e.iss == self.world.key("issuer").id
            )
        )

    async def is_finding(self, asked: Asked) -> bool:
        """Whether the refusal, which must have been told already, was told as a finding too."""
        # What comes after it on the same partition of decisions is handled later, and so is told later.
        later = await self.ask("read")
        await self.decide(later, outcome="allowed", ttl_s=later.claims.ttl_s + 1)
        await self.event("refused", later)
        events = [self.world.event(record) for record in await self.world.records(SERVICE_EVENT)]
        return any(e.kind == "finding" and e.request_id == asked.id for e in events)

    async def records(self, id: str) -> list[Signed[Lease]]:
        """The verified records of a lease, as they stand on the topic now."""
        found = []
        for record in await self.world.records(LEASE):
            if record.key == id:
                find = self.world.trust.finder("issuer", "revoker", at_s=record.appended_at_ms / 1000)
                found.append(verify(parse(record.value), Lease, find, audience=self.world.td))
        return found

    async def issued_records(self, id: str) -> list[Signed[Lease]]:
        """`records`, once there is one."""
        await self.lease(id, "active")
        return await self.records(id)

    async def lease(self, id: str, *statuses: LeaseStatus) -> Lease:
        """The record of a lease in one of these statuses, once it is on Kafka."""
        await self.world.consume_until(
            LEASE,
            lambda r: r.key == id and self.world.opened(r, Lease, "issuer", "revoker").status in statuses,
        )
        return next(one.claims for one in await self.records(id) if one.claims.status in statuses)

    # --- revoking ---

    async def revoke(
        self, by: Party, kind: str = "revocation", **fields: Any
    ) -> tuple[RevocationRequest, Coordinates]:
        claims = self.world.claims(RevocationRequest, by, **{"kind": kind, "reason": "a test", **fields})
        return claims, await self.world.send(REVOCATION_REQUEST, self.bot.name, sign(claims, by.key))

    async def verdict(self, claims: RevocationRequest) -> ServiceEvent:
        """The revoker's answer to an order."""
        return await self.world.event_where(
            lambda e: e.ref == claims.jti and e.actor == claims.iss and e.kind in ("accepted", "refused")
        )


@asynccontextmanager
async def opened_desks(world: World) -> AsyncIterator[IssuerBench]:
    """A world with people and a target; the registry runs. Desks are made from this one by `another`."""
    async with world.running("registry"):
        everything = scope("staging", ("read", "deploy", "wipe"), ("**",))
        people = {
            "sam": await world.user("sam", roles=("sponsor",), entitlements=everything),
            "sue": await world.user("sue", roles=("sponsor",)),
            "maria": await world.user("maria", entitlements=everything),
        }
        verbs = (
            VerbFloor(verb="read"),
            VerbFloor(verb="deploy", floor="sponsor"),
            VerbFloor(verb="wipe", floor="operator"),
        )
        target = await world.target("staging", verbs=verbs)
        yield IssuerBench(world, people, target)


@asynccontextmanager
async def opened_office(
    kafka: Kafka, redis_server: RedisServer, *services: ServiceRole, **running: Any
) -> AsyncIterator[IssuerBench]:
    """A world of its own with people, a target, the registry and these services. `running`: as of `World.running`."""
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as desk,
        world.running(*services, **running),
    ):
        yield desk


async def another(desk: IssuerBench, **fields: Any) -> IssuerBench:
    """A desk with an agent and a task of its own."""
    people = {"sam": desk.sam, "maria": desk.maria, "sue": desk.sue}
    return await IssuerBench(desk.world, people, desk.target).staff(**fields)
