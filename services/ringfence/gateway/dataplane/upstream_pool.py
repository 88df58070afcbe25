"""The connection pool of upstream targets: connections are verified, used by one request at a time, and reused if
clean.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import stat
import time
from collections import deque
from pathlib import Path
from typing import Final

from ringfence.gateway.dataplane.stream import DeadlineTimer, Stream, WriteBatcher
from ringfence.gateway.errors import RequestRefusedError
from ringfence.gateway.hosts import Origin
from ringfence.kernel.base.unix_sockets import socket_address

IDLE_S: Final = 15.0
MAX_IDLE_PER_ORIGIN: Final = 128
"""Idle connections that are kept per origin."""


class UpstreamPool:
    """The pool. A secret is written to a connection only after its TLS was verified for the target's name."""

    def __init__(
        self,
        tls: ssl.SSLContext,
        deadline_timer: DeadlineTimer,
        *,
        connect_s: float,
        write_batcher: WriteBatcher | None = None,
    ) -> None:
        """Raises ValueError for a `tls` that does not verify certificates and names.

        `write_batcher`: that of all connections, see `Stream.write_at_end_of_turn`.
        """
        if tls.verify_mode is not ssl.CERT_REQUIRED or not tls.check_hostname:
            raise ValueError("a gateway verifies the certificates of targets; this context does not")
        tls.set_alpn_protocols(["http/1.1"])
        self._tls = tls
        self._deadline_timer = deadline_timer
        self._connect_s = connect_s
        self._write_batcher = write_batcher
        self._idle: dict[Origin, deque[tuple[Stream, float]]] = {}
        self.open = 0
        """The number of open connections."""

    async def acquire(self, origin: Origin, *, fresh: bool = False) -> tuple[Stream, bool]:
        """A connection, and whether it was used before. Raises RequestRefusedError: 502, or 504 on a timeout."""
        if not fresh:
            stream = self.acquire_idle(origin)
            if stream is not None:
                return stream, True
        return await self._connect(origin), False

    def release(self, origin: Origin, stream: Stream) -> None:
        """Return a connection whose last exchange ended cleanly. It is closed if unsolicited data has arrived."""
        idle = self._idle.setdefault(origin, deque())
        stream.deadline = stream.data_handler = stream.on_disconnect = None
        if not stream.alive or stream.buffer or len(idle) >= MAX_IDLE_PER_ORIGIN:
            stream.abort()
            return
        stream.resume()
        idle.append((stream, time.monotonic() + IDLE_S))

    def sweep(self) -> None:
        """Close connections that were idle for too long, or were closed by the target."""
        now = time.monotonic()
        for origin, idle in list(self._idle.items()):
            usable = deque(
                entry for entry in idle if entry[0].alive and not entry[0].buffer and entry[1] > now
            )
            for stream, until in idle:
                if until <= now or stream.buffer:
                    stream.abort()
            if usable:
                self._idle[origin] = usable
            else:
                del self._idle[origin]

    def close(self) -> None:
        """Close all idle connections."""
        for idle in self._idle.values():
            for stream, _ in idle:
                stream.abort()
        self._idle.clear()

    def acquire_idle(self, origin: Origin) -> Stream | None:
        """An idle connection, or None."""
        idle = self._idle.get(origin)
        now = time.monotonic()
        while idle:
            stream, until = idle.pop()
            if stream.alive and not stream.buffer and until > now:
                return stream
            stream.abort()
        return None

    async def _connect(self, origin: Origin) -> Stream:
        if origin.socket is not None:
            return await self._connect_unix(origin.socket)
        tls = self._tls if origin.scheme == "https" else None
        try:
            async with asyncio.timeout(self._connect_s):
                _, stream = await asyncio.get_running_loop().create_connection(
                    lambda: Stream(self._opened, self._lost, self._write_batcher),
                    origin.host,
                    origin.port,
                    ssl=tls,
                    server_hostname=origin.host if tls else None,
                )
        except TimeoutError:
            raise RequestRefusedError(
                504, "target_timeout", "the target accepts no connection in time"
            ) from None
        except ssl.SSLError:
            raise RequestRefusedError(
                502, "target_not_verified", "the target's certificate does not stand for its name"
            ) from None
        except OSError:
            raise RequestRefusedError(
                502, "target_unreachable", "no connection to the target can be had"
            ) from None
        return stream

    async def _connect_unix(self, path: str) -> Stream:
        """Connect to a socket in the gateway's folder, to which only its own user and root can write."""
        try:
            found = os.lstat(path)
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid not in (0, os.geteuid()):
                raise RequestRefusedError(
                    502, "target_not_verified", "what stands for the server is not the runner's"
                )
            async with asyncio.timeout(self._connect_s):
                with socket_address(Path(path)) as address:
                    _, stream = await asyncio.get_running_loop().create_unix_connection(
                        lambda: Stream(self._opened, self._lost, self._write_batcher), address
                    )
        except TimeoutError:
            raise RequestRefusedError(
                504, "target_timeout", "the server in the run takes no connection"
            ) from None
        except OSError:
            raise RequestRefusedError(
                502,
                "target_unreachable",
                "there is no MCP server in this run: start it with ringfence mcp wrap",
            ) from None
        return stream

    def _opened(self, stream: Stream) -> None:
        self.open += 1
        self._deadline_timer.watch(stream)

    def _lost(self, stream: Stream) -> None:
        self.open -= 1
        self._deadline_timer.forget(stream)
