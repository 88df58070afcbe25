"""A loopback proxy that forwards to the unix socket of one task.

The socket authenticates by its file mode; any local user can connect to a port, so here a random password does (not
in a sandbox, whose loopback is private). No byte reaches the socket before a request's credentials were checked (RFC
9110, 11.7); they are not forwarded. A connection carries one request or CONNECT, so none can follow an authenticated
one. Bytes are relayed both ways only after the gateway accepted a CONNECT. The gateway's own strict parser reads
heads and bodies, and bodies are framed anew, so proxy and gateway see the same end of a request. Heads have a time
limit, and the oldest unauthenticated connection makes room: local users cannot keep out the agent. Nothing is logged.

Relays for targets that are no HTTP: each connection becomes a CONNECT to the target's host and port at the gateway.

What passes after the gateway's 200 is between the program and the target. A refused CONNECT closes the connection; the
reason stands in the audit trail, because PostgreSQL, SSH and Redis have no place for it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import secrets
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.http1.body import LAST_CHUNK, chunk, request_body
from ringfence.kernel.http1.head import (
    END_OF_HEAD,
    LINGER_BYTES,
    LINGER_S,
    MAX_HEAD_BYTES,
    RequestHead,
    RequestRefusedError,
    answer_head,
    parse_request,
    parse_response,
    problem_answer,
    take_head,
)
from ringfence.messages.codes import Code

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


@dataclass(slots=True)
class Traffic:
    """Numbers of connections that reached the gateway's socket, and of all bytes on them, heads of HTTP included."""

    connections: int = 0
    sent_bytes: int = 0
    """To the gateway."""
    received_bytes: int = 0

    def sent(self, number: int) -> None:
        self.sent_bytes += number

    def received(self, number: int) -> None:
        self.received_bytes += number


USER: Final = "ringfence"
"""The user in the proxy URL. It says nothing: the password is what counts."""
LOOPBACK: Final = "127.0.0.1"

_PASSWORD_BYTES: Final = 32
_SOCKET_CHECK_S: Final = 0.25
_NOT_FORWARDED: Final = frozenset({
    b"proxy-authorization", b"proxy-connection", b"connection", b"keep-alive", b"upgrade",
})  # fmt: skip
"""Header fields that concern this connection alone. Programs open WebSockets through a CONNECT (RFC 6455, 4.1)."""
_NOT_NAMED: Final = _NOT_FORWARDED | {b"", b"close"}
"""Options of `Connection` that the forwarded one does not repeat."""


class SocketGoneError(RingfenceError):
    """Raised if nothing listens at the task's socket."""

    code = Code.TASK_SOCKET_MISSING


@dataclass(frozen=True, slots=True)
class ProxyLimits:
    """Limits of a `TaskProxy`."""

    head_s: float = 10.0
    """Seconds for the whole head of a request, from the start of its connection."""
    connect_s: float = 60.0
    """Seconds for the gateway's answer to a CONNECT."""
    unauthenticated: int = 256
    """Connections whose request has not been authenticated. The oldest makes room for the next. More than the kernel
    queues, so that connections which arrive together do not displace each other before they are read.
    """
    authenticated: int = 128
    """Connections that were authenticated. A further one gets a 503."""


