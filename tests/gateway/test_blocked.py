"""What the data plane refuses by itself is told of, once each, with what the connection shows of its sender."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.limits import Allowance
from tests.gateway.certificates import Certificates
from tests.gateway.conftest import Place, placed
from tests.gateway.raw import connected, connected_unix
from tests.gateway.target import Target

GET = b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
CONNECT = b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n"
SPIFFE = "spiffe://test.example/agent/helper"
HASTY = Timeouts(head_s=0.3, piece_s=0.3)


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("data", "status", "code", "method", "where"),
    [
        (
            b"GET /?a=s3cret HTTP/1.1\r\nHost: gateway.test\r\nA : b\r\n\r\n",
            400, "malformed_http", "GET", ("gateway.test", 80, "/"),
        ),
        (
            b"G\x1b[T http://me:s3cret@a.test:81/b?c=s3cret HTTP/1.1\r\nHost: a.test\r\n\r\n",
            400, "malformed_http", "G\x1b[T", ("a.test", 81, "/b"),
        ),
        (b"\x16\x03\x01\r\n\r\n", 400, "malformed_http", "\x16\x03\x01", None),
        (b"GET /api/" + b"a" * 40_000, 431, "head_too_large", "GET", (None, None, f"/api/{'a' * 248}...")),
        (b"GET /api", 408, "head_timeout", "GET", (None, None, "/api")),
        (
            b"GET /api/x HTTP/1.1\r\nHost: elsewhere.test\r\n\r\n",
            421, "host_unknown", "GET", ("elsewhere.test", 80, "/api/x"),
        ),
        (b"GET /api/x HTTP/1.1\r\nHost: a@b\r\n\r\n", 400, "host_invalid", "GET", ("b", 80, "/api/x")),
        (
            GET.replace(b"\r\n\r\n", b"\r\nExpect: more\r\n\r\n"),
            417, "expectation_failed", "GET", ("gateway.test", 80, "/api/files/a"),
        ),
        (
            b"CONNECT api.test HTTP/1.1\r\nHost: api.test\r\n\r\n",
            400, "connect_refused", "CONNECT", ("api.test", 443, None),
        ),
    ],
)  # fmt: skip
async def test_each_refusal_is_told_once(
    data: bytes, status: int, code: str, method: str, where: tuple[str | int | None, ...] | None
) -> None:
    async with placed(timeouts=HASTY) as place, place.connected() as raw:
        assert (await raw.ask(data)).status == status
        (told,) = place.blocked
        assert (told.code, told.method, told.attempt) == (code, method, None)
        went = told.destination
        assert (went and (went.host, went.port, went.path)) == where
        assert "s3cret" not in str(went)
        assert place.gate.records == []


async def test_a_body_that_does_not_come_is_told_with_its_target() -> None:
    async with placed(timeouts=HASTY) as place, place.connected() as raw:
        post = b"POST /api/runs/a HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 9\r\n\r\n{"
        assert (await raw.ask(post)).status == 408
        (blocked,) = place.blocked
        assert (blocked.code, blocked.method) == ("body_timeout", "POST")
        assert blocked.attempt is not None
        assert blocked.attempt.target_id == "api"


async def test_blocked_request_on_a_task_socket_names_its_task(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with placed(allowance=Allowance(per_second_each=0.001, burst_each=1)) as place:
        path = tmp_path_factory.mktemp("s") / "t"
        await place.plane.listen_for_task(path, "the-task")
        async with connected_unix(str(path)) as raw:
            assert [(await raw.ask(GET)).status for _ in range(4)] == [200, 429, 429, 429]
        told = [(one.code, one.presented.task_id) for one in place.blocked]
        assert told == [("too_many_requests", "the-task")] * 3


async def test_decided_request_is_not_reported_as_blocked(place: Place) -> None:
    place.gate.credentials = False
    async with place.connected() as raw:
        assert (await raw.ask(GET)).status == 503
        assert (await raw.ask(GET.replace(b"files", b"secrets"))).status == 403
        assert (await raw.ask(GET.replace(b"/api/", b"/nothing/"))).status == 403
    assert len(place.gate.records) == 3
    assert place.blocked == []


async def test_to_be_asked_who_one_is_is_no_refusal(place: Place) -> None:
    port = await place.plane.listen("127.0.0.1", 0, names=["gateway.test"], challenge=True)
    async with connected(port) as raw:
        assert (await raw.ask(CONNECT)).status == 407
    assert place.blocked == []


async def test_a_connect_without_tls_in_it_is_told() -> None:
    async with placed(timeouts=HASTY) as place:
        for said in (b"GET / HTTP/1.1\r\n\r\n", b""):
            async with place.connected() as raw:
                await raw.send(CONNECT)
                assert (await raw.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                await raw.send(said)
                await raw.ended()
        await until(lambda: len(place.blocked) == 2)
        assert {(one.code, one.method) for one in place.blocked} == {("tls_failed", "CONNECT")}


# --- listeners with TLS -----------------------------------------------------------------------------------------------


@dataclass
class Secured:
    """A place that listens with TLS as well, and asks for certificates of clients."""

    place: Place
    certificates: Certificates
    port: int

    def client(self) -> ssl.SSLContext:
        context = self.certificates.trusting()
        context.load_cert_chain(self.certificates.client(SPIFFE))
        return context


@contextlib.asynccontextmanager
async def secured(folder: Path, allowance: Allowance, timeouts: Timeouts) -> AsyncIterator[Secured]:
    async with placed(Target(), allowance=allowance, timeouts=timeouts) as place:
        certificates = Certificates(folder)
        tls = certificates.server("localhost")
        tls.verify_mode = ssl.CERT_OPTIONAL
        tls.load_verify_locations(certificates.file)
        port = await place.plane.listen("127.0.0.1", 0, names=["gateway.test"], tls=tls)
        yield Secured(place, certificates, port)


async def test_handshakes_that_never_end_stop_nobody(tmp_path: Path) -> None:
    allowance = Allowance(connections=40, connections_each=20, handshakes_each=3)
    async with secured(tmp_path, allowance, Timeouts()) as door, contextlib.AsyncExitStack() as stack:
        place = door.place
        early = await stack.enter_async_context(connected(door.port, door.client()))
        assert (await early.ask(GET)).status == 200
        assert place.gate.last[0].certificate == SPIFFE
        silent = [await stack.enter_async_context(connected(door.port)) for _ in range(30)]
        await until(lambda: len(place.blocked) == 27)
        assert {one.code for one in place.blocked} == {"too_many_connections"}
        assert place.plane.limits.handshakes == 3
        assert (await early.ask(GET)).status == 200, "who is there already goes on"
        async with place.connected() as raw:
            assert (await raw.ask(GET)).status == 200, "so does who comes in elsewhere"
        for raw in silent:
            raw.writer.transport.abort()
        await until(lambda: place.plane.limits.handshakes == 0)
        async with connected(door.port, door.client()) as raw:
            assert (await raw.ask(GET)).status == 200


async def test_a_handshake_ends_in_time_and_is_told(tmp_path: Path) -> None:
    async with secured(tmp_path, Allowance(), HASTY) as door:
        for said in (b"", b"\x16\x03\x01", GET):
            async with connected(door.port) as raw:
                await raw.send(said)
                await raw.ended()
        await until(lambda: len(door.place.blocked) == 3)
        assert {one.code for one in door.place.blocked} == {"tls_failed"}
        limits = door.place.plane.limits
        await until(lambda: not limits.handshakes)
        assert (limits.connections, limits._connections, limits._handshakes) == (0, {}, {})


async def test_all_connections_of_an_address_can_be_open(tmp_path: Path) -> None:
    """The last one is not its own hindrance: while its TLS is opened it is counted once."""
    allowance = Allowance(connections_each=2)
    async with secured(tmp_path, allowance, Timeouts()) as door, contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            raw = await stack.enter_async_context(connected(door.port, door.certificates.trusting()))
            assert (await raw.ask(GET)).status == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await stack.enter_async_context(connected(door.port, door.certificates.trusting()))
        assert [one.code for one in door.place.blocked] == ["too_many_connections"]


async def test_a_listener_that_is_closed_leaves_nothing(tmp_path: Path) -> None:
    async with secured(tmp_path, Allowance(), Timeouts()) as door:
        async with connected(door.port) as raw:
            await until(lambda: door.place.plane.limits.handshakes == 1)
            await door.place.plane.close()
            assert await raw.ended()
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", door.port)
