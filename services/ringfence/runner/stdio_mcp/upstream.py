"""The target as the gateway sees it: HTTP at a unix socket, bridged to the server's standard input and output.

Only the gateway and the runner's own user can connect. Each request carries one message that the gateway has allowed.
Only its body counts: headers end here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from http import HTTPStatus
from pathlib import Path
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.http_client import socket_address
from ringfence.kernel.http1.body import LAST_CHUNK, chunk, request_body
from ringfence.kernel.http1.head import (
    MAX_HEAD_BYTES,
    RequestHead,
    RequestRefusedError,
    parse_request,
    take_head,
)
from ringfence.messages.codes import Code
from ringfence.runner.stdio_mcp.server_channel import (
    Exchange,
    ExchangeRefusedError,
    Outline,
    ServerChannel,
    ServerGoneError,
    outline_of,
)

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


class StdioUpstream:
    """Serves one server to the gateway, under the name of one target."""

    def __init__(self, path: Path, target_id: str, channel: ServerChannel) -> None:
        """`path`: `RUN.stdio` in the gateway's folder; `target_id`: requests for another target are refused."""
        self._path = path
        self._target_id = target_id
        self._channel = channel
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        """Open the socket, readable for the gateway's user alone. Raises UpstreamError."""
        before = os.umask(0o177)
        try:
            with socket_address(self._path) as address:
                self._server = await asyncio.start_unix_server(self._accept, address)
            if os.geteuid() == 0:
                os.chown(self._path, self._path.parent.stat().st_uid, -1)
        except OSError as error:
            raise UpstreamError(f"cannot listen at {self._path}: {error.strerror or error}").with_remedy(
                "start it as the user of the gateway, or as root"
            ) from None
        finally:
            os.umask(before)

    async def close(self) -> None:
        """Stop listening, drop all connections, and remove the socket. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            self._path.unlink(missing_ok=True)
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
            log.warning("refused at %s: %s", self._path, error.code)
        finally:
            self._connections.discard(this)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        buffer = bytearray()
        while (head := await _read_head(reader, buffer)) is not None:
            body = await _read_body(reader, buffer, head)
            if head.section.values.get(b"host", b"").decode("latin-1") != self._target_id:
                await _answer(writer, HTTPStatus.MISDIRECTED_REQUEST)
            elif head.method == "GET":
                with self._channel.stream() as stream:
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
                await self._channel.send(line)
                writer.write(_ACCEPTED)
                await writer.drain()
                return
            exchange = await self._channel.request(line, outline)
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
            await asyncio.shield(self._channel.abandon(exchange))

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
