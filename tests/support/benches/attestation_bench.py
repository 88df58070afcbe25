"""Where instances of agents run: platforms whose issuers the root has signed, and one that publishes its keys."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ringfence.client.agent.agent import Agent
from ringfence.client.instance_enrolment import TokenSource
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import ExpiringClaims, ServiceRole
from ringfence.messages.enrolment import AttestationSelector, InstanceEnrol
from ringfence.messages.registry import AgentSetAttestation
from ringfence.messages.trust import OidcIssuer
from ringfence.model.identity.attestation import audience, bound_audience
from ringfence.registry.settings import RegistrySettings
from tests.gateway.certificates import Certificates
from tests.support import platform_tokens
from tests.support.benches.sdk_clients import READ, client
from tests.support.http_client import plain_client
from tests.support.oidc_tokens import TokenIssuer
from tests.support.servers.oidc import OidcServer
from tests.support.world import WITHIN_S, Party, World


@dataclass
class Given(TokenSource):
    """Tokens that a test has ready, one for each call; or made anew for what is asked, where there are none."""

    issuer: TokenIssuer
    platform: str = "github"
    tokens: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    async def token(self, bound_audience: str) -> str:
        self.asked.append(bound_audience)
        if self.tokens:
            return self.tokens.pop(0)
        return self.issuer.token(platform_tokens.claims(self.platform, self.issuer, bound_audience))


class AttestationBench:
    """A world, its platforms, and agents without keys."""

    def __init__(self, world: World, published: OidcServer, own: RegistrySettings) -> None:
        self.world, self.published, self.own = world, published, own
        self.pinned = {
            name: TokenIssuer(f"https://{name}.acme.example") for name in platform_tokens.PLATFORMS
        }
        self.sam: Party
        self.maria: Party

    @classmethod
    @asynccontextmanager
    async def open(cls, world: World, folder: Path) -> AsyncIterator[AttestationBench]:
        """With the registry's settings and trust; the services are the test's to run."""
        certificates, published = Certificates(folder), OidcServer()
        yard = cls(world, published, RegistrySettings(oidc_ca_file=certificates.file))
        issuers = [issuer.pinned() for issuer in yard.pinned.values()]
        issuers.append(OidcIssuer(issuer=published.issuer, uses=("instances",), discovery=True))
        bundle = world.make_bundle(2).model_copy(update={"oidc_issuers": tuple(issuers)})
        world.trust.load(sign(bundle, world.root.key, header_jwk=True), time.time())
        await world.publish_trust(bundle)
        async with published.running(certificates.server("127.0.0.1")):
            yield yard

    async def staff(self) -> AttestationBench:
        """People and a target. The registry must be running."""
        self.sam = await self.world.user("sam", ("sponsor",))
        self.maria = await self.world.user("maria", entitlements=READ)
        await self.world.target("staging")
        return self

    async def agent(self, *selectors: AttestationSelector) -> Party:
        """An agent that has no key, and lets these in."""
        name = f"bot-{uuid.uuid4().hex[:8]}"
        return await self.world.agent(name, self.sam, READ, keys=(), attestation=selectors)

    async def task(self, agent: Party) -> str:
        return await self.world.task(agent, by=self.maria, scope=READ)

    async def attest(self, agent: Party, *selectors: AttestationSelector) -> None:
        """Replace the agent's selectors."""
        await self.command(agent, AgentSetAttestation, attestation=selectors)

    async def command(self, agent: Party, model: type[ExpiringClaims], **fields: Any) -> None:
        """A command of the agent's sponsor about it."""
        claims = self.world.claims(model, self.sam, agent_id=agent.name, **fields)
        await self.world.accepted(claims, self.sam)

    async def known(self, role: ServiceRole) -> None:
        """Once this service has heard of what was commanded: until then it decides by what was."""
        assert await self.world.runtimes[role].tables_caught_up(WITHIN_S)

    def selector(self, platform: str, **more: Any) -> AttestationSelector:
        return platform_tokens.selector(platform, self.pinned[platform].issuer, **more)

    def token(self, platform: str, key: SigningKey | None = None, /, **claims: Any) -> str:
        """A platform's token; for one key alone where one is given. `claims` replace what it would say."""
        issuer = self.pinned[platform]
        td = self.world.td
        aud = bound_audience(td, key.kid) if key else audience(td)
        said = {**platform_tokens.claims(platform, issuer, aud), **claims}
        return issuer.token({name: value for name, value in said.items() if value is not None})

    async def enrol(self, agent: Party, token: str, by: SigningKey, **claims: Any) -> httpx.Response:
        """What the registry answers to an instance."""
        given = {"key": by.public, "token": token, "exp": int(time.time()) + 60}
        body = sign(self.world.claims(InstanceEnrol, agent, **{**given, **claims}), by)
        async with plain_client(trust_env=False) as http:
            return await http.post(f"http://127.0.0.1:{self.world.ports['registry']}/v1/enrol", content=body)

    def connected(self, agent: Party, source: TokenSource | str, **settings: Any) -> Agent:
        """The SDK as an instance uses it."""
        return Agent.connect(attest=source, agent_id=agent.name, settings=client(self.world, **settings))


def fresh(agent: Party) -> SigningKey:
    """A key that nobody has heard of."""
    return SigningKey.generate(agent.id)
