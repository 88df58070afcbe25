"""What was decided is what the target receives: method, path, body; of the headers only those listed differ."""

from __future__ import annotations

import asyncio
import base64
import html
import json
from dataclasses import replace
from typing import Any
from urllib.parse import quote, quote_plus

import h11
import pytest

from ringfence.gateway.contract import Attempt, PresentedIdentity, Verdict
from ringfence.gateway.dataplane.exchange import Timeouts
from tests.gateway.conftest import Place, placed
from tests.gateway.raw import connected
from tests.gateway.table_gate import SECRET, with_entry
from tests.gateway.target import OK, Reader, Received, Target, Writer

GET = b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"


def request(first: str, *lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join([first, "Host: gateway.test", *lines, "", ""]).encode("latin-1") + body


JSON = "Content-Type: application/json"


def put(*lines: str, body: bytes = b"") -> bytes:
    return request("PUT /api/files/a HTTP/1.1", *lines, body=body)


async def test_only_the_listed_headers_differ(place: Place) -> None:
    data = request(
        "GET /api/files/a?x=1 HTTP/1.1", "Accept: text/plain", "X-Own:  two  spaces ", "x-own: again", "Cookie: a=b",
        "Connection: keep-alive, X-Named", "X-Named: gone", "Keep-Alive: timeout=5", "TE: trailers", "Trailer: X-T",
        "Upgrade: h2c", "Proxy-Connection: close", "Proxy-Authorization: Basic eDo=", "Authorization: DPoP handle",
        "DPoP: a.b.c", "Forwarded: for=1.1.1.1", "X-Forwarded-For: 1.1.1.1", "X-Forwarded-Uri: /files/b",
        "X-Forwarded-Host: elsewhere", "X-Real-IP: 1.1.1.1", "Accept-Encoding: gzip", "X-Ringfence-Label: issue",
    )  # fmt: skip
    async with place.connected() as raw:
        assert (await raw.ask(data)).status == 200
    lines = bytes(place.target.raw[0]).decode("latin-1").split("\r\n")
    assert lines == [
        "GET /files/a?x=1 HTTP/1.1", f"Host: 127.0.0.1:{place.target.port}", "Accept: text/plain",
        "X-Own:  two  spaces ", "x-own: again", "Cookie: a=b", "Accept-Encoding: identity",
        f"Authorization: Bearer {SECRET}", "", "",
    ]  # fmt: skip
    presented, attempt, _ = place.gate.last
    assert (presented.handle, presented.proof) == ("handle", "a.b.c")
    assert presented.htu == "http://gateway.test/api/files/a"
    assert (attempt.target_id, attempt.authority, attempt.target) == ("api", None, "/files/a?x=1")
    assert attempt.label == "issue"


@pytest.mark.parametrize("header", ["PRIVATE-TOKEN: mine", "Private-Token: mine", "private_token: mine"])
async def test_an_injected_name_replaces_the_agents(place: Place, header: str) -> None:
    with_entry(place.gate, "api", injected={"Private-Token": SECRET})
    async with place.connected() as raw:
        assert (await raw.ask(request("GET /api/files/a HTTP/1.1", header))).status == 200
    assert place.target.requests[0].values("private-token") == [SECRET]
    assert place.target.requests[0].values("private_token") == []


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (["Content-Length: 5"], b"hello"),
        (["Transfer-Encoding: chunked"], b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
        (["Transfer-Encoding: chunked"], b"5\r\nhello\r\n0\r\nX-Trailer: dropped\r\n\r\n"),
        (["Transfer-Encoding: chunked"], b"00000002\r\nhe\r\n0003\r\nllo\r\n000\r\n\r\n"),
    ],
)
async def test_bodies_arrive_framed_anew(place: Place, lines: list[str], body: bytes) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(put(*lines, body=body) + GET)).status == 200
        assert (await raw.response()).status == 200
    first, second = place.target.requests
    assert (first.method, first.body, second.method) == ("PUT", b"hello", "GET")
    assert b"X-Trailer" not in place.target.raw[0]


async def test_one_byte_at_a_time(place: Place) -> None:
    async with place.connected() as raw:
        for byte in put("Transfer-Encoding: chunked", body=b"2\r\nhe\r\n3\r\nllo\r\n0\r\nA: b\r\n\r\n"):
            await raw.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await raw.response()).status == 200
    assert place.target.requests[0].body == b"hello"


