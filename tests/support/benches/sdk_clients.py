"""What the tests of the SDK share: clients of a world, and services that a test plays itself."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from ringfence.client.admin.administrator import Administrator
from ringfence.client.approvals.history_comparison import PendingApproval
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.ids import digest, lease_id, message_id
from ringfence.kernel.crypto.jwe import seal
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import (
    Coordinates,
    Credential,
    CredentialDecision,
    CredentialDelivery,
    CredentialRequest,
    ReplyContent,
)
from ringfence.messages.lease import Lease
from ringfence.messages.topics import CREDENTIAL_REPLY
from tests.support.world import WITHIN_S, Party, World, scope

READ = scope("staging", ("read",), ("env/**",))
WRITE = scope("staging", ("deploy",), ("env/staging/*",))


def client(world: World, **fields: Any) -> ClientSettings:
    """The settings of somebody outside."""
    shared = world.settings("registry")
    ports = {f"{role}_url": f"http://127.0.0.1:{port}" for role, port in world.ports.items()}
    known = {name: getattr(shared, name) for name in ClientSettings.model_fields if hasattr(shared, name)}
    return ClientSettings(**{**known, **ports, **fields})


@asynccontextmanager
async def administrator(world: World, who: Party, **options: Any) -> AsyncIterator[Administrator]:
    async with Administrator.connect(
        who.key, client(world), **{"timeout_s": WITHIN_S, **options}
    ) as connected:
        yield connected


async def first(sponsor: Sponsor) -> PendingApproval:
    """The first thing that waits for somebody."""
    async with asyncio.timeout(WITHIN_S):
        async for pending in sponsor.watch():
            return pending
    raise AssertionError("the watch ended")


class Elsewhere(httpx.AsyncHTTPTransport):
    """Reaches the issuer, whose name in tokens is one address, at the one where this test runs it."""

    def __init__(self, named: str, actual: str) -> None:
        super().__init__()
        self._named, self._actual = httpx.URL(named), httpx.URL(actual)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if (request.url.host, request.url.port) == (self._named.host, self._named.port):
            request.url = request.url.copy_with(host=self._actual.host, port=self._actual.port)
        return await super().handle_async_request(request)


class Played:
    """Policy and issuer as a test plays them: what they sign is theirs, what they say is the test's choice."""

    def __init__(self, world: World, request: Received) -> None:
        self.world = world
        self.record = request
        self.compact = request.value.decode()
        self.claims = parse(self.compact).unverified_claims(CredentialRequest)
        self.request_id = message_id(self.claims.iss, self.claims.jti)
        self.agent = self.claims.iss.rpartition("/")[2]

    def stamp(self, by: SigningKey) -> dict[str, Any]:
        return {"iss": by.id, "aud": self.world.td, "iat": int(time.time()), "jti": str(uuid.uuid4())}

    def decision(self, outcome: str = "allowed", *, by: SigningKey | None = None, **fields: Any) -> str:
        """A signed decision on the request."""
        by = by or self.world.key("policy")
        given = {
            "request_id": self.request_id,
            "request": self.compact,
            "source": self.record.coordinates,
            "outcome": outcome,
            "delivery": "agent",
            "ttl_s": self.claims.ttl_s,
        }
        return sign(CredentialDecision(**{**self.stamp(by), **given, **fields}), by)

    async def reply(self, decision: str, **content: Any) -> None:
        """Seal a reply to the request's key and publish it."""
        reply = ReplyContent(request_id=self.request_id, decision=decision, **content)
        sealed = seal(
            reply.model_dump_json(exclude_none=True).encode(), self.claims.reply_key, kid=self.request_id
        )
        await self.world.send(CREDENTIAL_REPLY, self.agent, sealed, "credential.reply")

    async def issue(self, value: str = "token", **fields: Any) -> str:
        """Reply with a credential, or with the handle of one that is delivered to the gateway; the lease id."""
        by, decision = self.world.key("issuer"), self.decision()
        deadline = int(time.time()) + self.claims.ttl_s
        given = {
            "lease_id": lease_id(self.request_id),
            "seq": 1,
            "status": "active",
            "request_id": self.request_id,
            "decision_id": "d",
            "decision_digest": digest(decision),
            "agent_id": self.agent,
            "act": (self.agent,),
            "sponsor": "sam",
            "on_behalf_of": "maria",
            "task_id": self.claims.task_id,
            "target_id": self.claims.scope[0].target,
            "backend": "jwt",
            "delivery": "agent",
            "scope": self.claims.scope,
            "requested_at_ms": self.record.appended_at_ms,
            "deadline": deadline,
        }
        lease = Lease(**{**self.stamp(by), **given, **fields})
        delivered = {} if lease.delivery == "gateway" else {"delivery": sign(self.delivery(lease, value), by)}
        await self.reply(decision, lease=sign(lease, by), **delivered)
        return lease.lease_id

    def delivery(self, lease: Lease, value: str) -> CredentialDelivery:
        credential = Credential(
            kind=lease.backend, value=value, token_type="Bearer", expires_at=lease.deadline
        )
        return CredentialDelivery(
            **self.stamp(self.world.key("issuer")),
            request_id=lease.request_id,
            lease_id=lease.lease_id,
            target_id=lease.target_id,
            credential=credential,
        )


def nowhere() -> Coordinates:
    """Coordinates of a record that never was."""
    return Coordinates(topic="t", partition=0, offset=0, appended_at_ms=int(time.time() * 1000))
