"""The channel to an MCP server's standard input and output, and the outline of JSON-RPC messages that bridges read.

A server writes all its messages to one stream. Each goes to the exchange that it belongs to: a response by its id,
progress by its token, an event of a subscription by its id, anything else to the open stream of the client, or to an
exchange that is under way. Messages without an exchange are dropped. All streams lead to one client, through the
gateway, which interprets the rest of each message.

The target as the gateway sees it: HTTP at a unix socket, bridged to the server's standard input and output.

Only the gateway and the runner's own user can connect. Each request carries one message that the gateway has allowed.
Only its body counts: headers end here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.http_client import socket_address
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.http1.body import LAST_CHUNK, chunk, request_body
from ringfence.kernel.http1.head import (
    MAX_HEAD_BYTES,
    RequestHead,
    RequestRefusedError,
    parse_request,
    take_head,
)
from ringfence.messages.codes import Code

log = logging.getLogger(__name__)

_MAX_BODY_BYTES: Final = 2 * 1024 * 1024
"""Twice what the gateway takes."""
_READ_BYTES: Final = 64 * 1024
KEEP_ALIVE_S: Final = 30.0
"""A stream says at least so often that it lives: the gateway ends one that is silent for minutes, and a tool may take
longer.
"""
_EVENTS: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\nConnection: close\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_ACCEPTED: Final = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"


class UpstreamError(RingfenceError):
    """Raised if the socket for the gateway cannot be opened."""

    code = Code.CANNOT_LISTEN


@dataclass(slots=True, eq=False)
class StdioUpstream:
    """Serves one server to the gateway, under the name of one target."""

    path: Path
    """`RUN.stdio` in the gateway's folder; `target_id`: requests for another target are refused."""
    target_id: str
    channel: ServerChannel
    _server: asyncio.Server | None = field(default=None, init=False)
    _connections: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    async def listen(self) -> None:
        """Open the socket, readable for the gateway's user alone. Raises UpstreamError."""
        before = os.umask(0o177)
        try:
            with socket_address(self.path) as address:
                self._server = await asyncio.start_unix_server(self._accept, address)
            if os.geteuid() == 0:
                os.chown(self.path, self.path.parent.stat().st_uid, -1)
        except OSError as error:
            raise UpstreamError(f"cannot listen at {self.path}: {error.strerror or error}").with_remedy(
                "start it as the user of the gateway, or as root"
            ) from None
        finally:
            os.umask(before)

    async def close(self) -> None:
        """Stop listening, drop all connections, and remove the socket. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            self.path.unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        this = asyncio.current_task()
        assert this is not None
        self._connections.add(this)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the gateway has gone
        except RequestRefusedError as error:
            # The gateway sends nothing of the kind: somebody else is there.
            log.warning("refused at %s: %s", self.path, error.code)
        finally:
            self._connections.discard(this)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        buffer = bytearray()
        while (head := await _read_head(reader, buffer)) is not None:
            body = await _read_body(reader, buffer, head)
            if head.section.values.get(b"host", b"").decode("latin-1") != self.target_id:
                await _answer(writer, HTTPStatus.MISDIRECTED_REQUEST)
            elif head.method == "GET":
                with self.channel.stream() as stream:
                    await self._send_events(reader, writer, stream)
            elif head.method == "POST":
                await self._post(reader, writer, body)
            else:
                await _answer(writer, HTTPStatus.METHOD_NOT_ALLOWED)

    async def _post(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        try:
            # One message is one line: the gateway may have laid it out over several.
            line, outline = _one_line(body)
        except ValueError:
            await _answer(writer, HTTPStatus.BAD_REQUEST)
            return
        try:
            if not outline.is_request:
                await self.channel.send(line)
                writer.write(_ACCEPTED)
                await writer.drain()
                return
            exchange = await self.channel.request(line, outline)
        except ServerGoneError:
            await _answer(writer, HTTPStatus.BAD_GATEWAY)
            return
        except ExchangeRefusedError as error:
            log.warning("a request is not sent to the server: %s", error)
            await _answer(writer, HTTPStatus.CONFLICT)
            return
        try:
            await self._send_events(reader, writer, exchange)
        finally:
            await asyncio.shield(self.channel.abandon(exchange))

    async def _send_events(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, exchange: Exchange
    ) -> None:
        """Send the messages of an exchange as events. Raises ConnectionError at the end, or if the gateway leaves."""
        writer.write(_EVENTS)
        await writer.drain()
        # Nothing else comes on this connection now: what can be read is its end.
        leaving = asyncio.ensure_future(reader.read(1))
        sending = asyncio.ensure_future(self._relay(writer, exchange))
        try:
            await asyncio.wait({leaving, sending}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ConnectionResetError("the gateway left")
            sending.result()
        finally:
            for work in (leaving, sending):
                work.cancel()
            await asyncio.gather(leaving, sending, return_exceptions=True)
        raise ConnectionResetError("the exchange is over")

    async def _relay(self, writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    message = await exchange.messages.get()
            except TimeoutError:
                writer.write(chunk(b":\n\n"))
            else:
                if message is None:
                    break
                writer.write(chunk(b"data: " + message + b"\n\n"))
            await writer.drain()
        writer.write(LAST_CHUNK)
        await writer.drain()


def _one_line(body: bytes) -> tuple[bytes, Outline]:
    """Raises ValueError."""
    outline = outline_of(body)
    # Between tokens JSON takes a line end as a space, and inside of a text it has none.
    return body.replace(b"\r", b" ").replace(b"\n", b" "), outline


async def _read_head(reader: asyncio.StreamReader, buffer: bytearray) -> RequestHead | None:
    """The head of the next request; None at the end. Raises RequestRefusedError."""
    while (head := take_head(buffer)) is None:
        if len(buffer) > MAX_HEAD_BYTES or not (data := await reader.read(_READ_BYTES)):
            return None
        buffer += data
    return parse_request(head)


async def _read_body(reader: asyncio.StreamReader, buffer: bytearray, head: RequestHead) -> bytes:
    """Raises RequestRefusedError, IncompleteReadError."""
    body, content = request_body(head), bytearray()
    while True:
        content += body.take(buffer)
        if len(content) > _MAX_BODY_BYTES:
            raise RequestRefusedError(Code.BODY_UNSEEN, "the message is too long")
        if body.done:
            return bytes(content)
        if not (data := await reader.read(_READ_BYTES)):
            raise asyncio.IncompleteReadError(bytes(content), None)
        buffer += data


async def _answer(writer: asyncio.StreamWriter, status: HTTPStatus) -> None:
    writer.write(b"HTTP/1.1 %d %b\r\nContent-Length: 0\r\n\r\n" % (status.value, status.phrase.encode()))
    await writer.drain()


VERSION: Final = "io.modelcontextprotocol/protocolVersion"
SUBSCRIPTION: Final = "io.modelcontextprotocol/subscriptionId"
INITIALIZE: Final = "initialize"
INITIALIZED: Final = "notifications/initialized"
CANCELLED: Final = "notifications/cancelled"
_PROGRESS: Final = "notifications/progress"
_NAMES: Final = ("name", "uri", "taskId")
_PLAIN: Final = re.compile(r"[!-~]([ -~]*[!-~])?")

Id = str | int


@dataclass(frozen=True, slots=True)
class Outline:
    """The outline of one message."""

    method: str | None
    """None for a response."""
    id: Id | None
    version: str | None
    """The revision that a request states in `_meta`, from 2026-07-28 on."""
    name: str | None
    """What a request names: its tool, prompt, resource or task."""
    progress_token: Id | None
    """Of a request: the token that its progress is told by. Of a progress notification: that token."""
    about: Id | None
    """The id of the request that a notification belongs to: a subscription's, or a cancelled one's."""
    negotiated: str | None = None
    """The revision in the result of `initialize`."""

    @property
    def is_request(self) -> bool:
        return self.method is not None and self.id is not None

    @property
    def is_response(self) -> bool:
        return self.method is None and self.id is not None


def outline_of(line: bytes) -> Outline:
    """Read a message. Raises ValueError if it is no JSON object."""
    document = json_object(line)
    method = document.get("method")
    params, result = _object(document.get("params")), _object(document.get("result"))
    meta = _object(params.get("_meta"))
    is_progress = method == _PROGRESS
    about = params.get("requestId") if method == CANCELLED else meta.get(SUBSCRIPTION)
    return Outline(
        method=method if isinstance(method, str) else None,
        id=_id(document.get("id")),
        version=_text(meta.get(VERSION)),
        name=next((text for name in _NAMES if (text := _text(params.get(name))) is not None), None),
        progress_token=_id(params.get("progressToken") if is_progress else meta.get("progressToken")),
        about=_id(about),
        negotiated=_text(result.get("protocolVersion")),
    )


def header_value(text: str) -> str:
    """A text as the value of `Mcp-Name`: as it is, or in base64 if it is not plain ASCII (2026-07-28, SEP-2243)."""
    if _PLAIN.fullmatch(text) and not text.startswith("=?"):
        return text
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _id(value: Any) -> Id | None:
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""Of a message of the server, as the gateway has it for servers over HTTP."""
MAX_EXCHANGES: Final = 256
"""Requests that the server has not answered, whether somebody waits for them or not."""
_MAX_HELD: Final = 256
"""Messages that are held for a stream that the client has not opened yet. The oldest are dropped."""
_MAX_QUEUED: Final = 1024
"""Messages that an exchange has not taken. The server is not read any further then."""


