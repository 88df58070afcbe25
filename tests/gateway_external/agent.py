"""An agent that goes through a proxy: it says who it is, and writes its requests byte by byte where it wants to."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from ringfence.client.agent.dpop import proof
from ringfence.dev.processes import LOOPBACK
from ringfence.kernel.crypto.keys import SigningKey
from tests.support.world import WITHIN_S

HOST = "hub.gateway.example"
Headers = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    """What came back. Status 0: the connection was closed without a word."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def get(self, name: str) -> str:
        """The value of a header; empty where it is not there."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")

    def json(self) -> Any:
        return orjson.loads(self.body)


@dataclass
class Agent:
    """Somebody with a key and a handle, before one proxy."""

    key: SigningKey
    handle: str
    port: int
    trust: ssl.SSLContext
    nonce: str | None = None

    async def send(
        self,
        method: str,
        target: str,
        headers: Headers = (),
        body: bytes | None = None,
        *,
        proof_for: str | None = None,
        host: str = HOST,
    ) -> Answer:
        """One request with handle and proof; made anew where the gateway wants its nonce in the proof.

        `target`: as it stands in the request line. `proof_for`: the path that the proof is for, where that is not it.
        """
        answer = Answer(0)
        for _ in range(2):
            shown = self.shown(method, proof_for if proof_for is not None else target)
            answer = await self.send_raw(request(method, target, [*shown, *headers], body, host=host))
            nonce = answer.get("DPoP-Nonce")
            if answer.status != 401 or not nonce or "use_dpop_nonce" not in answer.get("WWW-Authenticate"):
                return answer
            self.nonce = nonce
        return answer

    def shown(self, method: str, path: str) -> list[tuple[str, str]]:
        """The headers that say who it is."""
        url = f"https://{HOST}{path}"
        made = proof(
            self.key, method, url, access_token=self.handle, now_s=int(time.time()), nonce=self.nonce
        )
        return [("Authorization", f"DPoP {self.handle}"), ("DPoP", made)]

    async def send_raw(self, raw: bytes) -> Answer:
        """What comes back for these bytes until the connection is closed; the request should ask for that."""
        async with self.connection() as (reader, writer):
            return await exchange(reader, writer, raw)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """TLS to the proxy, whose certificate must be that of its name."""
        reader, writer = await asyncio.open_connection(
            LOOPBACK, self.port, ssl=self.trust, server_hostname=HOST
        )
        try:
            yield reader, writer
        finally:
            writer.close()


def request(method: str, target: str, headers: Headers, body: bytes | None, *, host: str = HOST) -> bytes:
    """The bytes of a request after which the connection is closed."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if not any(name.lower() == "connection" for name, _ in headers):
        lines.append("Connection: close")
    if body is not None and not any(name.lower() == "transfer-encoding" for name, _ in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, raw: bytes) -> Answer:
    """What comes back for these bytes, which are one request and ask for the end of the connection."""
    async with asyncio.timeout(WITHIN_S):
        with contextlib.suppress(OSError):  # the answer may be there already
            writer.write(raw)
            await writer.drain()
        return parsed(await _all(reader))


async def _all(reader: asyncio.StreamReader) -> bytes:
    came = b""
    with contextlib.suppress(OSError):  # closed at once: what came before that is the answer
        while not _complete(came) and (piece := await reader.read(65_536)):
            came += piece
    return came


def _complete(came: bytes) -> bool:
    head, end, rest = came.partition(b"\r\n\r\n")
    lower = head.lower()
    if not end or b"\r\ncontent-length:" not in lower:
        return bool(end) and rest.endswith(b"0\r\n\r\n")
    return len(rest) >= int(lower.split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])


def parsed(came: bytes) -> Answer:
    """The answer that these bytes are."""
    head, end, rest = came.partition(b"\r\n\r\n")
    if not end:
        return Answer(0)
    line, *lines = head.decode("latin-1").split("\r\n")
    headers = tuple((name, value.strip()) for name, _, value in (one.partition(":") for one in lines))
    answer = Answer(int(line.split(" ")[1]), headers, rest)
    if answer.get("Transfer-Encoding").lower() != "chunked":
        return answer
    body, left = b"", rest
    while left:
        size, _, left = left.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length:
            break
        body, left = body + left[:length], left[length + 2 :]
    return Answer(answer.status, headers, body)