async def test_a_body_that_the_map_looks_at_is_read_before_the_decision(place: Place) -> None:
    body = b'{"mode": "dry"}'
    async with place.connected() as raw:
        data = request("POST /api/runs/a HTTP/1.1", f"Content-Length: {len(body)}", JSON, body=body)
        assert (await raw.ask(data)).status == 200
        data = request("POST /api/runs/a HTTP/1.1", "Transfer-Encoding: chunked", JSON)
        assert (await raw.ask(data + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))).status == 200
        data = request("POST /api/runs/a HTTP/1.1", "Content-Length: 16", JSON, body=b'{"mode": "real"}')
        assert (await raw.ask(data)).status == 403
    assert [one.body for one in place.target.requests] == [body, body]
    assert [one.values("content-length") for one in place.target.requests] == [["15"], ["15"]]
    assert [attempt.body for _, attempt, _ in place.gate.records] == [body, body, b'{"mode": "real"}']


@pytest.mark.parametrize("chunked", [False, True])
async def test_decided_body_over_the_limit_is_refused(place: Place, chunked: bool) -> None:
    size = 1024 * 1024 + 1
    async with place.connected() as raw:
        if chunked:
            data = request("POST /api/runs/a HTTP/1.1", "Transfer-Encoding: chunked")
            data += b"%x\r\n" % size + b" " * size
        else:
            data = request("POST /api/runs/a HTTP/1.1", f"Content-Length: {size}", body=b" " * size)
        raw.writer.write(data)
        assert (await raw.response()).status == 413
    assert [attempt.body for _, attempt, _ in place.gate.records] == [None]
    assert place.target.raw == []


async def test_expect_is_answered_by_the_gateway_and_not_passed_on(place: Place) -> None:
    async with place.connected() as raw:
        await raw.send(put("Content-Length: 5", "Expect: 100-continue"))
        assert await raw.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await raw.ask(b"hello")).status == 200
        await raw.send(request("POST /api/runs/a HTTP/1.1", "Content-Length: 2", "Expect: 100-continue"))
        assert await raw.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await raw.ask(b"{}")).status == 403
    assert place.target.requests[0].values("expect") == []
    assert len(place.target.requests) == 1


async def test_denied_request_with_expect_continue_sends_no_body(place: Place) -> None:
    async with place.connected() as raw:
        data = request("PATCH /api/files/a HTTP/1.1", "Content-Length: 5", "Expect: 100-continue")
        assert (await raw.ask(data)).status == 403
        assert await raw.ended()
    async with place.connected() as raw:
        assert (await raw.ask(put("Content-Length: 5", "Expect: 200-ok"))).status == 417
    assert place.target.raw == []


async def test_by_host_and_in_absolute_form(place: Place) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(b"GET /files/a HTTP/1.1\r\nHost: API.test\r\n\r\n")).status == 200
        data = b"GET http://api.test:80/files/a?x HTTP/1.1\r\nHost: api.test\r\n"
        data += b"Proxy-Authorization: Basic aGFuZGxlOg==\r\n\r\n"
        assert (await raw.ask(data)).status == 200
        assert (await raw.ask(b"GET http://api.test HTTP/1.1\r\nHost: api.test\r\n\r\n")).status == 200
    assert [one.target for one in place.target.requests] == ["/files/a", "/files/a?x", "/"]
    (_, by_host, _), (presented, absolute, _), (_, bare, _) = place.gate.records
    assert (by_host.authority, by_host.target_id, by_host.target) == ("api.test", None, "/files/a")
    assert (absolute.authority, absolute.scheme, absolute.target) == ("api.test", "http", "/files/a?x")
    assert (presented.handle, presented.htu) == ("handle", "http://api.test/files/a")
    assert bare.target == "/"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /api/files/a HTTP/1.1\r\nHost: elsewhere.test\r\n\r\n", 421),
        (b"GET http://elsewhere.test/files/a HTTP/1.1\r\nHost: elsewhere.test\r\n\r\n", 403),
        (b"GET http://api.test:8080/files/a HTTP/1.1\r\nHost: api.test:8080\r\n\r\n", 403),
        (b"GET /other/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n", 403),
        (b"GET /api HTTP/1.1\r\nHost: gateway.test\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\nHost: gateway.test\r\n\r\n", 404),
        (b"get /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n", 403),
        (b"TRACE /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n", 403),
    ],
)
async def test_request_for_an_unknown_target_is_rejected(place: Place, data: bytes, status: int) -> None:
    async with place.connected() as raw:
        response = await raw.ask(data)
        assert response.status == status
        assert response.value("content-type") == "application/problem+json"
    assert place.target.raw == []