class ServerGoneError(RingfenceError):
    """Raised if the server has closed its standard input or output."""

    code = Code.SERVER_GONE


class ExchangeRefusedError(RingfenceError):
    """Raised if a request must not be sent to the server now. The message gives the reason."""

    code = Code.EXCHANGE_REFUSED


@dataclass(eq=False, slots=True)
class Exchange:
    """One request to the server and the messages that belong to it, or the client's own stream (`id` is None)."""

    id: Id | None
    progress_token: Id | None
    messages: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(_MAX_QUEUED))
    """In order; None at the end."""
    abandoned: bool = False
    """Whether nobody waits for its answer any more."""

    def end(self) -> None:
        """Take no more messages, and release the callers that wait to add one."""
        self.abandoned = True
        while not self.messages.empty():
            self.messages.get_nowait()


class ServerChannel:
    """Writes messages to the server, and gives its messages to the exchanges."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """`reader`: its limit is `MAX_MESSAGE_BYTES`."""
        self._reader = reader
        self._writer = writer
        self._exchanges: dict[Id, Exchange] = {}
        self._stream: Exchange | None = None
        self._held: deque[bytes] = deque(maxlen=_MAX_HELD)
        self._gone = False

    async def run(self) -> None:
        """Read the server's messages until it closes its output."""
        try:
            while line := await self._next_line():
                await self._route(line)
        finally:
            self._gone = True
            for exchange in [*self._exchanges.values(), *([self._stream] if self._stream else [])]:
                with contextlib.suppress(asyncio.QueueFull):
                    exchange.messages.put_nowait(None)

    async def send(self, line: bytes) -> None:
        """Write a notification or a response. Raises ServerGoneError."""
        await self._write(line)

    async def request(self, line: bytes, outline: Outline) -> Exchange:
        """Write a request. Raises ServerGoneError, and ExchangeRefusedError for an id that is not answered yet."""
        id = outline.id
        assert id is not None
        if id in self._exchanges:
            # A late answer to the first would be taken for one to the second.
            raise ExchangeRefusedError(
                "the server has not answered the request with this id yet: use another id"
            )
        if len(self._exchanges) >= MAX_EXCHANGES:
            raise ExchangeRefusedError(f"{MAX_EXCHANGES} requests wait for the server already")
        exchange = self._exchanges[id] = Exchange(id, outline.progress_token)
        try:
            await self._write(line)
        except BaseException:
            del self._exchanges[id]
            raise
        return exchange

    async def abandon(self, exchange: Exchange) -> None:
        """The client no longer waits for the answer to a request. Notify the server, and drop its answer."""
        if exchange.id is None or self._exchanges.get(exchange.id) is not exchange or exchange.abandoned:
            return
        exchange.end()
        params = {"requestId": exchange.id, "reason": "nobody waits for it any more"}
        notification = {"jsonrpc": "2.0", "method": CANCELLED, "params": params}
        with contextlib.suppress(ServerGoneError):
            await self._write(json.dumps(notification, separators=(",", ":")).encode())

    @contextlib.contextmanager
    def stream(self) -> Iterator[Exchange]:
        """The client's own stream, for what belongs to no request. The latest one counts."""
        stream = Exchange(None, None)
        before, self._stream = self._stream, stream
        if before is not None:
            with contextlib.suppress(asyncio.QueueFull):
                before.messages.put_nowait(None)
        while self._held:
            stream.messages.put_nowait(self._held.popleft())
        try:
            yield stream
        finally:
            if self._stream is stream:
                self._stream = None
            stream.end()

    def close_input(self) -> None:
        """Close the server's standard input, as clients do at the end."""
        self._writer.close()

    # --- what the server writes ---

    async def _next_line(self) -> bytes:
        """The next line; b"" at the end."""
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            return b""
        except asyncio.LimitOverrunError:
            log.error(
                "the server wrote a message of more than %d bytes, and is read no further", MAX_MESSAGE_BYTES
            )
            return b""
        return line

    async def _route(self, line: bytes) -> None:
        # Between tokens JSON takes it as a space; an event would end there.
        if not (line := line.strip().replace(b"\r", b" ")):
            return
        try:
            outline = outline_of(line)
            if outline.method is None and outline.id is None:
                raise ValueError
        except ValueError:
            log.warning(
                "the server wrote a line that is no message; it is dropped", extra=rate_limited("line")
            )
            return
        if outline.is_response:
            await self._answer(outline, line)
            return
        exchange = self._owner(outline)
        if exchange is None:
            self._held.append(line)
        else:
            await exchange.messages.put(line)

    async def _answer(self, outline: Outline, line: bytes) -> None:
        exchange = self._exchanges.pop(outline.id, None) if outline.id is not None else None
        if exchange is None:
            log.warning("the server answered what nobody asked; it is dropped", extra=rate_limited("answer"))
        elif not exchange.abandoned:
            await exchange.messages.put(line)
            await exchange.messages.put(None)

    def _owner(self, outline: Outline) -> Exchange | None:
        """The exchange that a request or notification of the server goes to."""
        waited = [one for one in self._exchanges.values() if not one.abandoned]
        owner: Callable[[Exchange], bool] | None = None
        if outline.method == "notifications/progress":
            owner = lambda one: one.progress_token == outline.progress_token  # noqa: E731
        elif outline.method != CANCELLED and outline.about is not None:
            owner = lambda one: one.id == outline.about  # noqa: E731
        found = next(filter(owner, waited), None) if owner is not None else None
        return found or self._stream or (waited[-1] if waited else None)

    async def _write(self, line: bytes) -> None:
        if self._gone or self._writer.is_closing():
            raise ServerGoneError("the server has ended")
        try:
            self._writer.write(line + b"\n")
            await self._writer.drain()
        except OSError:
            raise ServerGoneError("the server has closed its standard input") from None
