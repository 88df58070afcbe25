"""The end of a connection whose request was answered before it was read whole: bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from ringfence.gateway.contract import Answer, ApiRequest
from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.limits import Allowance
from ringfence.kernel.http1.head import LINGER_BYTES
from tests.gateway.conftest import Place, placed
from tests.gateway.raw import Raw

GET = b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
PIECE = b"x" * 65_536


def denied(*lines: str) -> bytes:
    return "\r\n".join(["PATCH /api/files/a HTTP/1.1", "Host: gateway.test", *lines, "", ""]).encode()


async def gone(place: Place) -> None:
    while place.plane.connections:
        await asyncio.sleep(0.01)


async def refused(raw: Raw, data: bytes, status: int = 403) -> None:
    response = await raw.ask(data, "PATCH")
    assert (response.status, response.value("connection")) == (status, "close")


@pytest.mark.parametrize("framing", ["sized", "chunked"])
async def test_rest_of_a_refused_body_is_discarded_to_its_end(place: Place, framing: str) -> None:
    """The client keeps its side open: what ends the connection is the end of the body."""
    pieces = (LINGER_BYTES // 2) // len(PIECE)
    length = f"Content-Length: {pieces * len(PIECE)}"
    async with place.connected() as raw:
        await refused(raw, denied(length if framing == "sized" else "Transfer-Encoding: chunked"))
        for _ in range(pieces):
            await raw.send(PIECE if framing == "sized" else b"%x\r\n%b\r\n" % (len(PIECE), PIECE))
        if framing == "chunked":
            await raw.send(b"0\r\n\r\n")
        await gone(place)
        assert await raw.reader.read() == b""
    assert place.target.raw == []


async def test_refused_body_beyond_the_limit_ends_the_connection() -> None:
    async with placed(timeouts=Timeouts(linger_s=3600)) as place, place.connected() as raw:
        await refused(raw, denied("Transfer-Encoding: chunked"))
        sent = 0
        with pytest.raises(ConnectionError):
            while True:
                await raw.send(b"%x\r\n%b\r\n" % (len(PIECE), PIECE))
                sent += len(PIECE)
        assert sent >= LINGER_BYTES // 2, "the connection goes on until then"
        await gone(place)


@pytest.mark.parametrize("status", [403, 400], ids=["refused", "malformed"])
async def test_rest_of_a_request_that_never_comes_is_awaited_for_a_limited_time(status: int) -> None:
    async with placed(timeouts=Timeouts(linger_s=0.1)) as place, place.connected() as raw:
        more = ("Content-Length: 5", *(("Bad : header",) if status == 400 else ()))
        await refused(raw, denied(*more), status)
        assert await raw.reader.read() == b""
        await gone(place)


async def test_rest_of_a_malformed_body_is_discarded() -> None:
    async with placed(timeouts=Timeouts(linger_s=3600)) as place:
        async with place.connected() as raw:
            await raw.send(denied("Transfer-Encoding: chunked"))
            assert (await raw.response("PATCH")).status == 403
            for _ in range(3):
                await raw.send(b"no chunk" + PIECE)
                async with place.connected() as other:
                    assert (await other.ask(GET)).status == 200, "the gateway has had its turn"
            assert await raw.reader.read() == b""
            assert place.plane.connections >= 1
        await gone(place)


async def test_request_behind_a_refused_body_is_not_served(place: Place) -> None:
    async with place.connected() as raw:
        await refused(raw, denied("Content-Length: 5") + b"hello" + GET)
        assert await raw.ended()
    await gone(place)
    assert len(place.gate.records) == 1
    assert place.target.raw == []


LONG = 32 * 1024 * 1024


class LongAnswers:
    """An API whose answers no socket buffers whole."""

    async def answer(self, request: ApiRequest) -> Answer:
        return 200, {}, bytes(LONG)


TAKEN = b"GET /v1/x HTTP/1.1\r\nHost: ringfence\r\nConnection: close\r\n\r\n"


@contextlib.asynccontextmanager
async def untaken(timeouts: Timeouts) -> AsyncIterator[tuple[Place, socket.socket]]:
    """A plane that closes a connection whose client has taken only a part of the answer."""
    loop = asyncio.get_running_loop()
    allowance = Allowance(connections_each=1)
    async with placed(agent_api=LongAnswers(), timeouts=timeouts, allowance=allowance) as place:
        with socket.create_connection(("127.0.0.1", place.port)) as client:
            client.setblocking(False)
            await loop.sock_sendall(client, TAKEN)
            await loop.sock_recv(client, 1)
            yield place, client


async def rest_of(client: socket.socket) -> int:
    """The number of bytes that are left to be taken."""
    taken = 0
    while piece := await asyncio.get_running_loop().sock_recv(client, 1024 * 1024):
        taken += len(piece)
    return taken


async def test_connection_that_is_closing_counts_until_its_answer_is_taken() -> None:
    async with untaken(Timeouts(piece_s=3600)) as (place, client):
        assert place.plane.limits.connections == 1
        async with place.connected() as other:
            assert await other.ended(), "it is one too many"
        assert await rest_of(client) >= LONG
        await gone(place)
        assert place.plane.limits.connections == 0


async def test_client_that_never_takes_its_answer_is_disconnected() -> None:
    async with untaken(Timeouts(piece_s=0.1)) as (place, client):
        await gone(place)
        assert place.plane.limits.connections == 0
        assert await rest_of(client) < LONG
