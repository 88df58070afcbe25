"""An organisation in which the gateway stands before an API with a static secret: all of Ringfence that a lease needs.

The issuer's leases are real, as are the revoker's cuts; the gateway is a process of its own.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.base import Permission
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.registry import BackendSettings, VerbFloor
from tests.backends.gateway_process import GatewayProcess
from tests.backends.insisting import MARK, STREAM, InsistingApi
from tests.backends.through import ThroughGateway
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway_external.agent import Answer
from tests.support import secret_canary
from tests.support.benches.issuer_bench import Asked, IssuerBench
from tests.support.world import WITHIN_S, World, scope

VERBS = ("read", "write", "delete")
RESOURCES = ("path", "path/**")
SECRET = "canary-of-the-api"
Lives = Callable[[], Awaitable[bool]]


@dataclass
class Gated:
    """See the module. `may` goes through the gateway, and holds what the API received against what was told."""

    desk: IssuerBench
    api: InsistingApi
    gateway: GatewayProcess
    source: Path
    agent: ThroughGateway
    target: str
    secrets: list[str] = field(default_factory=lambda: [SECRET])
    told: list[str] = field(default_factory=list)
    """Every answer that the agent got."""
    _services: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def world(self) -> World:
        return self.desk.world

    def write_secret(self, secret: str) -> None:
        """What the gateway has to inject from now on."""
        if secret not in self.secrets:
            self.secrets.append(secret)
        self.source.touch(mode=0o600)
        self.source.write_text(f"{secret}\n")

    # --- leases ---

    async def leased(self, scope: Sequence[Permission], ttl_s: int = 600) -> str:
        """The handle of a new lease, once the gateway goes by it."""
        asked = await self.desk.ask(scope=tuple(scope), ttl_s=ttl_s, delivery="gateway")
        await self.desk.decide(asked)
        await self.handed(asked)
        await self.usable(asked.lease_id)
        return asked.lease_id

    async def handed(self, asked: Asked) -> Lease:
        """The agent is told of its lease, and of nothing that it could show to the target."""
        content = await self.desk.answer(asked)
        assert content.lease is not None, self.desk.refusal(content)
        assert content.credential is None
        return await self.desk.lease(asked.lease_id, "active")

    async def usable(self, handle: str) -> None:
        """Wait until the gateway says that requests can go by it."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                answer = await self.world.get("gateway", f"/v1/leases/{handle}", self.desk.sam)
                if answer.status_code == 200 and answer.json()["usable"]:
                    return
                await asyncio.sleep(0.01)

    async def cut(self, handle: str) -> None:
        """The agent gives a lease back; returns when that is done, or it was no lease."""
        claims, _ = await self.desk.revoke(self.desk.bot, "release", lease_id=handle)
        verdict = await self.desk.verdict(claims)
        if verdict.kind == "accepted":
            await self.desk.lease(handle, *TERMINAL)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Registry, issuer and revoker have ended meanwhile. The gateway goes on."""
        await self._services.aclose()
        try:
            yield
        finally:
            await self.attended()

    async def attended(self) -> None:
        await self._services.enter_async_context(self.world.running("registry", "issuer", "revoker"))

    # --- requests ---

    async def send(
        self, handle: str, method: str, path: str, headers: Sequence[tuple[str, str]] = ()
    ) -> tuple[Answer, str]:
        """The answer to a request of the agent, and the mark by which the API has it."""
        mark = uuid.uuid4().hex
        body = b"{}" if method in ("PUT", "POST", "PATCH") else None
        answer = await self.agent.send(
            handle, method, f"/{self.target}{path}", [(MARK, mark), *headers], body
        )
        said = "\n".join(f"{name}: {value}" for name, value in answer.headers)
        self.told.append(f"{said}\n\n{answer.body.decode('latin-1')}")
        assert secret_canary.in_texts(self.told[-1:], self.secrets) == [], "the agent sees what is injected"
        return answer, mark

    async def may(self, handle: str, act: Sequence[str]) -> bool:
        """Whether the API did it. Where the gateway refused, nothing may have come there."""
        method, path, *headers = act
        pairs = [(name, value) for name, _, value in (header.partition(": ") for header in headers)]
        answer, mark = await self.send(handle, method, path, pairs)
        came = self.api.came(mark)
        if answer.status == 200:
            assert len(came) == 1
            assert self.api.takes(came[0])
            assert came[0].all("DPoP") == []
            assert all(handle not in value for _, value in came[0].headers)
            return True
        assert answer.status in (400, 403), (act, answer)
        assert came == [], (act, "it was refused, and came to the API")
        return False

    async def refusal(self, handle: str, method: str = "GET", path: str = "/a") -> tuple[int, str]:
        """Status and code with which the gateway refuses. Nothing comes to the API."""
        answer, mark = await self.send(handle, method, path)
        assert self.api.came(mark) == []
        return answer.status, str(answer.json()["code"])

    @asynccontextmanager
    async def session(self, handle: str, path: str) -> AsyncIterator[Lives]:
        """A stream of events that goes on; what is yielded tells whether another event still arrives."""
        mark = uuid.uuid4().hex
        async with self.agent.stream(handle, f"/{self.target}{path}", [(MARK, mark), STREAM]) as reader:

            async def lives() -> bool:
                sent = self.api.streams[mark]
                sent.write(b"6\r\nevent\n\r\n")
                try:
                    async with asyncio.timeout(WITHIN_S):
                        return (await reader.read(65_536)) != b""
                except OSError:
                    return False

            yield lives


@asynccontextmanager
async def gated(
    kafka: Kafka,
    redis_server: RedisServer,
    folder: Path,
    target: str,
    *,
    grace_s: float,
    settings: Mapping[str, Any] | None = None,
) -> AsyncIterator[Gated]:
    """One, with the gateway running. `settings`: of the target, besides its URL."""
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        InsistingApi({("Authorization", f"Bearer {SECRET}")}).serving() as api,
    ):
        source = folder / "api-key"
        gateway = GatewayProcess(folder / "gateway", _environment(world, grace_s), {target: f"file:{source}"})
        world.ports["gateway"] = gateway.http
        async with AsyncExitStack() as services:
            await services.enter_async_context(world.running("registry", "issuer", "revoker"))
            desk = await _staffed(world, target, {"url": api.url, **(settings or {})})
            agent = ThroughGateway(desk.bot.key, gateway.port)
            made = Gated(desk, api, gateway, source, agent, target, _services=services)
            made.write_secret(SECRET)
            try:
                await gateway.start()
                yield made
            finally:
                await gateway.stop()


def _environment(world: World, grace_s: float) -> dict[str, str]:
    seal = world.folder / "keys" / "gateway-seal.json"
    world.seals["gateway"].save(seal)
    shared: ServiceSettings = world.settings("gateway", grace_s=grace_s)
    fields = shared.model_dump(exclude_unset=True, exclude={"http"})
    return {f"RINGFENCE_{name.upper()}": str(value) for name, value in fields.items()} | {
        "RINGFENCE_GATEWAY_SEAL_KEY_FILE": str(seal)
    }


async def _staffed(world: World, name: str, settings: Mapping[str, Any]) -> IssuerBench:
    """An agent that may do everything at the target: what it may do less, its leases say."""
    target = await world.target(
        name,
        backend=BackendSettings.model_validate({"kind": "http", **settings}),
        verbs=[VerbFloor(verb=verb) for verb in VERBS],
        requests=TEMPLATES["http"].requests,
    )
    wide = scope(name, VERBS, RESOURCES)
    people = {
        "sam": await world.user("sam", roles=("sponsor",), entitlements=wide),
        "sue": await world.user("sue", roles=("sponsor",)),
        "maria": await world.user("maria", entitlements=wide),
    }
    return await IssuerBench(world, people, target).staff(ceiling=wide, task_scope=wide)
