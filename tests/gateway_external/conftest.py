"""One organisation with a gateway, a target that records, each program before it. What cannot start fails the run."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringfence.client.approvals.action_approvals import PendingAction
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.messages.registry import BackendSettings, RequestRule, VerbFloor
from tests.brokers import RedisServer
from tests.brokers.secured import Authority
from tests.conftest import Kafka, needed
from tests.gateway_external.agent import HOST, Agent
from tests.gateway_external.programs import PROGRAMS, Places, Program, started
from tests.gateway_external.target import Target, running_target
from tests.support.benches.gateway_flows import Proxy, gateway, handle, secret_in
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.world import WITHIN_S, World, scope

HUB = "hub.example"
SECRET = "the-secret-of-keyed"
RULES = (
    RequestRule(method="GET", path="/{path*}", verb="read", resource="path/{path*}"),
    RequestRule(method="PUT", path="/{path*}", verb="write", resource="path/{path*}"),
    RequestRule(
        method="POST", path="/{path*}", body={"kind": ("note",)}, verb="read", resource="path/{path*}"
    ),
    RequestRule(method="POST", path="/{path*}", verb="write", resource="path/{path*}"),
    RequestRule(method="PATCH", path="/{path*}", verb="merge", resource="path/{path*}"),
    *(
        RequestRule(method=method, path="/a/bodies", verb="read", resource="path/a/bodies")
        for method in ("HEAD", "OPTIONS", "TRACE", "DELETE", "PROPFIND")
    ),
)
VERBS = (VerbFloor(verb="read"), VerbFloor(verb="write"), VerbFloor(verb="merge", ask="sponsor"))


@dataclass
class Stage:
    """Everything but the programs."""

    desk: IssuerBench
    proxy: Proxy
    target: Target
    places: Places
    trust: ssl.SSLContext
    folder: Path
    target_certificate: Path
    """With its key."""

    @property
    def world(self) -> World:
        return self.desk.world

    async def agent(
        self, port: int, *verbs: str, target_id: str = "hub", resource: str = "path/a/**"
    ) -> Agent:
        """An agent before the program on that port, once the gateway has its lease: this may take a moment."""
        lease = await handle(self.desk, *verbs, target=target_id, resource=resource)
        host = HUB if target_id == "hub" else f"{target_id}.example"
        url = f"https://{host}/{resource.removeprefix('path/').replace('**', 'x')}"
        method = "GET" if "read" in verbs else "PUT"
        async with asyncio.timeout(WITHIN_S):
            while (await self.proxy.as_agent(self.desk.bot.key, lease, method, url)).status_code != 200:
                await asyncio.sleep(0.02)
        return Agent(self.desk.bot.key, lease, port, self.trust)


@dataclass(frozen=True)
class Running:
    """A program before the target."""

    name: str
    program: Program
    port: int


@pytest.fixture(scope="session")
async def stage(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stage]:
    folder = tmp_path_factory.mktemp("gateways")
    authority = Authority(folder)
    certificate = authority.issue("target", HUB)
    place = secret_in(folder, SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RINGFENCE_BACKENDS_ACCESS", json.dumps({"keyed": place}))
        async with (
            World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
            opened_desks(world) as first,
            world.running("issuer", "revoker"),
            gateway(world) as proxy,
            running_target(certificate) as target,
        ):
            desk = await _staffed(await another(first))
            places = Places(authority.issue("gateway", HOST), authority.file, proxy.port, target.port)
            trust = ssl.create_default_context(cafile=str(authority.file))
            yield Stage(desk, proxy, target, places, trust, folder, certificate)


async def _staffed(desk: IssuerBench) -> IssuerBench:
    """Two targets, of which one takes its secret in a header of its own, and an agent with a task for both."""
    hub = BackendSettings.model_validate({"kind": "jwt", "url": f"https://{HUB}"})
    keyed = BackendSettings.model_validate(
        {"kind": "http", "url": "https://keyed.example", "auth": "header", "header": "X-Api-Key"}
    )
    await desk.world.target("hub", backend=hub, requests=RULES, verbs=VERBS)
    await desk.world.target("keyed", backend=keyed, requests=RULES, verbs=VERBS)
    wide = tuple(scope(name, ("read", "write", "merge"), ("path/**",))[0] for name in ("hub", "keyed"))
    user = await desk.world.user("ursula", entitlements=wide)
    desk.bot = await desk.world.agent("proxied-bot", sponsor=desk.sam, ceiling=wide)
    desk.task = await desk.world.task(desk.bot, by=user, scope=wide)
    return desk


@pytest.fixture(scope="session", params=list(PROGRAMS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def running(request: pytest.FixtureRequest, name: str, stage: Stage) -> Iterator[Running]:
    """Each of the programs, one after the other."""
    with needed(request), started(name, stage.places, stage.folder / name) as port:
        yield Running(name, PROGRAMS[name], port)


async def next_action(sponsor: Sponsor, other: str | None = None) -> PendingAction:
    """The action that waits for somebody, but for the one with that digest."""
    async with asyncio.timeout(WITHIN_S):
        async for pending in sponsor.watch_actions(everyone=False):
            if pending.digest != other:
                return pending
    raise AssertionError("the watch ended")
