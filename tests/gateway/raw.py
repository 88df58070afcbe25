"""An agent that sends exactly the bytes that it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

import h11


@dataclass
class Response:
    """A response, as h11 understands it."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def value(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key == name]
        assert len(found) < 2, f"{name} comes {len(found)} times"
        return found[0] if found else None


@dataclass
class Raw:
    """One connection to the gateway."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    left: bytes = b""
    """What came after the last response."""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def response(self, method: str = "GET") -> Response:
        """The next response, 1xx left out. Raises h11.RemoteProtocolError where it breaks off."""
        machine = h11.Connection(h11.CLIENT)
        machine.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        machine.send(h11.EndOfMessage())
        machine.receive_data(self.left) if self.left else None
        head: h11.Response | None = None
        body = b""
        while True:
            event = machine.next_event()
            if event is h11.NEED_DATA:
                machine.receive_data(await self.reader.read(65536))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                assert isinstance(event, h11.InformationalResponse), event
        self.left = machine.trailing_data[0]
        assert head is not None
        headers = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
        return Response(head.status_code, headers, body)

    async def ask(self, data: bytes, method: str = "GET") -> Response:
        await self.send(data)
        return await self.response(method)

    async def ended(self) -> bool:
        """Whether the gateway closes the connection, with nothing more to say."""
        try:
            return await self.reader.read(65536) == b"" and not self.left
        except ConnectionError:
            return True


@contextlib.asynccontextmanager
async def connected(
    port: int, tls: ssl.SSLContext | None = None, host: str = "localhost"
) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=tls, server_hostname=host if tls else None
    )
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def connected_unix(path: str) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()
