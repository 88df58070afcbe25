"""Whatever is sent, the target receives what was allowed and nothing else, as a parser that is not ours reads it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

from ringfence.gateway.dataplane.headers import request_head
from ringfence.gateway.dataplane.secret_redaction import Redactor, needles_of, redact
from ringfence.kernel.http1.body import ChunkedBody, chunk
from ringfence.kernel.http1.head import RequestRefusedError, parse_request, take_head
from ringfence.model.http_targets import RequestMap
from tests.gateway.conftest import Place, placed
from tests.gateway.table_gate import RULES, SECRET
from tests.gateway.test_smuggling import BODIES, REFUSED

WELL = b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
HIDDEN = b"DELETE /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"


def mostly(usual: bytes, *others: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(st.just(usual), st.just(usual), st.just(usual), st.sampled_from(others))


METHODS = mostly(b"PUT", b"GET", b"POST", b"DELETE", b"HEAD", b"put", b"PUT\t", b"OPTIONS")
TARGETS = mostly(
    b"/api/files/a", b"/api/files/../a", b"/api/files/%2e%2e/a", b"/api//files/a", b"/api/files/a;x", b"/api/files/a#b",
    b"http://gateway.test/api/files/a", b"http://api.test/files/a", b"/api/runs/a", b"/api/files/a?x=%00", b"*",
)  # fmt: skip
VERSIONS = mostly(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/1.1 ", b"http/1.1")
HOSTS = mostly(
    b"Host: gateway.test\r\n", b"", b"Host: api.test\r\n", b"Host : gateway.test\r\n", b"Host: gateway.test.\r\n",
    b"Host: gateway.test\r\nHost: gateway.test\r\n", b"Host: a@gateway.test\r\n", b"host:gateway.test\r\n",
)  # fmt: skip
LINES = st.lists(
    st.sampled_from([
        b"X-A: b\r\n", b"Accept: */*\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n",
        b"Connection: content-length, host\r\n", b"Expect: 100-continue\r\n", b"Authorization: Bearer mine\r\n",
        b"X-A: b\n", b"X-A: b\rX-B: c\r\n", b" folded\r\n", b"X-A\x00: b\r\n", b"X-A : b\r\n", b"\r\n",
        b"X-HTTP-Method-Override: DELETE\r\n", b"Content_Length: 1\r\n", b"Upgrade: websocket\r\n",
    ]),
    max_size=2,
)  # fmt: skip
LENGTH = b"Content-Length: %d\r\n"
CODINGS = st.sampled_from([
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Transfer-Encoding : chunked\r\n",
    b"Transfer-Encoding:\tchunked\r\n", b"Transfer-Encoding: \x0bchunked\r\n", b"Transfer-Encoding: xchunked\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
    b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", b"Transfer_Encoding: chunked\r\nContent-Length: 3\r\n",
])  # fmt: skip
CHUNKS = st.lists(
    st.sampled_from([
        b"5\r\nhello\r\n", b"5\r\nhello\r\n", b"%x\r\n%b\r\n" % (len(HIDDEN), HIDDEN), b"5\r\nhelloX\n",
        b"5\r\nhelloab",
        b"5;a=b\r\nhello\r\n", b"5 \r\nhello\r\n", b"0x5\r\nhello\r\n", b"005\r\nhello\r\n", b"5\nhello\r\n", b"-5\r\n",
    ]),
    max_size=3,
)  # fmt: skip
LAST = mostly(b"0\r\n\r\n", b"0\r\nX-T: a\r\n\r\n", b"0\r\nX T: a\r\n\r\n", b"000\r\n\r\n", b"0\n\n", b"")
IN_CHUNKS = st.tuples(CODINGS, CHUNKS.map(b"".join), LAST).map(lambda one: (one[0], one[1] + one[2]))
SIZED = st.sampled_from([(LENGTH % len(body), body) for body in (b"hello", HIDDEN, b'{"mode": "dry"}')])
WRONG = st.sampled_from([
    (b"Content-Length: +5\r\n", b"hello"), (LENGTH % 3, b"hello"), (LENGTH % 5 + LENGTH % 5, b"hello"), (b"", HIDDEN),
    (b"Content-Length: 5, 5\r\n", b"hello"), (b"Content-Length: 5\r\nContent-Length: 0\r\n", b"hello"),
])  # fmt: skip
FRAMED = st.one_of(st.just((b"", b"")), SIZED, IN_CHUNKS, IN_CHUNKS, WRONG)
REQUESTS = st.tuples(METHODS, TARGETS, VERSIONS, HOSTS, LINES, FRAMED).map(
    lambda one: b"%b %b %b\r\n%b%b%b\r\n%b" % (*one[:4], b"".join(one[4]), *one[5])
)
STREAMS = st.lists(st.one_of(REQUESTS, REQUESTS, st.just(WELL)), min_size=1, max_size=4)
MUTATED = st.tuples(
    st.sampled_from([*REFUSED.values(), *BODIES.values(), WELL, HIDDEN]),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=2)), max_size=4),
)


def mutated(given: tuple[bytes, list[tuple[int, bytes]]]) -> list[bytes]:
    """Something refused, changed here and there, between two requests that are well."""
    data, changes = given
    for at, new in changes:
        data = data[:at] + new + data[at + 1 :]
    return [WELL, data, WELL]


QUIET_S = 0.02


async def send(place: Place, pieces: list[bytes]) -> None:
    """All of it, in these pieces; until the gateway has no more to say."""
    async with place.connected() as raw:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                raw.writer.write(piece)
                await asyncio.sleep(0)
            with contextlib.suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(QUIET_S):
                        if not await raw.reader.read(65536):
                            break
    while place.plane.connections:
        await asyncio.sleep(0)


def agreed(place: Place) -> int:
    """What the target received, read by h11, is a part of what was allowed, in order; how much it was."""
    count = len(place.target.requests)
    allowed = [attempt for _, attempt, verdict in place.gate.records if verdict.allowed]
    for received in place.target.requests:
        while allowed:
            attempt = allowed.pop(0)
            if (attempt.method, attempt.target) == (received.method, received.target):
                assert attempt.body is None or attempt.body == received.body
                break
        else:
            raise AssertionError(f"nobody allowed {received}")
        assert received.values("authorization") == [f"Bearer {SECRET}"]
        assert received.values("host") == [f"127.0.0.1:{place.target.port}"]
    place.target.requests.clear()
    place.target.raw.clear()
    place.gate.records.clear()
    return count


@pytest.mark.parametrize("kind", ["assembled", "mutated"])
async def test_the_target_receives_nothing_that_was_not_decided(kind: str) -> None:
    strategy: Any = STREAMS if kind == "assembled" else MUTATED.map(mutated)
    found: list[list[bytes]] = []

    @settings(max_examples=400, suppress_health_check=list(HealthCheck), database=None)
    @given(strategy)
    def collect(pieces: list[bytes]) -> None:
        found.append(pieces)

    collect()
    async with placed() as place:
        reached = 0
        for pieces in found:
            await send(place, pieces)
            reached += agreed(place)
    assert reached > len(found) // 20, "hardly anything gets through: this proves little"


@settings(max_examples=500)
@given(st.one_of(st.binary(max_size=300), REQUESTS, REQUESTS, REQUESTS))
@example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
def test_a_head_that_is_accepted_means_the_same_to_another_parser(data: bytes) -> None:
    import h11

    buffer = bytearray(data)
    try:
        head = take_head(buffer)
        if head is None:
            return
        request = parse_request(head)
    except RequestRefusedError:
        return
    machine = h11.Connection(h11.SERVER)
    machine.receive_data(head + b"\r\n")
    event = machine.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method.decode(), event.target.decode()) == (request.method, request.target)
    assert [name for name, _ in event.headers] == [name for name, _ in request.fields]
    sent = request_head(
        request, request.target, "target.test", {"Authorization": "Bearer x"}, length=None, upgrade=False
    )
    parsed = parse_request(sent[:-2])
    assert (parsed.method, parsed.target) == (request.method, request.target)
    assert parsed.values[b"host"] == b"target.test"
    assert parsed.values[b"authorization"] == b"Bearer x"


@settings(max_examples=500)
@given(st.one_of(REQUESTS, MUTATED.map(lambda one: mutated(one)[1])), st.lists(st.integers(1, 30)))
def test_a_head_is_the_same_however_it_is_cut(data: bytes, cuts: list[int]) -> None:
    def outcome(pieces: list[bytes]) -> bytes | str | None:
        buffer, seen = bytearray(), 0
        for piece in pieces:
            buffer += piece
            try:
                head = take_head(buffer, seen)
            except RequestRefusedError as error:
                return error.code
            if head is not None:
                return head
            seen = len(buffer)
        return None

    pieces, rest = [], data
    for cut in [*cuts, len(data)]:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    in_pieces, whole = outcome(pieces), outcome([data])
    assert in_pieces == whole or (
        in_pieces == "malformed_http" and isinstance(whole, bytes) and refuses(whole)
    )


def refuses(head: bytes) -> bool:
    try:
        parse_request(head)
    except RequestRefusedError:
        return True
    return False


def test_request_head_is_not_scanned_twice() -> None:
    """Else who sends byte by byte costs as much as the square of what it sends."""
    assert take_head(bytearray(b"GET / HTTP/1.1\x00\r\nX: y"), 20) is None


@given(st.lists(st.binary(min_size=1, max_size=40)), st.lists(st.integers(1, 60)))
def test_chunks_come_out_as_they_went_in_however_they_are_cut(pieces: list[bytes], cuts: list[int]) -> None:
    data = b"".join(chunk(piece) for piece in pieces) + b"0\r\n\r\nrest"
    body, buffer, got = ChunkedBody(), bytearray(), b""
    for cut in [*cuts, len(data)]:
        buffer += data[:cut]
        data = data[cut:]
        got += body.take(buffer)
    assert body.done
    assert got == b"".join(pieces)
    assert bytes(buffer) == b"rest"


@settings(max_examples=500)
@given(st.binary(max_size=60) | st.tuples(CHUNKS.map(b"".join), LAST).map(b"".join))
def test_malformed_chunked_body_never_completes(data: bytes) -> None:
    """Read by h11 as well: where it finds an end, ours is the same or a refusal."""
    import h11

    body, buffer = ChunkedBody(), bytearray(data)
    try:
        got = body.take(buffer)
    except RequestRefusedError:
        return
    if not body.done:
        return
    machine = h11.Connection(h11.SERVER)
    machine.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    theirs = b""
    while not isinstance(event := machine.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Data):
            theirs += bytes(event.data)
        assert event is not h11.NEED_DATA
    assert got == theirs
    assert machine.trailing_data[0] == bytes(buffer)


@given(
    st.lists(st.sampled_from([SECRET, SECRET[:7], SECRET[7:], "Bearer ", "a", "\n", SECRET[:3]]), max_size=8),
    st.lists(st.integers(1, 50)),
)
def test_a_secret_is_found_however_it_is_cut(words: list[str], cuts: list[int]) -> None:
    needles = needles_of((f"Bearer {SECRET}",))
    data = "".join(words).encode()
    whole, redactor, got = redact(data, needles), Redactor(needles), b""
    for cut in cuts:
        got += redactor.feed(data[:cut])
        data = data[cut:]
    got += redactor.last(data)
    assert len(got) == len(whole)
    assert SECRET.encode() not in got
    assert all(shown == meant or meant == ord("*") for shown, meant in zip(got, whole, strict=True))


@given(st.text(alphabet="/.%2efFaA;\\0?&=+#c", max_size=24))
def test_a_path_that_the_map_allows_is_read_alike_by_those_who_decode_it(rest: str) -> None:
    from urllib.parse import unquote, urlsplit

    target = f"/files/{rest}"
    action = RequestMap(RULES).action("GET", target)
    if action is None:
        return
    path = urlsplit(target).path
    assert unquote(path) == f"/{action.resource}"
    assert ".." not in unquote(unquote(path)).split("/")
