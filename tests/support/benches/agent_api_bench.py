"""A gateway whose HTTP API for agents is called as a program without the SDK calls it."""

from __future__ import annotations

import ssl
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ringfence.client.agent.dpop import proof
from ringfence.client.settings import ClientSettings
from ringfence.dev.processes import free_port
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import BackendSettings
from ringfence.messages.topics import CREDENTIAL_REQUEST, REVOCATION_REQUEST
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.gateway_flows import RULES, VERBS, gateway
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.benches.sdk_clients import Played, client
from tests.support.openapi import document
from tests.support.world import WITHIN_S, World, scope

JOSE = {"Content-Type": "application/jose"}
NO_KAFKA = "127.0.0.1:1"
WIDE = scope("hub", ("read", "write"), ("path/**",))


_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""To read all authorities of the machine for each call would take longer than all else."""


@dataclass
class Posted:
    """A signed request and the key that opens its replies."""

    claims: Any
    compact: str
    reply_key: ReplyKey = field(repr=False)

    @property
    def id(self) -> str:
        return message_id(self.claims.iss, self.claims.jti)

    @property
    def status(self) -> str:
        return f"/v1/requests/{self.id}"


@dataclass
class Caller:
    """Somebody who calls the API: over TCP with proofs by `key`, or through a task's socket without any."""

    base: str
    key: SigningKey | None = field(default=None, repr=False)
    socket: Path | None = None
    nonce: str | None = None
    proxy: str | None = None
    tls: ssl.SSLContext = field(default=_NO_TLS, repr=False)

    async def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, /, **dpop: Any
    ) -> httpx.Response:
        """One call, with a second proof where the nonce was missing. `dpop`: replaces arguments of the proof."""
        answer = await self._call_once(method, path, body, headers, dpop)
        if "use_dpop_nonce" in answer.headers.get("WWW-Authenticate", ""):
            answer = await self._call_once(method, path, body, headers, dpop)
        return answer

    async def _call_once(
        self, method: str, path: str, body: Any, headers: dict[str, str] | None, dpop: dict[str, Any]
    ) -> httpx.Response:
        url, given = f"{self.base}{path}", dict(headers or {})
        if self.key is not None and "DPoP" not in given:
            given["DPoP"] = self.proof(method, url, **dpop)
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket)) if self.socket is not None else None
        async with httpx.AsyncClient(
            transport=transport, proxy=self.proxy, verify=self.tls, timeout=WITHIN_S, trust_env=False
        ) as http:
            document("gateway-agents").watch(http, below="/ringfence")
            answer = await http.request(method, url, content=body, headers=given)
        self.nonce = answer.headers.get("DPoP-Nonce", self.nonce)
        return answer

    def proof(self, method: str, url: str, /, **dpop: Any) -> str:
        assert self.key is not None
        made = {"access_token": None, "now_s": int(time.time()), "nonce": self.nonce, "key": self.key}
        made |= {"method": method, "url": url.partition("?")[0]}
        return proof(**{**made, **dpop})

    async def post(self, message: Posted | str, **options: Any) -> httpx.Response:
        body = message if isinstance(message, str) else message.compact
        return await self.call("POST", "/v1/requests", body, JOSE, **options)

    async def get(self, message: Posted, query: str = "", **options: Any) -> httpx.Response:
        return await self.call("GET", f"{message.status}{query}", **options)


@dataclass
class ApiOffice:
    """A gateway that listens on TCP and opens sockets, with the API. Policy is the test's to play."""

    desk: IssuerBench
    port: int
    sockets: Path
    ca: Path
    own: dict[str, Any]

    @property
    def world(self) -> World:
        return self.desk.world

    def over_tcp(self, desk: IssuerBench, key: SigningKey | None = None) -> Caller:
        return Caller(f"http://127.0.0.1:{self.port}/ringfence", key or desk.bot.key)

    def over_socket(self, desk: IssuerBench) -> Caller:
        return Caller("http://ringfence", socket=self.sockets / f"{desk.task}.sock")

    async def published(self, desk: IssuerBench) -> list[Received]:
        """The messages of an agent that stand on Kafka."""
        found = [*await self.world.records(CREDENTIAL_REQUEST), *await self.world.records(REVOCATION_REQUEST)]
        return [record for record in found if record.key == desk.bot.name]

    async def played(self, message: Posted) -> Played:
        """The request on Kafka, for the test to answer."""
        record = await self.world.consume_until(
            CREDENTIAL_REQUEST, lambda r: r.value == message.compact.encode()
        )
        return Played(self.world, record)


@asynccontextmanager
async def api_office(kafka: Kafka, redis: RedisServer, folder: Path, **own: Any) -> AsyncIterator[ApiOffice]:
    port = free_port()
    folder.mkdir(exist_ok=True)
    settings = {"listen": str(port), "sockets": folder / "tasks", "ca_file": folder / "ca.pem", **own}
    async with (
        World.open(kafka.bootstrap, redis.url, paced=kafka.embedded) as world,
        opened_desks(world) as first,
        world.running("issuer", "revoker"),
        gateway(world, **settings),
    ):
        backend = BackendSettings.model_validate({"kind": "jwt", "url": "https://hub.test.example"})
        await world.target("hub", backend=backend, requests=RULES, verbs=VERBS)
        yield ApiOffice(first, port, folder / "tasks", folder / "ca.pem", settings)


@asynccontextmanager
async def by_gateway(world: World, folder: Path, port: int = 0) -> AsyncIterator[ClientSettings]:
    """A registry, and a gateway; the settings of an agent that reaches the gateway, and no Kafka."""
    port = port or free_port()
    own = {"listen": str(port), "spool": folder / "spool", "issuer": "http://127.0.0.1:1"}
    async with world.running("registry"), gateway(world, confirmed=False, **own):
        yield client(world, door=f"http://127.0.0.1:{port}", kafka=NO_KAFKA)


async def agent_desk(office: ApiOffice) -> IssuerBench:
    """An agent and a task of its own."""
    desk = await another(office.desk)
    desk.sue = await desk.world.user(f"u-{uuid.uuid4().hex[:8]}", entitlements=WIDE)
    desk.bot = await desk.world.agent(f"b-{uuid.uuid4().hex[:8]}", sponsor=desk.sam, ceiling=WIDE)
    desk.task = await desk.world.task(desk.bot, by=desk.sue, scope=WIDE)
    return desk


def request(desk: IssuerBench, key: SigningKey | None = None, **fields: Any) -> Posted:
    """A request of the desk's agent, signed by it or by `key`, but for `fields`."""
    reply_key = ReplyKey()
    given = {
        "task_id": desk.task,
        "scope": scope("hub", ("read",), ("path/a",)),
        "ttl_s": 600,
        "reason": "a test",
        "reply_key": reply_key.public,
    }
    claims = desk.world.claims(CredentialRequest, desk.bot, **{**given, **fields})
    return Posted(claims, sign(claims, key or desk.bot.key), reply_key)


def release(desk: IssuerBench, **fields: Any) -> Posted:
    given = {"kind": "release", "lease_id": str(uuid.uuid4()), "reason": "done"}
    claims = desk.world.claims(RevocationRequest, desk.bot, **{**given, **fields})
    return Posted(claims, sign(claims, desk.bot.key), ReplyKey())


def typ_of(record: Received) -> str:
    return parse(record.value).header.typ
