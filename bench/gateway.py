"""What gateways add to each request: the embedded data plane, other proxies that ask the same core, and mitmproxy.

Four processes: the load (this one), the gateway with the real core, a proxy where one is measured, and a target that
answers without looking. On few cores they take them from each other: compare shares and CPU, not absolute times.

In clear the embedded plane is reached through the socket of a task, so who sends is known. All else is with TLS on both
sides and a proof (RFC 9449) with each request, which costs the gateway more than everything else: so a proxy has to be
asked, and so the embedded plane is where an agent comes from elsewhere. `direct` is the same load on the target.

A gateway scales by replicas: two of them, each on a core of its own with a task's socket, share the load in a row of
their own. On two cores the load and the target take theirs from them all the same.

`--kafka` changes nothing here: events stay in the spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import psutil
import uvloop

from bench.gateway_core import Places
from bench.http_load import Measured, Way, asked, connected, mcp_call, measure, request
from bench.machine import cpu_s
from ringfence.client.agent.dpop import proof
from ringfence.dev.processes import LOOPBACK, Child, free_port, spawn
from ringfence.kernel.crypto.keys import SigningKey
from tests.brokers.secured import Authority
from tests.gateway_external import programs
from tests.gateway_external.agent import HOST
from tests.support.in_memory_registry import START_MS

LEASES = (1, 100, 10_000)
CONNECTIONS, TUNNELS = 16, 8
REPLICAS = 2
"""So many gateways are measured side by side, where there are as many cores."""
DIRECT, EMBEDDED, PROVEN, TUNNELLED = 100_000, 40_000, 3_200, 20_000
MCP, MITM = 10_000, 2_400
ALONE, ALONE_PROVEN = 3_000, 400
PATHS = 256
_FETCH = programs.ROOT / ".ci" / "mitmproxy"
_START_S = 60.0


@dataclass
class _Processes:
    """Whose CPU and memory count."""

    pids: dict[str, int]
    before: dict[str, float]

    @classmethod
    def of(cls, **pids: int) -> _Processes:
        return cls(pids, {})

    def begin(self) -> None:
        self.before = cpu_s(self.pids)

    def said(self, count: int) -> str:
        after = cpu_s(self.pids)
        parts = [
            f"{name} {(after[name] - self.before[name]) / count * 1e6:.0f} µs, {_memory(pid):.0f} MiB"
            for name, pid in self.pids.items()
        ]
        return "; ".join(parts)


def _memory(pid: int) -> float:
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 2**20


class _Bench:
    """The places and processes of one run."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._authority = Authority(folder)
        self.trust = ssl.create_default_context(cafile=str(self._authority.file))
        self.plain, self.tls, self.listen, self.authz = (free_port() for _ in range(4))
        self._certificate = self._authority.issue("gateway", HOST, "localhost")
        self._target_certificate = self._authority.issue("target", "hub.example", "localhost")
        self.direct: dict[str, Measured] = {}

    def start_target(self) -> None:
        argv = [
            sys.executable,
            "-m",
            "bench.http_load",
            str(self.plain),
            str(self.tls),
            str(self._target_certificate),
        ]
        child = spawn("target", argv, log_path=self.folder / "target.log")
        self._stack.callback(child.kill)
        child.wait_until(lambda: _listens(self.tls), _START_S, "listens")

    @contextlib.contextmanager
    def gateway(self, leases: int, *, core: int | None = None) -> Iterator[tuple[Child, Places]]:
        """`core`: the one that it has, where it does not take whichever is free; then others run beside it."""
        folder = self.folder / (f"gateway-{leases}" if core is None else f"gateway-{leases}-{core}")
        folder.mkdir()
        listen, authz = (self.listen, self.authz) if core is None else (free_port(), free_port())
        places = Places(
            str(folder), leases, self.plain, self.tls, listen, authz,
            str(self._certificate), str(self._authority.file),
        )  # fmt: skip
        said = folder / "places.json"
        said.write_bytes(orjson.dumps(asdict(places)))
        child = spawn(
            "gateway", [sys.executable, "-m", "bench.gateway_core", str(said)], log_path=folder / "log"
        )
        try:
            child.wait_until(lambda: places.ready.exists() and _listens(authz), _START_S, "listens")
            if core is not None:
                for thread in psutil.Process(child.pid).threads():
                    os.sched_setaffinity(thread.id, {core})
            yield child, places
        finally:
            child.kill()

    @contextlib.contextmanager
    def program(self, name: str) -> Iterator[int]:
        """The port of a proxy that asks."""
        places = programs.Places(self._certificate, self._authority.file, self.authz, self.tls)
        with programs.started(name, places, self.folder / name) as port:
            yield port

    # --- the rows ---

    async def direct_on(self, name: str, way: Way) -> None:
        requests = itertools.cycle([request(f"/files/{n}", "localhost") for n in range(PATHS)])
        self.direct[name] = found = await measure(
            way, requests, connections=CONNECTIONS, count=DIRECT, alone=ALONE
        )
        print(f"{name:26} {_row(found)}")

    async def row(
        self,
        name: str,
        direct: str,
        ways: Sequence[Way],
        requests: Iterator[bytes],
        processes: _Processes,
        count: int,
        alone: int,
    ) -> None:
        """Measure the first way, with the same load on the others."""
        way, *also = ways
        found = await measure(
            way, requests, connections=CONNECTIONS, count=count, alone=alone, before=[processes.begin], also=also
        )  # fmt: skip
        base = self.direct[direct]
        print(
            f"{name:26} {_row(found)}; {found.rate / base.rate:.3f} of direct; alone "
            f"{found.alone_p50 - base.alone_p50:+.3f} and {found.alone_p99 - base.alone_p99:+.3f} ms; "
            f"{processes.said(count)}"
        )

    async def tunnelled(self, name: str, way: Way, host: str, processes: _Processes, count: int) -> float:
        """Inside CONNECT: requests a second."""
        requests = itertools.cycle([request(f"/files/{n}", host) for n in range(PATHS)])
        clients = await connected(way, requests, TUNNELS)
        await asked(clients, count // 10)
        processes.begin()
        rate, _ = await asked(clients, count)
        for client in clients:
            client.transport.close()
        print(f"{name:26} {rate:9,.0f} requests/s on {TUNNELS} connections; {processes.said(count)}")
        return rate


def _row(found: Measured) -> str:
    return f"{found.rate:9,.0f} requests/s on {CONNECTIONS} connections (p50 {found.p50:.2f}, p99 {found.p99:.2f} ms)"


class _Agent:
    """Shows its handle, and makes a proof for each request."""

    def __init__(self, places: Places) -> None:
        self._key = SigningKey.load(places.agent_key)
        self._handle = places.ready.read_text()
        self._born = places.ready.stat().st_mtime
        self.nonce: str | None = None

    def requests(self, count: int, prefix: str, host: str, named: str) -> Iterator[bytes]:
        """So many, made before they are wanted. `named`: as the proof names the host."""
        return iter([self._one(f"{prefix}/files/{n % PATHS}", host, named) for n in range(count)])

    def _one(self, path: str, host: str, named: str) -> bytes:
        now_s = int((START_MS + 60_000) / 1000 + time.time() - self._born)
        made = proof(
            self._key,
            "GET",
            f"https://{named}{path}",
            access_token=self._handle,
            now_s=now_s,
            nonce=self.nonce,
        )
        return request(path, host, f"Authorization: DPoP {self._handle}", f"DPoP: {made}")

    async def ask_for_a_nonce(self, way: Way, host: str) -> None:
        assert way.port is not None
        reader, writer = await asyncio.open_connection(
            LOOPBACK, way.port, ssl=way.trust, server_hostname=way.name
        )
        writer.write(self._one("/hub/files/0", host, host))
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        lines = head.decode("latin-1").split("\r\n")
        self.nonce = next(line.partition(": ")[2] for line in lines if line.lower().startswith("dpop-nonce:"))


async def _in_clear(bench: _Bench, leases: int, child: Child, places: Places) -> None:
    requests = itertools.cycle([request(f"/plain/files/{n}", "gateway") for n in range(PATHS)])
    await bench.row(
        f"embedded, {leases:,} leases", "direct", [Way(socket=places.socket)], requests,
        _Processes.of(gateway=child.pid), EMBEDDED, ALONE,
    )  # fmt: skip


async def _mcp(bench: _Bench, leases: int, child: Child, places: Places) -> None:
    """Calls of tools (2026-07-28): each message is parsed, decided by its arguments, and its answer filtered."""
    requests = itertools.cycle([mcp_call("/plain/mcp", "gateway", n % PATHS) for n in range(PATHS)])
    await bench.row(
        f"MCP calls, {leases:,} leases", "direct", [Way(socket=places.socket)], requests,
        _Processes.of(gateway=child.pid), MCP, ALONE,
    )  # fmt: skip


async def _never_the_same(bench: _Bench, leases: int, child: Child, places: Places) -> None:
    """Each head has a trace of its own, as an agent's tracing sends it, so nothing is remembered of a whole head."""
    total = int(EMBEDDED * 1.1 + ALONE * 1.2) + 4 * CONNECTIONS
    requests = [
        request(f"/plain/files/{n % PATHS}", "gateway", f"traceparent: 00-{n:032x}-{n:016x}-01")
        for n in range(1, total)
    ]
    await bench.row(
        f"heads all new, {leases:,} leases", "direct", [Way(socket=places.socket)], iter(requests),
        _Processes.of(gateway=child.pid), EMBEDDED, ALONE,
    )  # fmt: skip


async def _side_by_side(bench: _Bench, leases: int, running: Sequence[tuple[Child, Places]]) -> None:
    requests = itertools.cycle([request(f"/plain/files/{n}", "gateway") for n in range(PATHS)])
    ways = [Way(socket=places.socket) for _, places in running]
    pids = {f"gateway {at}": child.pid for at, (child, _) in enumerate(running, 1)}
    await bench.row(
        f"{len(running)} gateways, {leases:,} leases", "direct", ways, requests, _Processes.of(**pids),
        EMBEDDED, ALONE,
    )  # fmt: skip


async def _with_proofs(
    bench: _Bench, leases: int, child: Child, places: Places, ports: dict[str, int]
) -> None:
    agent, total = _Agent(places), int(PROVEN * 1.1 + ALONE_PROVEN * 1.2) + 4 * CONNECTIONS
    own = Way(places.listen, trust=bench.trust, name="localhost")
    host = f"localhost:{places.listen}"
    await agent.ask_for_a_nonce(own, host)
    requests = agent.requests(total, "/hub", host, host)
    await bench.row(
        f"embedded, {leases:,} leases", "direct, TLS", [own], requests, _Processes.of(gateway=child.pid), PROVEN,
        ALONE_PROVEN,
    )  # fmt: skip
    for name, port in ports.items():
        way = Way(port, trust=bench.trust, name=HOST)
        processes = _Processes.of(gateway=child.pid, **{name: _pid_of(port)})
        requests = agent.requests(total, "", HOST, HOST)
        await bench.row(
            f"{name}, {leases:,} leases", "direct, TLS", [way], requests, processes, PROVEN, ALONE_PROVEN
        )


def _pid_of(port: int) -> int:
    """Who listens there: its first process."""
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
            assert connection.pid is not None
            parent = psutil.Process(connection.pid).parent()
            name = psutil.Process(connection.pid).name()
            return parent.pid if parent is not None and parent.name() == name else connection.pid
    raise RuntimeError(f"nobody listens on {port}")


async def _through_connect(bench: _Bench, child: Child, places: Places) -> None:
    inner = f"localhost:{bench.tls}"
    trust = ssl.create_default_context(cafile=str(places.bundle))
    way = Way(socket=places.socket, trust=trust, name="localhost", through=inner)
    own = await bench.tunnelled("CONNECT, embedded", way, inner, _Processes.of(gateway=child.pid), TUNNELLED)
    with _mitmproxy(bench) as (mitm, port, authority):
        trust = ssl.create_default_context(cafile=str(authority))
        way = Way(port, trust=trust, name="localhost", through=inner)
        other = await bench.tunnelled(
            "CONNECT, mitmproxy", way, inner, _Processes.of(mitmproxy=mitm.pid), MITM
        )
    print(f"{'':26} the embedded plane passes {own / other:.1f} times what mitmproxy passes")


@contextlib.contextmanager
def _mitmproxy(bench: _Bench) -> Iterator[tuple[Child, int, Path]]:
    """It, its port, and the certificate that it is trusted by. It trusts the target as the gateway does."""
    port, folder = free_port(), bench.folder / "mitmproxy"
    argv = [
        _mitmdump(), "--quiet", "--listen-host", LOOPBACK, "--listen-port", str(port),
        "--set", f"confdir={folder}", "--set", f"ssl_verify_upstream_trusted_ca={bench.folder / 'authority.pem'}",
    ]  # fmt: skip
    child = spawn("mitmproxy", argv, log_path=folder / "log")
    authority = folder / "mitmproxy-ca-cert.pem"
    try:
        child.wait_until(lambda: authority.exists() and _listens(port), _START_S, "listens")
        yield child, port, authority
    finally:
        child.kill()


def _mitmdump() -> str:
    """Where it is, fetched the first time. Raises SystemExit where that fails."""
    found = subprocess.run(
        [_FETCH], stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "PYTHON": sys.executable}
    )
    if found.returncode != 0:
        raise SystemExit(f"gateway: {_FETCH} failed: mitmproxy could not be fetched from PyPI")
    return found.stdout.strip()


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def run(kafka: str) -> None:
    """Print all of it. Raises SystemExit where something is missing that it is compared with."""
    if (lacking := programs.lacking()) is not None:
        raise SystemExit(f"gateway: {lacking}")
    _mitmdump()
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as name, contextlib.ExitStack() as stack:
        bench = _Bench(Path(name), stack)
        bench.start_target()
        _rows(bench, stack)


