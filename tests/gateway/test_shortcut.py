"""The short way of requests, and each place at which one leaves it: nothing is lost, sent twice, or left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.limits import Allowance
from tests.gateway.conftest import Place, placed
from tests.gateway.raw import connected
from tests.gateway.table_gate import SECRET, with_entry
from tests.gateway.target import OK, Reader, Received, Target, Writer
from tests.support.switches import is_on

GET = b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
PUT = b"PUT /api/files/a HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 5\r\n\r\nhello"
DENIED = b"DELETE /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
CHUNKED = (
    b"PUT /api/files/a HTTP/1.1\r\nHost: gateway.test\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n0\r\n\r\n"
)


class Slow:
    """A target that answers its first request, and the others when and how the test says."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def script(self, reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        while await reader.readuntil(b"\r\n\r\n"):
            self.asked.set()
            while (piece := await self.answers.get()) != b"":
                writer.write(piece)


def left(place: Place) -> list[object]:
    """What would be left of requests that are over."""
    return [*place.gate.watching[place.gate.leases["api"].lease_id]]


def at_once(place: Place, expected: int) -> bool:
    """Whether so many requests were allowed without an await: none without a fast path."""
    return place.gate.at_once == (expected if is_on("gateway", "fast_path") else 0)


async def test_whole_requests_go_the_short_way(place: Place) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 200  # it takes a connection first
        assert at_once(place, 1)
        for data in (GET, PUT, GET):
            assert (await raw.ask(data)).body == b"ok"
        assert at_once(place, 4)
        assert (await raw.ask(DENIED)).status == 403
        assert (await raw.ask(CHUNKED)).status == 200
        assert at_once(place, 4)
    assert [(one.method, one.body) for one in place.target.requests] == [
        ("GET", b""), ("GET", b""), ("PUT", b"hello"), ("GET", b""), ("PUT", b"hello"),
    ]  # fmt: skip
    assert place.plane.upstreams.open == 1
    assert left(place) == []


async def test_a_body_that_decides_is_seen_on_the_short_way(place: Place) -> None:
    head = b"POST /api/runs/x HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 14\r\n"
    head += b"Content-Type: application/json\r\n\r\n"
    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        assert (await raw.ask(head + b'{"mode":"dry"}')).status == 200
        assert (await raw.ask(head + b'{"mode":"wet"}')).status == 403
    assert at_once(place, 2)
    assert place.gate.records[1][1].body == b'{"mode":"dry"}'
    assert [one.body for one in place.target.requests] == [b"", b'{"mode":"dry"}']


async def test_requests_in_one_piece_are_answered_one_after_the_other(place: Place) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        await raw.send(GET + PUT + GET)
        assert [(await raw.response()).status for _ in range(3)] == [200, 200, 200]
        assert (await raw.ask(GET)).status == 200
    assert [one.method for one in place.target.requests] == ["GET", "GET", "PUT", "GET", "GET"]


async def test_pipelined_request_waits_for_the_response_before_it() -> None:
    slow = Slow()
    async with placed(Target(script=slow.script)) as place, place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        await raw.send(GET)
        await slow.asked.wait()
        assert at_once(place, 2)
        await raw.send(GET + DENIED)
        slow.asked.clear()
        slow.answers.put_nowait(OK)
        slow.answers.put_nowait(b"")
        assert (await raw.response()).status == 200
        await slow.asked.wait()
        slow.answers.put_nowait(OK)
        assert [(await raw.response()).status for _ in range(2)] == [200, 403]


async def test_an_answer_that_comes_in_pieces_is_handed_over() -> None:
    slow = Slow()
    async with placed(Target(script=slow.script)) as place, place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        await raw.send(GET)
        await slow.asked.wait()
        body = f"it is {SECRET}".encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
        for at, piece in enumerate((head[:20], head[20:] + body[:14])):
            slow.answers.put_nowait(piece)
            if at:
                await raw.reader.readuntil(b"\r\n\r\n")
        slow.answers.put_nowait(body[14:])
        assert await raw.reader.readexactly(len(body)) == b"it is " + b"*" * len(SECRET)
        slow.answers.put_nowait(b"")
        slow.asked.clear()
        await raw.send(GET)
        await slow.asked.wait()
        slow.answers.put_nowait(OK)
        assert (await raw.response()).status == 200
        assert at_once(place, 3)
        assert left(place) == []


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Encoding: gzip\r\n\r\nok", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", 502),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 404),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 200),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", 200),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok, and what nobody asked for", 200),
    ],
)
async def test_every_answer_is_what_it_is_on_the_long_way(answer: bytes, status: int) -> None:
    slow = Slow()
    async with placed(Target(script=slow.script)) as place, place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        await raw.send(GET)
        for piece in (answer, b"", OK, b""):
            slow.answers.put_nowait(piece)
        assert (await raw.response()).status == status
        assert at_once(place, 2)
        assert (await raw.ask(GET)).status == 200
        assert left(place) == []


