"""Relays for targets that are no HTTP: each connection becomes a CONNECT to the target's host and port at the gateway.

What passes after the gateway's 200 is between the program and the target. A refused CONNECT closes the connection; the
reason stands in the audit trail, because PostgreSQL, SSH and Redis have no place for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final

from ringfence.client.task_proxy.server import Traffic
from ringfence.kernel.http1.head import END_OF_HEAD, MAX_HEAD_BYTES, RequestRefusedError, parse_response

_READ_BYTES: Final = 65_536
_CONNECT_S: Final = 60.0
MAX_CONNECTIONS: Final = 128
"""Of one relay; a further one is closed."""


class TargetRelay:
    """Leads connections at a listening socket to one host and port, by CONNECT at the gateway's socket."""

    def __init__(self, gateway: Path, host: str, port: int, traffic: Traffic) -> None:
        self._gateway = gateway
        self._authority = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode()
        self._traffic = traffic
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Serve at a socket that listens already; it becomes this relay's."""
        self._server = await asyncio.start_server(self._accept, sock=listener)

    async def close(self) -> None:
        """Stop listening, and abort all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        writer.transport.set_write_buffer_limits(0)
        task = asyncio.create_task(self._relay(reader, writer))
        self._connections.add(task)
        task.add_done_callback(partial(self._end, writer))

    def _end(self, writer: asyncio.StreamWriter, task: asyncio.Task[None]) -> None:
        writer.close()
        self._connections.discard(task)
        if not task.cancelled():
            task.result()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            target_reader, target = await asyncio.open_unix_connection(
                str(self._gateway), limit=MAX_HEAD_BYTES + len(END_OF_HEAD)
            )
            target.transport.set_write_buffer_limits(0)
            try:
                if await self._connect(target_reader, target):
                    self._traffic.connections += 1
                    await _both(
                        _pass_on(reader, target, self._traffic.sent),
                        _pass_on(target_reader, writer, self._traffic.received),
                    )
            finally:
                target.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Return whether the gateway accepted the CONNECT (RFC 9110, 9.3.6). Raises OSError."""
        request = b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (self._authority, self._authority)
        writer.write(request)
        self._traffic.sent(len(request))
        try:
            async with asyncio.timeout(_CONNECT_S):
                await writer.drain()
                head = await reader.readuntil(END_OF_HEAD)
            self._traffic.received(len(head))
            return parse_response(head[: -len(END_OF_HEAD)] + b"\r\n").status == HTTPStatus.OK
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, RequestRefusedError):
            return False


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[int], None]
) -> None:
    """Pass bytes on until the sender ends, and then its end. Raises OSError."""
    while data := await reader.read(_READ_BYTES):
        writer.write(data)
        count(len(data))
        await writer.drain()
    writer.write_eof()


async def _both(*directions: asyncio.Future[None] | object) -> None:
    """Run both directions to their ends; an error of one ends the other."""
    async with asyncio.TaskGroup() as group:
        for direction in directions:
            group.create_task(direction)  # type: ignore[arg-type]