async def test_request_without_a_decision_or_credential_is_not_forwarded(place: Place) -> None:
    async with place.connected() as raw:
        place.gate.available = False
        assert (await raw.ask(GET)).status == 503
        place.gate.available, place.gate.credentials = True, False
        response = await raw.ask(GET)
        assert (response.status, response.value("retry-after")) == (503, "1")
        place.gate.credentials = True
        assert (await raw.ask(GET)).status == 200
    assert len(place.target.requests) == 1


async def test_a_denied_body_is_not_taken_for_the_next_request(place: Place) -> None:
    async with place.connected() as raw:
        data = request("PATCH /api/files/a HTTP/1.1", f"Content-Length: {len(GET)}", body=GET)
        assert (await raw.ask(data)).status == 403
        assert await raw.ended()
    assert len(place.gate.records) == 1


# --- responses --------------------------------------------------------------------------------------------------------


def saying(response: bytes) -> Target:
    return Target(respond=lambda _: response)


async def test_responses_come_back_as_they_were_sent_but_for_the_hop() -> None:
    said = (
        b"HTTP/1.1 302 Found It\r\nLocation: http://169.254.169.254/\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\n"
        b"Connection: X-Named\r\nX-Named: gone\r\nKeep-Alive: timeout=5\r\nAlt-Svc: h3\r\n"
        b"Proxy-Authenticate: Basic\r\nContent-Length: 2\r\n\r\nok"
    )
    async with placed(saying(said)) as place, place.connected() as raw:
        await raw.send(GET)
        response = await raw.response()
    assert (response.status, response.body) == (302, b"ok")
    assert response.headers == [
        ("location", "http://169.254.169.254/"), ("set-cookie", "a=b"), ("set-cookie", "c=d"), ("content-length", "2"),
    ]  # fmt: skip
    assert len(place.target.raw) == 1


UNREADABLE = {
    "CL.TE": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "CL twice": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    "CL that is none": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok",
    "another TE": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a line that goes on": b"HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nContent-Length: 2\r\n\r\nok",
    "a bare LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "a NUL": b"HTTP/1.1 200 OK\r\nX-A: \x00\r\nContent-Length: 2\r\n\r\nok",
    "no status": b"HTTP/1.1 OK\r\nContent-Length: 2\r\n\r\nok",
    "another version": b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "a switch that nobody asked for": b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "a head without measure": b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 40_000 + b"\r\n\r\n",
    "compressed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nok",
    "nothing but 1xx": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 20,
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_a_response_that_cannot_be_read_for_certain_is_none(name: str) -> None:
    async with placed(saying(UNREADABLE[name])) as place, place.connected() as raw:
        assert (await raw.ask(GET)).status == 502
        await place.target.gone.wait()  # the connection is not used again


@pytest.mark.parametrize(
    ("said", "method", "body"),
    [
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-T: a\r\n\r\n",
            "GET",
            b"ok",
        ),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "GET", b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "GET", b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HEAD", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + OK, "GET", b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "GET", b""),
    ],
)
async def test_responses_that_end_for_certain_leave_both_connections_open(
    said: bytes, method: str, body: bytes
) -> None:
    data = GET.replace(b"GET", method.encode())
    async with placed(saying(said)) as place, place.connected() as raw:
        for _ in range(3):
            await raw.send(data)
            response = await raw.response(method)
            assert (response.body, raw.left) == (body, b"")
        assert len(place.target.raw) == 1
        assert place.plane.upstreams.open == 1


async def test_no_content_response_loses_its_content_length() -> None:
    answer = b"HTTP/1.1 204 No Content\r\nContent-Length: 30\r\n\r\n"
    async with placed(saying(answer)) as place, place.connected() as raw:
        for _ in range(2):  # once by each way through the plane
            assert (await raw.ask(GET)).value("content-length") is None