def _rows(bench: _Bench, stack: contextlib.ExitStack) -> None:
    print("in clear, through the socket of a task:")
    uvloop.run(bench.direct_on("direct", Way(bench.plain)))
    for leases in LEASES:
        with bench.gateway(leases) as (child, places):
            uvloop.run(_in_clear(bench, leases, child, places))
            if leases == LEASES[1]:
                uvloop.run(_never_the_same(bench, leases, child, places))
                uvloop.run(_mcp(bench, leases, child, places))
            if leases == LEASES[-1]:
                uvloop.run(_through_connect(bench, child, places))
        _forget(bench, leases)
    with contextlib.ExitStack() as beside:
        cores = sorted(os.sched_getaffinity(0))[:REPLICAS]
        running = [beside.enter_context(bench.gateway(LEASES[1], core=core)) for core in cores]
        uvloop.run(_side_by_side(bench, LEASES[1], running))
    print("with TLS on both sides, and a proof each:")
    uvloop.run(bench.direct_on("direct, TLS", Way(bench.tls, trust=bench.trust, name="localhost")))
    ports: dict[str, int] = {}
    for leases in LEASES:
        with bench.gateway(leases) as (child, places):
            if not ports:
                ports = {name: stack.enter_context(bench.program(name)) for name in programs.PROGRAMS}
            uvloop.run(_with_proofs(bench, leases, child, places, ports))
        _forget(bench, leases)


def _forget(bench: _Bench, leases: int) -> None:
    import shutil

    shutil.rmtree(bench.folder / f"gateway-{leases}")
