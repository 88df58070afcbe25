"""WebSocket (RFC 6455): recognizes the opening handshake, and relays the frames."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ringfence.gateway.dataplane.secret_redaction import Redactor
from ringfence.gateway.dataplane.stream import DisconnectedError, PeerTimeoutError, Stream
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.http1.head import RequestHead, ResponseHead

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def asks_for_websocket(head: RequestHead) -> bool:
    """Whether a request opens a WebSocket. All other upgrades are dropped, and their requests are forwarded without."""
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
    """Whether a target that answered 101 accepted the opening handshake (RFC 6455, 4.1).

    `plain`: no extension was offered, so none may be accepted: in compressed frames the secret would not be found.
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


@dataclass(slots=True)
class RelayedBytes:
    """Bytes that a tunnel has relayed."""

    sent: int = 0
    """From the client to the upstream."""
    received: int = 0


async def tunnel(
    client: Stream,
    upstream: Stream,
    redactor: Redactor,
    check_cut: Callable[[], None],
    *,
    idle_s: float,
    relayed: RelayedBytes | None = None,
) -> None:
    """Relay bytes in both directions until one side is gone, is made to fail, or neither sent anything for `idle_s`.

    `check_cut` raises if nothing may be forwarded any more. Frames of servers are not masked, and not compressed as no
    extension was accepted: so the redactor finds the secret in them. `relayed` counts.
    """
    counts = relayed if relayed is not None else RelayedBytes()

    async def relay(source: Stream, sink: Stream, through: Redactor | None) -> None:
        while True:
            if source.buffer:
                check_cut()
                data = bytes(source.buffer)
                source.buffer.clear()
                for side in (client, upstream):
                    side.deadline = time.monotonic() + idle_s
                sink.write(through.feed(data) if through is not None else data)
                if source is client:
                    counts.sent += len(data)
                else:
                    counts.received += len(data)
                if sink.blocked:
                    await sink.drain()
            await source.read_more()

    async def until_gone(source: Stream, sink: Stream, through: Redactor | None = None) -> None:
        try:
            await relay(source, sink, through)
        except (DisconnectedError, PeerTimeoutError, RingfenceError):
            if through is not None and sink.alive:
                sink.write(through.last(b""))
            sink.close()
            source.close()

    await asyncio.gather(until_gone(client, upstream), until_gone(upstream, client, redactor))
