"""The proxy of `ringfence gateway connect`: who has no password reaches nothing, and nothing rides on who has."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ringfence.client.task_proxy.server import ProxyLimits, SocketGoneError, TaskProxy
from tests.gateway.raw import Raw, connected
from tests.gateway.table_gate import SECRET, TASK, Entry, TableGate, data_plane
from tests.gateway.target import Target

OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
REFUSED = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclass
class FakeGateway:
    """Listens at the task's socket, keeps every byte, and answers each connection once a head is there."""

    path: Path
    answer: bytes = OK
    closes: bool = True
    """Whether it closes after its answer."""
    connections: list[bytearray] = field(default_factory=list)
    """All bytes of each connection that sent any."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once a connection that sent bytes has ended."""
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeGateway]:
        server = await asyncio.start_unix_server(self._serve, str(self.path))
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = bytearray()
        answered = False
        try:
            while data := await reader.read(65536):
                if not seen:
                    self.connections.append(seen)
                seen += data
                async with self.arrived:
                    self.arrived.notify_all()
                if b"\r\n\r\n" in seen and not answered:
                    answered = True
                    writer.write(self.answer)
                    if self.closes:
                        break
        except ConnectionError:
            pass
        finally:
            if seen:
                self.ended.set()
            writer.close()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with self.arrived:
            await self.arrived.wait_for(holds)


@dataclass
class Place:
    """A proxy before a gateway that only records."""

    gateway: FakeGateway
    proxy: TaskProxy

    @property
    def password(self) -> str:
        return self.proxy.url.split(":")[2].partition("@")[0]

    @property
    def key(self) -> bytes:
        return authorization("ringfence", self.password)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Raw]:
        async with connected(self.proxy.port) as raw:
            yield raw


def authorization(user: str, password: str, scheme: str = "Basic") -> bytes:
    encoded = base64.b64encode(f"{user}:{password}".encode())
    return b"Proxy-Authorization: %b %b\r\n" % (scheme.encode(), encoded)


@contextlib.asynccontextmanager
async def placed(folder: Path, limits: ProxyLimits | None = None, **gateway: Any) -> AsyncIterator[Place]:
    fake = FakeGateway(folder / "task.sock", **gateway)
    async with fake.serving(), TaskProxy(fake.path, limits=limits) as proxy:
        await proxy.start()
        yield Place(fake, proxy)


@pytest_asyncio.fixture(loop_scope="package")
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with placed(tmp_path) as place:
        yield place


def get(*lines: bytes, path: str = "/files/a") -> bytes:
    return b"GET http://api.test%b HTTP/1.1\r\nHost: api.test\r\n%b\r\n" % (path.encode(), b"".join(lines))


