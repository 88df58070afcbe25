"""WebSocket (RFC 6455): which request opens one, whether the target agreed, and the bytes both ways after that."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Callable
from typing import Final

from ringfence.gateway.dataplane.http1_head import RequestHead, ResponseHead
from ringfence.gateway.dataplane.secret_redaction import Redactor
from ringfence.gateway.dataplane.stream import DeadlineError, DisconnectedError, Stream
from ringfence.kernel.base.errors import RingfenceError

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def asks_for_websocket(head: RequestHead) -> bool:
    """Whether a request opens a WebSocket. Every other upgrade is left out, and the request is one like any other."""
    return (
        head.method == "GET"
        and head.minor == 1
        and b"upgrade" in head.connection_options
        and head.values.get(b"upgrade", b"").lower() == b"websocket"
        and b"sec-websocket-key" in head.values
        and head.values.get(b"sec-websocket-version") == b"13"
        and not head.chunked
        and not head.length
    )


def accepts_websocket(head: RequestHead, response: ResponseHead, *, plain: bool) -> bool:
    """Whether a target that answered 101 opened the WebSocket that was asked for (RFC 6455, 4.1).

    `plain`: no extension was asked for, so none may be agreed on: compressed, the secret would not be seen.
    """
    if plain and any(name == b"sec-websocket-extensions" for name, _ in response.fields):
        return False
    key = head.values[b"sec-websocket-key"]
    expected = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
    return (
        response.values.get(b"upgrade", b"").lower() == b"websocket"
        and b"upgrade" in response.connection_options
        and response.values.get(b"sec-websocket-accept") == expected
    )


async def tunnel(
    client: Stream, upstream: Stream, redactor: Redactor, check_cut: Callable[[], None], *, idle_s: float
) -> None:
    """Pass bytes both ways until one side is gone, nothing came from either for `idle_s`, or one was made to fail.

    `check_cut` raises where what came goes nowhere any more.
    Frames of servers are not masked and, as no extension was agreed on, not compressed: the secret would stand in them.
    """

    async def pass_on(source: Stream, sink: Stream, through: Redactor | None) -> None:
        while True:
            if source.buffer:
                check_cut()
                data = bytes(source.buffer)
                source.buffer.clear()
                for side in (client, upstream):
                    side.deadline = time.monotonic() + idle_s
                sink.write(through.feed(data) if through is not None else data)
                if sink.blocked:
                    await sink.drain()
            await source.read_more()

    async def until_gone(source: Stream, sink: Stream, through: Redactor | None = None) -> None:
        try:
            await pass_on(source, sink, through)
        except (DisconnectedError, DeadlineError, RingfenceError):
            if through is not None and sink.alive:
                sink.write(through.last(b""))
            sink.close()
            source.close()

    await asyncio.gather(until_gone(client, upstream), until_gone(upstream, client, redactor))
