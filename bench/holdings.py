"""The table of what agents hold and used: what each record of a lease costs, what asking it costs, and its weight."""

from __future__ import annotations

import gc
import time
import uuid
from collections.abc import Callable, Iterable
from typing import cast

import psutil

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Permission
from ringfence.messages.lease import Lease, LeaseStatus
from ringfence.messages.registry import AgentRecord
from ringfence.messages.topics import LEASE
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.policy.agents.holdings import Holdings
from tools.schemas.examples import EXAMPLES

TTL_S = 3600
FIRST = 2_000
"""Of so many records the cost is told; the others fill the table."""
_TD = "bench.example"
_SCOPE = (Permission(target="platform", verbs=("read", "deploy"), resources=("env/staging/*",)),)


class Leases:
    """Records of leases, as issuer and revoker sign them."""

    def __init__(self) -> None:
        self.now_s = int(time.time())
        root = SigningKey.generate(f"spiffe://{_TD}/root")
        self._keys = {
            role: SigningKey.generate(f"spiffe://{_TD}/service/{role}") for role in ("issuer", "revoker")
        }
        services = tuple(
            ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(self.now_s + 10**6),))  # type: ignore[arg-type]
            for role, key in self._keys.items()
        )
        bundle = TrustBundle(
            iss=root.id,
            aud=_TD,
            iat=self.now_s,
            exp=self.now_s + 10**6,
            jti="1",
            version=1,
            services=services,
        )
        self.trust = TrustStore(_TD, root.kid)
        self.trust.load(sign(bundle, root, header_jwk=True), self.now_s)

    def record(
        self, number: int, status: LeaseStatus, seq: int = 1, by: str = "issuer", ago_s: int = 0
    ) -> Received:
        """One record of the lease `number` that was requested so long ago."""
        at_s, id = self.now_s - ago_s, str(uuid.UUID(int=number))
        lease = cast(Lease, EXAMPLES[Lease]).model_copy(
            update={
                "iss": self._keys[by].id, "aud": _TD, "iat": at_s, "jti": f"{id}.{seq}", "lease_id": id, "seq": seq,
                "status": status, "agent_id": f"agent-{number}", "scope": _SCOPE, "cause": None,
                "requested_at_ms": at_s * 1000, "deadline": at_s + TTL_S,
            }
        )  # fmt: skip
        value = sign(lease, self._keys[by]).encode()
        return Received(LEASE, LEASE.name("bench"), 0, number, at_s * 1000, id, value)


def _cpu_us(work: Callable[[], object], count: int) -> float:
    began = time.process_time()
    work()
    return (time.process_time() - began) / count * 1e6


def _each(table: Holdings, records: Iterable[Received]) -> Callable[[], None]:
    def feed() -> None:
        for record in records:
            table.on_leases([record])

    return feed


def measure(agents: int) -> None:
    """Print it for so many agents, each with a lease that lives and two verbs that it used today and a week ago."""
    leases = Leases()
    table = Holdings(leases.trust, SystemClock())
    gc.collect()
    before = psutil.Process().memory_info().rss
    first = [leases.record(number, "active") for number in range(FIRST)]
    size = len(first[0].value)
    seen = _cpu_us(_each(table, first), FIRST)
    for number in range(agents):
        week_ago = leases.record(number, "expired", 2, "revoker", ago_s=7 * 86_400)
        table.on_leases([leases.record(number, "active"), week_ago])
    gc.collect()
    weight = (psutil.Process().memory_info().rss - before) / agents
    nothing = _cpu_us(_each(table, first), FIRST)
    agent = cast(AgentRecord, EXAMPLES[AgentRecord]).state
    ids = [f"agent-{number}" for number in range(FIRST)]
    states = [agent.model_copy(update={"agent_id": id}) for id in ids]

    def ask() -> None:
        for state in states:
            table.held(state.agent_id, leases.now_s)
            table.history(state, "platform", leases.now_s)

    asked = _cpu_us(ask, FIRST)
    ends = [leases.record(number, "released", 3, "revoker") for number in range(FIRST)]
    ended = _cpu_us(_each(table, ends), FIRST)
    print(
        f"{'held and history':16} {agents:7,} agents: CPU of a record of {size} B: new and verified {seen:.0f} µs, "
        f"an early end, verified {ended:.0f} µs, nothing new {nothing:.1f} µs; asking {asked:.1f} µs; "
        f"{weight:.0f} B of memory an agent"
    )
