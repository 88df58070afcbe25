"""Both engines side by side: latency and throughput of decisions, in organisations of 1,000 to 100,000 agents.

Records come to the rules as input, not as data, so it should be the same whatever the number of agents: each holds two
leases, and used two verbs in the last 30 days. `bare` is what the engine alone takes: regorus in this process, and OPA
asked by a plain connection. `.ci/opa` builds that OPA.

Then the table that this input comes from (`bench/holdings.py`), with all of the agents in it.
"""

from __future__ import annotations

import asyncio
import http.client
import random
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import regorus

from bench import holdings
from bench.machine import cpu_s, percentile
from ringfence.dev.processes import LOOPBACK, Child, free_port, spawn
from ringfence.rego.bundle import Bundle, archive, load_bundle
from ringfence.rego.embedded import EmbeddedEngine
from ringfence.rego.engine import ISSUANCE, PolicyEngine
from ringfence.rego.opa import OpaEngine
from ringfence.rego.regorus_programs import compiled
from tests.policy.cases import GOOD

SIZES = (1_000, 10_000, 100_000)
DECISIONS = 2_000
SIDE_BY_SIDE = 32
"""As policy handles the requests of a batch."""
_TIMEOUT_MS = 30_000
_OPA = Path(__file__).parents[1] / ".ci" / "opa"


class Directory:
    """Agents with sponsors, users and tasks, as policy's tables hold them; the input of a request of any of them."""

    def __init__(self, size: int) -> None:
        self._agents = [_records(number) for number in range(size)]
        self._random = random.Random(size)

    def inputs(self, count: int) -> list[bytes]:
        """Of so many requests, by agents at random."""
        return [orjson.dumps({**_REQUEST, **self._random.choice(self._agents)}) for _ in range(count)]


_PERMISSION = {
    "target": "platform",
    "verbs": ["read", "deploy"],
    "resources": ["env/staging/*", "env/dev/**"],
}
_REQUEST: dict[str, Any] = {
    "now_s": 1000,
    "target": {**GOOD["target"], "verbs": [{"verb": "deploy"}]},
    "floors": [],
    "lacking": [],
    "approvals": [],
}
_USE = {"first_s": 0, "last_s": 0, "days": 12}


def _records(number: int) -> dict[str, Any]:
    agent, sponsor, user, task = (f"{kind}-{number}" for kind in ("agent", "sponsor", "user", "task"))
    wanted = {"target": "platform", "verbs": ["deploy"], "resources": [f"env/staging/app-{number}"]}
    return {
        "request": {
            "id": str(number), "agent_id": agent, "task_id": task, "scope": [wanted], "ttl_s": 300,
            "delivery": "agent", "reason": "bench", "requested_at_s": 1000,
        },
        "agent": {
            "agent_id": agent, "sponsor": sponsor, "status": "active", "ceiling": [_PERMISSION],
            "registered_at_s": -(10**7),
        },
        "held": [
            {"lease_id": f"{number}-{other}", "task_id": task, "deadline": 1200, "scope": [
                {"target": "platform", "verbs": ["read"], "resources": [f"env/staging/app-{other}"]},
            ]} for other in range(2)
        ],
        "history": {
            "since_s": 0, "used": {"platform": {"read": _USE, "deploy": _USE}}, "never_used": {},
            "granted": 2, "unused": 0,
        },
        "sponsor": {"user_id": sponsor, "status": "active", "roles": ["sponsor"]},
        "task": {
            "task_id": task, "agent_id": agent, "on_behalf_of": user, "status": "active", "not_after": 9000,
            "scope": [_PERMISSION],
        },
        "user": {
            "user_id": user, "status": "active", "roles": [], "entitlements": {"as_of": 1, "scope": [_PERMISSION]},
        },
    }  # fmt: skip


async def _engine(name: str, agents: int, engine: PolicyEngine, inputs: list[bytes]) -> None:
    for given in inputs[:200]:
        assert (await engine.evaluate(given)).result.allow

    async def ask(given: bytes) -> None:
        await engine.evaluate(given)

    latencies = await _one_by_one(ask, inputs)
    queue = iter(inputs)

    async def worker() -> None:
        for given in queue:
            await engine.evaluate(given)

    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(SIDE_BY_SIDE)))
    took = time.perf_counter() - began
    own = (time.process_time() - cpu) / len(inputs) * 1e6
    _print(
        name, agents, latencies, f"{len(inputs) / took:6.0f}/s side by side, {own:4.0f} µs CPU in the service"
    )


