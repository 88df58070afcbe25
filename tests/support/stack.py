"""One whole Ringfence for the run: every service a process of its own, and names of their own for each test."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ringfence.cli.commands.dev import client_settings
from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.history_comparison import PendingApproval
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.errors import RequestDeniedError
from ringfence.client.settings import ClientSettings
from ringfence.dev.stack import Stack, StackOptions
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.base import Claims, Permission, ServiceRole, Topic
from ringfence.messages.credential import Reason
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import BackendSettings, VerbFloor
from ringfence.messages.topics import AUDIT, CREDENTIAL_DECISION, DEAD_LETTER, LEASE, SERVICE_EVENT
from ringfence.model.identity.spiffe_ids import Kind, spiffe_id

if TYPE_CHECKING:
    from tests.brokers import RedisServer
    from tests.conftest import Kafka

WITHIN_S = 60.0
C = TypeVar("C", bound=Claims)


class Seen:
    """All records of some topics from the start of a test on."""

    def __init__(self, settings: ClientSettings, topics: Sequence[Topic[Any]]) -> None:
        self.records: list[Received] = []
        self._news = asyncio.Event()
        self._follower = Follower(settings, topics, self._take, since_ms=None)

    def _take(self, records: Sequence[Received]) -> None:
        self.records.extend(records)
        self._news.set()

    async def __aenter__(self) -> Seen:
        await self._follower.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._follower.stop()

    async def until(self, found: Callable[[], Any], what: str) -> Any:
        """What `found` returns once it is true. Fails the test after a minute."""
        try:
            async with asyncio.timeout(WITHIN_S):
                while not (result := found()):
                    self._news.clear()
                    await self._news.wait()
                return result
        except TimeoutError:
            raise AssertionError(f"did not come within {WITHIN_S:.0f} s: {what}") from None

    async def news(self) -> None:
        """Return when more has come."""
        self._news.clear()
        await self._news.wait()

    async def up_to_now(self) -> None:
        """Wait until all is here that stands on the topics now: before a test says what did *not* come."""
        assert await self._follower.caught_up(WITHIN_S), "the topics could not be read up to their ends"

    def of(self, topic: Topic[Any]) -> list[Received]:
        """What came on one topic."""
        return [record for record in self.records if record.topic is topic]


@dataclass
class RunningStack:
    """A small organisation of its own inside the shared stack: nobody else uses its names."""

    stack: Stack
    settings: ClientSettings
    mark: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    keys: dict[str, SigningKey] = field(default_factory=dict)
    task: str = ""
    _verified: dict[tuple[bytes, int, type[Claims], tuple[ServiceRole, ...], bytes], Any] = field(
        default_factory=dict
    )
    """What was verified once: the same record under the same trust bundle is as good the second time."""

    @property
    def target(self) -> str:
        return f"shop-{self.mark}"

    @property
    def agent(self) -> str:
        return f"bot-{self.mark}"

    def name(self, who: str) -> str:
        """The id of `sam`, `maria`, ... in this realm."""
        return f"{who}-{self.mark}"

    def key(self, kind: Kind, id: str) -> SigningKey:
        """The key of a subject of this realm; made when first asked for."""
        full = spiffe_id(self.settings.trust_domain, kind, id)
        if full not in self.keys:
            self.keys[full] = SigningKey.generate(full)
        return self.keys[full]

    def permission(self, verbs: Sequence[str], *resources: str) -> Permission:
        """A permission at this realm's target."""
        return Permission(target=self.target, verbs=tuple(verbs), resources=resources)

    async def make(self) -> RunningStack:
        """sam sponsors the agent; maria may read all and write to staging; the agent has a task for maria."""
        everything = [self.permission(["read", "write"], "env/**")]
        async with self.as_operator() as olga:
            await olga.set_user(
                self.name("sam"), name="Sam", roles=["sponsor"], keys=[self.key("user", self.name("sam"))],
                entitlements=everything,
            )  # fmt: skip
            await olga.set_user(
                self.name("maria"), name="Maria", keys=[self.key("user", self.name("maria"))],
                entitlements=[self.permission(["read"], "env/**"), self.permission(["write"], "env/staging/*")],
            )  # fmt: skip
            await olga.set_target(
                self.target, description="a shop", backend=BackendSettings(kind="jwt"),
                verbs=[VerbFloor(verb="read"), VerbFloor(verb="write", floor="sponsor")],
                keys=[self.key("target", self.target)],
            )  # fmt: skip
        async with self.administrator("sam") as sam:
            await sam.register_agent(
                self.agent, description="a bot", keys=[self.key("agent", self.agent)], ceiling=everything
            )
        async with self.administrator("maria") as maria:
            self.task = await maria.assign_task(
                self.agent, purpose="a test", scope=everything, ends_in_s=3600
            )
        return self

    def as_operator(self) -> Administrator:
        """The stack's first operator."""
        return Administrator.connect(self.stack.trust.user_key(self.stack.options.operator), self.settings)

    def administrator(self, who: str) -> Administrator:
        """A person of this realm, giving commands."""
        return Administrator.connect(self.key("user", self.name(who)), self.settings)

    def sponsor(self, who: str = "sam") -> Sponsor:
        """A person of this realm, approving."""
        return Sponsor.connect(self.key("user", self.name(who)), self.settings)

    def as_agent(self) -> Agent:
        """The realm's agent."""
        return Agent.connect(self.key("agent", self.agent), self.settings)

    def publisher(self) -> Publisher:
        """Raw write access to every topic: what an attacker may have."""
        return Publisher(self.settings, "spiffe://elsewhere/attacker")

    def seen(self, *topics: Topic[Any]) -> Seen:
        """All that comes on these topics from now on."""
        return Seen(self.settings, topics or (LEASE, AUDIT, SERVICE_EVENT, CREDENTIAL_DECISION, DEAD_LETTER))

    async def read(self, agent: Agent, *, ttl_s: int = 600, timeout_s: float = WITHIN_S) -> Any:
        """A credential that nobody has to approve."""
        return await agent.request(
            task=self.task, target=self.target, verbs=["read"], resources=["env/staging/web"], reason="to look",
            ttl_s=ttl_s, timeout_s=timeout_s,
        )  # fmt: skip

    def verified(self, agent: Agent, record: Received, model: type[C], *roles: ServiceRole) -> C | None:
        """The claims of a record that a service with one of the roles signed, else None."""
        trust = agent.connection.trust
        # Whoever waits for a record asks for all before it again, with each that comes.
        key = (record.value, record.appended_at_ms, model, roles, trust.compact)
        if (claims := self._verified.get(key)) is None:
            find = trust.finder(*roles, at_s=record.appended_at_ms / 1000)
            try:
                claims = verify(parse(record.value), model, find, audience=self.settings.trust_domain).claims
            except InvalidMessageError:
                return None
            self._verified[key] = claims
        return claims

    def leases(self, agent: Agent, seen: Seen, lease_id: str) -> list[Lease]:
        """Every verified record of a lease that came, in order."""
        claims = [
            self.verified(agent, r, Lease, "issuer", "revoker") for r in seen.of(LEASE) if r.key == lease_id
        ]
        return [lease for lease in claims if lease]

    async def end_of(self, agent: Agent, seen: Seen, lease_id: str) -> Lease:
        """The terminal record of a lease, awaited."""

        def found() -> list[Lease]:
            return [lease for lease in self.leases(agent, seen, lease_id) if lease.status in TERMINAL]

        return (await seen.until(found, f"the end of lease {lease_id}"))[0]

    async def denial(self, agent: Agent, seen: Seen, ask: Callable[[], Awaitable[Any]]) -> tuple[Reason, ...]:
        """Ask until it is denied, and return the reasons.

        Policy may decide on a record that is stale within the grace. A lease that was issued so must end by itself.
        """
        while True:
            try:
                credential = await ask()
            except RequestDeniedError as denied:
                return denied.reasons
            await self.end_of(agent, seen, credential.lease_id)

    async def event_where(
        self, agent: Agent, seen: Seen, holds: Callable[[ServiceEvent], bool], what: str
    ) -> ServiceEvent:
        """The first verified service event that came and for which `holds`."""

        def found() -> list[ServiceEvent]:
            events = [
                self.verified(agent, r, ServiceEvent, "registry", "policy", "issuer", "revoker", "audit")
                for r in seen.of(SERVICE_EVENT)
            ]
            return [event for event in events if event and holds(event)]

        return (await seen.until(found, what))[0]


async def first_pending(sponsor: Sponsor) -> PendingApproval:
    """The first thing that waits for this person."""
    async with asyncio.timeout(WITHIN_S):
        async for pending in sponsor.watch():
            return pending
    raise AssertionError("the watch ended")


def options_of_stack(
    folder: Path, kafka: Kafka, redis_server: RedisServer, prefix: str, **more: Any
) -> StackOptions:
    """Options of a stack on the broker and the Redis of this run, with names of its own (`prefix`) there."""
    return StackOptions(
        folder / "state",
        trust_domain="acme.example",
        kafka=kafka.bootstrap,
        embedded_broker=kafka.embedded,
        redis_url=redis_server.url,
        topic_prefix=prefix,
        redis_prefix=prefix,
        keep_bytes=1024 * 1024,  # what it keeps, the embedded broker writes every other second
        **more,
    )


@asynccontextmanager
async def realm_in(stack: Stack) -> AsyncIterator[RunningStack]:
    """A realm in a running stack."""
    yield await RunningStack(stack, client_settings(stack.environment())).make()


def now_s() -> int:
    """The present, in seconds."""
    return int(time.time())
