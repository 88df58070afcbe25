"""The gateway in memory: decision core and data plane of the real one, between a client of httpx and a test's server.

```
httpx client --> GatewayTransport --socket pair--> AgentConnection --> DecisionGate
                                                        |
test's server <--------------------socket pair----- Forwarder
```

The bytes of each request pass the gateway's own parser, so that refusals, dropped headers and redacted secrets are
those of a real gateway. Each request has connections of its own. Left out: TLS, CONNECT, relays, and the HTTP API for
agents.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import httpx

from ringfence.client.errors import InvalidCallError
from ringfence.gateway.dataplane.connection import AgentConnection
from ringfence.gateway.dataplane.denials import denial_answer
from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.fast_path import FastPaths
from ringfence.gateway.dataplane.forwarder import Forwarder, UpstreamPool
from ringfence.gateway.dataplane.limits import Allowance, SenderLimits, sender_at
from ringfence.gateway.dataplane.request_reader import ListenerContext
from ringfence.gateway.dataplane.shared import DataPlaneContext
from ringfence.gateway.dataplane.stream import DeadlineTimer, DisconnectedError, Stream
from ringfence.gateway.dataplane.tls_listener import CertificateAuthority
from ringfence.gateway.events.recorder import Recorder, outbound_of
from ringfence.gateway.hosts import Origin, Scheme, canonical, origin_of
from ringfence.gateway.settings import LOOPBACK
from ringfence.gateway.state.view import View
from ringfence.gateway.wiring import CoreParts, wire_core
from ringfence.kernel.base.clock import RemoteClock
from ringfence.kernel.http1.body import (
    LAST_CHUNK,
    Body,
    CloseDelimitedBody,
    chunk,
    request_body,
    response_body,
)
from ringfence.kernel.http1.head import RequestRefusedError, parse_request, parse_response, take_head
from ringfence.kernel.tracing.api import NOT_TRACING
from ringfence.messages.codes import Code
from ringfence.messages.operations import ActionAnswered, ActionDecided, RelayEnded
from ringfence.messages.topics import ACTION
from ringfence.testing.bus import InMemoryPublisher
from ringfence.testing.parts import InMemoryRuntime, run_at_once

Server = httpx.AsyncBaseTransport | Callable[..., Any]
"""What answers for a target: an httpx transport, an ASGI application, or a function from request to response."""
GATEWAY_NAME: Final = "gateway.ringfence.test"
_SCHEMES: Final[Mapping[str, Scheme]] = {"http": "http", "https": "https"}
_NO_CONTENT: Final = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})


def transport_of(server: Server) -> httpx.AsyncBaseTransport:
    """The transport to a test's server. Raises InvalidCallError if it is neither of what `Server` lists."""
    if isinstance(server, httpx.AsyncBaseTransport):
        return server
    if not callable(server):
        raise InvalidCallError(
            "server is an httpx transport, an ASGI application or a function of one httpx.Request"
        )
    if len(inspect.signature(server).parameters) == 1:
        return httpx.MockTransport(server)
    return httpx.ASGITransport(app=server)


# --- parts of the decision core ---


class InMemoryView(View):
    """The view of a gateway that has each record at once: it is never too old."""

    def __init__(self, runtime: InMemoryRuntime) -> None:
        broker_clock = RemoteClock(runtime.clock.now_ms)
        broker_clock.observe(runtime.clock.now_ms())
        super().__init__(runtime, broker_clock=broker_clock)

    def stale(self) -> str | None:
        return None

    def view_expired(self) -> bool:
        return False


class InMemoryRecorder(Recorder):
    """Publishes each event at once: nothing has to outlive a process."""

    def __init__(self, publisher: InMemoryPublisher) -> None:
        # Not that of the base class: it takes a spool on disk.
        self._publisher = publisher
        self._tracing = NOT_TRACING

    def record(self, event: ActionDecided | ActionAnswered | RelayEnded) -> None:
        run_at_once(self._publisher.send_many(ACTION, ACTION.what, [outbound_of(self._entry(event))]))


class InMemoryGateway:
    """One gateway, and the servers of its targets."""

    def __init__(self, parts: CoreParts) -> None:
        # The fast path only saves time.
        core = wire_core(parts, fast_path=False)
        self._core = core
        self._servers: dict[Origin, httpx.AsyncBaseTransport] = {}
        self._limits = SenderLimits(Allowance(), time.monotonic)
        self._authority = CertificateAuthority("gateway", (), parts.runtime.clock)

    def serve(self, url: str, server: Server) -> None:
        """Have requests to this URL (`https://host[:port]`) answered by a test's server. Raises InvalidCallError."""
        try:
            self._servers[origin_of(url)] = transport_of(server)
        except RequestRefusedError:
            raise InvalidCallError(
                f"{url!r} is no URL of a target: https://host or https://host:port"
            ) from None

    def transport(self, task_id: str | None) -> GatewayTransport:
        """The way to this gateway: by the socket of a task, or by its listener."""
        return GatewayTransport(self, task_id)

    def on_clock_moved(self) -> None:
        """End what is over by the clock: requests under leases that have ended, and waits for approvals."""
        self._core.view.table.sweep()
        self._core.approvals.end_waits()

    def delivery(self, listener: ListenerContext) -> Delivery:
        """A connection of an agent, for one request."""
        timeouts, upstreams = Timeouts(), InMemoryUpstreams(self._servers)
        core = self._core
        shared = DataPlaneContext(
            core.gate,
            core.targets.is_target_host,
            denial_answer,
            self._authority,
            Forwarder(core.gate, upstreams, timeouts),
            upstreams,
            self._limits,
            timeouts,
            core.blocked.add,
        )
        return Delivery(shared, listener, upstreams, core.blocked.flush)


