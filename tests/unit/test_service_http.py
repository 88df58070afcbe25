"""What a service's HTTP port takes from strangers, before anything of Ringfence is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ringfence.dev.processes import free_port
from ringfence.kernel.service import http
from ringfence.kernel.service.http import HttpServer, Requests, application

WITHIN_S = 20
SOON_S = 0.2
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: here\r\n"


async def echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(Requests, "reading_s", SOON_S)
    port = free_port()
    server = HttpServer(application([Route("/echo", echo, methods=["POST"])], []), "127.0.0.1", port)
    running = asyncio.create_task(server.run_until_stopped())
    async with asyncio.timeout(WITHIN_S):
        while not server.started:
            await asyncio.sleep(0.01)
    yield port
    server.should_exit = True
    await running


async def answer(port: int, *parts: bytes) -> bytes:
    """All that comes back until the server closes, or a write fails as it has."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(WITHIN_S):
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()


async def test_a_request_that_comes_in_pieces_is_answered(port: int) -> None:
    whole = HEALTH + b"Connection: close\r\n\r\n"
    assert (await answer(port, *(whole[i : i + 7] for i in range(0, len(whole), 7)))).startswith(
        b"HTTP/1.1 200"
    )


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /hea",
        HEALTH,
        HEALTH + b"X-A: ",
        b"POST /echo HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\n\r\nab",
        b"POST /echo HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
    ],
)
async def test_incomplete_request_times_out(port: int, beginning: bytes) -> None:
    assert b" 200 " not in await answer(port, beginning)


@pytest.mark.parametrize(
    "after", [b"\r\n", b"GET /healthz HT", HEALTH], ids=["nothing", "a line", "a header"]
)
async def test_nor_after_a_first_request_that_was_answered(port: int, after: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(WITHIN_S):
        writer.write(HEALTH + b"\r\n")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(after)
        assert await reader.read() == b""


@pytest.mark.parametrize(
    "more", [b"a" * 4096, b"X-A: b\r\n" * 512], ids=["one header without an end", "headers without an end"]
)
async def test_headers_have_an_end(port: int, monkeypatch: pytest.MonkeyPatch, more: bytes) -> None:
    monkeypatch.setattr(Requests, "reading_s", WITHIN_S * 2.0)
    took = 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEALTH + b"X-B: ")
    async with asyncio.timeout(WITHIN_S):
        try:
            while not reader.at_eof() and not reader._buffer:  # type: ignore[attr-defined]
                writer.write(more)
                await writer.drain()
                took += len(more)
                await asyncio.sleep(0)
                assert took < 100 * http.MAX_HEAD_BYTES, "it reads on for ever"
        except ConnectionError:
            return
    assert (await reader.read(12)) == b"HTTP/1.1 431"


async def test_a_large_body_is_no_large_head(port: int) -> None:
    body = b"x" * (3 * http.MAX_HEAD_BYTES)
    head = b"POST /echo HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert (await answer(port, head, body)).endswith(str(len(body)).encode())


async def test_a_large_body_that_comes_with_the_end_of_the_headers(port: int) -> None:
    body = b"x" * (3 * http.MAX_HEAD_BYTES)
    start, rest = b"POST /echo HTTP/1.1\r\nHost: he", b"re\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(start)
    await writer.drain()
    await asyncio.sleep(0)
    writer.write(rest % len(body) + body)
    async with asyncio.timeout(WITHIN_S):
        assert (await reader.read()).endswith(str(len(body)).encode())


async def test_trailing_slash_gives_404_and_no_redirect(port: int) -> None:
    """A redirect would go to the host that the request names, and take what is in its body along."""
    for path in (b"/healthz/", b"/echo/"):
        said = await answer(
            port, b"POST %b HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n" % path
        )
        assert said.startswith(b"HTTP/1.1 404")
        assert b"evil.example" not in said


async def test_fragment_in_the_target_is_rejected(port: int) -> None:
    assert (await answer(port, b"GET /healthz#x HTTP/1.1\r\nHost: here\r\n\r\n")).startswith(b"HTTP/1.1 400")
