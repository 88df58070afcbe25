"""Where credentials are used: one kind of door for each kind of target."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import urlencode, urlsplit

import orjson

from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.agent.dpop import proof
from ringfence.issuer.http import INTROSPECTION_PATH
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.codes import Code
from ringfence.model.identity.api_tokens import api_token

ANSWER_WITHIN_S = 5.0
_NO_ANSWER = (OSError, ValueError, LookupError, EOFError, TimeoutError)
_OK = 200
_OVER = ("lease_ended", "lease_cut")


_Answer = tuple[int, dict[str, str], bytes]


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
        self._connections = _Connections()

    async def opens(self, credential: IssuedCredential) -> bool | None:
        self._turn += 1
        port = self._ports[self._turn % len(self._ports)]
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                status, _, body = await self._post(port, credential)
        except _NO_ANSWER:
            return None
        return bool(orjson.loads(body)["active"]) if status == 200 else None

    async def forget(self, credential: IssuedCredential) -> None:
        """Nothing is open for one credential."""

    async def _post(self, port: int, credential: IssuedCredential) -> _Answer:
        form = urlencode({"token": credential.value})
        token = api_token(self._keys[credential.target], "issuer", now_ms=int(time.time() * 1000))
        return await self._connections.ask(
            port,
            f"POST {INTROSPECTION_PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Authorization: Bearer {token}\r\n"
            f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(form)}\r\n\r\n{form}",
        )

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
                status, _, body = await self._connections.ask(self._port, asked)
        except _NO_ANSWER:
            return None
        return bool(orjson.loads(body)["forwards"]) if status == 200 else None

    def close(self) -> None:
        """Close what is idle."""
        self._connections.close()


class ForwardingDoor:
    """A target behind a gateway, which injects the credential: agents show the handle of the lease, and a proof."""

    def __init__(self, url: str) -> None:
        """`url`: where agents reach the gateway."""
        self._url = url
        self._port = urlsplit(url).port or 80
        self._nonce: str | None = None
        self._connections = _Connections()

    async def opens(self, credential: IssuedCredential) -> bool | None:
        """None as well where the gateway refuses for another reason than that the lease is over."""
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                code = await self._send(credential)
                if code == Code.USE_DPOP_NONCE:
                    code = await self._send(credential)
        except _NO_ANSWER:
            return None
        return True if code is None else False if code in _OVER else None

    async def forget(self, credential: IssuedCredential) -> None:
        """Nothing is open for one lease."""

    async def _send(self, credential: IssuedCredential) -> str | None:
        """The code of the gateway's refusal, None where the target answered. Remembers the nonce that it gave."""
        permission = credential.scope[0]
        method = "GET" if "read" in permission.verbs else "PUT"
        path = f"/{credential.target}/{permission.resources[0]}"
        assert credential.key is not None
        shown = proof(
            credential.key, method, f"{self._url}{path}",
            access_token=credential.lease_id, now_s=int(time.time()), nonce=self._nonce,
        )  # fmt: skip
        status, headers, body = await self._connections.ask(
            self._port,
            f"{method} {path} HTTP/1.1\r\nHost: {urlsplit(self._url).netloc}\r\nContent-Length: 0\r\n"
            f"Authorization: DPoP {credential.lease_id}\r\nDPoP: {shown}\r\n\r\n",
        )
        self._nonce = headers.get("dpop-nonce", self._nonce)
        return None if status == _OK else str(orjson.loads(body)["code"])

    def close(self) -> None:
        """Close what is idle."""
        self._connections.close()


class _Connections:
    """HTTP by hand: this is done a hundred times a second, on the cores of those who are watched."""

    def __init__(self) -> None:
        self._idle: dict[int, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}

    async def ask(self, port: int, request: str) -> _Answer:
        """Status, headers and body of the answer."""
        idle = self._idle.setdefault(port, [])
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request.encode())
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
            fields = (line.partition(":") for line in lines)
            headers = {name.lower(): value.strip() for name, _, value in fields}
            body = await reader.readexactly(int(headers["content-length"]))
        except BaseException:
            writer.transport.abort()
            raise
        if headers.get("connection") == "close":
            writer.transport.abort()
        else:
            idle.append((reader, writer))
        return int(first.split(" ")[1]), headers, body

    def close(self) -> None:
        for idle in self._idle.values():
            for _, writer in idle:
                writer.transport.abort()