async def test_a_connection_that_was_closed_meanwhile_is_replaced(place: Place) -> None:
    def gone(received: Received) -> bytes:
        place.target.respond = lambda _: OK
        raise ConnectionError

    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        place.target.respond = gone
        assert (await raw.ask(GET)).status == 200
        place.target.respond = gone
        assert (await raw.ask(PUT)).status == 502  # it may have been done
    assert [one.method for one in place.target.requests] == ["GET", "GET", "GET", "PUT"]


async def test_the_lease_ends_while_the_target_thinks() -> None:
    slow = Slow()
    async with placed(Target(script=slow.script)) as place, place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        await raw.send(GET)
        await slow.asked.wait()
        place.gate.end("api")
        answer = await raw.response()
        assert (answer.status, b"lease_ended" in answer.body) == (403, True)
        slow.answers.put_nowait(b"")
        await place.target.gone.wait()
        assert at_once(place, 2)
        assert left(place) == []
        assert (await raw.ask(GET)).status == 200


async def test_a_target_that_does_not_answer_in_time() -> None:
    slow = Slow()
    timeouts = Timeouts(response_s=0.3)
    async with placed(Target(script=slow.script), timeouts=timeouts) as place, place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        answer = await raw.ask(GET)
        assert (answer.status, b"target_timeout" in answer.body) == (504, True)
        assert at_once(place, 2)
        assert (await raw.ask(GET)).status == 200
        assert left(place) == []


async def test_a_client_that_leaves_takes_its_request_along() -> None:
    slow = Slow()
    allowance = Allowance(concurrent_each=1)
    async with placed(Target(script=slow.script), allowance=allowance) as place:
        async with connected(place.port) as raw:
            assert (await raw.ask(GET)).status == 200
            await raw.send(GET)
            await slow.asked.wait()
        slow.answers.put_nowait(b"")
        await place.target.gone.wait()
        while place.plane.connections:
            await asyncio.sleep(0)
        assert left(place) == []
        async with connected(place.port) as raw:  # it is one at a time, and nothing is counted any more
            assert (await raw.ask(GET)).status == 200


async def test_a_connection_to_a_target_serves_both_ways_in_turn(place: Place) -> None:
    """Whoever had it on the short way hears nothing of what comes for the next one."""
    async with place.connected() as one, place.connected() as other:
        for data in (GET, GET):
            assert (await one.ask(data)).status == 200
        for data in (CHUNKED, GET, CHUNKED):
            assert (await other.ask(data)).status == 200
            assert (await one.ask(GET)).status == 200
    assert place.plane.upstreams.open == 1


async def test_fast_path_fallback_charges_the_rate_limit_once() -> None:
    async with (
        placed(allowance=Allowance(per_second_each=0.001, burst_each=3)) as place,
        place.connected() as raw,
    ):
        statuses = [(await raw.ask(DENIED)).status for _ in range(4)]
    assert statuses == [403, 403, 403, 429]


async def test_a_head_that_comes_slowly_has_no_more_time_after_short_ones() -> None:
    async with (
        placed(timeouts=Timeouts(head_s=0.3)) as place,
        place.connected() as raw,
        place.connected() as other,
    ):
        assert (await raw.ask(GET)).status == 200
        await raw.send(GET[:10])
        assert (await other.ask(GET)).status == 200  # by then the gateway has seen the beginning
        assert (await raw.ask(GET[10:])).status == 200
        await raw.send(GET[:10])
        assert (await raw.response()).status == 408


