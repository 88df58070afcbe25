"""The two bridges of a wrapped MCP server, each by itself: whose answer is whose, and what is dropped."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.runner.stdio_mcp.server_channel import (
    Exchange,
    ExchangeRefusedError,
    ServerChannel,
    ServerGoneError,
    StdioUpstream,
    header_value,
    outline_of,
)

WITHIN_S = 20


@dataclass
class PlayedServer:
    """A channel, and the far ends of its two pipes."""

    channel: ServerChannel
    asked: asyncio.StreamReader
    """What was written to the server."""
    says: int

    def say(self, *messages: Any) -> None:
        for message in messages:
            text = message if isinstance(message, str) else json.dumps(message)
            os.write(self.says, f"{text}\n".encode())

    async def next(self) -> Any:
        async with asyncio.timeout(WITHIN_S):
            return json.loads(await self.asked.readline())


@asynccontextmanager
async def played() -> AsyncIterator[PlayedServer]:
    loop = asyncio.get_running_loop()
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    asked, reader = asyncio.StreamReader(), asyncio.StreamReader(limit=4096)
    files = [os.fdopen(in_read, "rb", 0), os.fdopen(out_read, "rb", 0), os.fdopen(in_write, "wb", 0)]
    first, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), files[0])
    second, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), files[1])
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.streams.FlowControlMixin(loop=loop), files[2]
    )
    channel = ServerChannel(reader, asyncio.StreamWriter(transport, protocol, None, loop))
    running = asyncio.create_task(channel.run())
    try:
        yield PlayedServer(channel, asked, out_write)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for one in (first, second, transport):
            one.close()
        os.close(out_write)


def message(id: Any = None, method: str | None = None, **params: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"jsonrpc": "2.0"}
    found |= {"id": id} if id is not None else {}
    found |= {"method": method, "params": params} if method is not None else {"result": params}
    return found


async def request(server: PlayedServer, id: Any, method: str = "tools/call", **params: Any) -> Exchange:
    line = json.dumps(message(id, method, **params)).encode()
    exchange = await server.channel.request(line, outline_of(line))
    assert (await server.next())["id"] == id
    return exchange


async def taken(exchange: Exchange, count: int) -> list[Any]:
    async with asyncio.timeout(WITHIN_S):
        found = [await exchange.messages.get() for _ in range(count)]
    return [json.loads(one) for one in found if one is not None]


async def test_each_answer_goes_to_its_own_request() -> None:
    async with played() as server:
        first, second = await request(server, 1), await request(server, "1")
        server.say(message("1", about="second"), message(1, about="first"))
        assert [one["result"]["about"] for one in await taken(first, 2)] == ["first"]
        assert [one["result"]["about"] for one in await taken(second, 2)] == ["second"]


async def test_an_id_counts_until_the_server_has_answered_it() -> None:
    async with played() as server:
        first = await request(server, 7)
        await server.channel.abandon(first)
        told = await server.next()
        assert (told["method"], told["params"]["requestId"]) == ("notifications/cancelled", 7)
        with pytest.raises(ExchangeRefusedError):
            await request(server, 7)
        server.say(message(7, about="late"), message(None, "notifications/message", data="mark"))
        with server.channel.stream() as stream:
            assert [one["params"]["data"] for one in await taken(stream, 1)] == ["mark"]
        again = await request(server, 7)
        server.say(message(7, about="again"))
        assert [one["result"]["about"] for one in await taken(again, 2)] == ["again"]


async def test_notification_goes_to_its_request_else_to_the_stream() -> None:
    async with played() as server:
        first = await request(server, 1, _meta={"progressToken": "p1"})
        listens = await request(server, 2, "subscriptions/listen")
        subscribed = {"_meta": {"io.modelcontextprotocol/subscriptionId": 2}}
        server.say(
            message(None, "notifications/progress", progressToken="p1", progress=1),
            message(None, "notifications/tools/list_changed", **subscribed),
            message(9, "sampling/createMessage"),
        )
        assert [one["method"] for one in await taken(first, 1)] == ["notifications/progress"]
        # The client has no stream of its own yet: what belongs to nobody takes what is open.
        assert [one["method"] for one in await taken(listens, 2)] == [
            "notifications/tools/list_changed",
            "sampling/createMessage",
        ]
        with server.channel.stream() as stream:
            server.say(message(None, "notifications/resources/list_changed"))
            assert [one["method"] for one in await taken(stream, 1)] == [
                "notifications/resources/list_changed"
            ]


@pytest.mark.parametrize(
    "line", ["nothing", "[1]", '{"jsonrpc": "2.0"}', '{"id": 1, "id": 2}', '{"id": true}', "\r"]
)
async def test_malformed_line_is_dropped(line: str) -> None:
    async with played() as server:
        exchange = await request(server, 1)
        server.say(line, message(3, about="nobody"), message(1, about="mine"))
        assert [one["result"]["about"] for one in await taken(exchange, 2)] == ["mine"]


async def test_a_message_that_is_too_long_ends_the_server_for_its_client() -> None:
    async with played() as server:
        exchange = await request(server, 1)
        server.say(message(1, text="x" * 10_000))
        assert await taken(exchange, 1) == []
        with pytest.raises(ServerGoneError):
            await request(server, 2)


async def test_abandoned_slow_reader_does_not_block_others() -> None:
    async with played() as server:
        slow = await request(server, 1, _meta={"progressToken": 1})
        told = message(None, "notifications/progress", progressToken=1, progress=1)
        for _ in range(1500):
            server.say(told)
            await asyncio.sleep(0)
        await server.channel.abandon(slow)
        await server.next()
        other = await request(server, 2)
        server.say(message(2, about="other"))
        found = [one for one in await taken(other, 1) if "result" in one]
        while not found:
            found = [one for one in await taken(other, 1) if "result" in one]
        assert found[0]["result"]["about"] == "other"


@asynccontextmanager
async def upstream(server: PlayedServer, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    path = folder / "run.stdio"
    bridge = StdioUpstream(path, "noted", server.channel)
    await bridge.listen()
    assert path.stat().st_mode & 0o777 == 0o600
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport, base_url="http://noted", timeout=WITHIN_S) as http:
        yield http
    await bridge.close()
    assert not path.exists()


async def test_a_request_is_answered_by_events_and_only_its_body_gets_to_the_server(tmp_path: Path) -> None:
    async with played() as server, upstream(server, tmp_path) as http:
        body = json.dumps(message(1, "tools/call", name="x"), indent=1)
        asked = asyncio.create_task(
            http.post("/mcp", content=body, headers={"Authorization": "Bearer secret"})
        )
        assert await server.next() == message(1, "tools/call", name="x")
        server.say(message(None, "notifications/message", data="first"), message(1, about="done"))
        answer = await asked
        assert answer.headers["Content-Type"] == "text/event-stream"
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
        assert [one.get("method") for one in events] == ["notifications/message", None]
        told = await http.post("/mcp", content=json.dumps(message(None, "notifications/initialized")))
        assert (told.status_code, (await server.next())["method"]) == (202, "notifications/initialized")


async def test_a_stream_says_that_it_lives_while_the_server_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.runner.stdio_mcp.server_channel.KEEP_ALIVE_S", 0.01)
    async with played() as server, upstream(server, tmp_path) as http:
        body = json.dumps(message(1, "tools/call"))
        async with asyncio.timeout(WITHIN_S), http.stream("POST", "/mcp", content=body) as answer:
            pieces = answer.aiter_bytes()
            assert await anext(pieces) == b":\n\n"
            server.say(message(1, about="done"))
            said = b"".join([piece async for piece in pieces])
            assert b'data: {"jsonrpc": "2.0", "id": 1' in said


async def test_a_request_for_another_target_is_refused(tmp_path: Path) -> None:
    async with played() as server, upstream(server, tmp_path) as http:
        body = json.dumps(message(1, "tools/call"))
        assert (await http.post("http://other/mcp", content=body)).status_code == 421
        assert (await http.delete("/mcp")).status_code == 405
        assert (await http.post("/mcp", content="[]")).status_code == 400
        asked = asyncio.create_task(http.post("/mcp", content=json.dumps(message(2, "ping"))))
        assert (await server.next())["id"] == 2, "nothing of the others got there"
        server.say(message(2))
        await asked


async def test_a_gateway_that_leaves_cancels_the_request(tmp_path: Path) -> None:
    async with played() as server, upstream(server, tmp_path) as http:
        asked = asyncio.create_task(http.post("/mcp", content=json.dumps(message(1, "tools/call"))))
        assert (await server.next())["id"] == 1
        asked.cancel()
        told = await server.next()
        assert (told["method"], told["params"]["requestId"]) == ("notifications/cancelled", 1)


@pytest.mark.parametrize(("text", "value"), [
    ("get_note", "get_note"), ("a b", "a b"), (" a", "=?base64?IGE=?="), ("\u00e9", "=?base64?w6k=?="),
    ("=?base64?x?=", "=?base64?PT9iYXNlNjQ/eD89?="), ("a\r\nb: c", "=?base64?YQ0KYjogYw==?="),
])  # fmt: skip
def test_a_name_in_a_header_is_plain_or_in_base64(text: str, value: str) -> None:
    assert header_value(text) == value


def test_an_outline_reads_nothing_that_two_readers_read_differently() -> None:
    with pytest.raises(ValueError, match="twice"):
        outline_of(b'{"id": 1, "id": 2}')
    outline = outline_of(b'{"jsonrpc":"2.0","id":true,"method":5,"params":[1]}')
    assert (outline.id, outline.method, outline.name) == (None, None, None)
