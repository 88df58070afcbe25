"""The gateway of the benchmark: its own process, with the real core, real records and leases, and no Kafka.

    python -m bench.gateway_core FILE       what FILE says, as JSON: see `Places`

Events go into a real spool, and from there nowhere.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import ssl
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import orjson
import uvloop

from ringfence.backends import BackendContext, TargetAccess, all_backends
from ringfence.backends.capabilities import BackendCapabilities
from ringfence.backends.http import StaticSecrets
from ringfence.client.resource_server.dpop_proofs import Nonces, ProofChecker
from ringfence.dev.processes import LOOPBACK
from ringfence.gateway.contract import DecisionCore
from ringfence.gateway.dataplane.limits import Allowance
from ringfence.gateway.dataplane.plane import DataPlane, DataPlaneSettings
from ringfence.gateway.dataplane.tls_listener import CertificateAuthority
from ringfence.gateway.decision.evaluator import Evaluator
from ringfence.gateway.decision.gate import DecisionGate, DecisionLog, DecisionSettings, DecisionSteps
from ringfence.gateway.decision.injection import Injector
from ringfence.gateway.decision.model_budget import ModelMeters
from ringfence.gateway.decision.sender import SenderAuthenticator
from ringfence.gateway.decision.targets import Targets
from ringfence.gateway.domain import stale_view
from ringfence.gateway.events.recorder import Recorder, RefusalCounts
from ringfence.gateway.events.spool import Spool
from ringfence.gateway.proxies import READERS, ProxyAuth
from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.service.http import HttpServer
from ringfence.kernel.service.process import search_seldom_for_cycles
from ringfence.messages.registry import BackendSettings, McpRule, RequestRule
from ringfence.model.verdict import ALLOWED, Allowed, Refused
from ringfence.rego.bundle import OWN_BUNDLE, load_bundle
from ringfence.rego.embedded import EmbeddedEngine
from ringfence.rego.engine import ACTION
from ringfence.testing.services import InMemoryBudgets
from tests.support import leases
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry, permission

SECRET = "RINGFENCE_BENCH_SECRET"
PER_TASK, PER_AGENT = 20, 100
_DAY_S = 86_400
_CALL = McpRule(method="tools/call", name="get_file")
_RULES = (
    RequestRule(method="GET", path="/files/{path*}", verb="read", resource="files/{path*}"),
    RequestRule(method="MCP", path="/mcp", mcp=_CALL, verb="read", resource="files/{arguments.path}"),
)


@dataclass(frozen=True)
class Places:
    """Where everything is, and how many leases live."""

    folder: str
    leases: int
    plain: int
    """The target's port in clear."""
    tls: int
    listen: int
    """Of the embedded plane, with TLS."""
    authz: int
    certificate: str
    authority: str

    @property
    def socket(self) -> Path:
        return Path(self.folder) / "task.sock"

    @property
    def bundle(self) -> Path:
        return Path(self.folder) / "gateway-ca.pem"

    @property
    def agent_key(self) -> Path:
        return Path(self.folder) / "agent.json"

    @property
    def ready(self) -> Path:
        """The handle of a lease at `hub`, once all listens."""
        return Path(self.folder) / "ready"


class _Clock:
    """The ledger's time, going on."""

    def __init__(self, start_ms: int) -> None:
        self._offset_ms = start_ms - time.time_ns() // 1_000_000

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self._offset_ms


class _View:
    """Records and leases that nobody has to confirm."""

    def __init__(self, ledger: InMemoryRegistry, table: LeaseTable) -> None:
        self.directory, self.table = ledger.directory, table

    def view_expired(self) -> bool:
        return False

    def stale(self) -> str | None:
        return self.directory.stale()

    def check_freshness(self) -> Allowed | Refused:
        stale = self.stale()
        return Refused(stale_view(stale)) if stale is not None else ALLOWED

    check_view = check_freshness


