"""Receivers of shared signals before a real transmitter: an endpoint that takes pushes, and a client with a stream."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt

from ringfence.dev.processes import free_port
from ringfence.kernel.service.bearer_tokens import new_token
from ringfence.signals.events import SESSION_REVOKED, VERIFICATION
from ringfence.signals.settings import SignalsSettings
from tests.support.http_client import plain_client
from tests.support.openapi import document
from tests.support.world import World

PUSH, POLL = "urn:ietf:rfc:8935", "urn:ietf:rfc:8936"


class Endpoint:
    """Takes pushes, and answers as the test wants; `got` are the bodies that it took."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.port = free_port()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/events"
        self.answer: tuple[int, dict[str, str], bytes] = (202, {}, b"")
        self.got: list[str] = []
        self.asked: list[dict[str, str]] = []
        """The header fields of every request, whatever was answered."""
        self._tls = tls
        self._server: asyncio.Server | None = None

    async def up(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls)

    async def down(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Endpoint]:
        await self.up()
        try:
            yield self
        finally:
            await self.down()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = [line.partition(": ") for line in head.split("\r\n")[1:] if line]
            fields = {name.lower(): value for name, _, value in lines}
            body = await reader.readexactly(int(fields.get("content-length", "0")))
            self.asked.append(fields)
            status, more, answer = self.answer
            if status == 202:
                self.got.append(body.decode())
            sent = {"Content-Length": str(len(answer)), "Connection": "close", **more}
            answered = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in sent.items())]
            writer.write("\r\n".join([*answered, "", ""]).encode() + answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


class Client:
    """One receiver, as it manages its stream and reads what comes."""

    def __init__(self, url: str, name: str, token: str) -> None:
        self.url = url
        self.name = name
        self.audience = f"https://{name}.example"
        self.http = plain_client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False
        )
        document("signals").watch(self.http)
        self.stream_id = ""

    async def call(self, method: str, path: str, body: Any = None, status: int = 200, **query: str) -> Any:
        """The answer to a request, which must have this status."""
        response = await self.http.request(method, path, json=body, params=query)
        assert response.status_code == status, response.text
        return response.json() if response.content else None

    async def create(self, push: str | None = None, **more: Any) -> Any:
        """A stream of its own."""
        delivery = {"method": PUSH, "endpoint_url": push} if push else {"method": POLL}
        made = await self.call("POST", "/ssf/streams", {"delivery": delivery, **more}, 201)
        self.stream_id = made["stream_id"]
        return made

    async def status(self, status: str) -> None:
        body = {"stream_id": self.stream_id, "status": status}
        assert (await self.call("POST", "/ssf/status", body))["status"] == status

    async def poll(self, status: int = 200, **body: Any) -> Any:
        return await self.call("POST", f"/ssf/poll/{self.stream_id}", body, status)

    async def polled(self, count: int, **body: Any) -> dict[str, Any]:
        """As many events as that, polled for until they are there, and not acknowledged; by their ids."""
        async with asyncio.timeout(60):
            while True:
                response = await self.http.post(f"/ssf/poll/{self.stream_id}", json=body)
                sets = response.json().get("sets", {}) if response.status_code == 200 else {}
                if len(sets) >= count:
                    return {jti: await self.read(compact) for jti, compact in sets.items()}

    async def read(self, compact: str) -> dict[str, Any]:
        """The claims of a SET, verified as a stranger does: from the metadata to the key, by PyJWT."""
        about = (await self.http.get("/.well-known/ssf-configuration")).json()
        keys = jwt.PyJWKSet.from_dict((await self.http.get(about["jwks_uri"])).json())
        header = jwt.get_unverified_header(compact)
        assert header["typ"] == "secevent+jwt"
        claims: dict[str, Any] = jwt.decode(
            compact,
            keys[header["kid"]].key,
            algorithms=[header["alg"]],
            audience=self.audience,
            issuer=about["issuer"],
            options={"require": ["iss", "iat", "jti", "aud"]},
        )
        assert "exp" not in claims
        assert "sub" not in claims
        return claims

    async def pushed(self, endpoint: Endpoint, count: int) -> list[dict[str, Any]]:
        """What an endpoint took, once it is as much as that."""
        await until(lambda: len(endpoint.got) >= count)
        return [await self.read(compact) for compact in endpoint.got]


def lease_of(claims: dict[str, Any]) -> str:
    """Whose end an event tells."""
    assert SESSION_REVOKED in claims["events"], claims
    id: str = claims["sub_id"]["session"]["id"]
    return id


def is_verification(claims: dict[str, Any]) -> bool:
    return VERIFICATION in claims["events"]


async def until(found: Any) -> None:
    """Return once `found()` is true."""
    async with asyncio.timeout(60):
        while not found():
            await asyncio.sleep(0.02)


class Office:
    """Where the operator declares receivers, and runs the transmitter for them."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.port = free_port()
        self._declared: list[str] = []
        self._tokens: dict[str, str] = {}
        self._lines: list[str] = []

    def declare(self, name: str, *, targets: str = '["*"]', **more: str) -> None:
        """A receiver, with a token of its own; `more` are members as they stand in TOML."""
        token, line = new_token(name)
        self._tokens[name] = token
        self._lines.append(line)
        members = {"name": f'"{name}"', "audience": f'"https://{name}.example"', "targets": targets, **more}
        self._declared.append("\n".join(["[[receiver]]", *(f"{k} = {v}" for k, v in members.items())]))

    def take_back(self, member: str) -> list[str]:
        """Take a member out of every receiver; what was declared before is returned, for `restore`."""
        before, self._declared = (
            self._declared,
            [
                "\n".join(line for line in one.splitlines() if not line.startswith(f"{member} = "))
                for one in self._declared
            ],
        )
        return before

    def restore(self, declared: list[str]) -> None:
        """Declare what was declared before."""
        self._declared = declared

    def settings(self, url: str, **own: Any) -> SignalsSettings:
        """The service's own, with all that was declared so far."""
        receivers, tokens = self.folder / "receivers.toml", self.folder / "tokens"
        receivers.write_text("\n\n".join(self._declared))
        tokens.write_text("\n".join(self._lines))
        tokens.chmod(0o600)
        quick: dict[str, Any] = {"first_delay_s": 0.05, "longest_delay_s": 0.2, "poll_s": 0.5}
        return SignalsSettings(receivers=receivers, tokens=tokens, url=url, **{**quick, **own})

    @asynccontextmanager
    async def running(self, clock: Any = None, **own: Any) -> AsyncIterator[None]:
        """The transmitter, always at the same place: as a service that is started again."""
        settings, http = self.settings(self.url, **own), f"127.0.0.1:{self.port}"
        async with self.world.running("signals", own={"signals": settings}, clock=clock, http=http):
            yield

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def token(self, name: str) -> str:
        """The bearer token of a receiver."""
        return self._tokens[name]

    def client(self, name: str) -> Client:
        return Client(self.url, name, self._tokens[name])
