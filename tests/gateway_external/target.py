"""A target behind a proxy: it records each request exactly as it received it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ringfence.dev.processes import LOOPBACK, free_port

EVENTS = "/a/events"
"""Here the response comes in two pieces: the second once `Target.go_on` is set."""
FORBIDDEN = "/a/forbidden"
"""Here the target refuses by itself."""
FIRST, SECOND = b"data: one\n\n", b"data: two\n\n"


@dataclass(frozen=True)
class Received:
    """One request."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def all(self, name: str) -> list[str]:
        """The values of a header, in the spelling of CGI: `X_Api_Key` is `X-Api-Key` there."""
        return [value for key, value in self.headers if key.replace("_", "-").lower() == name.lower()]


@dataclass
class Target:
    """Where it listens, and what came."""

    port: int
    received: list[Received] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request after request."""
        try:
            while (request := await read_request(reader)) is not None:
                self.received.append(request)
                if request.target == EVENTS:
                    await self._events(writer)
                elif request.target == FORBIDDEN:
                    writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
                    await writer.drain()
                else:
                    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\nAlt-Svc: h3=":443"\r\n\r\nok')
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def _events(self, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"%x\r\n%s\r\n" % (len(FIRST), FIRST))
        await writer.drain()
        await self.go_on.wait()
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(SECOND), SECOND))
        await writer.drain()


@asynccontextmanager
async def running_target(certificate: Path) -> AsyncIterator[Target]:
    """A target with a certificate and its key, from one file."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    target = Target(free_port())
    server = await asyncio.start_server(target.serve, LOOPBACK, target.port, ssl=context, limit=8 << 20)
    try:
        yield target
    finally:
        server.close()


async def read_request(reader: asyncio.StreamReader) -> Received | None:
    """One request; None where the connection ended before it."""
    """One request; None where the connection ended instead."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    line, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    method, target, _ = line.split(" ")
    headers = tuple((name, value.strip()) for name, _, value in (one.partition(":") for one in lines))
    said = {name.lower(): value for name, value in headers}
    if said.get("transfer-encoding", "").lower() == "chunked":
        body = await _chunks(reader)
    else:
        body = await reader.readexactly(int(said.get("content-length", "0")))
    return Received(method, target, headers, body)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
    return body