# --- messages of HTTP/1.1 on a stream ---


async def connected_pair() -> tuple[Stream, Stream]:
    """Both ends of a connection within this process."""
    loop = asyncio.get_running_loop()
    ends = [(await loop.create_connection(Stream, sock=end))[1] for end in socket.socketpair()]
    return ends[0], ends[1]


ReadMore = Callable[[], Awaitable[None]]


async def read_head(stream: Stream, read_more: ReadMore) -> bytes:
    """The next head. Raises what `read_more` raises, and RequestRefusedError."""
    while (head := take_head(stream.buffer)) is None:
        await read_more()
    return head


async def read_body(stream: Stream, body: Body, read_more: ReadMore) -> AsyncIterator[bytes]:
    """The pieces of a body as they arrive. Raises what `read_more` raises, and RequestRefusedError."""
    while True:
        if piece := body.take(stream.buffer):
            yield piece
        if body.done:
            return
        try:
            await read_more()
        except DisconnectedError:
            if isinstance(body, CloseDelimitedBody):
                return
            raise


async def write_message(
    stream: Stream, first_line: bytes, headers: httpx.Headers, body: AsyncIterator[bytes] | None
) -> None:
    """Write a message with its body, if it has one, framed as its headers say. Raises DisconnectedError."""
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers.raw)
    stream.write(first_line + b"\r\n" + lines + b"\r\n")
    if body is None:
        return
    chunked = "Transfer-Encoding" in headers
    async for piece in body:
        if piece:
            stream.write(chunk(piece) if chunked else piece)
            await stream.drain()
    if chunked:
        stream.write(LAST_CHUNK)


