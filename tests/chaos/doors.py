"""Where credentials are used: one kind of door for each kind of target."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import urlencode, urlsplit

import orjson

from ringfence.client.credentials import IssuedCredential
from ringfence.issuer.http import INTROSPECTION_PATH
from ringfence.kernel.jws import sign
from ringfence.kernel.keys import SigningKey
from ringfence.messages.api import ApiToken

ANSWER_WITHIN_S = 5.0
_TOKEN_S = 60
_RENEWED_AFTER_S = 20


class Door(Protocol):
    """One kind of target."""

    async def opens(self, credential: IssuedCredential) -> bool | None:
        """Use a credential once. None where nobody said yes or no: the target, or whoever it asks, is away."""
        ...

    async def forget(self, credential: IssuedCredential) -> None:
        """It is not used any more: close what is open for it."""
        ...


class IntrospectionDoor:
    """A resource server that asks introspection each time, of the issuers in turn."""

    def __init__(self, keys: dict[str, SigningKey], issuers: Sequence[str]) -> None:
        """`keys`: of each target, by its id; `issuers`: their URLs."""
        self._keys = keys
        self._ports = [urlsplit(url).port or 80 for url in issuers]
        self._turn = 0
        self._tokens: dict[str, tuple[float, str]] = {}
        self._connections = _Connections()

    async def opens(self, credential: IssuedCredential) -> bool | None:
        self._turn += 1
        port = self._ports[self._turn % len(self._ports)]
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                status, body = await self._post(port, credential)
        except (OSError, ValueError, IndexError, EOFError, TimeoutError):
            return None
        return bool(orjson.loads(body)["active"]) if status == 200 else None

    async def forget(self, credential: IssuedCredential) -> None:
        """Nothing is open for one credential."""

    async def _post(self, port: int, credential: IssuedCredential) -> tuple[int, bytes]:
        form = urlencode({"token": credential.value})
        return await self._connections.ask(
            port,
            f"POST {INTROSPECTION_PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Authorization: Bearer {self._token(credential.target)}\r\n"
            f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(form)}\r\n\r\n{form}",
        )

    def _token(self, target: str) -> str:
        now = time.time()
        until, token = self._tokens.get(target, (0.0, ""))
        if until < now:
            key = self._keys[target]
            claims = ApiToken(
                iss=key.id, aud=key.id.removeprefix("spiffe://").partition("/")[0], iat=int(now),
                exp=int(now) + _TOKEN_S, jti=str(uuid.uuid4()),
            )  # fmt: skip
            token = sign(claims, key)
            self._tokens[target] = (now + _RENEWED_AFTER_S, token)
        return token

    def close(self) -> None:
        """Close what is idle."""
        self._connections.close()


class GatewayDoor:
    """A gateway, which is asked whether it would forward."""

    def __init__(self, url: str) -> None:
        self._port = urlsplit(url).port or 80
        self._connections = _Connections()

    async def forwards(self, lease_id: str) -> bool | None:
        """Whether a request under a lease would go on to its target now. None where the gateway does not say."""
        asked = f"GET /v1/forwards/{lease_id} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                status, body = await self._connections.ask(self._port, asked)
        except (OSError, ValueError, IndexError, EOFError, TimeoutError):
            return None
        return bool(orjson.loads(body)["forwards"]) if status == 200 else None

    def close(self) -> None:
        """Close what is idle."""
        self._connections.close()


class _Connections:
    """HTTP by hand: this is done a hundred times a second, on the cores of those who are watched."""

    def __init__(self) -> None:
        self._idle: dict[int, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}

    async def ask(self, port: int, request: str) -> tuple[int, bytes]:
        """Status and body of the answer."""
        idle = self._idle.setdefault(port, [])
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request.encode())
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").lower().split("\r\n")
            length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
            body = await reader.readexactly(length)
        except BaseException:
            writer.transport.abort()
            raise
        idle.append((reader, writer))
        return int(lines[0].split(" ")[1]), body

    def close(self) -> None:
        for idle in self._idle.values():
            for _, writer in idle:
                writer.transport.abort()
