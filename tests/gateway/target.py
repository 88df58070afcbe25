"""A target that keeps every byte that it receives, and answers as a test tells it. Its requests are read by h11."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import h11

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter


@dataclass
class Received:
    """One request, as h11 understands what came."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


Respond = Callable[[Received], bytes]
Script = Callable[[Reader, Writer], Awaitable[None]]


@dataclass
class Target:
    """The server. `requests` is complete once a response was sent."""

    respond: Respond = lambda _: OK
    script: Script | None = None
    """Instead of reading requests: all that happens in a connection."""
    hangs_up: bool = False
    """Whether it closes a connection after its answer."""
    answers: asyncio.Event | None = None
    """If given, no answer is sent before it is set."""
    requests: list[Received] = field(default_factory=list)
    raw: list[bytearray] = field(default_factory=list)
    """All bytes of each connection."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set each time that a connection ends."""
    port: int = 0
    open: int = 0

    @contextlib.asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[Target]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        self.open += 1
        seen = bytearray()
        self.raw.append(seen)
        try:
            if self.script is not None:
                await self.script(reader, writer)
            else:
                await self._requests(reader, writer, seen)
        except (ConnectionError, asyncio.IncompleteReadError, h11.RemoteProtocolError, ssl.SSLError):
            pass
        finally:
            self.open -= 1
            writer.close()
            self.gone.set()

    async def _requests(self, reader: Reader, writer: Writer, seen: bytearray) -> None:
        while True:
            machine = h11.Connection(h11.SERVER)
            received = await self._one(machine, reader, seen)
            if received is None:
                return
            self.requests.append(received)
            if self.answers is not None:
                await self.answers.wait()
            writer.write(self.respond(received))
            await writer.drain()
            if self.hangs_up:
                return
            left = machine.trailing_data[0]
            assert not left, f"more came than one request: {left!r}"

    async def _one(self, machine: h11.Connection, reader: Reader, seen: bytearray) -> Received | None:
        received: Received | None = None
        while True:
            event = machine.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(65536)
                seen += data
                machine.receive_data(data)
            elif isinstance(event, h11.Request):
                received = Received(
                    event.method.decode(),
                    event.target.decode("latin-1"),
                    [(name.decode(), value.decode("latin-1")) for name, value in event.headers],
                )
            elif isinstance(event, h11.Data):
                assert received is not None
                received.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return received
            else:
                return None
