"""Forwards requests to their targets, and pools the connections to them.

A request gets the credential injected, or is unchanged in observe mode. Connections are verified, used by one request
at a time, and reused if clean.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ringfence.gateway.contract import Gate, Verdict
from ringfence.gateway.dataplane.exchange import (
    Exchange,
    ForwardedRequest,
    StaleConnectionError,
    Timeouts,
    do_nothing,
    is_observed,
    never_expired,
)
from ringfence.gateway.dataplane.stream import DeadlineTimer, Stream, WriteBatcher
from ringfence.gateway.hosts import Origin, origin_of, stdio_origin
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.http_client import socket_address
from ringfence.kernel.http1.head import RequestRefusedError
from ringfence.messages.codes import Code
from ringfence.model.target_settings import STDIO_URL

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
        for idle in self._idle.values():
            for stream, _ in idle:
                stream.abort()
        self._idle.clear()

    def acquire_idle(self, origin: Origin) -> Stream | None:
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
                Code.TARGET_TIMEOUT, "the target accepts no connection in time"
            ) from None
        except ssl.SSLError:
            raise RequestRefusedError(
                Code.TARGET_NOT_VERIFIED,
                "the target's certificate does not verify; if a CA of its own signed it, an operator sets "
                "RINGFENCE_GATEWAY_TARGETS_CA_FILE of the gateway",
            ) from None
        except OSError:
            raise RequestRefusedError(
                Code.TARGET_UNREACHABLE,
                "the gateway cannot connect to the target's url; an operator runs: ringfence target show TARGET",
            ) from None
        return stream

    async def _connect_unix(self, path: str) -> Stream:
        """Connect to a socket in the gateway's folder, to which only its own user and root can write."""
        try:
            found = os.lstat(path)
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid not in (0, os.geteuid()):
                raise RequestRefusedError(
                    Code.TARGET_NOT_VERIFIED, "what stands for the server is not the runner's"
                )
            async with asyncio.timeout(self._connect_s):
                with socket_address(Path(path)) as address:
                    _, stream = await asyncio.get_running_loop().create_unix_connection(
                        lambda: Stream(self._opened, self._lost, self._write_batcher), address
                    )
        except TimeoutError:
            raise RequestRefusedError(
                Code.TARGET_TIMEOUT, "the server in the run takes no connection"
            ) from None
        except OSError:
            raise RequestRefusedError(
                Code.TARGET_UNREACHABLE,
                "there is no MCP server in this run: start it with ringfence mcp wrap",
            ) from None
        return stream

    def _opened(self, stream: Stream) -> None:
        self.open += 1
        self._deadline_timer.watch(stream)

    def _lost(self, stream: Stream) -> None:
        self.open -= 1
        self._deadline_timer.forget(stream)


def is_forwarded(verdict: Verdict) -> bool:
    """Whether a request is forwarded: allowed, or only observed."""
    return verdict.allowed or is_observed(verdict)


@dataclass(slots=True, eq=False)
class Forwarder:
    """Runs exchanges on pooled connections."""

    gate: Gate
    upstreams: UpstreamPool
    timeouts: Timeouts

    async def forward(self, client: Stream, request: ForwardedRequest) -> bool:
        """Forward a request, and send the response to the client. Returns whether the client's connection can be
        reused.

        Raises RequestRefusedError as long as nothing of a response was sent, and DisconnectedError or PeerTimeoutError
        if the client fails.
        """
        try:
            return await self._forward(client, request)
        finally:
            if request.verdict.meter is not None:
                request.verdict.meter.finish()

    async def _forward(self, client: Stream, request: ForwardedRequest) -> bool:
        injected, origin = await self._credential_and_origin(request.verdict, request.server_socket)
        view_expired = never_expired if is_observed(request.verdict) else self.gate.view_expired
        exchange = Exchange(
            client, request, injected, origin, self.timeouts, view_expired, self.gate.check_view
        )
        exchange.unsubscribe = self._on_lease_end(request.verdict, exchange.on_lease_end)
        try:
            # A request that was approved, or has a reservation, is sent once: a pooled connection may turn out closed.
            meter = request.verdict.meter
            fresh = request.verdict.headers is not None or (meter is not None and meter.reserves)
            return await self._run(exchange, *await self.upstreams.acquire(origin, fresh=fresh))
        finally:
            exchange.finish()

    def take_over(
        self,
        client: Stream,
        request: ForwardedRequest,
        injected: Mapping[str, str],
        origin: Origin,
        upstream: Stream,
    ) -> Exchange:
        """The exchange of an allowed request that was sent to `upstream` already. Pass it to `resume`."""
        assert request.verdict.lease is not None, "it was allowed"
        gate = self.gate
        exchange = Exchange(
            client, request, injected, origin, self.timeouts, gate.view_expired, gate.check_view
        )
        exchange.upstream = upstream
        client.on_disconnect = exchange.on_client_disconnect
        exchange.unsubscribe = self.gate.on_lease_end(request.verdict.lease.lease_id, exchange.on_lease_end)
        return exchange

    async def resume(self, exchange: Exchange) -> bool:
        """Wait for the response to a request that was taken over. Returns and raises as `forward`."""
        assert exchange.upstream is not None, "it was sent"
        try:
            return await self._run(exchange, exchange.upstream, reused=True, begun=True)
        finally:
            exchange.finish()

    async def _credential_and_origin(
        self, verdict: Verdict, server_socket: Path | None
    ) -> tuple[Mapping[str, str] | None, Origin]:
        """The headers to inject, None if the request is forwarded unchanged; and the origin of the target."""
        as_it_came = is_observed(verdict)
        if verdict.target is None or (verdict.lease is None and not as_it_came):
            raise RequestRefusedError(Code.UNDECIDED, "the decision names no lease; try again")
        try:
            injected = None if as_it_came else await self.gate.headers_to_inject(verdict)
            url = self.gate.upstream(verdict.target)
            if url == STDIO_URL and server_socket is not None:
                # The bridge is of the run, and no target: it gets no credential. The server gets the message alone.
                return {}, stdio_origin(verdict.target.target_id, server_socket)
            return injected, origin_of(url)
        except UnavailableError as error:
            raise RequestRefusedError(
                error.code, error.message, status=503, headers={"Retry-After": "1"}
            ) from None

    def _on_lease_end(self, verdict: Verdict, ended: Callable[[], None]) -> Callable[[], None]:
        if verdict.lease is None or is_observed(verdict):
            return do_nothing  # it uses no lease
        return self.gate.on_lease_end(verdict.lease.lease_id, ended)

    async def _run(self, exchange: Exchange, upstream: Stream, reused: bool, *, begun: bool = False) -> bool:
        while True:
            try:
                if not begun:
                    exchange.send_request(upstream)
                response = await exchange.read_response_head(upstream)
            except StaleConnectionError:
                upstream.abort()
                if not reused or not exchange.can_repeat:
                    raise RequestRefusedError(Code.TARGET_GONE, "the target closed the connection") from None
                upstream, reused = await self.upstreams.acquire(exchange.origin, fresh=True)
                begun = False
                continue
            except BaseException:
                upstream.abort()
                raise
            try:
                keep_client, keep_upstream = await exchange.relay_response(upstream, response)
            except BaseException:
                upstream.abort()
                raise
            if keep_upstream:
                self.upstreams.release(exchange.origin, upstream)
            else:
                upstream.abort()
            return keep_client