@dataclass(slots=True, eq=False)
class _Client:
    """One connection to the proxy."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    buffer: bytearray = field(default_factory=bytearray)
    """Bytes that arrived and were not used."""
    answered: bool = False
    """Whether a byte of an answer was sent."""


class TaskProxy:
    """Serves one task's socket at a port of 127.0.0.1. An async context manager."""

    def __init__(
        self, socket: Path, *, limits: ProxyLimits | None = None, with_password: bool = True
    ) -> None:
        """`socket` is the gateway's unix socket of the task.

        Without a password, everybody who can connect to the port acts for the task.
        """
        self._socket = socket
        self._with_password = with_password
        self.traffic = Traffic()
        self._limits = limits or ProxyLimits()
        self._password = secrets.token_urlsafe(_PASSWORD_BYTES)
        self._expected = base64.b64encode(f"{USER}:{self._password}".encode())
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._unauthenticated: dict[asyncio.Task[None], None] = {}
        """Of these the ones that have not authenticated, the oldest first."""
        self.port = 0

    @property
    def url(self) -> str:
        """The proxy URL, password included, in the form of `HTTPS_PROXY`."""
        if not self._with_password:
            return f"http://{LOOPBACK}:{self.port}"
        return f"http://{USER}:{self._password}@{LOOPBACK}:{self.port}"

    async def start(self, port: int = 0) -> None:
        """Listen at a port of 127.0.0.1; 0 is any free one.

        Raises SocketGoneError if nothing listens at the socket, and OSError if the port cannot be had.
        """
        _, ahead = await self._dial()
        ahead.transport.abort()
        self._set_server(await asyncio.start_server(self._accept, LOOPBACK, port))

    async def serve(self, listener: socket.socket) -> None:
        """Serve at a socket that listens already, and becomes this proxy's. Nothing has to listen at the task's yet."""
        self._set_server(await asyncio.start_server(self._accept, sock=listener))

    def _set_server(self, server: asyncio.Server) -> None:
        self._server = server
        self.port = server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening, and abort all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def __aenter__(self) -> TaskProxy:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def socket_removed(self) -> None:
        """Return when the socket is gone: the gateway removes it at the end of the task, and when it stops."""
        while self._socket.is_socket():  # noqa: ASYNC110 - nothing tells when a file is removed
            await asyncio.sleep(_SOCKET_CHECK_S)

    # --- connections ---

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._unauthenticated) >= self._limits.unauthenticated:
            oldest = next(iter(self._unauthenticated))
            del self._unauthenticated[oldest]
            oldest.cancel()
        # `drain` waits until the kernel has everything: nothing is lost when a transport is aborted afterwards.
        writer.transport.set_write_buffer_limits(0)
        task = asyncio.create_task(self._serve(_Client(reader, writer)))
        self._connections.add(task)
        self._unauthenticated[task] = None
        task.add_done_callback(partial(self._end, writer))

    def _end(self, writer: asyncio.StreamWriter, task: asyncio.Task[None]) -> None:
        # Here, because a task that is cancelled before its first step runs no `finally`.
        writer.transport.abort()
        self._connections.discard(task)
        self._unauthenticated.pop(task, None)
        if not task.cancelled():
            task.result()

    async def _serve(self, client: _Client) -> None:
        with contextlib.suppress(OSError):  # one of the two sides is gone
            try:
                await self._serve_request(client)
            except RequestRefusedError as error:
                if not client.answered:
                    await _refuse(client, error)

    async def _serve_request(self, client: _Client) -> None:
        """Authenticate the request and forward it. Raises RequestRefusedError, OSError."""
        try:
            async with asyncio.timeout(self._limits.head_s):
                head = await _read_head(client.reader, client.buffer)
        except TimeoutError:
            raise RequestRefusedError(Code.HEAD_TIMEOUT, "the head of the request does not come") from None
        if head is None:
            return
        request = parse_request(head)
        self._authenticate(request)
        task = asyncio.current_task()
        if len(self._connections) - len(self._unauthenticated) >= self._limits.authenticated:
            raise RequestRefusedError(Code.TOO_MANY_CONNECTIONS, "this proxy has too many connections")
        if task is not None:
            self._unauthenticated.pop(task, None)
        forwarded = _forwarded_head(head, request)
        if request.method == "CONNECT":
            await self._tunnel(client, forwarded)
        elif request.target.startswith("/"):
            raise RequestRefusedError(
                Code.MALFORMED_HTTP, "this is a proxy: a request names a whole URL, as by HTTP_PROXY"
            )
        else:
            await self._forward(client, request, forwarded)

    def _authenticate(self, request: RequestHead) -> None:
        """Check the credentials of a request, in constant time. Raises RequestRefusedError (407)."""
        if not self._with_password:
            return
        given = request.values.get(b"proxy-authorization")
        scheme, _, value = (given or b"").partition(b" ")
        if hmac.compare_digest(value.strip(b" "), self._expected) and scheme.lower() == b"basic":
            return
        code = Code.PROXY_AUTHORIZATION_MISSING if given is None else Code.PROXY_AUTHORIZATION_INVALID
        raise RequestRefusedError(
            code,
            "this proxy needs the password in the URL that ringfence gateway connect printed",
            status=HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
            headers={"Proxy-Authenticate": 'Basic realm="ringfence"'},
        )

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the task's socket. Raises SocketGoneError."""
        try:
            return await asyncio.open_unix_connection(str(self._socket))
        except OSError as error:
            raise SocketGoneError(f"nothing listens at {self._socket}: {error.strerror or error}") from None

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            reader, writer = await self._dial()
        except SocketGoneError:
            raise _gateway_gone() from None
        writer.transport.set_write_buffer_limits(0)
        self.traffic.connections += 1
        return reader, writer

    async def _tunnel(self, client: _Client, head: bytes) -> None:
        """Forward a CONNECT. Once the gateway has accepted it, relay bytes until one side ends."""
        if client.buffer:
            raise RequestRefusedError(
                Code.CONNECT_REFUSED, "nothing may follow a CONNECT before it is answered"
            )
        reader, writer = await self._open()
        try:
            writer.write(head)
            self.traffic.sent(len(head))
            await writer.drain()
            buffer = bytearray()
            try:
                async with asyncio.timeout(self._limits.connect_s):
                    answer = await _read_head(reader, buffer)
            except TimeoutError:
                answer = None
            if answer is None:
                raise _gateway_gone()
            client.answered = True
            client.writer.write(answer + b"\r\n" + buffer)
            self.traffic.received(len(answer) + len(b"\r\n") + len(buffer))
            await client.writer.drain()
            if parse_response(answer).status == HTTPStatus.OK:
                await _first_of(
                    _relay(reader, client.writer, self.traffic.received),
                    _relay(client.reader, writer, self.traffic.sent),
                )
            else:
                await _first_of(_relay(reader, client.writer, self.traffic.received), _discard(client))
            await _linger(client)
        finally:
            writer.transport.abort()

    async def _forward(self, client: _Client, request: RequestHead, head: bytes) -> None:
        """Forward one request, and the answer to it until the gateway closes."""
        reader, writer = await self._open()
        try:
            writer.write(head)
            self.traffic.sent(len(head))
            await _first_of(
                _answer(reader, client, self.traffic.received),
                _upload(client, request, writer, self.traffic.sent),
            )
            if not client.answered:
                raise _gateway_gone()
            await _linger(client)
        finally:
            writer.transport.abort()


