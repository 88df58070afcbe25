"""Requests to the gateway itself on their way through the data plane. The API behind is the test's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from ringfence.gateway.contract import Answer, ApiRequest
from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.kernel.http1.head import RequestRefusedError
from ringfence.messages.codes import Code
from tests.gateway.conftest import Place, placed

GET = b"GET /v1/x?y=1 HTTP/1.1\r\nHost: ringfence\r\n\r\n"
TARGET = b"GET /files/a HTTP/1.1\r\nHost: api.test\r\n\r\n"
BY_PATH = b"GET /ringfence/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
POST = b"POST /v1/x HTTP/1.1\r\nHost: ringfence\r\nContent-Length: 5\r\n%s\r\n"


@dataclass
class Played:
    """Answers as the test says, and remembers what it was asked."""

    asked: list[ApiRequest] = field(default_factory=list)
    then: Callable[[ApiRequest], Awaitable[Answer]] | None = None

    async def answer(self, request: ApiRequest) -> Answer:
        self.asked.append(request)
        return await self.then(request) if self.then else (200, {"X": "y"}, b"api")


@pytest.fixture
def played() -> Played:
    return Played()


@pytest_asyncio.fixture(loop_scope="package")
async def there(played: Played) -> AsyncIterator[Place]:
    """A plane with the API, and a target that has the name from before."""
    timeouts = Timeouts(piece_s=0.2)
    async with placed(agent_api=played, target_id="ringfence", timeouts=timeouts) as place:
        yield place


async def test_api_receives_the_request_and_its_answer_is_sent(there: Place, played: Played) -> None:
    async with there.connected() as raw:
        for _ in range(2):
            answer = await raw.ask(GET)
            assert (answer.status, answer.value("x"), answer.body) == (200, "y", b"api")
            assert answer.value("cache-control") == "no-store"
        by_path = await raw.ask(
            b"GET /ringfence/v1/x HTTP/1.1\r\nHost: gateway.test\r\nDPoP: p\r\nTraceparent: t\r\n\r\n"
        )
    assert by_path.status == 200
    first, _, last = played.asked
    assert (first.method, first.path, first.query, first.base) == ("GET", "/v1/x", "y=1", "")
    assert (first.presented.htu, first.presented.proof) == ("http://ringfence/v1/x", None)
    assert (last.base, last.presented.htu, last.presented.proof, last.traceparent) == (
        "/ringfence", "http://gateway.test/ringfence/v1/x", "p", "t",
    )  # fmt: skip
    assert first.sender == "address:127.0.0.1"
    assert there.gate.records == []


async def test_no_short_way_leads_past_it_to_a_target_of_its_name(there: Place, played: Played) -> None:
    async with there.connected() as raw:
        for _ in range(3):
            assert (await raw.ask(TARGET)).body == b"ok"
        assert (await raw.ask(BY_PATH)).body == b"api"
        assert (await raw.ask(TARGET)).body == b"ok"
        assert (await raw.ask(BY_PATH)).body == b"api"
    assert [one.path for one in played.asked] == ["/files/a"] * 2


async def test_without_it_the_name_is_a_target_like_others() -> None:
    async with placed(target_id="ringfence") as place, place.connected() as raw:
        assert (await raw.ask(BY_PATH)).body == b"ok"


async def test_a_refusal_is_answered_and_told_with_its_agent(there: Place, played: Played) -> None:
    async def refuse(request: ApiRequest) -> Answer:
        error = RequestRefusedError(Code.ID_TAKEN, "no", headers={"Retry-After": "7"})
        error.agent_id = "bot"
        raise error

    played.then = refuse
    async with there.connected() as raw:
        answer = await raw.ask(GET)
        assert (answer.status, json.loads(answer.body)["code"], answer.value("retry-after")) == (
            409, "id_taken", "7",
        )  # fmt: skip
        played.then = None
        assert (await raw.ask(GET)).status == 200, "the connection goes on"
    (blocked,) = there.blocked
    assert (blocked.code, blocked.agent_id, blocked.method, blocked.unparsed) == (
        "id_taken",
        "bot",
        "GET",
        False,
    )


@pytest.mark.parametrize("limit", [3, 5, 100])
async def test_a_body_is_read_up_to_its_limit(there: Place, played: Played, limit: int) -> None:
    bodies: list[bytes] = []

    async def read(request: ApiRequest) -> Answer:
        bodies.append(await request.read_body(limit))
        return 200, {}, b""

    played.then = read
    async with there.connected() as raw:
        assert (await raw.ask(POST % b"" + b"hello")).status == 200
        assert (await raw.ask(POST % b"Expect: 100-continue\r\n" + b"world")).status == 200
    assert bodies == [b"hello", b"world"]


async def test_a_body_that_does_not_come_ends_the_call(there: Place, played: Played) -> None:
    async def read(request: ApiRequest) -> Answer:
        return 200, {}, await request.read_body(100)

    played.then = read
    async with there.connected() as raw:
        answer = await raw.ask(POST % b"" + b"hel")
        assert (answer.status, json.loads(answer.body)["code"]) == (408, "body_timeout")


async def test_a_body_that_is_not_read_ends_the_connection(there: Place, played: Played) -> None:
    async with there.connected() as raw:
        answer = await raw.ask(POST % b"")
        assert (answer.status, answer.value("connection")) == (200, "close")
        assert await raw.ended()


async def test_api_is_notified_of_a_client_disconnect(there: Place, played: Played) -> None:
    waits, gone = asyncio.Event(), asyncio.Event()

    async def wait(request: ApiRequest) -> Answer:
        request.release_slot()
        unsubscribe = request.on_disconnect(gone.set)
        waits.set()
        await gone.wait()
        unsubscribe()
        return 200, {}, b""

    played.then = wait
    async with there.connected() as raw:
        await raw.send(GET)
        await waits.wait()
    await gone.wait()
    async with there.connected() as raw:
        played.then = None
        assert (await raw.ask(GET)).status == 200
