"""The embedded data plane between an agent and a target: what it adds to each request, and how much passes.

Three processes: the load (this one), the gateway, and a target that answers without looking. It is decided from a
table by the real map. `direct` is the same load on the target itself. On few cores the three take them from each other:
compare shares and CPU, not absolute times.

    python -m bench.gateway target|gateway ...        the other two; started by `python -m bench gateway`
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import psutil
import uvloop

from bench.machine import cpu_s, percentile
from ringfence.dev.processes import LOOPBACK, Child, free_port, spawn

BODY = b'{"ok": true, "text": "' + b"x" * 400 + b'"}'
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
)
CONNECTIONS = 16
WARM_UP = 2_000
REQUESTS = 100_000
ALONE = 5_000
TUNNELS = 8
TUNNELLED = 30_000
_HEADERS = (
    b"User-Agent: bench/1\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\nX-Request-Id: 0123456789\r\n"
    b"Authorization: DPoP 00000000-0000-0000-0000-000000000001\r\n\r\n"
)


class _Target(asyncio.Protocol):
    """Answers each head that comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._came = b""

    def data_received(self, data: bytes) -> None:
        self._came += data
        while (end := self._came.find(b"\r\n\r\n")) >= 0:
            self._came = self._came[end + 4 :]
            self._transport.write(RESPONSE)


async def _target(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Target, LOOPBACK, port)
    async with server:
        await server.serve_forever()


async def _gateway(port: int, target: int, bundle: Path) -> None:
    from ringfence.gateway.limits import Allowance
    from ringfence.gateway.plane import DataPlane
    from tests.gateway.table_gate import Entry, TableGate

    gate = TableGate({"api": Entry(f"http://{LOOPBACK}:{target}", frozenset({"api.test"}))})
    gate.keeps_records = False
    allowance = Allowance(per_second_each=1e9, burst_each=10**9)
    plane = DataPlane(gate, knows=gate.knows, hosts=gate.hosts, allowance=allowance)
    await plane.start()
    plane.authority.write(bundle)
    await plane.listen(LOOPBACK, port, names=[f"{LOOPBACK}:{port}"])
    await asyncio.Event().wait()


class _Client(asyncio.Protocol):
    """Asks again as soon as it has the whole answer, whose length it knows."""

    def __init__(self, request: bytes, length: int) -> None:
        self._request = request
        self._length = length
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.latencies: list[float] = []
        self._left = self._missing = 0
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def run(self, count: int) -> asyncio.Future[None]:
        self.latencies.clear()
        self.done = asyncio.get_running_loop().create_future()
        self._left = count
        self._ask()
        return self.done

    def _ask(self) -> None:
        self._missing = self._length
        self._began = time.perf_counter()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        if self._missing > 0:
            return
        self.latencies.append(time.perf_counter() - self._began)
        self._left -= 1
        if self._left:
            self._ask()
        else:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError("the connection was closed"))


class _Load:
    """Requests to one address."""

    def __init__(self, port: int, path: bytes) -> None:
        self._port = port
        self._request = b"GET %b HTTP/1.1\r\nHost: %b:%d\r\n" % (path, LOOPBACK.encode(), port) + _HEADERS

    async def clients(self, count: int) -> list[_Client]:
        length = await self._length()
        loop = asyncio.get_running_loop()
        return [
            (await loop.create_connection(lambda: _Client(self._request, length), LOOPBACK, self._port))[1]
            for _ in range(count)
        ]

    async def _length(self) -> int:
        reader, writer = await asyncio.open_connection(LOOPBACK, self._port)
        writer.write(self._request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"not forwarded: {head!r}")
        writer.close()
        return len(head) + len(BODY)


