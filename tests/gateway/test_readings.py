"""What a target might take for something else than was decided on: bodies, and what is said to proxies."""

from __future__ import annotations

import pytest

from tests.gateway.conftest import Place
from tests.gateway.raw import Raw

HEAD = b"POST /api/runs/a HTTP/1.1\r\nHost: gateway.test\r\n"
DRY = b'{"mode": "dry", "x": "&mode=real&"}'


def post(*lines: bytes, body: bytes = DRY) -> bytes:
    sized = b"Content-Length: %d" % len(body)
    return HEAD + b"".join(line + b"\r\n" for line in (*lines, sized)) + b"\r\n" + body


@pytest.mark.parametrize("idling", [False, True])
@pytest.mark.parametrize(
    "lines",
    [
        [],
        [b"Content-Type: application/x-www-form-urlencoded"],
        [b"Content-Type: text/plain"],
        [b"Content-Type: application/json; charset=utf-7"],
        [b"Content-Type: application/json", b"Content-Encoding: gzip"],
        [b"Content-Type: multipart/form-data; boundary=dry"],
    ],
)
async def test_a_body_is_no_json_because_it_could_be(place: Place, lines: list[bytes], idling: bool) -> None:
    """Read as a form, the same bytes ask for the stronger verb."""
    async with place.connected() as raw:
        if idling:
            await whole(raw, place)
        assert (await raw.ask(post(*lines))).status in (403, 413)
        assert not any(b"dry" in seen for seen in place.target.raw[idling:])
        assert len(place.target.requests) == idling


async def whole(raw: Raw, place: Place) -> None:
    assert (await raw.ask(post(b"Content-Type: application/json"))).status == 200
    assert place.target.requests[-1].body == DRY


@pytest.mark.parametrize("name", [b"Content-Type", b"content-encoding"])
async def test_body_header_named_in_connection_is_rejected(place: Place, name: bytes) -> None:
    async with place.connected() as raw:
        lines = (b"Content-Type: application/json", b"Connection: keep-alive, " + name)
        assert (await raw.ask(post(*lines))).status == 400
    assert place.target.raw == []


@pytest.mark.parametrize(
    "line",
    [
        b"Forwarded: for=127.0.0.1", b"X-Forwarded-For: 127.0.0.1", b"X-Forwarded-Host: admin", b"X-Real-IP: 127.0.0.1",
        b"X-Client-IP: 127.0.0.1", b"True-Client-IP: 127.0.0.1", b"Client-Cert: :AAAA:", b"X-Remote-User: admin",
        b"Remote-User: admin", b"X-WebAuth-User: admin", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQ", b"A-IM: gzip",
    ],
)  # fmt: skip
async def test_proxy_headers_of_an_agent_are_removed(place: Place, line: bytes) -> None:
    connection = b"Connection: Upgrade, HTTP2-Settings"
    get = b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n%b\r\n%b\r\n\r\n"
    async with place.connected() as raw:
        assert (await raw.ask(get % (connection, line))).status == 200
        (received,) = place.target.requests
        assert received.values(line.partition(b":")[0].decode().lower()) == []
        underscored = line.replace(b"-", b"_", line.partition(b":")[0].count(b"-"))
        if b"_" in underscored and not line.startswith((b"HTTP2", b"A-IM")):
            assert (await raw.ask(get % (connection, underscored))).status == 400
