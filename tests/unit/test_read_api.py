"""A read of a service whose kept connection was closed just when it was used again."""

from __future__ import annotations

import asyncio

import pytest

from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.kernel.crypto.keys import SigningKey

TD = "test.example"


class Closing:
    """A server that takes so many requests and closes their connections; it answers the next one."""

    def __init__(self, closes: int) -> None:
        self._closes = closes
        self.tokens: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.tokens += [line for line in head.splitlines() if line.lower().startswith(b"authorization:")]
        if len(self.tokens) > self._closes:
            writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n{"trust":1}')
            await writer.drain()
        writer.close()


async def asked(closing: Closing) -> object:
    async with await asyncio.start_server(closing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        settings = ClientSettings(trust_domain=TD, registry_url=f"http://127.0.0.1:{port}")
        async with ReadApi(SigningKey.generate(f"spiffe://{TD}/user/sam"), settings) as api:
            return await api.get("registry", "trust")


async def test_a_read_is_tried_once_more_with_a_token_of_its_own() -> None:
    closing = Closing(1)
    assert await asked(closing) == {"trust": 1}
    assert len(set(closing.tokens)) == 2


async def test_a_service_that_closes_twice_does_not_answer() -> None:
    closing = Closing(2)
    with pytest.raises(ApiError, match="RemoteProtocolError"):
        await asked(closing)
    assert len(closing.tokens) == 2