async def _pieces(stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> AsyncIterator[bytes]:
    if isinstance(stream, httpx.AsyncByteStream):
        async for piece in stream:
            yield piece
    else:
        for piece in stream:
            yield piece


class _ReceivedBody(httpx.AsyncByteStream):
    """The body of a received message."""

    def __init__(
        self, pieces: AsyncIterator[bytes], close: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._pieces = pieces
        self._close = close

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._pieces:
            yield piece

    async def aclose(self) -> None:
        if self._close is not None:
            await self._close()


def _headers(fields: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value.strip(b" \t")) for name, _, value in (line.partition(b":") for _, line in fields)]


# --- from the gateway to the test's servers ---


class InMemoryUpstreams(UpstreamPool):
    """Connections to the servers that a test gives, a new one for each request."""

    def __init__(self, servers: Mapping[Origin, httpx.AsyncBaseTransport]) -> None:
        # Not that of the base class: it prepares TLS.
        self._servers = servers
        self._running: list[asyncio.Task[None]] = []
        self._streams: list[Stream] = []
        self.errors: list[Exception] = []
        """What servers raised, besides errors of httpx's transports."""

    async def acquire(self, origin: Origin, *, fresh: bool = False) -> tuple[Stream, bool]:
        """A new connection. Raises RequestRefusedError (502) if the test gave no server for the target."""
        server = self._servers.get(origin)
        if server is None:
            raise RequestRefusedError(Code.TARGET_UNREACHABLE, "no connection to the target can be had")
        upstream, served = await connected_pair()
        self._streams.append(upstream)
        self._running.append(
            asyncio.create_task(self._answer(served, origin, server), name="server of a target")
        )
        return upstream, False

    def release(self, origin: Origin, stream: Stream) -> None:
        stream.abort()

    async def end(self) -> None:
        """End all connections, and what the servers still do."""
        for stream in self._streams:
            stream.abort()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _answer(self, stream: Stream, origin: Origin, server: httpx.AsyncBaseTransport) -> None:
        try:
            head = parse_request(await read_head(stream, stream.read_more))
            body = _ReceivedBody(read_body(stream, request_body(head), stream.read_more))
            url = f"{origin.scheme}://{origin.authority}{head.target}"
            request = httpx.Request(head.method, url, headers=_headers(head.fields), stream=body)
            response = await server.handle_async_request(request)
            try:
                await _write_response(stream, head.method, response)
            finally:
                await response.aclose()
        except (DisconnectedError, httpx.TransportError):
            pass  # as a target that closes the connection
        except Exception as error:  # noqa: BLE001 - the test sees it, in place of the gateway's 502
            self.errors.append(error)
        finally:
            stream.close()


async def _write_response(stream: Stream, method: str, response: httpx.Response) -> None:
    has_body = method != "HEAD" and response.status_code not in _NO_CONTENT
    if has_body and not {"content-length", "transfer-encoding"} & response.headers.keys():
        response.headers["Transfer-Encoding"] = "chunked"
    first_line = f"HTTP/1.1 {response.status_code} {response.reason_phrase}".encode("ascii")
    await write_message(stream, first_line, response.headers, _pieces(response.stream) if has_body else None)


# --- from the client to the gateway ---


@dataclass(slots=True, eq=False)
class Delivery:
    """One request on its way through the gateway, and its response.

    `on_end` is called once the gateway has finished the request.
    """

    shared: DataPlaneContext
    listener: ListenerContext
    upstreams: InMemoryUpstreams
    on_end: Callable[[], None]
    _client: Stream | None = field(init=False, default=None)
    _serving: asyncio.Task[None] | None = field(init=False, default=None)
    _timer: DeadlineTimer = field(init=False, default_factory=DeadlineTimer)

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send the request. Returns its response, whose body is read and closed by the caller.

        Raises httpx.ReadTimeout, httpx.RemoteProtocolError, and what the test's server raised.
        """
        client, served = await connected_pair()
        self._client = client
        self._timer.start()
        self._timer.watch(served)
        agent = AgentConnection(served, self.listener, self.shared, FastPaths(self.shared, enabled=False))
        self._serving = asyncio.create_task(agent.run(), name="connection of an agent")
        timeout_s: float | None = request.extensions.get("timeout", {}).get("read")

        async def read_more() -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    await client.read_more()
            except TimeoutError:
                raise httpx.ReadTimeout("the gateway does not answer in time", request=request) from None

        first_line = request.method.encode("ascii") + b" " + request.url.raw_path + b" HTTP/1.1"
        with contextlib.suppress(DisconnectedError):  # it may have answered before it read all of the body
            await write_message(client, first_line, request.headers, _pieces(request.stream))
        try:
            head = parse_response(await read_head(client, read_more))
            while head.status < HTTPStatus.OK:
                head = parse_response(await read_head(client, read_more))
        except DisconnectedError:
            raise self._lost(request) from None
        if self.upstreams.errors:
            raise self.upstreams.errors[0]
        body = response_body(head, request.method)
        return httpx.Response(
            head.status,
            headers=_headers(head.fields),
            stream=_ReceivedBody(self._body(request, body, read_more), self.end),
            request=request,
        )

    async def _body(self, request: httpx.Request, body: Body, read_more: ReadMore) -> AsyncIterator[bytes]:
        assert self._client is not None, "the request was sent"
        try:
            async for piece in read_body(self._client, body, read_more):
                yield piece
        except DisconnectedError:
            raise self._lost(request) from None

    def _lost(self, request: httpx.Request) -> Exception:
        if self.upstreams.errors:
            return self.upstreams.errors[0]
        return httpx.RemoteProtocolError("the gateway closed the connection", request=request)

    async def end(self) -> None:
        """Close all connections. When it returns, the gateway has recorded the request."""
        if self._client is not None:
            self._client.abort()
        await self.upstreams.end()
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)
        self._timer.stop()
        self.on_end()


class GatewayTransport(httpx.AsyncBaseTransport, httpx.BaseTransport):
    """The way to an in-memory gateway, for `httpx.AsyncClient` and `httpx.Client`."""

    def __init__(self, gateway: InMemoryGateway, task_id: str | None) -> None:
        self._gateway = gateway
        self._task_id = task_id

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See `Delivery.send`. Raises httpx.ProxyError for an https URL whose host a CONNECT could not name."""
        delivery = self._gateway.delivery(self._listener(request))
        try:
            return await delivery.send(request)
        except BaseException:
            await delivery.end()
            raise

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """As `handle_async_request`, in an event loop of its own: only `answer_all` can answer a request that waits.

        Raises InvalidCallError where an event loop runs.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._whole(request))
        raise InvalidCallError("an event loop runs in this thread: use httpx.AsyncClient")

    async def _whole(self, request: httpx.Request) -> httpx.Response:
        response = await self.handle_async_request(request)
        try:
            content = await response.aread()
        finally:
            await response.aclose()
        return httpx.Response(
            response.status_code, headers=response.headers.raw, stream=httpx.ByteStream(content)
        )

    def _listener(self, request: httpx.Request) -> ListenerContext:
        """The listener that the request comes in at. On a task's socket, https is what comes through a CONNECT."""
        scheme, task_id = request.url.scheme, self._task_id
        if scheme not in _SCHEMES:
            raise httpx.UnsupportedProtocol(
                f"a gateway takes http and https, not {scheme!r}", request=request
            )
        if task_id is None:
            own, sender = frozenset({GATEWAY_NAME}), sender_at(LOOPBACK)
            return ListenerContext(sender, _SCHEMES[scheme], own, address=LOOPBACK)
        authority = None
        if scheme == "https":
            try:
                authority = canonical(request.url.netloc.decode("ascii"), "https")
            except RequestRefusedError as error:
                raise httpx.ProxyError(error.message, request=request) from None
        return ListenerContext(
            f"task:{task_id}", _SCHEMES[scheme], task_id=task_id, connect_authority=authority
        )
