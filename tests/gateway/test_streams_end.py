"""Server-sent events and WebSockets pass, and end when the lease does; so does everything else that is under way."""

from __future__ import annotations

import asyncio
import base64
import hashlib

import h11
import pytest

from ringfence.gateway.dataplane.exchange import Timeouts
from tests.gateway.conftest import placed
from tests.gateway.table_gate import SECRET
from tests.gateway.target import OK, Reader, Target, Writer

GET = b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
KEY = base64.b64encode(b"0123456789abcdef")
OPENING = (
    b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: " + KEY + b"\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Extensions: permessage-deflate\r\nSec-WebSocket-Protocol: chat\r\n\r\n"
)


async def events(reader: Reader, writer: Writer) -> None:
    """Sends one event, and then one for each word that the test says."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"9\r\ndata: 1\n\n\r\n"
    )
    await reader.read()


def accepted(key: bytes = KEY) -> bytes:
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


class Socket:
    """A target that opens a WebSocket and says everything back."""

    def __init__(self, answer: bytes | None = None) -> None:
        self.head = b""
        self._answer = answer or accepted()

    async def script(self, reader: Reader, writer: Writer) -> None:
        self.head = await reader.readuntil(b"\r\n\r\n")
        writer.write(self._answer)
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


async def test_events_come_one_by_one_and_stop_with_the_lease() -> None:
    async with placed(Target(script=events)) as place, place.connected() as raw:
        await raw.send(GET)
        await raw.reader.readuntil(b"data: 1\n\n\r\n")
        place.gate.end("api")
        assert await raw.ended()
        await place.target.gone.wait()
        assert place.gate.watching[place.gate.leases["api"].lease_id] == []


async def test_a_websocket_passes_both_ways_and_stops_with_the_lease() -> None:
    socket = Socket()
    async with placed(Target(script=socket.script)) as place, place.connected() as raw:
        await raw.send(OPENING)
        head = await raw.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101")
        for data in (b"\x81\x02hi", b"\x82\x7e\x01\x00" + bytes(256)):
            await raw.send(data)
            assert await raw.reader.readexactly(len(data)) == data
        place.gate.end("api")
        assert await raw.ended()
        await place.target.gone.wait()
    lines = socket.head.split(b"\r\n")
    assert b"Upgrade: websocket" in lines
    assert b"Connection: Upgrade" in lines
    assert b"Sec-WebSocket-Protocol: chat" in lines
    assert b"Authorization: Bearer " + SECRET.encode() in lines
    assert not any(line.startswith(b"Sec-WebSocket-Extensions") for line in lines)


async def test_a_websocket_does_not_tell_the_secret() -> None:
    async with placed(Target(script=Socket().script)) as place, place.connected() as raw:
        await raw.send(OPENING)
        await raw.reader.readuntil(b"\r\n\r\n")
        secret = SECRET.encode()
        await raw.send(b"\x81" + bytes([len(secret)]) + secret[:10])
        await raw.send(secret[10:])
        frame = await raw.reader.readexactly(2 + len(secret))
        assert frame[2:] == b"*" * len(secret)
        await raw.send(b"\x81\x01s")  # the first letter of the secret does not wait for more
        assert await raw.reader.readexactly(3) == b"\x81\x01s"


@pytest.mark.parametrize("client_leaves", [True, False])
async def test_a_websocket_ends_for_both_when_one_leaves(client_leaves: bool) -> None:
    leave = asyncio.Event()

    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(accepted())
        await (reader.read() if client_leaves else leave.wait())

    async with placed(Target(script=script)) as place, place.connected() as raw:
        await raw.send(OPENING)
        await raw.reader.readuntil(b"\r\n\r\n")
        if client_leaves:
            raw.writer.close()
        else:
            leave.set()
            assert await raw.ended()
        await place.target.gone.wait()


@pytest.mark.parametrize(
    "answer",
    [
        accepted(base64.b64encode(b"another key here")),
        accepted().replace(b"Upgrade: websocket", b"Upgrade: h2c"),
        accepted().replace(b"Connection: Upgrade\r\n", b""),
        accepted().replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n"),
    ],
)
async def test_a_target_that_did_not_agree_to_a_websocket_gets_no_tunnel(answer: bytes) -> None:
    async with placed(Target(script=Socket(answer).script)) as place, place.connected() as raw:
        assert (await raw.ask(OPENING)).status == 502


async def test_a_target_that_refuses_a_websocket_is_heard() -> None:
    async with placed(Target(respond=lambda _: OK)) as place, place.connected() as raw:
        assert (await raw.ask(OPENING)).body == b"ok"
        assert (await raw.ask(GET)).body == b"ok"


@pytest.mark.parametrize(
    "without",
    [b"Sec-WebSocket-Version: 13\r\n", b"Sec-WebSocket-Key: " + KEY + b"\r\n", b"Upgrade: websocket\r\n"],
)
async def test_half_an_opening_is_a_request_like_any_other(without: bytes) -> None:
    async with placed() as place, place.connected() as raw:
        assert (await raw.ask(OPENING.replace(without, b""))).status == 200
    assert place.target.requests[0].values("upgrade") == []
    assert place.target.requests[0].values("connection") == []


async def test_a_lease_that_ends_before_the_answer_gets_none() -> None:
    came = asyncio.Event()

    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        came.set()
        await reader.read()

    async with placed(Target(script=script)) as place, place.connected() as raw:
        await raw.send(GET)
        await came.wait()
        place.gate.end("api")
        assert (await raw.response()).status == 403
        await place.target.gone.wait()


async def test_a_lease_that_ends_in_mid_body_cuts_the_upload() -> None:
    came = asyncio.Event()

    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"half")
        came.set()
        await reader.read()

    async with placed(Target(script=script)) as place, place.connected() as raw:
        await raw.send(b"PUT /api/files/a HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 99\r\n\r\nhalf")
        await came.wait()
        place.gate.end("api")
        assert (await raw.response()).status == 403
        assert await raw.ended()
        await place.target.gone.wait()


async def test_a_lease_that_has_ended_already_sends_nothing() -> None:
    async with placed() as place, place.connected() as raw:
        subscribe = place.gate.on_lease_end

        def at_once(lease_id: str, ended: object) -> object:
            assert callable(ended)
            ended()
            return subscribe(lease_id, ended)

        place.gate.on_lease_end = at_once  # type: ignore[assignment,method-assign]
        assert (await raw.ask(GET)).status == 403
    assert place.target.requests == []


async def test_a_lease_that_ends_in_mid_response_cuts_it_off() -> None:
    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await reader.read()

    async with placed(Target(script=script)) as place, place.connected() as raw:
        await raw.send(GET)
        await raw.reader.readuntil(b"half")
        place.gate.end("api")
        assert await raw.ended()
        with pytest.raises((h11.RemoteProtocolError, ConnectionError)):
            await raw.ask(GET)


async def test_a_lease_that_ends_cuts_off_who_takes_nothing_as_well() -> None:
    written = 0

    async def script(reader: Reader, writer: Writer) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 30))
        while True:
            writer.write(b"a" * 65536)
            await writer.drain()
            written += 65536

    timeouts = Timeouts(piece_s=3600)  # it is the lease that ends this, not the patience
    async with placed(Target(script=script), timeouts=timeouts) as place, place.connected() as raw:
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await raw.send(GET)
        sent, stands = -1, 0
        while stands < 10:  # until nothing more goes, to anybody
            await asyncio.sleep(0.02)
            stands = stands + 1 if written and sent == written else 0
            sent = written
        place.gate.end("api")
        await place.target.gone.wait()
        while place.plane.connections:
            await asyncio.sleep(0.01)


# --- a gateway that stood still: its view is too old, and nobody was told yet -----------------------------------------


@pytest.mark.parametrize("what", ["events", "socket"])
async def test_data_received_while_stale_is_not_forwarded(what: str) -> None:
    go = asyncio.Event()

    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = accepted() if what == "socket" else b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"
        writer.write(head + b"before")
        await go.wait()
        writer.write(b"after")
        await reader.read()

    async with placed(Target(script=script)) as place, place.connected() as raw:
        await raw.send(OPENING if what == "socket" else GET)
        await raw.reader.readuntil(b"before")
        place.gate.stood_still = True
        go.set()
        assert await raw.ended()
        await place.target.gone.wait()


async def test_nor_does_what_the_agent_sent_meanwhile() -> None:
    socket, head = Socket(), b"PUT /api/files/a HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 99\r\n\r\n"
    async with placed(Target(script=socket.script)) as place, place.connected() as raw:
        await raw.send(OPENING)
        await raw.reader.readuntil(b"\r\n\r\n")
        await raw.send(b"before")
        await raw.reader.readuntil(b"before")
        place.gate.stood_still = True
        await raw.send(b"after")
        assert await raw.ended()
    async with placed(Target()) as place, place.connected() as raw:
        await raw.send(head + b"before")
        while not place.target.raw or b"before" not in place.target.raw[0]:
            await asyncio.sleep(0.01)
        place.gate.stood_still = True
        await raw.send(b"after")
        assert (await raw.response()).status == 503
        assert b"after" not in place.target.raw[0]


@pytest.mark.parametrize("kept", [False, True])
async def test_nor_is_an_answer_that_waited(kept: bool) -> None:
    """`kept`: on a connection to the target that was there already."""
    go, asked = asyncio.Event(), 0

    async def script(reader: Reader, writer: Writer) -> None:
        nonlocal asked
        while await reader.readuntil(b"\r\n\r\n"):
            asked += 1
            if asked > kept:
                await go.wait()
            writer.write(OK)

    async with placed(Target(script=script)) as place, place.connected() as raw:
        if kept:
            assert (await raw.ask(GET)).status == 200
        await raw.send(GET)
        while asked <= kept:
            await asyncio.sleep(0.01)
        place.gate.stood_still = True
        go.set()
        response = await raw.response()
        assert (response.status, b"stale_view" in response.body) == (503, True)  # it may live on
