"""A target that does not read the body of a GET takes it for the next request: no such body may reach it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringfence.gateway.contract import BlockedRequest
from ringfence.gateway.dataplane.plane import DataPlane
from tests.gateway.mcp_place import DEPLOYS, mcp_placed
from tests.gateway.raw import Raw, Response, connected, connected_unix
from tests.gateway.table_gate import Entry, TableGate, data_plane, rule
from tests.support.servers.unread_bodies import Executed, serving_unread_bodies

SAFE = ("GET", "HEAD", "OPTIONS", "TRACE")
RULES = (
    *(rule(method, "/notes", "read", "notes") for method in (*SAFE, "PROPFIND", "POST")),
    rule("DELETE", "/notes", "dry-run", "notes", body={"mode": ("dry",)}),
    rule("DELETE", "/drafts", "read", "drafts"),
)
SMUGGLED = b"POST /private HTTP/1.1\r\nHost: api.test\r\nContent-Length: 0\r\n\r\n"
DRY = b'{"mode":"dry"}'
FRAMINGS = {
    "sized": b"Content-Length: %d\r\n\r\n%b" % (len(SMUGGLED), SMUGGLED),
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
}


@dataclass
class Before:
    """A gateway before a target that executes what it did not read."""

    target: Executed
    gate: TableGate
    plane: DataPlane
    port: int
    blocked: list[BlockedRequest]

    async def executed(self) -> list[tuple[str, str]]:
        """All that the target executed, once it is done with every connection."""
        self.plane.upstreams.close()
        while self.plane.upstreams.open or self.target.ended < self.connections:
            await asyncio.sleep(0.01)
        return self.target.requests

    connections: int = 0


@contextlib.asynccontextmanager
async def before(*, observed: bool = False) -> AsyncIterator[Before]:
    with serving_unread_bodies() as target:
        gate = TableGate({"api": Entry(f"http://127.0.0.1:{target.port}", frozenset({"api.test"}), RULES)})
        gate.observed = frozenset({"api"} if observed else ())
        blocked: list[BlockedRequest] = []
        plane = data_plane(gate, blocked=blocked.append)
        await plane.start()
        port = await plane.listen("127.0.0.1", 0, names=["gateway.test"])
        try:
            yield Before(target, gate, plane, port, blocked)
        finally:
            await plane.close()


@contextlib.asynccontextmanager
async def by_path(place: Before) -> AsyncIterator[tuple[Raw, bytes, bytes]]:
    async with connected(place.port) as raw:
        yield raw, b"/api", b"gateway.test"


@contextlib.asynccontextmanager
async def by_url(place: Before) -> AsyncIterator[tuple[Raw, bytes, bytes]]:
    async with connected(place.port) as raw:
        yield raw, b"http://api.test", b"api.test"


@contextlib.asynccontextmanager
async def by_connect(place: Before) -> AsyncIterator[tuple[Raw, bytes, bytes]]:
    async with connected(place.port) as raw:
        await raw.send(b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n")
        assert (await raw.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        trust = ssl.create_default_context(cadata=place.plane.authority.certificate_pem)
        await raw.writer.start_tls(trust, server_hostname="api.test")
        yield raw, b"", b"api.test"


WAYS = {"path": by_path, "URL": by_url, "CONNECT": by_connect}


async def refused(raw: Raw, method: str, path: bytes, host: bytes, rest: bytes) -> Response:
    head = b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (method.encode(), path, host)
    response = await raw.ask(head + rest, method)
    assert response.status == 400, response
    assert response.value("connection") == "close"
    assert method == "HEAD" or b'"body_refused"' in response.body
    return response


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("way", WAYS)
async def test_body_that_a_target_may_execute_is_refused(way: str, framing: str) -> None:
    async with before() as place:
        for method in (*SAFE, "DELETE"):
            path = b"/drafts" if method == "DELETE" else b"/notes"
            async with WAYS[way](place) as (raw, prefix, host):
                await refused(raw, method, prefix + path, host, FRAMINGS[framing])
                assert await raw.ended()
            blocked = place.blocked[-1]
            assert (blocked.code, blocked.method, blocked.unparsed) == ("body_refused", method, False)
            assert blocked.attempt is not None
            assert blocked.attempt.target == path.decode()
        assert await place.executed() == []
        assert place.gate.records == []
        assert len(place.blocked) == 5


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_body_at_an_observed_target_is_refused(method: str) -> None:
    async with before(observed=True) as place:
        async with by_path(place) as (raw, prefix, host):
            rest = b"Authorization: Bearer own\r\n" + FRAMINGS["sized"]
            await refused(raw, method, prefix + b"/drafts", host, rest)
        assert await place.executed() == []


async def test_body_after_the_same_request_without_one_is_refused() -> None:
    """Repeated requests take the fast path."""
    async with before() as place:
        async with by_path(place) as (raw, prefix, host):
            head = b"GET %b/notes HTTP/1.1\r\nHost: %b\r\n" % (prefix, host)
            for end in (b"\r\n", b"\r\n", b"Content-Length: 0\r\n\r\n", b"Content-Length: 0\r\n\r\n"):
                assert (await raw.ask(head + end)).status == 200
            await refused(raw, "GET", prefix + b"/notes", host, FRAMINGS["sized"])
        place.connections = 1
        assert await place.executed() == [("GET", "/notes")] * 4


async def test_body_of_no_bytes_in_chunks_is_refused() -> None:
    async with before() as place:
        async with by_path(place) as (raw, prefix, host):
            rest = b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            await refused(raw, "GET", prefix + b"/notes", host, rest)
        assert await place.executed() == []


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"DELETE /api/notes HTTP/1.1\r\nContent-Type: application/json\r\n", DRY),
        (b"PROPFIND /api/notes HTTP/1.1\r\n", SMUGGLED),
    ],
    ids=["DELETE", "PROPFIND"],
)
async def test_body_of_an_uncommon_method_ends_the_connection_to_the_target(head: bytes, body: bytes) -> None:
    """`http.server` leaves the body unread, and executes nothing after `Connection: close`."""
    method = head.partition(b" ")[0].decode()
    async with before() as place:
        async with by_path(place) as (raw, _, host):
            for _ in range(2):
                rest = b"Host: %b\r\nContent-Length: %d\r\n\r\n%b" % (host, len(body), body)
                assert (await raw.ask(head + rest, method)).status == 200
        place.connections = 2
        assert await place.executed() == [(method, "/notes")] * 2
        assert place.target.options == ["close"] * 2


async def test_body_of_a_stream_or_the_end_of_an_mcp_session_is_refused(tmp_path: Path) -> None:
    """The smuggled message would be a call of a tool that nobody decided on."""
    with serving_unread_bodies() as target:
        async with mcp_placed(target.port, tmp_path, DEPLOYS) as place:
            for method in ("GET", "DELETE"):
                for rest in FRAMINGS.values():
                    async with connected_unix(str(place.socket)) as raw:
                        await refused(raw, method, b"/staging/mcp", b"gateway", rest)
            assert place.events == []
        assert target.requests == []
