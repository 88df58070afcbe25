"""A TCP proxy between a service and a server, of which the connections can be cut, held up and slowed down."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal

from ringfence.dev.processes import LOOPBACK

Mode = Literal["open", "cut", "held"]
_CHUNK = 64 * 1024


class Link:
    """One way from a service to a server. Listens on a port of its own for as long as it lives."""

    def __init__(self, name: str, port: int, upstream: int = 0) -> None:
        """`port` is where it listens, `upstream` the port of the server."""
        self.name = name
        self.port = port
        self.upstream = upstream
        self._mode: Mode = "open"
        self._delay_s = 0.0
        self._there, self._back = asyncio.Event(), asyncio.Event()
        self._there.set()
        self._back.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Link:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.sever()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def cut(self) -> None:
        """End every connection at once, and each new one, until `heal`."""
        self._mode = "cut"
        self.sever()

    def hold(self) -> None:
        """Let nothing through in either direction until `heal`; then it arrives, late."""
        self._mode = "held"
        self._there.clear()
        self._back.clear()

    def hold_answers(self) -> None:
        """Let through what goes there, and nothing that comes back, until `heal`."""
        self._back.clear()

    def slow(self, delay_s: float) -> None:
        """Let everything through so much later, until `heal`."""
        self._delay_s = delay_s

    def heal(self) -> None:
        """As if nothing had been."""
        self._mode, self._delay_s = "open", 0.0
        self._there.set()
        self._back.set()

    def sever(self) -> None:
        """End every connection at once; new ones are welcome."""
        for connection in self._connections:
            connection.cancel()

    def switch(self, upstream: int) -> None:
        """Lead to another server from now on."""
        self.upstream = upstream
        self.sever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if self._mode != "cut":
                await self._connect(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # cut, or whoever listens there is down: both look the same from here
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(LOOPBACK, self.upstream)
        pumps = [
            asyncio.create_task(self._pump(reader, back, self._there)),
            asyncio.create_task(self._pump(there, writer, self._back)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            back.transport.abort()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passable: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                await passable.wait()
                writer.write(data)
                await writer.drain()
