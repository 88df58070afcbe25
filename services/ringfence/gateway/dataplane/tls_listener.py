"""A TLS listener with limits: each handshake is counted before it begins, and has a deadline.

The event loop's own TLS server would begin any number of handshakes, and not report those that fail.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Final

from ringfence.gateway.contract import BlockedRequest, ReportBlocked
from ringfence.gateway.dataplane.limits import TOO_MANY_CONNECTIONS, SenderLimits, sender_at
from ringfence.gateway.dataplane.stream import Stream, WriteBatcher

log = logging.getLogger(__name__)

TLS_FAILED: Final = "tls_failed"
_RETRY_DELAY_S: Final = 0.1
"""The delay before the next accept when the process is out of files."""

StreamCallback = Callable[[Stream], None]


class TlsListener:
    """One listener."""

    def __init__(
        self,
        tls: ssl.SSLContext,
        limits: SenderLimits,
        blocked: ReportBlocked,
        write_batcher: WriteBatcher,
        *,
        handshake_s: float,
    ) -> None:
        self._tls = tls
        self._limits = limits
        self._blocked = blocked
        self._write_batcher = write_batcher
        self._handshake_s = handshake_s
        self._listening: list[socket.socket] = []
        self._work: set[asyncio.Task[None]] = set()

    async def open(
        self, host: str, port: int, backlog: int, on_open: StreamCallback, on_lost: StreamCallback
    ) -> int:
        """Listen. Returns the port. `on_open` is called once the TLS of a connection is open, `on_lost` when it is
        gone.

        Raises OSError.
        """
        loop = asyncio.get_running_loop()
        addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, address in dict.fromkeys((info[0], info[4]) for info in addresses):
                self._listening.append(socket.create_server(address, family=family, backlog=backlog))
        except OSError:
            await self.close()
            raise
        for listening in self._listening:
            listening.setblocking(False)
            self._start(self._accept(listening, on_open, on_lost))
        bound_port: int = self._listening[0].getsockname()[1]
        return bound_port

    async def close(self) -> None:
        """Stop listening, and abort handshakes in progress."""
        for task in list(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        for listening in self._listening:
            listening.close()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _accept(
        self, listening: socket.socket, on_open: StreamCallback, on_lost: StreamCallback
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("a connection is not accepted: %s", error.strerror)
                await asyncio.sleep(_RETRY_DELAY_S)
                continue
            address = sender_at(peer[0])
            if self._limits.begin_handshake(address):
                self._start(self._handshake(connection, address, on_open, on_lost))
            else:
                connection.close()
                self._blocked(BlockedRequest(TOO_MANY_CONNECTIONS, "too many connections of this address"))

    async def _handshake(
        self, connection: socket.socket, address: str, on_open: StreamCallback, on_lost: StreamCallback
    ) -> None:
        pending = True

        def end_handshake() -> None:
            nonlocal pending
            if pending:
                pending = False
                self._limits.end_handshake(address)

        def opened(stream: Stream) -> None:
            end_handshake()
            on_open(stream)

        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Stream(opened, on_lost, self._write_batcher),
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=self._handshake_s,
            )
        except OSError:
            self._blocked(BlockedRequest(TLS_FAILED, "the client did not agree to TLS, or not in time"))
        finally:
            end_handshake()
