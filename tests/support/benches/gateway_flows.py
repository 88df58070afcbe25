"""What the flows of the gateway share: a proxy that asks `/authz/fwd`, and an agent that shows its handle."""

from __future__ import annotations

import asyncio
import ssl
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ringfence.client.agent.dpop import proof
from ringfence.dev.processes import free_port
from ringfence.gateway.settings import GatewaySettings
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import ReplyContent
from ringfence.messages.operations import ActionDecided
from ringfence.messages.registry import BackendSettings, RequestRule, VerbFloor
from ringfence.messages.topics import ACTION
from tests.support.benches.issuer_bench import Asked, IssuerBench
from tests.support.world import WITHIN_S, World, scope

HUB = "hub.test.example"
PARTNER = "partner.test.example"
RULES = (
    RequestRule(method="GET", path="/{path*}", verb="read", resource="path/{path*}"),
    RequestRule(method="PUT", path="/.ci/{path*}", verb="ci", resource="path/.ci/{path*}"),
    RequestRule(method="PUT", path="/{path*}", verb="write", resource="path/{path*}"),
)
VERBS = (VerbFloor(verb="read"), VerbFloor(verb="write"), VerbFloor(verb="ci", floor="operator"))

_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""To read all authorities of the machine for each question would take longer than all else."""


@dataclass
class Proxy:
    """Stands before targets, and asks about each request."""

    port: int

    async def ask(
        self,
        method: str,
        url: str,
        *,
        authorization: str | None = None,
        dpop: str | None = None,
        **headers: str,
    ) -> httpx.Response:
        """The gateway's answer on a request, as a proxy puts the question."""
        at = httpx.URL(url)
        told = {
            "X-Forwarded-Method": method,
            "X-Forwarded-Uri": at.raw_path.decode(),
            "X-Forwarded-Host": at.netloc.decode(),
            "X-Forwarded-Proto": at.scheme,
            **headers,
        }
        told |= {"Authorization": authorization} if authorization is not None else {}
        told |= {"DPoP": dpop} if dpop is not None else {}
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}", timeout=WITHIN_S, trust_env=False, verify=_NO_TLS
        ) as http:
            return await http.get("/authz/fwd", headers=told)

    async def as_agent(
        self, key: SigningKey, handle: str, method: str, url: str, **headers: str
    ) -> httpx.Response:
        """As an agent with a key goes through it: it makes its proof with the nonce that it is told."""
        answer, nonce = None, None
        for _ in range(2):
            dpop = proof(key, method, url, access_token=handle, now_s=int(time.time()), nonce=nonce)
            answer = await self.ask(method, url, authorization=f"DPoP {handle}", dpop=dpop, **headers)
            if answer.status_code != 401 or "use_dpop_nonce" not in answer.headers["WWW-Authenticate"]:
                return answer
            nonce = answer.headers["DPoP-Nonce"]
        assert answer is not None
        return answer


@asynccontextmanager
async def gateway(world: World, **own: Any) -> AsyncIterator[Proxy]:
    """A gateway in this process, ready and with a view that is confirmed: that takes a registry and a revoker.

    `confirmed=False` does not wait for that; all else are its settings.
    """
    confirmed = own.pop("confirmed", True)
    port = free_port()
    world.seals["gateway"].save(world.folder / "keys" / f"gateway-{port}.json")
    fields: dict[str, Any] = {
        "authz": f"127.0.0.1:{port}",
        "seal_key_file": world.folder / "keys" / f"gateway-{port}.json",
        "spool": world.folder / "spool",
        "issuer": f"http://127.0.0.1:{world.ports.get('issuer', 1)}",
    }
    settings = GatewaySettings(**{**fields, **own})
    async with world.running("gateway", own={"gateway": settings}):
        if confirmed:
            await fresh(world)
        yield Proxy(port)


async def fresh(world: World) -> None:
    """Wait until the gateway denies nothing for its view."""
    async with asyncio.timeout(WITHIN_S):
        while (await world.get("gateway", "/readyz")).json()["denies"]:
            await asyncio.sleep(0.05)


async def hub(
    desk: IssuerBench, name: str = "hub", kind: str = "jwt", host: str = HUB, **backend: Any
) -> IssuerBench:
    """A target behind the gateway, an agent with a ceiling there, and a task for it."""
    wide = scope(name, ("read", "write"), ("path/**",))
    settings = BackendSettings.model_validate({"kind": kind, "url": f"https://{host}", **backend})
    await desk.world.target(name, backend=settings, requests=RULES, verbs=VERBS)
    user = await desk.world.user(f"user-{uuid.uuid4().hex[:8]}", entitlements=wide)
    desk.bot = await desk.world.agent(f"bot-{uuid.uuid4().hex[:8]}", sponsor=desk.sam, ceiling=wide)
    desk.task = await desk.world.task(desk.bot, by=user, scope=wide)
    return desk


async def handle(desk: IssuerBench, *verbs: str, target: str = "hub", resource: str = "path/a/**") -> str:
    """The handle of a lease for the gateway."""
    asked, _ = await leased(desk, *verbs, target=target, resource=resource)
    return asked.lease_id


async def leased(
    desk: IssuerBench, *verbs: str, target: str = "hub", resource: str = "path/a/**"
) -> tuple[Asked, ReplyContent]:
    asked = await desk.ask(scope=scope(target, verbs, (resource,)), delivery="gateway")
    await desk.decide(asked)
    content = await desk.answer(asked)
    assert content.lease is not None, desk.refusal(content)
    return asked, content


async def action(world: World, **fields: Any) -> ActionDecided:
    """The first event on `action` with these values."""

    def is_it(record: Any) -> bool:
        if b'"allowed"' not in record.value:
            return False  # another event of the topic
        event = ActionDecided.model_validate_json(record.value)
        return all(getattr(event, name) == value for name, value in fields.items())

    record = await world.consume_until(ACTION, is_it)
    return ActionDecided.model_validate_json(record.value)


def secret_in(folder: Path, value: str) -> str:
    """A file with a secret, as `RINGFENCE_BACKENDS_ACCESS` names it."""
    path = folder / f"secret-{uuid.uuid4().hex[:8]}"
    path.touch(mode=0o600)
    path.write_text(value)
    return f"file:{path}"
