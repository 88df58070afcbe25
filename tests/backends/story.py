"""What the stories have in common: every service a process, targets, and the people around an agent."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ringfence import Agent
from ringfence.cli.commands.dev import client_settings
from ringfence.cli.commands.target_templates import TEMPLATES, Template
from ringfence.client.agent.credentials import GatewayCredential, IssuedCredential
from ringfence.dev.stack import Stack, StackOptions
from ringfence.kernel.crypto.jwe import EncryptionKey, unverified_about
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Permission
from ringfence.messages.credential import CredentialDelivery, Delivery
from ringfence.messages.registry import BackendSettings, VerbFloor
from ringfence.messages.topics import CREDENTIAL_REPLY
from ringfence.model.target_settings import CREDENTIAL_KINDS
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.stack import WITHIN_S, RunningStack, Seen, first_pending

REASON = "to count the chairs"
TOKENS = Template("jwt", {"read": "none"})
"""A resource server of one's own has verbs of its own."""


@dataclass(frozen=True)
class Thing:
    """A target, and what sam, maria and their agent may ever do there: `verbs` on `resources`."""

    target_id: str
    template: Template
    verbs: tuple[str, ...]
    resources: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, target_id: str, template: str, verbs: tuple[str, ...], resource: str) -> Thing:
        return cls(target_id, TEMPLATES[template], verbs, (resource,))

    @property
    def delivery(self) -> Delivery:
        """To the agent where the kind allows it, so that a story can ask for both."""
        return "agent" if CREDENTIAL_KINDS[self.template.backend].handed_out else "gateway"

    @property
    def scope(self) -> Permission:
        return Permission(target=self.target_id, verbs=self.verbs, resources=self.resources)


@asynccontextmanager
async def running(
    kafka: Kafka,
    redis_server: RedisServer,
    name: str,
    places: Mapping[str, str],
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[RunningStack, Path]]:
    """A stack that knows the `places` of its own rights, and the folder of all that it leaves on the disk."""
    with tempfile.TemporaryDirectory(prefix="ringfence-story-") as folder:
        passing = Path(folder) / "passing"
        passing.mkdir()
        options = StackOptions(
            Path(folder) / "state",
            trust_domain="acme.example",
            kafka=kafka.bootstrap,
            embedded_broker=kafka.embedded,
            redis_url=redis_server.url,
            topic_prefix=name,
            redis_prefix=name,
            environment={
                "RINGFENCE_BACKENDS_ACCESS": json.dumps(dict(places)),
                "RINGFENCE_LOG_LEVEL": "debug",
                "TMPDIR": str(passing),
                **(environment or {}),
            },
        )
        stack = Stack(options)
        await asyncio.to_thread(stack.start)
        try:
            yield RunningStack(stack, client_settings(stack.environment())), Path(folder)
        finally:
            await asyncio.to_thread(stack.stop)


async def staff(realm: RunningStack, *things: Thing) -> None:
    """sam sponsors the agent; it has a task for maria; whatever it reads, sam approves."""
    everything = [thing.scope for thing in things]
    async with realm.as_operator() as olga:
        for who in ("sam", "maria"):
            await olga.set_user(
                realm.name(who), name=who.title(), roles=["sponsor"] if who == "sam" else [],
                keys=[realm.key("user", realm.name(who))], entitlements=everything,
            )  # fmt: skip
        for thing in things:
            template = thing.template
            floors = template.verbs | {"read": "sponsor"}
            await olga.set_target(
                thing.target_id, description="of a story",
                backend=BackendSettings.model_validate(
                    {"kind": template.backend, **template.settings, **thing.settings}
                ),
                verbs=[VerbFloor(verb=verb, floor=floor) for verb, floor in floors.items()],
                requests=template.requests, delivery=thing.delivery,
            )  # fmt: skip
    async with realm.administrator("sam") as sam:
        key = realm.key("agent", realm.agent)
        await sam.register_agent(realm.agent, description="a bot", keys=[key], ceiling=everything)
    async with realm.administrator("maria") as maria:
        realm.task = await maria.assign_task(realm.agent, purpose="a test", scope=everything, ends_in_s=3600)


async def approved(
    realm: RunningStack, agent: Agent, target: str, resource: str, ttl_s: int, delivery: Delivery = "agent"
) -> IssuedCredential:
    """What the agent gets to read with, once sam has approved. Raises what the agent is told."""
    asked = asyncio.create_task(
        agent.request(
            task=realm.task, target=target, verbs=["read"], resources=[resource], reason=REASON, ttl_s=ttl_s,
            timeout_s=WITHIN_S, delivery=delivery,
        )
    )  # fmt: skip
    async with realm.sponsor() as sam:
        await sam.approve(await first_pending(sam))
    return await asked


async def at_the_gateway(realm: RunningStack, agent: Agent, seen: Seen, handle: GatewayCredential) -> str:
    """What a gateway injects: opened by its own key, believed by the issuer's signature."""

    def envelopes() -> list[Received]:
        return [r for r in seen.of(CREDENTIAL_REPLY) if unverified_about(r.value) == handle.request_id]

    record = (await seen.until(envelopes, "the envelope"))[0]
    own = EncryptionKey.load(realm.stack.trust.encryption_key("gateway"))
    trust = agent.connection.trust
    find = trust.finder("issuer", at_s=record.appended_at_ms / 1000)
    signed = verify(parse(own.open(record.value)), CredentialDelivery, find, audience=trust.trust_domain)
    assert signed.claims.lease_id == handle.handle
    return signed.claims.credential.value


def command(realm: RunningStack, identity: Path, allow: str, *argv: str) -> list[str]:
    """`ringfence request --exec` as the agent, of which the key is written to `identity`."""
    realm.key("agent", realm.agent).save(identity)
    return [
        "-m", "ringfence.cli.main", "--identity", str(identity), "request", "--task", realm.task,
        "--allow", allow, "--reason", REASON, "--exec", "--", *argv,
    ]  # fmt: skip