async def test_a_connection_on_which_more_comes_than_was_asked_for_is_not_used_again() -> None:
    async with placed(saying(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")) as place:
        async with place.connected() as raw:
            for _ in range(3):
                assert (await raw.ask(GET)).body == b"ok"
        assert len(place.target.raw) == 3


async def test_a_response_until_the_end_of_the_connection_ends_the_agents_too() -> None:
    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it")

    async with placed(Target(script=script)) as place, place.connected() as raw:
        response = await raw.ask(GET)
        assert (response.body, response.value("connection")) == (b"all of it", "close")
        assert await raw.ended()


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    said = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    async with placed(saying(said)) as place, place.connected() as raw:
        await raw.send(GET.replace(b"HTTP/1.1", b"HTTP/1.0"))
        data = await raw.reader.read()
        assert data.endswith(b"\r\n\r\nok")
        assert b"Transfer-Encoding" not in data


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ],
)
async def test_a_response_that_breaks_off_is_seen_to_break_off(sent: bytes) -> None:
    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)

    async with placed(Target(script=script)) as place, place.connected() as raw:
        with pytest.raises((h11.RemoteProtocolError, ConnectionError)):
            await raw.ask(GET)


async def test_a_target_that_is_away_or_leaves_is_told(place: Place) -> None:
    with_entry(place.gate, "api", url="http://127.0.0.1:9")
    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 502

    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with placed(Target(script=script)) as other, other.connected() as raw:
        assert (await raw.ask(GET)).status == 502
        assert (await raw.ask(GET)).status == 502


async def test_a_kept_connection_that_the_target_closed_is_noticed_in_time() -> None:
    served = 0

    async def script(reader: Reader, writer: Writer) -> None:
        nonlocal served
        await reader.readuntil(b"\r\n\r\n")
        served += 1
        writer.write(OK)
        await writer.drain()
        if served % 2:  # the next request on this connection finds it closed
            await reader.readuntil(b"\r\n\r\n")

    async with placed(Target(script=script)) as place, place.connected() as raw:
        for _ in range(4):
            assert (await raw.ask(GET)).status == 200
        assert served == 4


async def test_non_idempotent_request_is_sent_once() -> None:
    served = 0

    async def script(reader: Reader, writer: Writer) -> None:
        nonlocal served
        await reader.readuntil(b"\r\n\r\n")
        served += 1
        writer.write(OK)
        await reader.readuntil(b"\r\n\r\n")
        served += 1

    async with placed(Target(script=script)) as place, place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        assert (await raw.ask(put("Content-Length: 0"))).status == 502
        assert served == 2


async def test_patience_ends() -> None:
    async def silent(reader: Reader, writer: Writer) -> None:
        await reader.read()

    timeouts = Timeouts(head_s=0.3, idle_s=0.3, piece_s=0.3, response_s=0.3, stream_s=0.3)
    async with placed(Target(script=silent), timeouts=timeouts) as place:
        async with place.connected() as raw:
            assert (await raw.ask(GET)).status == 504  # the target says nothing
        async with place.connected() as raw:
            assert (await raw.ask(b"GET /api/fi")).status == 408
        async with place.connected() as raw:
            assert await raw.ended()  # it says nothing itself
        async with place.connected() as raw:
            assert (await raw.ask(put("Content-Length: 5", body=b"he"))).status == 408
        async with place.connected() as raw:
            data = request("POST /api/runs/a HTTP/1.1", "Content-Length: 5", body=b"he")
            assert (await raw.ask(data)).status == 408
        await all_gone(place)


async def all_gone(place: Place) -> None:
    """Until the plane holds no connection, to nobody."""
    while place.plane.connections or place.plane.limits.connections or place.target.open:
        place.plane.upstreams.close()
        await asyncio.sleep(0.01)
    assert place.plane.upstreams.open == 0


# --- redaction --------------------------------------------------------------------------------------------------------


def echoing(shown: bytes) -> Target:
    def respond(received: Received) -> bytes:
        return (
            b"HTTP/1.1 200 OK\r\nX-Echo: " + shown + b"\r\nContent-Type: text/plain\r\n"
            b"Content-Length: %d\r\n\r\n<%b>" % (len(shown) + 2, shown)
        )

    return Target(respond=respond)


