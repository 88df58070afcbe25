"""How many connections a service's HTTP keeps open, and who is served while somebody opens all they can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ringfence.dev.processes import free_port
from ringfence.kernel.service.http import ConnectionLimit, HttpServer, Requests, application

WITHIN_S = 20
MOST = 8
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n"
HOLD = b"GET /hold HTTP/1.1\r\nHost: here\r\n\r\n"
LARGE_BYTES = 20_000_000
"""More than sockets take in that nobody reads."""
LARGE = b"GET /large HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
ATTACKERS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Place:
    port: int
    limit: ConnectionLimit
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    held: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def hold(self, _: Request) -> Response:
        self.held += 1
        await self.go_on.wait()
        return PlainTextResponse("held")

    async def large(self, _: Request) -> Response:
        self.held += 1
        return PlainTextResponse(b"x" * LARGE_BYTES)

    async def connected(self, said: bytes, address: str = "127.0.0.1") -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0))
        self.writers.append(writer)
        writer.write(said)
        return reader, writer

    async def status(self, connection: Connection) -> bytes:
        async with asyncio.timeout(WITHIN_S):
            return (await connection[0].readline()).removeprefix(b"HTTP/1.1 ")[:3]

    async def until_held(self, count: int) -> None:
        async with asyncio.timeout(WITHIN_S):
            while self.held < count:
                await asyncio.sleep(0.01)


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    port = free_port()
    made = Place(port, ConnectionLimit(MOST))
    server = HttpServer(
        application([Route("/hold", made.hold), Route("/large", made.large)], []),
        "127.0.0.1",
        port,
        connections=MOST,
    )
    protocol = server.config.http
    assert isinstance(protocol, type)
    assert issubclass(protocol, Requests)
    assert protocol.limit is not None
    made.limit = protocol.limit
    running = asyncio.create_task(server.run_until_stopped())
    async with asyncio.timeout(WITHIN_S):
        while not server.started:
            await asyncio.sleep(0.01)
    yield made
    made.go_on.set()
    for writer in made.writers:
        writer.close()
    server.should_exit = True
    await running


@pytest.mark.parametrize(
    "said", [b"", b"GET /hea", HEALTH[:-2] + b"X-A: "], ids=["nothing", "a line", "a header"]
)
async def test_flood_of_slow_connections_blocks_no_other_client(place: Place, said: bytes) -> None:
    for number in range(60):
        await place.connected(said, ATTACKERS[number % len(ATTACKERS)])
    for _ in range(5):
        assert await place.status(await place.connected(HEALTH)) == b"200"
    assert len(place.limit) <= MOST


async def test_connections_that_are_kept_open_make_room(place: Place) -> None:
    for number in range(60):
        address = ATTACKERS[number % len(ATTACKERS)]
        assert await place.status(await place.connected(HEALTH, address)) == b"200"
    assert await place.status(await place.connected(HEALTH)) == b"200"
    assert len(place.limit) <= MOST


async def test_of_one_address_half_of_them_are_answered_and_others_are_served(place: Place) -> None:
    held = [await place.connected(HOLD, ATTACKERS[0]) for _ in range(MOST // 2)]
    await place.until_held(MOST // 2)
    assert await place.status(await place.connected(HEALTH, ATTACKERS[0])) == b"503"
    assert await place.status(await place.connected(HEALTH)) == b"200"
    place.go_on.set()
    assert [await place.status(one) for one in held] == [b"200"] * len(held)


async def test_full_server_answers_503_and_drops_no_request_in_progress(place: Place) -> None:
    held = [await place.connected(HOLD, ATTACKERS[number % 2]) for number in range(MOST)]
    await place.until_held(MOST)
    assert await place.status(await place.connected(HEALTH)) == b"503"
    place.go_on.set()
    assert [await place.status(one) for one in held] == [b"200"] * MOST
    assert await place.status(await place.connected(HEALTH)) == b"200"


async def test_closed_connection_frees_its_place(place: Place) -> None:
    one = await place.connected(HEALTH)
    assert await place.status(one) == b"200"
    one[1].close()
    async with asyncio.timeout(WITHIN_S):
        while len(place.limit):
            await asyncio.sleep(0.01)


async def test_an_answer_that_is_on_its_way_is_not_cut_off(place: Place) -> None:
    reader, writer = await place.connected(LARGE, ATTACKERS[0])
    assert await place.status((reader, writer)) == b"200"
    for number in range(60):
        await place.connected(b"", ATTACKERS[1 + number % 2])
    assert await place.status(await place.connected(HEALTH)) == b"200"
    async with asyncio.timeout(WITHIN_S):
        assert (await reader.read()).endswith(b"x" * LARGE_BYTES)


@pytest.mark.parametrize("times", [1, 9], ids=["one request", "many at once"])
async def test_client_that_reads_no_response_is_evicted(
    place: Place, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(Requests, "stall_s", 0.05)
    for number in range(MOST):
        reader, _ = await place.connected(
            LARGE.replace(b"close", b"keep-alive") * times, ATTACKERS[number % 2]
        )
        reader._transport.pause_reading()  # type: ignore[attr-defined]
    async with asyncio.timeout(WITHIN_S):
        while await place.status(await place.connected(HEALTH)) != b"200":
            await asyncio.sleep(0.01)


async def test_client_that_reads_no_response_is_dropped_after_the_stall_limit(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Requests, "stall_s", 0.05)
    monkeypatch.setattr(Requests, "reading_s", 0.2)
    reader, _ = await place.connected(LARGE)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    async with asyncio.timeout(WITHIN_S):
        while not place.held:
            await asyncio.sleep(0.01)
        while len(place.limit):
            await asyncio.sleep(0.01)
