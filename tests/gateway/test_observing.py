"""What is only observed goes on exactly as it came, and nothing else does."""

from __future__ import annotations

import asyncio
import gzip

import pytest

from tests.gateway.conftest import Place
from tests.gateway.raw import Response, connected_unix
from tests.gateway.table_gate import SECRET, TASK
from tests.gateway.target import Received
from tests.gateway.test_forwarding import request

OLD = "Authorization: Bearer what-all-of-them-share"
LEASE = "0b1f2c3d-0000-4000-8000-000000000001"
DELETE = "DELETE /api/files/a?x=1 HTTP/1.1"
"""No lease allows it."""


@pytest.fixture(autouse=True)
def observing(place: Place) -> None:
    place.gate.observed = frozenset({"api"})


async def ask(place: Place, first: str, *lines: str, body: bytes = b"") -> Response:
    async with place.connected() as raw:
        return await raw.ask(request(first, *lines, body=body))


def sent(place: Place) -> list[str]:
    return bytes(place.target.raw[0]).decode("latin-1").split("\r\n")


async def test_observed_request_is_forwarded_unchanged(place: Place) -> None:
    response = await ask(
        place, DELETE, "Accept: text/plain", "X-Own:  two  spaces ", "x-own: again", OLD, "Cookie: a=b",
        "Accept-Encoding: gzip", f"X-Ringfence-Handle: {LEASE}", "DPoP: a.b.c", "X-Ringfence-Label: issue",
        "Connection: keep-alive, X-Named", "X-Named: gone", "Keep-Alive: timeout=5", "TE: trailers", "Upgrade: h2c",
        "Proxy-Authorization: Basic eDo=", "Proxy-Connection: close", "Forwarded: for=1.1.1.1", "X-Real-IP: 1.1.1.1",
        "X-Forwarded-For: 1.1.1.1",
    )  # fmt: skip
    assert response.status == 200
    assert sent(place) == [
        "DELETE /files/a?x=1 HTTP/1.1", f"Host: 127.0.0.1:{place.target.port}", "Accept: text/plain",
        "X-Own:  two  spaces ", "x-own: again", OLD, "Cookie: a=b", "Accept-Encoding: gzip", "", "",
    ]  # fmt: skip
    presented, attempt, verdict = place.gate.last
    assert (presented.handle, presented.proof, attempt.label) == (LEASE, "a.b.c", "issue")
    assert presented.header_names == {"accept", "x-own", "authorization", "cookie", "accept-encoding"}
    assert (verdict.allowed, verdict.observed, verdict.lease) == (False, True, None)
    assert place.gate.watching == {}, "it is bound to no lease"


async def test_allowed_request_replaces_the_observed_credential(place: Place) -> None:
    response = await ask(
        place, "GET /api/files/a HTTP/1.1", OLD, f"X-Ringfence-Handle: {LEASE}", "DPoP: a.b.c"
    )
    assert response.status == 200
    assert place.target.requests[0].values("authorization") == [f"Bearer {SECRET}"]
    assert b"what-all-of-them-share" not in place.target.raw[0]
    assert place.gate.last[0].handle == LEASE


@pytest.mark.parametrize("authorization", [f"Authorization: DPoP {LEASE}", f"authorization:dpop {LEASE}"])
async def test_a_handle_in_authorization_is_nothing_of_the_agents_own(
    place: Place, authorization: str
) -> None:
    assert (await ask(place, DELETE, authorization, "DPoP: a.b.c")).status == 403
    assert "authorization" not in place.gate.last[0].header_names
    assert place.target.raw == []
    assert (await ask(place, DELETE, authorization, "DPoP: a.b.c", "Cookie: a=b")).status == 200
    assert "DPoP" not in bytes(place.target.raw[0]).decode()
    assert LEASE not in bytes(place.target.raw[0]).decode()


async def test_header_named_in_connection_is_not_observed(place: Place) -> None:
    assert (await ask(place, DELETE, OLD, "Connection: Authorization")).status == 403
    assert place.gate.last[0].header_names == frozenset()