@pytest.mark.parametrize(
    "shown",
    [
        SECRET.encode(),
        b"Bearer " + SECRET.encode(),
        base64.b64encode(SECRET.encode()),
        base64.b64encode(b"a" + SECRET.encode() + b"b"),
        base64.urlsafe_b64encode(b"ab" + SECRET.encode()),
    ],
)
async def test_a_secret_that_the_target_echoes_is_not_shown(shown: bytes) -> None:
    async with placed(echoing(shown)) as place, place.connected() as raw:
        response = await raw.ask(GET)
    assert response.status == 200
    for seen in (response.body, (response.value("x-echo") or "").encode()):
        assert shown not in seen
        assert b"*" * 20 in seen
    assert len(response.body) == len(shown) + 2


ODD = "p+/=&<\"q' r`s!*(t)"


@pytest.mark.parametrize(
    "shown",
    [
        ODD,
        quote(ODD, safe=""), quote(ODD, safe="").lower(), quote(ODD), quote_plus(ODD), quote(ODD, safe="!~*'()"),
        quote(ODD, safe=";,/?:@&=+$!~*'()#"), "p%2b%2f%3d%26%3c%22q%27+r%60s%21%2a%28t%29",
        json.dumps(ODD)[1:-1], json.dumps(ODD)[1:-1].replace("/", "\\/"),
        'p+/=\\u0026\\u003c\\"q\' r`s!*(t)', 'p\\u002B/=\\u0026\\u003C\\u0022q\\u0027 r\\u0060s!*(t)',
        html.escape(ODD), html.escape(ODD, quote=False), "p&#43;/=&amp;&lt;&#34;q&#39; r`s!*(t)",
        "p+/=&amp;&lt;&quot;q&#39; r`s!*(t)", "p+&#x2F;&#x3D;&amp;&lt;&quot;q&#39; r&#x60;s!*(t)",
        ODD.encode().hex(), ODD.encode().hex().upper(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_secret_is_not_shown_in_the_ways_in_which_libraries_write_it(
    shown: str, at_once: bool
) -> None:
    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b"<" + shown.encode() + b">"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        for piece in [body] if at_once else [body[:7], body[7:9], body[9:]]:
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.write(piece)

    async with placed(Target(script=script)) as place, place.connected() as raw:
        with_entry(place.gate, "api", injected={"X-Api-Key": ODD})
        assert (await raw.ask(GET)).body == b"<" + b"*" * len(shown) + b">"


async def test_the_parts_of_basic_credentials_are_not_shown() -> None:
    pair = "robot:" + SECRET
    basic = base64.b64encode(pair.encode()).decode()
    for shown in (basic, pair, SECRET):
        async with placed(echoing(shown.encode())) as place, place.connected() as raw:
            with_entry(place.gate, "api", injected={"Authorization": f"Basic {basic}"})
            response = await raw.ask(GET)
        assert SECRET.encode() not in response.body
        assert basic.encode() not in response.body


async def test_a_secret_in_pieces_is_not_shown() -> None:
    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for byte in b"<" + SECRET.encode() + b">":
            writer.write(b"1\r\n%c\r\n" % byte)
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async with placed(Target(script=script)) as place, place.connected() as raw:
        body = (await raw.ask(GET)).body
    assert len(body) == len(SECRET) + 2
    assert body[5:] == b"*" * (len(SECRET) - 4) + b">"


# --- both ways at once ------------------------------------------------------------------------------------------------


async def test_a_stream_comes_as_it_is_sent_both_ways() -> None:
    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while (piece := await reader.readexactly(8)) and not piece.startswith(b"0"):
            writer.write(piece)  # 3\r\nabc\r\n
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        await reader.read()

    async with placed(Target(script=script)) as place, place.connected() as raw:
        await raw.send(put("Transfer-Encoding: chunked"))
        assert (await raw.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        for piece in (b"3\r\nabc\r\n", b"3\r\ndef\r\n"):
            await raw.send(piece)
            assert await raw.reader.readexactly(8) == piece
        await raw.send(b"0\r\n\r\n")


async def test_an_answer_before_the_end_of_the_request_is_passed_on() -> None:
    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await reader.read()

    async with placed(Target(script=script)) as place, place.connected() as raw:
        response = await raw.ask(put("Content-Length: 1000000", body=b"a" * 1000))
        assert (response.status, response.value("connection")) == (413, "close")
        await raw.send(b"a" * 1000)
        assert await raw.ended()
        await all_gone(place)


@pytest.mark.parametrize("upwards", [True, False])
async def test_slow_reader_stops_the_sender_by_backpressure(upwards: bool) -> None:
    go = asyncio.Event()
    size, limit = 32 * 1024 * 1024, 16 * 1024 * 1024
    received = sent = 0

    async def script(reader: Reader, writer: Writer) -> None:
        nonlocal received, sent
        await reader.readuntil(b"\r\n\r\n")
        if upwards:
            await go.wait()
            while received < size:
                received += len(await reader.read(1 << 20))
            writer.write(OK)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            while sent < size:
                writer.write(b"a" * 65536)
                await writer.drain()
                sent += 65536
        await writer.drain()
        await reader.read()

    async with placed(Target(script=script)) as place, place.connected() as raw:
        if upwards:
            await raw.send(put(f"Content-Length: {size}"))
            sending = asyncio.create_task(_send_all(raw.writer, size))
            await _stands_still(lambda: _unsent(raw.writer, sending))
            assert not sending.done()
            go.set()
            await sending
            assert (await raw.response()).status == 200
            assert received == size
        else:
            await raw.send(GET)
            await _stands_still(lambda: sent)
            assert 0 < sent < limit
            await raw.reader.readuntil(b"\r\n\r\n")
            left = size
            while left and (piece := await raw.reader.read(1 << 20)):
                left -= len(piece)
            assert left == 0
        assert place.plane.connections == 1


async def _send_all(writer: asyncio.StreamWriter, size: int) -> None:
    for _ in range(size // 65536):
        writer.write(b"a" * 65536)
        await writer.drain()


def _unsent(writer: asyncio.StreamWriter, sending: asyncio.Task[None]) -> int:
    return 0 if sending.done() else writer.transport.get_write_buffer_size()


async def _stands_still(count: object) -> None:
    """Until what is counted has not changed for a while."""
    assert callable(count)
    last, same = None, 0
    while same < 20:
        await asyncio.sleep(0.02)
        now = count()
        same = same + 1 if now == last and now else 0
        last = now


async def test_a_client_that_leaves_takes_the_targets_connection_along() -> None:
    came = asyncio.Event()

    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        came.set()
        await reader.read()

    async with placed(Target(script=script)) as place:
        for data in (put("Content-Length: 100", body=b"half"), GET):
            came.clear()
            place.target.gone.clear()
            async with connected(place.port) as raw:
                await raw.send(data)
                await came.wait()
            await place.target.gone.wait()
        await all_gone(place)


async def test_a_client_that_leaves_in_mid_response_takes_it_along() -> None:
    async def script(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await reader.read()

    async with placed(Target(script=script)) as place:
        async with connected(place.port) as raw:
            await raw.send(GET)
            await raw.reader.readuntil(b"1\r\na\r\n")
        await place.target.gone.wait()
        await all_gone(place)


async def test_a_request_is_not_sent_again_without_its_body(place: Place) -> None:
    """Where the target closes a kept connection, what was sent of a body is gone."""
    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        place.target.respond = _gone
        assert (await raw.ask(put("Content-Length: 5", body=b"hello"))).status == 502
    assert [one.body for one in place.target.requests] == [b"", b"hello"]


async def test_request_approved_by_a_person_is_sent_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the connection that was kept for its target is closed."""
    decide, asks = place.gate.decide, GET.replace(b"/a ", b"/asks ")

    async def approved(presented: PresentedIdentity, attempt: Attempt, *others: Any) -> Verdict:
        assert attempt.headers is not None
        return replace(await decide(presented, attempt, *others), headers=attempt.headers())

    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 200
        monkeypatch.setattr(place.gate, "cached_allowance", lambda *_: None)
        monkeypatch.setattr(place.gate, "decide", approved)
        place.target.respond = _gone
        assert (await raw.ask(asks)).status == 502
    assert len(place.target.requests) == 2
    async with place.connected() as raw:
        place.target.respond = lambda _: OK
        assert (await raw.ask(asks)).status == 200


def _gone(received: Received) -> bytes:
    raise ConnectionError