async def _one_by_one(ask: Callable[[bytes], Awaitable[None]], inputs: list[bytes]) -> list[float]:
    latencies = []
    for given in inputs:
        began = time.perf_counter()
        await ask(given)
        latencies.append((time.perf_counter() - began) * 1e6)
    return latencies


def _bare_regorus(bundle: Bundle, agents: int, inputs: list[bytes]) -> None:
    machine = regorus.Rvm()
    machine.load_program(compiled(bundle.modules, ISSUANCE))
    latencies = []
    for given in inputs:
        began = time.perf_counter()
        machine.set_input_json(given.decode())
        machine.execute()
        latencies.append((time.perf_counter() - began) * 1e6)
    _print("regorus, bare", agents, latencies, f"{1e6 * len(inputs) / sum(latencies):6.0f}/s")


def _bare_opa(port: int, agents: int, inputs: list[bytes]) -> None:
    connection = http.client.HTTPConnection(LOOPBACK, port)
    path, headers = f"/v1/{ISSUANCE.replace('.', '/')}", {"Content-Type": "application/json"}
    latencies = []
    for given in inputs:
        began = time.perf_counter()
        connection.request("POST", path, b'{"input":' + given + b"}", headers)
        connection.getresponse().read()
        latencies.append((time.perf_counter() - began) * 1e6)
    connection.close()
    _print("OPA, bare", agents, latencies, f"{1e6 * len(inputs) / sum(latencies):6.0f}/s")


def _print(name: str, agents: int, latencies: list[float], more: str) -> None:
    p50, p99 = (percentile(latencies, share) for share in (0.5, 0.99))
    print(f"{name:16} {agents:7,} agents: p50 {p50:5.0f} µs, p99 {p99:5.0f} µs one by one; {more}")


def _start_opa(folder: Path, bundle: Bundle) -> tuple[Child, int]:
    binary = subprocess.run([_OPA], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    packed, port = folder / "policy.tar.gz", free_port()
    packed.write_bytes(archive(bundle))
    argv = [binary, "run", "--server", "--addr", f"{LOOPBACK}:{port}", "--bundle", str(packed)]
    argv += ["--log-level", "error", "--disable-telemetry", "--skip-version-check"]
    child = spawn("opa", argv, log_path=folder / "opa.log")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and child.alive:
        try:
            if httpx.get(f"http://{LOOPBACK}:{port}/health?bundles", trust_env=False).is_success:
                return child, port
        except httpx.HTTPError:
            time.sleep(0.05)
    child.kill()
    raise RuntimeError(f"OPA did not start:\n{child.log_tail()}")


async def _all(port: int, opa_pid: int) -> None:
    bundle = load_bundle()
    embedded = EmbeddedEngine(bundle, timeout_ms=_TIMEOUT_MS)
    opa = OpaEngine(f"http://{LOOPBACK}:{port}", bundle, timeout_ms=_TIMEOUT_MS)
    await embedded.start()
    try:
        for size in SIZES:
            inputs = Directory(size).inputs(DECISIONS)
            _bare_regorus(bundle, size, inputs)
            await _engine("embedded", size, embedded, inputs)
            _bare_opa(port, size, inputs)
            before = cpu_s({"opa": opa_pid})["opa"]
            await _engine("OPA over HTTP", size, opa, inputs)
            used = (cpu_s({"opa": opa_pid})["opa"] - before) / (2 * DECISIONS + 200) * 1e6
            print(f"{'':16} {size:7,} agents: {used:.0f} µs CPU a decision in OPA itself")
    finally:
        await embedded.close()
        await opa.close()


def run(kafka: str) -> None:
    """Print all of it. No broker takes part, whatever `kafka` says."""
    import uvloop

    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as folder:
        child, port = _start_opa(Path(folder), load_bundle())
        try:
            uvloop.run(_all(port, child.pid))
        finally:
            child.kill()
    for size in SIZES:
        holdings.measure(size)