async def _tunnelled(port: int, bundle: Path) -> list[_Client]:
    """Clients inside a CONNECT each."""
    loop, context = asyncio.get_running_loop(), ssl.create_default_context(cafile=str(bundle))
    request = b"GET /files/a HTTP/1.1\r\nHost: api.test\r\n" + _HEADERS
    clients = []
    for _ in range(TUNNELS):
        connecting = _Client(b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n", 1)
        transport, _ = await loop.create_connection(lambda one=connecting: one, LOOPBACK, port)  # type: ignore[misc]
        await connecting.run(1)
        client = _Client(request, len(RESPONSE))
        opened = await loop.start_tls(transport, client, context, server_hostname="api.test")
        assert opened is not None
        client.transport = opened
        clients.append(client)
    return clients


async def _asked(clients: list[_Client], count: int) -> tuple[float, list[float]]:
    """Requests a second, and all latencies, in ms."""
    began = time.perf_counter()
    await asyncio.gather(*(client.run(count // len(clients)) for client in clients))
    took = time.perf_counter() - began
    latencies = [one * 1e3 for client in clients for one in client.latencies]
    return len(latencies) / took, latencies


async def _measure(target: int, gateway: int, pid: int, bundle: Path) -> None:
    loads = {"direct": _Load(target, b"/files/a"), "gateway": _Load(gateway, b"/api/files/a")}
    rates: dict[str, float] = {}
    alone: dict[str, list[float]] = {}
    process = psutil.Process(pid)
    for name, load in loads.items():
        [single] = clients = await load.clients(1)
        await _asked(clients, WARM_UP)
        _, alone[name] = await _asked(clients, ALONE)
        single.transport.close()
        clients = await load.clients(CONNECTIONS)
        await _asked(clients, WARM_UP)
        memory, sockets = process.memory_info().rss, len(process.net_connections())
        before = cpu_s({name: pid})[name]
        rates[name], latencies = await _asked(clients, REQUESTS)
        used = (cpu_s({name: pid})[name] - before) / len(latencies) * 1e6
        print(
            f"{name:8} {rates[name]:8,.0f} requests/s on {CONNECTIONS} connections "
            f"(p50 {percentile(latencies, 0.5):.2f}, p99 {percentile(latencies, 0.99):.2f} ms); "
            f"alone p50 {percentile(alone[name], 0.5):.3f}, p99 {percentile(alone[name], 0.99):.3f} ms"
        )
        if name == "gateway":
            grown = process.memory_info().rss - memory
            print(
                f"{'':8} {rates[name] / rates['direct']:.2f} of direct; {used:.0f} µs CPU a request; "
                f"{process.memory_info().rss / 2**20:.0f} MiB, {grown / 2**20:+.1f} MiB and "
                f"{len(process.net_connections()) - sockets:+d} connections over {len(latencies):,} requests"
            )
        for client in clients:
            client.transport.close()
    added = [
        percentile(alone["gateway"], share) - percentile(alone["direct"], share) for share in (0.5, 0.99)
    ]
    print(f"{'':8} added alone: p50 {added[0]:.3f}, p99 {added[1]:.3f} ms")
    clients = await _tunnelled(gateway, bundle)
    await _asked(clients, WARM_UP)
    before = cpu_s({"gateway": pid})["gateway"]
    rate, latencies = await _asked(clients, TUNNELLED)
    used = (cpu_s({"gateway": pid})["gateway"] - before) / len(latencies) * 1e6
    print(
        f"CONNECT  {rate:8,.0f} requests/s on {TUNNELS} connections (p50 {percentile(latencies, 0.5):.2f}, "
        f"p99 {percentile(latencies, 0.99):.2f} ms); {used:.0f} µs CPU a request"
    )


@contextlib.contextmanager
def _started(folder: Path, role: str, port: int, *more: str) -> Iterator[Child]:
    argv = [sys.executable, "-m", "bench.gateway", role, str(port), *more]
    child = spawn(role, argv, log_path=folder / f"{role}.log")
    try:
        deadline = time.monotonic() + 30
        while not _listens(port):
            if time.monotonic() > deadline or not child.alive:
                raise RuntimeError(f"the {role} did not start:\n{child.log_tail()}")
            time.sleep(0.05)
        yield child
    finally:
        child.kill()


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def run(kafka: str) -> None:
    """Print all of it. No broker takes part, whatever `kafka` says."""
    target, gateway = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as name:
        folder, bundle = Path(name), Path(name) / "bundle.pem"
        with (
            _started(folder, "target", target),
            _started(folder, "gateway", gateway, str(target), str(bundle)) as child,
        ):
            uvloop.run(_measure(target, gateway, child.pid, bundle))


def main() -> None:
    """One of the processes beside the load."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    role, port, *more = sys.argv[1:]
    if role == "target":
        uvloop.run(_target(int(port)))
    else:
        uvloop.run(_gateway(int(port), int(more[0]), Path(more[1])))


if __name__ == "__main__":
    main()
