"""A gateway with sockets for runs, in front of an HTTP target, with all services that give a run a credential."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import IssuedCredential
from ringfence.dev.processes import free_port
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import CredentialRequest, RequestWithdraw
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import BackendSettings
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway.certificates import Certificates
from tests.gateway.target import Target
from tests.support.benches.agent_api_bench import Caller, Posted
from tests.support.benches.attestation_bench import AttestationBench
from tests.support.benches.gateway_flows import RULES, VERBS, gateway
from tests.support.benches.live_runs import RUNNER, LiveRun, add_runner, agent_of
from tests.support.world import WITHIN_S, Party, World, scope

WIDE = (
    *scope("hub", ("read", "write"), ("path/**",)),
    *(one for name in ("cache", "echo", "jump") for one in scope(name, ("read", "forward"), ("**",))),
)
ASK: dict[str, Any] = {
    "target": "hub", "verbs": ["read"], "resources": ["path/**"], "reason": "a look", "delivery": "gateway",
    "timeout_s": WITHIN_S,
}  # fmt: skip


@dataclass
class RunBench:
    """See the module."""

    yard: AttestationBench
    user: Party
    target: Target
    port: int
    folder: Path
    certificates: Certificates

    @property
    def world(self) -> World:
        return self.yard.world

    async def agent(self, *, has_key: bool = False) -> Party:
        return await agent_of(self.yard, RUNNER, WIDE, has_key=has_key)

    async def task(self, agent: Party) -> str:
        return await self.world.task(agent, by=self.user, scope=WIDE)

    def run(self, agent: Party, task: str, **options: Any) -> RunInside:
        return RunInside(self, LiveRun(self.yard, agent, task, **options))

    def task_socket(self, task: str) -> Path:
        return self.folder / f"{task}.sock"


@dataclass
class RunInside:
    """A run of an agent, with the SDK inside that goes through the run's socket."""

    bench: RunBench
    live: LiveRun
    sdk: Agent = field(init=False)

    @property
    def socket(self) -> Path:
        return self.bench.folder / f"{self.live.id}.sock"

    @property
    def key(self) -> SigningKey:
        return self.sdk.connection.key

    @asynccontextmanager
    async def started(self) -> AsyncIterator[RunInside]:
        """Once its socket is there and its instance is enrolled."""
        door = f"unix:{self.socket}"
        async with self.bench.yard.connected(self.live.agent, self, door=door) as self.sdk:
            yield self

    async def token(self, bound_audience: str) -> str:
        """As a runner does: the run has started, and its socket is there, before the instance asks for anything."""
        token = await self.live.token(bound_audience)
        await until_there(self.socket)
        return token

    async def lease(self, **more: Any) -> str:
        """The handle of a lease for the gateway, asked for through the run's socket."""
        return (await self.lease_of(**more)).lease_id

    async def lease_of(self, **more: Any) -> IssuedCredential:
        """What the run gets for a request through its socket."""
        return await self.sdk.request(task=self.live.task, **{**ASK, **more})

    async def get(self, path: str = "/a", *, handle: str | None = None, socket: Path | None = None) -> Any:
        """The answer to a request at the target, through the run's socket."""
        return await through(socket or self.socket, path, handle)

    async def known(self, handle: str) -> None:
        """Wait until the gateway has heard of a lease, and has its credential."""
        async with asyncio.timeout(WITHIN_S):
            while (answer := await self.get(handle=handle)).status_code != 200:
                assert answer.status_code in (401, 503), answer.text
                await asyncio.sleep(0.02)

    def caller(self, socket: Path | None = None) -> Caller:
        return Caller("http://ringfence", socket=socket or self.socket)

    def signed(self, model: Any, *, key: SigningKey | None = None, **fields: Any) -> Posted:
        """A message of the run's instance, but for `fields`; by another key if `key` says so."""
        reply_key, live = ReplyKey(), self.live
        given: dict[str, Any] = {"enrolment": self.sdk.connection.enrolment}
        if model is CredentialRequest:
            given |= {
                "task_id": live.task, "scope": scope("hub", ("read",), ("path/a",)), "ttl_s": 600,
                "reason": "a test", "reply_key": reply_key.public,
            }  # fmt: skip
        claims = self.bench.world.claims(model, live.agent, **{**given, **fields})
        return Posted(claims, sign(claims, key or self.key), reply_key)

    def request(self, **fields: Any) -> Posted:
        return self.signed(CredentialRequest, **fields)

    def withdraw(self, message: Posted, **fields: Any) -> Posted:
        return self.signed(RequestWithdraw, request_id=message.id, **fields)

    def release(self, lease_id: str, **fields: Any) -> Posted:
        return self.signed(RevocationRequest, kind="release", lease_id=lease_id, reason="done", **fields)


@asynccontextmanager
async def run_bench(
    kafka: Kafka, redis: RedisServer, folder: Path, *, targets: dict[str, Any] | None = None, **own: Any
) -> AsyncIterator[RunBench]:
    """`targets`: more of them, by name; `own`: settings of the gateway besides those of a usual one."""
    yard_folder = folder / "platforms"
    yard_folder.mkdir(parents=True, exist_ok=True)
    certificates, port, sockets = Certificates(folder), free_port(), folder / "sockets"
    settings = {
        "listen": str(port), "sockets": sockets, "ca_file": folder / "ca.pem",
        "targets_ca_file": certificates.file, **own,
    }  # fmt: skip
    async with (
        Target().serving(certificates.server("localhost")) as target,
        World.open(kafka.bootstrap, redis.url, paced=kafka.embedded) as world,
        AttestationBench.open(world, yard_folder) as yard,
    ):
        await add_runner(world)
        async with world.running("registry", "policy", "issuer", "revoker", own={"registry": yard.own}):
            await yard.staff()
            backend = BackendSettings.model_validate(
                {"kind": "jwt", "url": f"https://localhost:{target.port}"}
            )
            for name, target_fields in (targets or {}).items():
                await world.target(name, **target_fields)
            await world.target("hub", backend=backend, requests=RULES, verbs=VERBS)
            user = await world.user(f"u-{uuid.uuid4().hex[:8]}", entitlements=WIDE)
            async with gateway(world, **settings):
                yield RunBench(yard, user, target, port, sockets, certificates)


async def through(socket: Path, path: str = "/a", handle: str | None = None) -> httpx.Response:
    """The answer to a request at the target, through a socket."""
    headers = {"Authorization": f"DPoP {handle}"} if handle is not None else {}
    transport = httpx.AsyncHTTPTransport(uds=str(socket))
    async with httpx.AsyncClient(transport=transport, timeout=WITHIN_S, trust_env=False) as http:
        return await http.get(f"http://gateway/hub{path}", headers=headers)


async def until_there(path: Path, *, gone: bool = False) -> None:
    async with asyncio.timeout(WITHIN_S):
        while path.exists() == gone:
            await asyncio.sleep(0.02)
