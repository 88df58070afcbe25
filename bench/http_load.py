"""The load on a gateway, and the target behind it: both as cheap as Python allows, as they share the machine with it.

python -m bench.http_load PLAIN TLS CERTIFICATE       a target on these two ports
"""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson
import uvloop

from bench.machine import percentile
from ringfence.dev.processes import LOOPBACK

CALL_ID = 1
"""The id of every call of a tool: the target answers all requests with the same body."""
BODY = orjson.dumps(
    {
        "jsonrpc": "2.0",
        "id": CALL_ID,
        "result": {"resultType": "complete", "content": [{"type": "text", "text": "x" * 320}]},
    }
)
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
)
_HEADERS = (
    b"User-Agent: bench/1\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\nX-Request-Id: 0123456789\r\n"
)
_END = b"\r\n\r\n"


class _Target(asyncio.Protocol):
    """Answers each head that comes, without looking at it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._came = b""

    def data_received(self, data: bytes) -> None:
        self._came += data
        while (end := self._came.find(_END)) >= 0:
            self._came = self._came[end + len(_END) :]
            self._transport.write(RESPONSE)


async def _target(plain: int, tls: int, certificate: Path) -> None:
    loop, context = asyncio.get_running_loop(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    await loop.create_server(_Target, LOOPBACK, plain)
    await loop.create_server(_Target, LOOPBACK, tls, ssl=context)
    await asyncio.Event().wait()


def request(path: str, host: str, *lines: str) -> bytes:
    """A GET with the headers that clients send, and some more."""
    more = "".join(f"{line}\r\n" for line in lines)
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{more}".encode() + _HEADERS + b"\r\n"


def mcp_call(path: str, host: str, number: int) -> bytes:
    """A call of a tool, as clients of MCP's revision 2026-07-28 send it."""
    revision, prefix = "2026-07-28", "io.modelcontextprotocol/"
    meta = {
        f"{prefix}protocolVersion": revision, f"{prefix}clientCapabilities": {},
        f"{prefix}clientInfo": {"name": "bench", "version": "1"},
    }  # fmt: skip
    params = {"name": "get_file", "arguments": {"path": str(number)}, "_meta": meta}
    body = orjson.dumps({"jsonrpc": "2.0", "id": CALL_ID, "method": "tools/call", "params": params})
    lines = [
        f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(body)}",
        "Accept: application/json, text/event-stream", f"MCP-Protocol-Version: {revision}", "Mcp-Method: tools/call",
        "Mcp-Name: get_file", "User-Agent: bench/1",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + _END + body


@dataclass(frozen=True)
class Way:
    """How the load reaches what is measured."""

    port: int | None = None
    socket: Path | None = None
    """A unix socket, where it is no port."""
    trust: ssl.SSLContext | None = None
    """With TLS, by this."""
    name: str | None = None
    """Whose certificate is expected."""
    through: str | None = None
    """Inside a CONNECT to this authority."""


class _Client(asyncio.Protocol):
    """Asks again as soon as it has the whole answer."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self._requests = requests
        self._came = b""
        self._missing = self._left = 0
        self._began = 0.0
        self.latencies: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def run(self, count: int) -> asyncio.Future[None]:
        self.latencies.clear()
        self.done = asyncio.get_running_loop().create_future()
        self._left = count
        self._ask()
        return self.done

    def _ask(self) -> None:
        self._came, self._missing = b"", 0
        asked = next(self._requests)
        self._began = time.perf_counter()
        self.transport.write(asked)

    def data_received(self, data: bytes) -> None:
        if not self._missing:
            self._came += data
            end = self._came.find(_END)
            if end < 0:
                return
            self._missing, data = end + len(_END) + _length(self._came[:end]), self._came
        self._missing -= len(data)
        if self._missing > 0:
            return
        if not self._came.startswith(b"HTTP/1.1 200"):
            self._fail(RuntimeError(f"not forwarded: {self._came[:2000]!r}"))
            return
        self.latencies.append((time.perf_counter() - self._began) * 1e3)
        self._left -= 1
        if self._left:
            self._ask()
        else:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(ConnectionError("the connection was closed"))

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def _length(head: bytes) -> int:
    lower = head.lower()
    at = lower.find(b"\r\ncontent-length:")
    if at < 0:
        raise RuntimeError(f"an answer without a length: {head!r}")
    return int(lower[at + 17 :].split(b"\r\n", 1)[0])


class _Agreed(asyncio.Protocol):
    """Waits until a CONNECT was agreed to."""

    def __init__(self) -> None:
        self.agreed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        if not data.startswith(b"HTTP/1.1 200"):
            self.agreed.set_exception(RuntimeError(f"no CONNECT: {data!r}"))
        else:
            self.agreed.set_result(None)


async def connected(way: Way, requests: Iterator[bytes], count: int) -> list[_Client]:
    """So many clients that take their requests in turn."""
    return [await _connected(way, requests) for _ in range(count)]


async def _connected(way: Way, requests: Iterator[bytes]) -> _Client:
    loop, client = asyncio.get_running_loop(), _Client(requests)
    inside = way.through is not None
    first: Any = _Agreed() if inside else client
    tls = None if inside else way.trust
    if way.socket is not None:
        transport, _ = await loop.create_unix_connection(lambda: first, str(way.socket))
    else:
        assert way.port is not None
        transport, _ = await loop.create_connection(
            lambda: first, LOOPBACK, way.port, ssl=tls, server_hostname=way.name if tls else None
        )
    if inside:
        assert way.trust is not None
        transport.write(f"CONNECT {way.through} HTTP/1.1\r\nHost: {way.through}\r\n\r\n".encode())
        await first.agreed
        opened = await loop.start_tls(transport, client, way.trust, server_hostname=way.name)
        assert opened is not None
        client.transport = opened
    return client


async def asked(clients: Sequence[_Client], count: int) -> tuple[float, list[float]]:
    """Requests a second, and all latencies, in ms."""
    began = time.perf_counter()
    await asyncio.gather(*(client.run(count // len(clients)) for client in clients))
    took = time.perf_counter() - began
    latencies = [one for client in clients for one in client.latencies]
    return len(latencies) / took, latencies


@dataclass(frozen=True)
class Measured:
    """What one load on one place came to. Times in ms."""

    rate: float
    p50: float
    p99: float
    alone_p50: float
    alone_p99: float


async def measure(
    way: Way,
    requests: Iterator[bytes],
    *,
    connections: int,
    count: int,
    alone: int,
    before: Iterable[Any] = (),
    also: Sequence[Way] = (),
) -> Measured:
    """First one connection, then several. `also`: other ways, that have their share of these."""
    [single] = clients = await connected(way, requests, 1)
    await asked(clients, alone // 5)
    _, one = await asked(clients, alone)
    single.transport.close()
    ways = (way, *also)
    clients = [one for each in ways for one in await connected(each, requests, connections // len(ways))]
    await asked(clients, max(count // 10, connections))
    for start in before:
        start()
    rate, many = await asked(clients, count)
    for client in clients:
        client.transport.close()
    return Measured(
        rate, percentile(many, 0.5), percentile(many, 0.99), percentile(one, 0.5), percentile(one, 0.99)
    )


def main() -> None:
    """The target."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    plain, tls, certificate = sys.argv[1:]
    uvloop.run(_target(int(plain), int(tls), Path(certificate)))


if __name__ == "__main__":
    main()