async def test_inside_a_sandbox_no_password_is_asked_for_and_none_is_forwarded(tmp_path: Path) -> None:
    """And the listening socket may be older than the proxy, and than the gateway's."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    fake = FakeGateway(tmp_path / "task.sock")
    async with TaskProxy(fake.path, with_password=False) as proxy:
        await proxy.serve(listener)
        assert proxy.url == f"http://127.0.0.1:{proxy.port}"
        async with fake.serving(), connected(proxy.port) as raw:
            assert (await raw.ask(get(authorization("ringfence", "x")))).status == 200
            assert await raw.ended()
    assert len(fake.connections) == 1
    assert b"proxy-authorization" not in fake.connections[0].lower()
    assert proxy.traffic.connections == 1
    assert proxy.traffic.received_bytes == len(OK)


# --- the password ---

WITHOUT = {
    "none": lambda place: b"",
    "wrong": lambda place: authorization("ringfence", "x" * len(place.password)),
    "empty": lambda place: authorization("ringfence", ""),
    "shorter": lambda place: authorization("ringfence", place.password[:-1]),
    "longer": lambda place: authorization("ringfence", place.password + "a"),
    "part": lambda place: place.key[:-10] + b"\r\n",
    "no value": lambda place: b"Proxy-Authorization: Basic\r\n",
    "nothing after it": lambda place: b"Proxy-Authorization: Basic \r\n",
    "another user": lambda place: authorization("root", place.password),
    "another scheme": lambda place: authorization("ringfence", place.password, "Bearer"),
    "no scheme": lambda place: place.key.replace(b"Basic ", b""),
    "not for proxies": lambda place: place.key.replace(b"Proxy-", b""),
    "not encoded": lambda place: b"Proxy-Authorization: Basic ringfence:%b\r\n" % place.password.encode(),
}  # fmt: skip
HEADS = {
    "GET": b"GET http://api.test/files/a HTTP/1.1\r\nHost: api.test\r\n",
    "POST": b"POST http://api.test/files/a HTTP/1.1\r\nHost: api.test\r\nContent-Length: 3\r\n",
    "CONNECT": b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n",
    "path": b"GET /files/a HTTP/1.1\r\nHost: api.test\r\n",
    "HTTP/1.0": b"GET http://api.test/files/a HTTP/1.0\r\nHost: api.test\r\n",
}


@pytest.mark.parametrize("method", HEADS)
@pytest.mark.parametrize("without", WITHOUT)
async def test_without_the_password_nothing_reaches_the_socket(
    place: Place, caplog: pytest.LogCaptureFixture, without: str, method: str
) -> None:
    caplog.set_level(logging.DEBUG)
    async with place.connected() as raw:
        answer = await raw.ask(HEADS[method] + WITHOUT[without](place) + b"\r\n")
        assert answer.status == 407
        assert answer.value("proxy-authenticate") == 'Basic realm="ringfence"'
        assert answer.value("connection") == "close"
        assert await raw.ended()
    assert place.gateway.connections == []
    assert place.password not in caplog.text + str(answer) + repr(place.proxy)


async def test_the_password_is_random_and_not_forwarded(place: Place, tmp_path: Path) -> None:
    assert len(base64.urlsafe_b64decode(place.password + "=")) * 8 >= 128
    assert TaskProxy(tmp_path / "task.sock").url.split("@")[0] != place.proxy.url.split("@")[0]
    async with place.connected() as raw:
        assert (await raw.ask(get(place.key, b"X-One: 1\r\nAuthorization: Bearer mine\r\n"))).body == b"ok"
    (seen,) = place.gateway.connections
    assert bytes(seen) == get(b"X-One: 1\r\nAuthorization: Bearer mine\r\nConnection: close\r\n")


async def test_the_scheme_may_be_written_in_any_case(place: Place) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(get(place.key.replace(b"Basic", b"bASIC")))).status == 200


@pytest.mark.parametrize(
    "lines",
    [
        lambda place: place.key + place.key,
        lambda place: place.key + authorization("ringfence", "other"),
        lambda place: place.key.replace(b"Proxy-Authorization", b"Proxy_Authorization"),
        lambda place: b"X: 1\r\n " + place.key,
        lambda place: place.key.replace(b":", b" :", 1),
        lambda place: b"X: 1\n" + place.key,
    ],
    ids=["twice", "two", "underscore", "folded", "space", "bare LF"],
)
async def test_an_ambiguous_password_is_refused(place: Place, lines: Callable[[Place], bytes]) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(get(lines(place)))).status == 400
        assert await raw.ended()
    assert place.gateway.connections == []


# --- what could ride on an authenticated connection ---


async def test_a_pipelined_request_is_not_forwarded(place: Place) -> None:
    async with place.connected() as raw:
        answer = await raw.ask(get(place.key) + get(path="/files/b") + get(place.key, path="/files/c"))
        assert answer.body == b"ok"
        assert await raw.ended()
    assert [bytes(one) for one in place.gateway.connections] == [get(b"Connection: close\r\n")]


async def test_a_later_request_is_not_forwarded_even_if_the_gateway_does_not_close(tmp_path: Path) -> None:
    async with placed(tmp_path, closes=False) as place, place.connected() as raw:
        assert (await raw.ask(get(place.key, b"Connection: keep-alive\r\n"))).body == b"ok"
        await raw.send(get(path="/files/b") + get(place.key, path="/files/c"))
        raw.writer.write_eof()
        await place.gateway.ended.wait()
        assert [bytes(one) for one in place.gateway.connections] == [get(b"Connection: close\r\n")]


NEXT = b"GET http://api.test/files/secret HTTP/1.1\r\nHost: api.test\r\n\r\n"
POST = b"POST http://api.test/files/a HTTP/1.1\r\nHost: api.test\r\n"
BODIES = {
    "sized": (b"Content-Length: 3\r\n\r\nabc", b"abc"),
    "none": (b"Content-Length: 0\r\n\r\n", b""),
    "chunked": (b"Transfer-Encoding: chunked\r\n\r\n03\r\nabc\r\n0\r\n\r\n", b"3\r\nabc\r\n0\r\n\r\n"),
    "trailers": (
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: 1\r\n\r\n",
        b"3\r\nabc\r\n0\r\n\r\n",
    ),
}


@pytest.mark.parametrize("framing", BODIES)
@pytest.mark.parametrize("whole", [True, False], ids=["at once", "in pieces"])
async def test_a_body_ends_where_the_gateway_sees_its_end(tmp_path: Path, framing: str, whole: bool) -> None:
    sent, expected = BODIES[framing]
    async with placed(tmp_path, closes=False) as place, place.connected() as raw:
        data = POST + place.key + sent + NEXT
        for piece in [data] if whole else [data[at : at + 1] for at in range(len(data))]:
            await raw.send(piece)
        assert (await raw.response("POST")).body == b"ok"
        raw.writer.write_eof()
        await place.gateway.ended.wait()
        (seen,) = place.gateway.connections
        head, _, body = bytes(seen).partition(b"\r\n\r\n")
        assert b"/files/secret" not in seen
        if framing == "chunked" or framing == "trailers":
            body = b"3\r\nabc\r\n0\r\n\r\n" if _unchunked(body) == b"abc" else body
        assert body == expected
        assert head.endswith(b"Connection: close")


def _unchunked(body: bytes) -> bytes:
    """The content of a chunked body that ends with its last chunk, and has nothing after it."""
    content = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        content, end, body = content + body[:length], body[length : length + 2], body[length + 2 :]
        assert end == b"\r\n"
        if not length:
            assert not body
            return content


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"Content-Length: +3\r\n\r\nabc",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Transfer_Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"X: 1\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_an_ambiguous_framing_reaches_nothing(place: Place, framing: bytes) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(POST + place.key + framing + NEXT, "POST")).status == 400
        assert await raw.ended()
    assert place.gateway.connections == []


@pytest.mark.parametrize("chunks", [b"3;a=b\r\nabc\r\n", b"3\nabc\r\n", b"2\r\nabc\r\n", b"-1\r\n", b"\r\n"])
async def test_an_ambiguous_chunk_is_not_forwarded(tmp_path: Path, chunks: bytes) -> None:
    async with placed(tmp_path, answer=b"", closes=False) as place, place.connected() as raw:
        head = POST + place.key + b"Transfer-Encoding: chunked\r\n\r\n"
        answer = await raw.ask(head + chunks + b"0\r\n\r\n" + NEXT, "POST")
        assert answer.status == 400
        assert await raw.ended()
        await place.gateway.ended.wait()
        (seen,) = place.gateway.connections
        assert b"0\r\n\r\n" not in seen.partition(b"\r\n\r\n")[2]
        assert b"secret" not in seen


@pytest.mark.parametrize(
    ("sent", "forwarded"),
    [
        (b"Connection: keep-alive\r\n", b"close"),
        (b"Connection: keep-alive, X-One, TE\r\n", b"close, te, x-one"),
        (b"Connection: X-One\r\nConnection: close\r\n", b"close, x-one"),
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"close"),
        (b"Connection: proxy-authorization\r\nProxy-Connection: keep-alive\r\nKeep-Alive: 5\r\n", b"close"),
    ],
)
async def test_hop_by_hop_headers(place: Place, sent: bytes, forwarded: bytes) -> None:
    """The proxy replaces what concerns its own connections; what else `Connection` names, the gateway removes."""
    async with place.connected() as raw:
        assert (await raw.ask(get(sent, place.key, b"X-One: 1\r\n"))).body == b"ok"
    assert bytes(place.gateway.connections[0]) == get(b"X-One: 1\r\nConnection: %b\r\n" % forwarded)


async def test_a_path_is_refused(place: Place) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(HEADS["path"] + place.key + b"\r\n")).status == 400
    assert place.gateway.connections == []


# --- CONNECT ---


async def test_an_accepted_connect_relays_bytes_both_ways(tmp_path: Path) -> None:
    async with placed(tmp_path, answer=ESTABLISHED + b"from the gateway", closes=False) as place:
        async with place.connected() as raw:
            await raw.send(HEADS["CONNECT"] + place.key + b"\r\n")
            expected = ESTABLISHED + b"from the gateway"
            assert await raw.reader.readexactly(len(expected)) == expected
            await raw.send(b"\x16 from the client")
            await place.gateway.until(lambda: place.gateway.connections[0].endswith(b"client"))
        await place.gateway.ended.wait()
    (seen,) = place.gateway.connections
    assert bytes(seen) == HEADS["CONNECT"] + b"Connection: close\r\n\r\n\x16 from the client"


async def test_data_pipelined_after_connect_is_rejected(tmp_path: Path) -> None:
    async with placed(tmp_path, answer=ESTABLISHED) as place, place.connected() as raw:
        assert (await raw.ask(HEADS["CONNECT"] + place.key + b"\r\n" + NEXT, "CONNECT")).status == 400
        assert place.gateway.connections == []


@pytest.mark.parametrize("closes", [True, False])
async def test_a_refused_connect_opens_nothing(tmp_path: Path, closes: bool) -> None:
    async with placed(tmp_path, answer=REFUSED, closes=closes) as place, place.connected() as raw:
        assert (await raw.ask(HEADS["CONNECT"] + place.key + b"\r\n")).status == 403
        with contextlib.suppress(OSError):  # it may have closed
            await raw.send(NEXT)
            raw.writer.write_eof()
        await place.gateway.ended.wait()
        assert [bytes(one) for one in place.gateway.connections] == [
            HEADS["CONNECT"] + b"Connection: close\r\n\r\n"
        ]


# --- limits ---


@pytest.mark.parametrize("sent", [b"", b"G", HEADS["GET"]], ids=["nothing", "a byte", "a head without end"])
async def test_a_slow_head_is_ended(tmp_path: Path, sent: bytes) -> None:
    async with placed(tmp_path, ProxyLimits(head_s=0.05)) as place, place.connected() as raw:
        await raw.send(sent)
        assert (await raw.response()).status == 408
        assert await raw.ended()
        assert place.gateway.connections == []


async def test_bytes_that_trickle_do_not_extend_the_time_of_a_head(tmp_path: Path) -> None:
    async with placed(tmp_path, ProxyLimits(head_s=0.2)) as place, place.connected() as raw:
        answer = asyncio.create_task(raw.response())
        with contextlib.suppress(ConnectionError):
            while not answer.done():
                await raw.send(b"x")
                await asyncio.sleep(0.01)
        assert (await answer).status == 408


async def test_a_large_head_is_refused(place: Place) -> None:
    async with place.connected() as raw:
        assert (await raw.ask(get(place.key, b"X: " + b"x" * 40_000 + b"\r\n"))).status == 431
    assert place.gateway.connections == []


async def test_connections_without_the_password_keep_nobody_out(tmp_path: Path) -> None:
    limits = ProxyLimits(unauthenticated=3)
    async with (
        placed(tmp_path, limits, answer=ESTABLISHED, closes=False) as place,
        contextlib.AsyncExitStack() as stack,
    ):
        tunnel = await stack.enter_async_context(place.connected())
        await tunnel.send(HEADS["CONNECT"] + place.key + b"\r\n")
        await tunnel.reader.readexactly(len(ESTABLISHED))
        idle = [await stack.enter_async_context(place.connected()) for _ in range(10)]
        for one in idle[:7]:
            assert await one.ended()
        own = await stack.enter_async_context(place.connected())
        await own.send(HEADS["CONNECT"] + place.key + b"\r\n")
        await own.reader.readexactly(len(ESTABLISHED))
        await tunnel.send(b"goes on")
        await place.gateway.until(lambda: place.gateway.connections[0].endswith(b"goes on"))


async def test_one_connection_too_many_is_told(tmp_path: Path) -> None:
    limits = ProxyLimits(authenticated=1)
    async with placed(tmp_path, limits, answer=ESTABLISHED, closes=False) as place:
        async with place.connected() as tunnel, place.connected() as raw:
            await tunnel.send(HEADS["CONNECT"] + place.key + b"\r\n")
            await tunnel.reader.readexactly(len(ESTABLISHED))
            assert (await raw.ask(get(place.key))).status == 503
        assert len(place.gateway.connections) == 1


# --- ends ---


async def test_a_client_that_leaves_ends_its_request_at_the_gateway(tmp_path: Path) -> None:
    async with placed(tmp_path, answer=b"", closes=False) as place:
        async with place.connected() as raw:
            await raw.send(get(place.key))
            await place.gateway.until(lambda: bool(place.gateway.connections))
        await place.gateway.ended.wait()


async def test_the_end_of_the_socket(tmp_path: Path) -> None:
    async with placed(tmp_path) as place:
        removed = asyncio.create_task(place.proxy.socket_removed())
        place.gateway.path.unlink()
        await removed
        async with place.connected() as raw:
            assert (await raw.ask(get(place.key))).status == 503
        port = place.proxy.port
        await place.proxy.close()
        with pytest.raises(OSError, match="refused"):
            await asyncio.open_connection("127.0.0.1", port)


async def test_a_gateway_that_says_nothing_is_told(tmp_path: Path) -> None:
    for head in ("GET", "CONNECT"):
        async with placed(tmp_path, answer=b"") as place, place.connected() as raw:
            assert (await raw.ask(HEADS[head] + place.key + b"\r\n")).status == 503
            place.gateway.path.unlink()


async def test_no_proxy_without_a_socket(tmp_path: Path) -> None:
    for path in (tmp_path / "none.sock", tmp_path / "file", tmp_path / ("long" * 40)):
        (tmp_path / "file").touch()
        with pytest.raises(SocketGoneError):
            await TaskProxy(path).start()


# --- before a data plane ---


@dataclass
class Plane:
    """A target behind a data plane, behind the proxy."""

    target: Target
    gate: TableGate
    proxy: TaskProxy
    url: str

    @property
    def key(self) -> bytes:
        return authorization("ringfence", self.proxy.url.split(":")[2].partition("@")[0])

    def head(self, method: str, path: str, *lines: bytes, minor: int = 1) -> bytes:
        first = f"{method} {self.url}{path} HTTP/1.{minor}\r\nHost: {self.url.partition('//')[2]}\r\n"
        return first.encode() + b"".join([self.key, *lines, b"\r\n"])


@pytest_asyncio.fixture(loop_scope="package")
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    async with Target().serving() as target, contextlib.AsyncExitStack() as stack:
        url = f"http://127.0.0.1:{target.port}"
        gate = TableGate({"api": Entry(url, frozenset({f"127.0.0.1:{target.port}"}))})
        plane = data_plane(gate)
        await plane.start()
        stack.push_async_callback(plane.close)
        await plane.listen_for_task(tmp_path / "task.sock", TASK)
        proxy = await stack.enter_async_context(TaskProxy(tmp_path / "task.sock"))
        await proxy.start()
        yield Plane(target, gate, proxy, url)


@pytest.mark.parametrize("minor", [0, 1])
async def test_each_request_is_decided_on_a_connection_of_its_own(plane: Plane, minor: int) -> None:
    for method, status in (("GET", 200), ("DELETE", 403), ("GET", 200)):
        async with connected(plane.proxy.port) as raw:
            answer = await raw.ask(plane.head(method, "/files/a", minor=minor))
            assert (answer.status, answer.value("connection")) == (status, "close")
            assert await raw.ended()
    assert [presented.task_id for presented, _, _ in plane.gate.records] == [TASK] * 3
    assert [one.values("authorization") for one in plane.target.requests] == [[f"Bearer {SECRET}"]] * 2
    assert all(not one.values("proxy-authorization") for one in plane.target.requests)


@pytest.mark.parametrize("chunked", [True, False])
async def test_large_bodies_go_through(plane: Plane, chunked: bool) -> None:
    size = 4 * 1024 * 1024
    body = bytes(range(256)) * (size // 256)
    plane.target.respond = lambda received: (
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(received.body), received.body)
    )
    framing = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % size
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body) if chunked else body
    async with connected(plane.proxy.port) as raw:
        answering = asyncio.create_task(raw.response("PUT"))
        await raw.send(plane.head("PUT", "/files/a", framing) + sent)
        answer = await answering
    assert answer.status == 200
    assert answer.body == body


async def test_expect_continue(plane: Plane) -> None:
    async with connected(plane.proxy.port) as raw:
        await raw.send(plane.head("PUT", "/files/a", b"Content-Length: 3\r\n", b"Expect: 100-continue\r\n"))
        assert await raw.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await raw.ask(b"abc", "PUT")).status == 200
    assert plane.target.requests[0].body == b"abc"


async def test_client_still_sending_its_body_receives_the_denial(plane: Plane) -> None:
    size = 2 * 1024 * 1024
    async with connected(plane.proxy.port) as raw:
        await raw.send(plane.head("PATCH", "/files/a", b"Content-Length: %d\r\n" % size))
        sending = asyncio.create_task(raw.send(b"x" * size))
        assert (await raw.response("PATCH")).status == 403
        sending.cancel()
    assert plane.target.requests == []