# --- heads ---


async def _read_head(reader: asyncio.StreamReader, buffer: bytearray) -> bytes | None:
    """Read a head, without its empty line. None if the peer ends before. Raises RequestRefusedError, OSError."""
    searched = 0
    while (head := take_head(buffer, searched)) is None:
        searched = len(buffer)
        data = await reader.read(_READ_BYTES)
        if not data:
            return None
        buffer += data
    return head


def _forwarded_head(head: bytes, request: RequestHead) -> bytes:
    """Return the head for the gateway: without credentials for this proxy, and closing after this request.

    Other options of `Connection` stay: the gateway removes the fields that they name.
    """
    options = sorted(request.connection_options - _NOT_NAMED)
    lines = [line for name, line in request.fields if name not in _NOT_FORWARDED]
    lines.append(b"Connection: " + b", ".join([b"close", *options]))
    return b"\r\n".join([head.partition(b"\r\n")[0], *lines, b"", b""])


# --- bodies ---


async def _upload(
    client: _Client, request: RequestHead, writer: asyncio.StreamWriter, count: Callable[[int], None]
) -> None:
    """Forward the body of a request, and discard what follows it.

    It never returns. Raises RequestRefusedError if the framing of the body is wrong, and OSError if the client is gone.
    """
    body = request_body(request)
    listening = True
    while True:
        piece = body.take(client.buffer)
        if request.chunked:
            piece = (chunk(piece) if piece else b"") + (LAST_CHUNK if body.done else b"")
        if piece and listening:
            writer.write(piece)
            count(len(piece))
            try:
                await writer.drain()
            except OSError:
                listening = False  # the gateway answers without the rest
        if body.done:
            break
        client.buffer += await _read_client(client)
    await _discard(client)


async def _discard(client: _Client) -> None:
    """Read what the client sends, and forward nothing. It never returns. Raises OSError if the client is gone."""
    while True:
        await _read_client(client)


async def _read_client(client: _Client) -> bytes:
    data = await client.reader.read(_READ_BYTES)
    if not data:
        raise ConnectionAbortedError
    return data


async def _answer(reader: asyncio.StreamReader, client: _Client, count: Callable[[int], None]) -> None:
    """Pass an answer on, interim answers included, until the gateway closes."""
    with contextlib.suppress(ConnectionResetError):  # the gateway did not read all of the body
        while data := await reader.read(_READ_BYTES):
            client.answered = True
            client.writer.write(data)
            count(len(data))
            await client.writer.drain()


async def _relay(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[int], None]
) -> None:
    """Pass bytes on until the sender ends. Raises OSError."""
    while data := await reader.read(_READ_BYTES):
        writer.write(data)
        count(len(data))
        await writer.drain()


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Run coroutines until one ends, and cancel the others. Raises what that one raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


# --- ends ---


def _gateway_gone() -> RequestRefusedError:
    return RequestRefusedError(
        Code.TASK_SOCKET_MISSING, "the gateway does not answer at the socket of this task"
    )


async def _refuse(client: _Client, error: RequestRefusedError) -> None:
    status, headers, body = problem_answer(error)
    client.writer.write(answer_head(status, headers, len(body), close=True) + body)
    await _linger(client)


async def _linger(client: _Client) -> None:
    """End the answer, and read what still arrives for a moment: a client that still sends would lose the answer."""
    left = LINGER_BYTES
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(LINGER_S):
            client.writer.write_eof()
            await client.writer.drain()
            while left > 0 and (data := await client.reader.read(_READ_BYTES)):
                left -= len(data)
