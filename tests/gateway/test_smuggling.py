"""What two readers could understand differently is refused, the connection closed, and nothing reaches the target."""

from __future__ import annotations

import pytest

from tests.gateway.conftest import Place

HOST = b"Host: gateway.test\r\n"


def post(*lines: bytes, body: bytes = b"") -> bytes:
    return (
        b"POST /api/files/a HTTP/1.1\r\n" + HOST + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body
    )


def get(*lines: bytes, first: bytes = b"GET /api/files/a HTTP/1.1", host: bytes = HOST) -> bytes:
    return first + b"\r\n" + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


SMUGGLED = b"DELETE /files/a HTTP/1.1\r\nHost: api.test\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"

REFUSED = {
    "CL.TE": post(b"Content-Length: 6", CHUNKED, body=b"0\r\n\r\nX"),
    "TE.CL": post(CHUNKED, b"Content-Length: 4", body=b"2\r\nab\r\n0\r\n\r\n"),
    "TE.TE": post(CHUNKED, b"Transfer-Encoding: identity", body=b"0\r\n\r\n"),
    "TE twice the same": post(CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    "TE with another before": post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "TE with another name": post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "TE in capitals": post(b"Transfer-Encoding: Chunked", body=b"0\r\n\r\n"),
    "TE with a vertical tab": post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"),
    "TE quoted": post(b'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n"),
    "TE with an underscore": post(b"Transfer_Encoding: chunked", b"Content-Length: 4", body=b"0\r\n\r\n"),
    "TE in HTTP/1.0": get(CHUNKED, first=b"POST /api/files/a HTTP/1.0") + b"0\r\n\r\n",
    "TE in a line that goes on": post(b"Transfer-Encoding:\r\n chunked", body=b"0\r\n\r\n"),
    "TE before a space": post(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"),
    "CL twice": post(b"Content-Length: 2", b"Content-Length: 2", body=b"ab"),
    "CL twice, differing": post(b"Content-Length: 2", b"Content-Length: 3", body=b"ab"),
    "CL as a list": post(b"Content-Length: 2, 2", body=b"ab"),
    "CL with a plus": post(b"Content-Length: +2", body=b"ab"),
    "CL with a minus": post(b"Content-Length: -2", body=b"ab"),
    "CL in hexadecimal": post(b"Content-Length: 0x2", body=b"ab"),
    "CL with a zero before": post(b"Content-Length: 02", body=b"ab"),
    "CL with an underscore": post(b"Content_Length: 2", body=b"ab"),
    "CL of nothing": post(b"Content-Length:", body=b"ab"),
    "CL beyond all": post(b"Content-Length: 99999999999999999999", body=b"ab"),
    "CL in other digits": post("Content-Length: ２".encode(), body=b"ab"),
    "a line that goes on": get(b"X-A: b", b" c"),
    "a line that goes on with a tab": get(b"X-A: b", b"\tc"),
    "a line that goes on first": b"GET /api/files/a HTTP/1.1\r\n Host: gateway.test\r\n\r\n",
    "a bare LF": get(b"X-A: b\nX-B: c"),
    "a bare CR": get(b"X-A: b\rX-B: c"),
    "a bare CR at the end": get(b"X-A: b\r"),
    "only LF": b"GET /api/files/a HTTP/1.1\nHost: gateway.test\n\n",
    "a NUL in a value": get(b"X-A: b\x00c"),
    "a NUL in a name": get(b"X\x00A: b"),
    "a NUL in the target": get(first=b"GET /api/files/a\x00 HTTP/1.1"),
    "space before a colon": get(b"X-A : b"),
    "tab before a colon": get(b"X-A\t: b"),
    "a field without a name": get(b": b"),
    "a field without a colon": get(b"X-A"),
    "a name that is none": get(b"X(A): b"),
    "no Host": get(host=b""),
    "Host twice": get(b"Host: gateway.test"),
    "Host twice, differing": get(b"Host: elsewhere.test"),
    "Host of nothing": get(host=b"Host:\r\n"),
    "Host with an underscore": get(host=b"Host_: gateway.test\r\n"),
    "Host with a user": get(host=b"Host: a@gateway.test\r\n"),
    "Host with a dot after": get(host=b"Host: gateway.test.\r\n"),
    "Host with two ports": get(host=b"Host: gateway.test:80:80\r\n"),
    "Host with an empty port": get(host=b"Host: gateway.test:\r\n"),
    "Host with a port beyond all": get(host=b"Host: gateway.test:65536\r\n"),
    "Host with a path": get(host=b"Host: gateway.test/x\r\n"),
    "Host as a list": get(host=b"Host: gateway.test, api.test\r\n"),
    "Host in other letters": get(host="Host: gatewaу.test\r\n".encode()),
    "IPv6 without brackets": get(host=b"Host: ::1\r\n"),
    "IPv6 that is none": get(host=b"Host: [::1::2]\r\n"),
    "IPv6 with a zone": get(host=b"Host: [fe80::1%25eth0]\r\n"),
    "IPv6 without an end": get(host=b"Host: [::1\r\n"),
    "IPv4 in short": get(host=b"Host: 127.1\r\n"),
    "IPv4 in hexadecimal": get(host=b"Host: 0x7f.0.0.1\r\n"),
    "IPv4 as a number": get(host=b"Host: 2130706433\r\n"),
    "IPv4 in octal": get(host=b"Host: 0177.0.0.01\r\n"),
    "Host against absolute-form": get(first=b"GET http://api.test/files/a HTTP/1.1"),
    "absolute-form with a user": get(first=b"GET http://a@api.test/ HTTP/1.1", host=b"Host: api.test\r\n"),
    "absolute-form with a dot": get(first=b"GET http://api.test./ HTTP/1.1", host=b"Host: api.test.\r\n"),
    "absolute-form without a host": get(first=b"GET http:///files/a HTTP/1.1"),
    "absolute-form of another scheme": get(first=b"GET ftp://api.test/ HTTP/1.1", host=b"Host: api.test\r\n"),
    "asterisk-form": get(first=b"OPTIONS * HTTP/1.1"),
    "authority-form": get(first=b"GET api.test:443 HTTP/1.1", host=b"Host: api.test\r\n"),
    "a relative target": get(first=b"GET files/a HTTP/1.1"),
    "a target with a space": get(first=b"GET /api/files/a b HTTP/1.1"),
    "a target with raw UTF-8": get(first="GET /api/files/é HTTP/1.1".encode()),
    "two spaces": get(first=b"GET  /api/files/a HTTP/1.1"),
    "a tab for a space": get(first=b"GET\t/api/files/a\tHTTP/1.1"),
    "a space after the version": get(first=b"GET /api/files/a HTTP/1.1 "),
    "a space before the method": get(first=b" GET /api/files/a HTTP/1.1"),
    "an empty line before": b"\r\n" + get(),
    "Connection with names beyond all": get(b"Connection: " + b"a," * 200),
    "HTTP/0.9": b"GET /api/files/a\r\n\r\n",
    "HTTP/1.2": get(first=b"GET /api/files/a HTTP/1.2"),
    "HTTP/2": get(first=b"GET /api/files/a HTTP/2.0"),
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "the version in small letters": get(first=b"GET /api/files/a http/1.1"),
    "HTTP/01.1": get(first=b"GET /api/files/a HTTP/01.1"),
    "another method by a header": get(b"X-HTTP-Method-Override: DELETE"),
    "another method by a header with underscores": get(b"X_HTTP_Method_Override: DELETE"),
    "another path by a header": get(b"X-Original-URL: /files/b"),
    "Authorization twice": get(b"Authorization: DPoP a", b"Authorization: DPoP b"),
    "a spoofed header with underscores": get(b"X_Forwarded_Uri: /files/b"),
    "an address by a header with underscores": get(b"X_Real_IP: 127.0.0.1"),
    "a CONNECT with a body": b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\nContent-Length: 2\r\n\r\nab",
    "a CONNECT with bytes behind": b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n\x16\x03",
    "a CONNECT against its Host": b"CONNECT api.test:443 HTTP/1.1\r\nHost: elsewhere.test\r\n\r\n",
    "a CONNECT without a port": b"CONNECT api.test HTTP/1.1\r\nHost: api.test\r\n\r\n",
    "a CONNECT with a user": b"CONNECT a@api.test:443 HTTP/1.1\r\nHost: a@api.test:443\r\n\r\n",
}  # fmt: skip

BODIES = {
    "an extension of a chunk": b"2;a=b\r\nab\r\n0\r\n\r\n",
    "a space after a size": b"2 \r\nab\r\n0\r\n\r\n",
    "a space before a size": b" 2\r\nab\r\n0\r\n\r\n",
    "a size with 0x": b"0x2\r\nab\r\n0\r\n\r\n",
    "a size with a minus": b"-2\r\nab\r\n0\r\n\r\n",
    "a size beyond all": b"fffffffff\r\nab\r\n0\r\n\r\n",
    "a size that wraps": b"100000000000000002\r\nab\r\n0\r\n\r\n",
    "no size": b"\r\nab\r\n0\r\n\r\n",
    "LF after a size": b"2\nab\r\n0\r\n\r\n",
    "more than the size": b"2\r\nabc\r\n0\r\n\r\n",
    "LF after a chunk": b"2\r\nab\n0\r\n\r\n",
    "a trailer that is none": b"2\r\nab\r\n0\r\nX A: b\r\n\r\n",
    "a trailer that goes on": b"2\r\nab\r\n0\r\nX-A: b\r\n c\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
async def test_ambiguous_request_is_rejected_and_not_forwarded(place: Place, name: str) -> None:
    async with place.connected() as raw:
        response = await raw.ask(REFUSED[name] + SMUGGLED)
        assert response.status == 400, response
        assert response.value("connection") == "close"
        assert await raw.ended()
    assert place.target.requests == []
    assert place.target.raw == []
    assert place.gate.records == []


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_that_is_ambiguous_never_becomes_a_whole_request(place: Place, name: str) -> None:
    async with place.connected() as raw:
        await raw.send(post(CHUNKED, body=BODIES[name]) + SMUGGLED)
        response = await raw.response()
        assert response.status == 400, response
        assert await raw.ended()
    assert place.target.requests == []
    assert not any(b"DELETE" in seen for seen in place.target.raw)


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_that_is_read_for_the_decision_is_refused_alike(place: Place, name: str) -> None:
    async with place.connected() as raw:
        head = b"POST /api/runs/a HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n\r\n"
        assert (await raw.ask(head + BODIES[name] + SMUGGLED)).status == 400
        assert await raw.ended()
    assert place.target.raw == []
    assert place.gate.records == []


@pytest.mark.parametrize(
    "data",
    [
        b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\nX-A: " + b"a" * 40_000 + b"\r\n\r\n",
        get(*(b"X-A: b" for _ in range(200))),
    ],
)
async def test_a_head_without_measure_is_refused(place: Place, data: bytes) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(data)).status == 431
        assert await raw.ended()
    assert place.target.raw == []


async def test_a_target_without_measure_is_refused(place: Place) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(get(first=b"GET /api/files/" + b"a" * 9000 + b" HTTP/1.1"))).status == 400
    assert place.target.raw == []


async def test_requests_in_one_packet_are_decided_one_after_the_other(place: Place) -> None:
    async with place.connected() as raw:
        await raw.send(
            post(b"Content-Length: 2", body=b"ab")
            + b"DELETE /api/files/a HTTP/1.1\r\n" + HOST + b"\r\n"
            + get()
        )  # fmt: skip
        assert [(await raw.response()).status for _ in range(3)] == [200, 403, 200]
    assert [(one.method, one.body) for one in place.target.requests] == [("POST", b"ab"), ("GET", b"")]
    assert [attempt.method for _, attempt, _ in place.gate.records] == ["POST", "DELETE", "GET"]


@pytest.mark.parametrize(
    "target",
    [
        "/files/%2e%2e/a", "/files/../a", "/files/./a", "//files/a", "/files//a", "/files/a;x", "/files/a%3bx",
        "/files/%252e", "/files/%c0%ae", "/files/%ff", "/files/a%2fb", "/files/a%5cb", "/files/a\\b", "/files/%00",
        "/files/%", "/files/%zz", "/FILES/a", "/files/a#b", "/files/a?x#b", "/files/%0d%0aHost:%20x", "/files/",
        "/files",
    ],
)  # fmt: skip
async def test_paths_that_others_read_otherwise_are_judged_as_they_were_sent(
    place: Place, target: str
) -> None:
    async with place.connected() as raw:
        response = await raw.ask(f"GET /api{target} HTTP/1.1\r\nHost: gateway.test\r\n\r\n".encode())
        assert response.status == 403
    assert place.gate.last[1].target == target
    assert place.target.raw == []


@pytest.mark.parametrize(
    "target", ["/files/a%41", "/files/a?x=%2e%2e", "/files/a?", "/files/%C3%A9", "/files/~a.b"]
)
async def test_allowed_request_is_forwarded_with_its_exact_path(place: Place, target: str) -> None:
    async with place.connected() as raw:
        data = f"GET /api{target} HTTP/1.1\r\nHost: gateway.test\r\n\r\n".encode()
        assert (await raw.ask(data)).status == 200
    assert place.gate.last[1].target == target
    assert place.target.requests[0].target == target
