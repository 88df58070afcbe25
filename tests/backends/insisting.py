"""An API that has heard of no leases: whoever shows the secret of the day may do all, and is told what they said."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ringfence.dev.processes import LOOPBACK, free_port
from tests.gateway_external.target import Received, read_request

MARK = "X-Mark"
"""By this header a request is found again."""
STREAM = ("Accept", "text/event-stream")
WAIT = ("X-Wait", "yes")
"""Requests with this are answered once `InsistingApi.go_on` is set."""
_STREAMING = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class InsistingApi:
    """See the module. It writes down every request as it came."""

    wanted: set[tuple[str, str]]
    """Headers, of which a request has to show one, once."""
    port: int = field(default_factory=free_port)
    received: list[Received] = field(default_factory=list)
    streams: dict[str, asyncio.StreamWriter] = field(default_factory=dict)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def came(self, mark: str) -> list[Received]:
        """All that came of the request with this mark."""
        return [one for one in self.received if one.all(MARK) == [mark]]

    def takes(self, request: Received) -> bool:
        return any(request.all(name) == [value] for name, value in self.wanted)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[InsistingApi]:
        server = await asyncio.start_server(self._serve, LOOPBACK, self.port, limit=1 << 20)
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while (request := await read_request(reader)) is not None:
                self.received.append(request)
                await self._answer(request, writer)
                await writer.drain()
        writer.close()

    async def _answer(self, request: Received, writer: asyncio.StreamWriter) -> None:
        if request.all(WAIT[0]):
            await self.go_on.wait()
        if not self.takes(request):
            writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
        elif request.all("Accept") == [STREAM[1]]:
            writer.write(_STREAMING)
            self.streams[request.all(MARK)[0]] = writer
        else:
            told = "\n".join(f"{name}: {value}" for name, value in request.headers).encode("latin-1")
            shown = b"; ".join(value.encode() for name, _ in self.wanted for value in request.all(name))
            head = b"HTTP/1.1 200 OK\r\nX-Shown: %s\r\nContent-Length: %d\r\n\r\n" % (shown, len(told))
            writer.write(head + told)
