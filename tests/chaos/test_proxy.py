"""The links: what is cut ends, what is held arrives later, what is slow takes its time, what is healed works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ringfence.dev.processes import LOOPBACK, free_port
from tests.chaos.proxy import Link


@asynccontextmanager
async def echo(prefix: bytes = b"") -> AsyncIterator[int]:
    """The port of a server that says what it is told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(prefix + line)
        writer.close()

    server = await asyncio.start_server(serve, LOOPBACK, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection(LOOPBACK, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def ask(self, line: bytes = b"hello\n") -> bytes:
        self.writer.write(line)
        return await self.reader.readline()


async def ended(client: Client) -> bool:
    try:
        return await client.ask() == b""
    except ConnectionError:
        return True


async def test_an_open_link_lets_through() -> None:
    async with echo() as port, Link("x", free_port(), port) as link, Client(link.port) as client:
        assert await client.ask() == b"hello\n"


async def test_a_cut_ends_what_is_there_and_what_comes_until_it_is_healed() -> None:
    async with echo() as port, Link("x", free_port(), port) as link:
        async with Client(link.port) as client:
            assert await client.ask() == b"hello\n"
            link.cut()
            assert await ended(client)
        async with Client(link.port) as client:
            assert await ended(client)
        link.heal()
        async with Client(link.port) as client:
            assert await client.ask() == b"hello\n"


async def test_held_data_arrives_after_healing() -> None:
    async with echo() as port, Link("x", free_port(), port) as link, Client(link.port) as client:
        assert await client.ask() == b"hello\n"
        link.hold()
        answer = asyncio.create_task(client.ask(b"late\n"))
        await asyncio.wait({answer}, timeout=0.2)
        assert not answer.done()
        link.heal()
        assert await answer == b"late\n"


async def test_held_answers_do_not_delay_requests() -> None:
    heard = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        heard.set()
        writer.close()

    async with await asyncio.start_server(serve, LOOPBACK, 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Link("x", free_port(), port) as link, Client(link.port) as client:
            link.hold_answers()
            answer = asyncio.create_task(client.ask())
            await asyncio.wait_for(heard.wait(), 30)
            await asyncio.wait({answer}, timeout=0.2)
            assert not answer.done()
            link.heal()
            assert await answer == b"hello\n"


async def test_a_slow_link_takes_its_time() -> None:
    async with echo() as port, Link("x", free_port(), port) as link, Client(link.port) as client:
        link.slow(0.1)
        began = time.monotonic()
        assert await client.ask() == b"hello\n"
        assert time.monotonic() - began >= 0.2, "once there and once back"


async def test_switched_it_leads_to_another_server() -> None:
    async with echo(b"a:") as a, echo(b"b:") as b, Link("x", free_port(), a) as link:
        async with Client(link.port) as client:
            assert await client.ask() == b"a:hello\n"
            link.switch(b)
            assert await ended(client)
        async with Client(link.port) as client:
            assert await client.ask() == b"b:hello\n"


async def test_link_without_a_listener_hangs_up() -> None:
    async with Link("x", free_port(), free_port()) as link, Client(link.port) as client:
        assert await ended(client)


@pytest.mark.parametrize("mode", ["cut", "hold"])
async def test_the_end_of_a_link_ends_its_connections(mode: str) -> None:
    async with echo() as port, Link("x", free_port(), port) as link:
        client = await Client(link.port).__aenter__()
        assert await client.ask() == b"hello\n"
        getattr(link, mode)()
    assert await ended(client)
    await client.__aexit__()