@pytest.mark.parametrize(
    "lines",
    [
        (f"Authorization: DPoP {LEASE}", f"X-Ringfence-Handle: {LEASE}"),
        (f"X-Ringfence-Handle: {LEASE}", f"X-Ringfence-Handle: {LEASE}"),
        (f"X_Ringfence_Handle: {LEASE}",),
    ],
)
async def test_a_handle_comes_once(place: Place, lines: tuple[str, ...]) -> None:
    assert (await ask(place, DELETE, "Cookie: a=b", *lines)).status == 400
    assert place.gate.records == []
    assert place.target.raw == []


async def test_the_handle_beside_an_authorization_counts_before_the_proxys(place: Place) -> None:
    proxy = "Proxy-Authorization: Basic cHJveHk6"
    await ask(place, DELETE, OLD, proxy)
    assert place.gate.last[0].handle == "proxy"
    await ask(place, DELETE, OLD, proxy, f"X-Ringfence-Handle: {LEASE}")
    assert place.gate.last[0].handle == LEASE


async def test_unobserved_request_stays_denied(place: Place) -> None:
    place.gate.observed = frozenset({"another"})
    assert (await ask(place, DELETE, OLD)).status == 403
    place.gate.observed = frozenset({"api"})
    assert (await ask(place, DELETE)).status == 403
    place.gate.available = False
    place.gate.observed = frozenset()
    assert (await ask(place, DELETE, OLD)).status == 503
    assert place.target.raw == []


async def test_a_response_is_passed_on_as_it_is(place: Place) -> None:
    """There is no secret of Ringfence in it: it may be compressed, and the agent's own is the agent's."""
    packed = gzip.compress(b"what-all-of-them-share " + SECRET.encode())

    def respond(received: Received) -> bytes:
        assert received.values("accept-encoding") == ["gzip"]
        return b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (
            len(packed),
            packed,
        )

    place.target.respond = respond
    response = await ask(place, DELETE, OLD, "Accept-Encoding: gzip")
    assert (response.value("content-encoding"), response.body) == ("gzip", packed)
    place.target.respond = lambda _: (
        b"HTTP/1.1 200 OK\r\nX-Echo: %b\r\nContent-Length: 0\r\n\r\n" % OLD.encode()
    )
    assert (await ask(place, DELETE, OLD)).value("x-echo") == OLD


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("more", [1, 3 * 1024 * 1024])
async def test_a_body_too_large_to_be_decided_by_streams_on(place: Place, chunked: bool, more: int) -> None:
    body = bytes(range(256)) * 4096 + b"x" * more
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    async with place.connected() as raw:
        raw.writer.write(
            request("POST /api/runs/a HTTP/1.1", OLD, framing, "Expect: 100-continue", body=data)
        )
        assert (await raw.response()).status == 200
    assert place.target.requests[0].body == body
    _, attempt, verdict = place.gate.last
    assert (attempt.body, verdict.status, verdict.observed) == (None, 413, True)


async def test_the_agent_is_told_to_go_on_once(place: Place) -> None:
    size = 2 * 1024 * 1024
    async with place.connected() as raw:
        await raw.send(
            request("POST /api/runs/a HTTP/1.1", OLD, f"Content-Length: {size}", "Expect: 100-continue")
        )
        assert (await raw.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        raw.writer.write(b"x" * (1024 * 1024 + 1))
        while not place.gate.records:
            await asyncio.sleep(0.01)
        raw.writer.write(b"x" * (size - 1024 * 1024 - 1))
        assert (await raw.reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
    assert len(place.target.requests[0].body) == size


async def test_through_the_socket_of_a_task(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("s") / "t.sock"
    await place.plane.listen_for_task(path, TASK)
    async with connected_unix(str(path)) as raw:
        assert (await raw.ask(request(DELETE, OLD))).status == 200
    assert place.gate.last[0].task_id == TASK
    assert OLD in sent(place)
