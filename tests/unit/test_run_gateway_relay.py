"""The relay between a sandbox's socket and the gateway's socket of the run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ringfence.runner.lifecycle.gateway_relay import GatewayRelay, GatewaySocketError

WITHIN_S = 10


class EchoGateway:
    """A gateway's socket that answers what it is told, and counts its connections."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._echo, self.path)

    async def close(self) -> None:
        for writer in self.writers:
            writer.close()
        if self._server is not None:
            self._server.close()

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[EchoGateway]:
    gateway = EchoGateway(tmp_path / "gateway.sock")
    await gateway.open()
    yield gateway
    await gateway.close()


@pytest.fixture
async def relay(tmp_path: Path, gateway: EchoGateway) -> AsyncIterator[GatewayRelay]:
    relay = GatewayRelay(tmp_path / "run.sock", gateway.path)
    await relay.listen()
    yield relay
    await relay.close()


async def test_bytes_go_both_ways_and_an_end_is_passed_on(relay: GatewayRelay) -> None:
    async with asyncio.timeout(WITHIN_S):
        reader, writer = await asyncio.open_unix_connection(relay.path)
        sent = bytes(range(256)) * 4096
        writer.write(sent)
        writer.write_eof()
        assert await reader.read(-1) == sent
        writer.close()
    assert relay.relayed == 1


async def test_connection_closed_by_the_gateway_closes_inside(
    relay: GatewayRelay, gateway: EchoGateway
) -> None:
    async with asyncio.timeout(WITHIN_S):
        reader, writer = await asyncio.open_unix_connection(relay.path)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        gateway.writers[0].close()
        assert await reader.read() == b""
        writer.close()


async def test_rest_of_a_request_that_was_answered_reaches_the_gateway(tmp_path: Path) -> None:
    """The gateway discards it: if the relay ended with the answer, the program would lose the answer."""
    received = asyncio.get_running_loop().create_future()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"403")
        writer.write_eof()
        received.set_result(await reader.read(-1))
        writer.close()

    server = await asyncio.start_unix_server(refuse, tmp_path / "gateway.sock")
    relay = GatewayRelay(tmp_path / "run.sock", tmp_path / "gateway.sock")
    await relay.listen()
    async with asyncio.timeout(WITHIN_S):
        reader, writer = await asyncio.open_unix_connection(relay.path)
        assert await reader.read(-1) == b"403"
        writer.write(b"x" * 1_000_000)
        writer.write_eof()
        assert await received == b"x" * 1_000_000
        writer.close()
    await relay.close()
    server.close()


async def test_connection_that_the_gateway_answered_is_held_for_a_limited_time(
    relay: GatewayRelay, gateway: EchoGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.runner.lifecycle.gateway_relay.LINGER_S", 0.01)
    async with asyncio.timeout(WITHIN_S):
        reader, writer = await asyncio.open_unix_connection(relay.path)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        gateway.writers[0].close()
        with pytest.raises(OSError):
            while True:
                writer.write(b"y")
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()


async def test_the_end_of_a_run_ends_its_connections(relay: GatewayRelay) -> None:
    async with asyncio.timeout(WITHIN_S):
        reader, writer = await asyncio.open_unix_connection(relay.path)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        await relay.close()
        assert await reader.read() == b""
        writer.close()
        with pytest.raises(OSError, match="No such file"):
            await asyncio.open_unix_connection(relay.path)


async def test_a_gateway_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    gateway = EchoGateway(tmp_path / "late.sock")
    relay = GatewayRelay(tmp_path / "run.sock", gateway.path)
    waiting = asyncio.create_task(relay.wait_for_gateway(WITHIN_S))
    await asyncio.sleep(0)
    await gateway.open()
    await waiting
    await gateway.close()


async def test_without_a_gateway_it_says_what_to_do(tmp_path: Path) -> None:
    relay = GatewayRelay(tmp_path / "run.sock", tmp_path / "none.sock")
    with pytest.raises(GatewaySocketError) as raised:
        await relay.wait_for_gateway(0.1)
    assert "RINGFENCE_GATEWAY_SOCKETS" in str(raised.value.remedy)


async def test_connections_are_limited(
    relay: GatewayRelay, gateway: EchoGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.runner.lifecycle.gateway_relay._MAX_CONNECTIONS", 2)
    async with asyncio.timeout(WITHIN_S):
        open_now = []
        for _ in range(2):
            reader, writer = await asyncio.open_unix_connection(relay.path)
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            open_now.append(writer)
        reader, writer = await asyncio.open_unix_connection(relay.path)
        assert await reader.read() == b""
        assert gateway.connections == 2
        for one in (*open_now, writer):
            one.close()


async def test_relay_waits_until_the_gateway_removes_its_socket(
    relay: GatewayRelay, gateway: EchoGateway
) -> None:
    assert not await relay.wait_for_removal(0.01)
    waiting = asyncio.create_task(relay.wait_for_removal(WITHIN_S))
    await asyncio.sleep(0)
    gateway.path.unlink()
    assert await waiting
