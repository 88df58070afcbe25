"""A target over HTTP behind the real gateway: it answers whoever gets through, and knows nothing of Ringfence."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ringfence.dev.processes import LOOPBACK

HUB = "hub"
"""The target's id."""
_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextlib.asynccontextmanager
async def upstream() -> AsyncIterator[str]:
    """The server; its URL."""
    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")  # all that are sent have no body
                writer.write(_OK)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            connections.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serve, LOOPBACK, 0)
    try:
        yield f"http://{LOOPBACK}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for connection in list(connections):
            connection.cancel()