async def test_a_connection_that_brought_much_serves_the_short_way_too(place: Place) -> None:
    """Reading was stopped in between: whoever has the connection next must hear of its answer."""
    body = bytes(2 * 1024 * 1024)
    much = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with place.connected() as raw:
        for answer, length in ((OK, 2), (much, len(body)), (OK, 2)) * 10:
            place.target.respond = lambda _, answer=answer: answer  # type: ignore[misc]
            assert len((await raw.ask(GET)).body) == length
    assert place.plane.upstreams.open == 1


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (lambda gate: gate.end("api"), (403, b"lease_ended")),
        (lambda gate: setattr(gate, "stood_still", True), (503, b"stale_view")),
    ],
)
async def test_request_cut_between_decision_and_send_is_not_sent(
    place: Place, monkeypatch: pytest.MonkeyPatch, cut: Any, said: tuple[int, bytes]
) -> None:
    """What is sent goes out when all that came in a turn of the loop was seen to: a cut may come in between."""
    loop = asyncio.get_running_loop()
    decides = "at_hand" if is_on("gateway", "fast_path") else "decide"
    decide = getattr(place.gate, decides)

    def then_cut(*asked: Any) -> Any:
        loop.call_soon(cut, place.gate)
        return decide(*asked)

    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        assert (await raw.ask(GET)).status == 200
        seen = bytes(place.target.raw[0])
        monkeypatch.setattr(place.gate, decides, then_cut)
        answer = await raw.ask(GET)
        assert answer.status == said[0]
        assert said[1] in answer.body
        assert bytes(place.target.raw[0]) == seen
        assert len(place.target.raw) == 1


async def test_answers_in_one_turn_come_in_their_order(place: Place) -> None:
    """One is held until the end of the turn, and the next one is written at once."""
    refused = GET.replace(b"files", b"secrets")
    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        for _ in range(20):
            await raw.send(GET)
            await raw.send(refused + GET)
            assert [(await raw.response()).status for _ in range(3)] == [200, 403, 200]


async def test_request_that_cannot_be_recorded_takes_the_slow_path(place: Place) -> None:
    """Nothing of it is lost, nor of what came behind it."""
    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        assert (await raw.ask(GET)).status == 200
        place.gate.full = place.gate.keeps_records = True
        before = len(place.gate.records)
        for data in (GET, PUT):
            answer = await raw.ask(data)
            assert answer.status == 200
        assert at_once(place, 4)
        assert len(place.gate.records) == before + 2, "by the long way, which recorded it"
        place.gate.available = False
        assert (await raw.ask(GET)).status == 503
        place.gate.available, place.gate.full = True, False
        assert (await raw.ask(GET)).status == 200
    assert [one.method for one in place.target.requests] == ["GET", "GET", "GET", "PUT", "GET"]
    assert left(place) == []


async def test_the_same_head_with_another_body_is_another_request(place: Place) -> None:
    """Of what a body decides nothing is kept; where it does not matter each is sent with its own."""
    head = b"POST /api/runs/x HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 14\r\n"
    head += b"Content-Type: application/json\r\n\r\n"
    put = PUT.removesuffix(b"hello")
    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        for _ in range(2):
            assert (await raw.ask(head + b'{"mode":"dry"}')).status == 200
            assert (await raw.ask(head + b'{"mode":"wet"}')).status == 403
            assert (await raw.ask(put + b"hello")).status == 200
            assert (await raw.ask(put + b"there")).status == 200
    assert [one.body for one in place.target.requests][1:] == [b'{"mode":"dry"}', b"hello", b"there"] * 2
    assert at_once(place, 7)


async def test_changed_catalogue_entry_rebuilds_the_request_plan(place: Place) -> None:
    """A plan is kept by every byte of a head, and only as long as it stands."""
    async with place.connected() as raw:
        for _ in range(3):
            assert (await raw.ask(GET)).status == 200
        with_entry(place.gate, "api", injected={"X-Api-Key": "another-secret-0123"})
        assert (await raw.ask(GET)).status == 200
        with_entry(place.gate, "api", verbs=frozenset({"write"}))
        assert (await raw.ask(GET)).status == 403
    names = [[name for name, _ in one.headers] for one in place.target.requests]
    assert ["x-api-key" in one for one in names] == [False, False, False, True]
    assert ["authorization" in one for one in names] == [True, True, True, False]


async def test_the_secret_that_was_sent_is_the_one_that_is_looked_for() -> None:
    """It may be replaced while the target thinks, and others go on with the new one meanwhile."""
    other = "another-secret-0123456789"
    slow, count = Slow(), 0

    async def script(reader: Reader, writer: Writer) -> None:
        nonlocal count
        count += 1
        if count == 1:
            await slow.script(reader, writer)
            return
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(OK)

    async with placed(Target(script=script)) as place, place.connected() as one, place.connected() as two:
        assert (await one.ask(GET)).status == 200
        await one.send(GET)
        await slow.asked.wait()
        with_entry(place.gate, "api", injected={"Authorization": f"Bearer {other}"})
        for _ in range(2):
            assert (await two.ask(GET)).status == 200
        assert at_once(place, 4)
        body = f"{SECRET} {other}".encode()
        slow.answers.put_nowait(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        assert (await one.response()).body == b"*" * len(SECRET) + f" {other}".encode()