class _World:
    """One organisation: bot has a task at two targets, and leases for it; most leases are of others."""

    def __init__(self, places: Places) -> None:
        self.ledger, self._places = InMemoryRegistry(), places
        self.clock = _Clock(START_MS + 60_000)
        self.table = LeaseTable(self.clock)
        self.targets = Targets(self.ledger.directory)
        proofs = ProofChecker(nonces=Nonces(), clock=self.clock)
        self.identifier = SenderAuthenticator(TD, self.ledger.directory, self.table, proofs, self.clock)
        self.ledger.organisation()
        self._target("plain", f"http://{LOOPBACK}:{places.plain}")
        self._target("hub", f"https://localhost:{places.tls}")
        self.task = self._task()
        self.handle = ""
        for number in range(max(2, places.leases)):  # one at each target, where it is one
            self._lease(number)

    def _target(self, id: str, url: str) -> None:
        backend = BackendSettings.model_validate({"kind": "http", "url": url})
        self.ledger.give(self.ledger.target_set("olga", id, backend=backend, requests=_RULES))

    def _task(self) -> str:
        give, ledger = self.ledger.give, self.ledger
        wide = tuple(permission("files/**", target=id, verbs=("read",)) for id in ("plain", "hub"))
        give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(*wide)))
        give(ledger.register("sam", "bot", "sam", ceiling=wide))
        terms = ledger.terms("bot", scope=wide, not_after=START_MS // 1000 + _DAY_S)
        change = give(ledger.assign("uma", "bot", terms=terms))
        assert change is not None
        return str(change.state.task_id)  # type: ignore[union-attr]

    def _lease(self, number: int) -> None:
        """Of the task's own: the first is for all of a target's files, the others for one each."""
        own = number < PER_TASK
        target = ("plain", "hub")[number % 2] if own else f"target-{number % 50}"
        agent = "bot" if own else f"agent-{number // PER_AGENT}"
        resource = "files/**" if number < 2 else f"other/{number}"
        key = self.ledger.key(agent, "agent") if own else None
        fields = {"task_id": self.task, "key_thumbprint": key.kid} if key is not None else {}
        lease = leases.lease(
            agent_id=agent, target_id=target, backend="http", delivery="gateway",
            scope=(permission(resource, target=target, verbs=("read",)),),
            requested_at_ms=START_MS, deadline=START_MS // 1000 + _DAY_S, **fields,
        ).claims  # fmt: skip
        self.table.apply(lease)
        if number == 1:
            self.handle = lease.lease_id

    async def gate(self) -> DecisionGate:
        declared = BackendCapabilities(all_backends(BackendContext(TD, "http://issuer.invalid")))
        engine = EmbeddedEngine(load_bundle(_without_limit(self._places)), entry_point=ACTION)
        await engine.start()
        access = TargetAccess(dict.fromkeys(("plain", "hub"), f"env:{SECRET}"))
        injector = Injector(self.table, None, StaticSecrets(access))  # type: ignore[arg-type]
        spool = Spool(Path(self._places.folder) / "spool", max_bytes=1 << 31)
        recorder, name = Recorder(spool, None), f"spiffe://{TD}/service/gateway"  # type: ignore[arg-type]
        key = SigningKey.generate(name)
        return DecisionGate(
            _View(self.ledger, self.table),  # type: ignore[arg-type]
            DecisionSteps(
                self.identifier,
                self.targets,
                Evaluator(engine, declared),
                None,  # type: ignore[arg-type]
                injector,
                ModelMeters(InMemoryBudgets()),
            ),
            DecisionLog(name, recorder, RefusalCounts(recorder.record, self.clock, gateway=name)),
            DecisionSettings(30 * _DAY_S),
            clock=self.clock,
            key=lambda: key,
        )


def _without_limit(places: Places) -> Path:
    """The bundle that comes with Ringfence, without its limit on what a task does in a minute."""
    folder = Path(places.folder) / "policy"
    shutil.copytree(OWN_BUNDLE, folder, ignore=shutil.ignore_patterns("*_test.rego"))
    rules = folder / "action.rego"
    text = rules.read_text()
    assert "longest_minute := 6000" in text
    rules.write_text(text.replace("longest_minute := 6000", "longest_minute := 1000000000"))
    return folder


async def _serve(places: Places) -> None:
    world = _World(places)
    gate = await world.gate()
    trust = ssl.create_default_context(cafile=places.authority)
    plane = DataPlane(
        DecisionCore(gate, world.targets.is_target_host),
        authority=CertificateAuthority("gateway", world.targets.hosts(), SystemClock()),
        tls=trust,
        settings=DataPlaneSettings(Allowance(per_second_each=1e9, burst_each=10**9)),
    )
    await plane.start()
    plane.authority.write(places.bundle)
    await plane.listen_for_task(places.socket, world.task)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(places.certificate)
    await plane.listen(LOOPBACK, places.listen, names=[f"localhost:{places.listen}"], tls=context)
    server = HttpServer(ProxyAuth(gate, READERS), LOOPBACK, places.authz)
    serving = asyncio.create_task(server.run_until_stopped())
    world.ledger.key("bot", "agent").save(places.agent_key)
    places.ready.write_text(world.handle)
    await serving


def main() -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[SECRET] = "the-secret-of-the-benchmark"
    places = Places(**orjson.loads(Path(sys.argv[1]).read_bytes()))
    search_seldom_for_cycles()
    uvloop.run(_serve(places))


if __name__ == "__main__":
    main()
