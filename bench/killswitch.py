"""The kill switch: from a selector's place on Kafka until every gateway has said that it refuses what it covers.

Four processes stand for gateways. First each switch covers all leases, then many switches, each for one agent, are
thrown at once. The leases' own ends come after, and are measured as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.filling import Valkey, signed_leases
from bench.machine import cpu_s, percentile
from bench.stack import running
from ringfence.dev.processes import Child, free_port, spawn
from ringfence.dev.stack import Stack
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.base import Topic
from ringfence.messages.lease import TERMINAL, Lease, RevocationAck, RevocationRequest, Selector
from ringfence.messages.topics import HEARTBEAT, LEASE, REVOCATION_ACK, REVOCATION_REQUEST
from ringfence.model.lease_store import SignedLease

LEASES = 10_000
AGENTS = 100
SWITCHES = 5
GATEWAYS = tuple(f"gateway-{number}" for number in range(1, 5))
_AT_A_TIME = 500


@dataclass
class Heard:
    """What came on Kafka: orders, the word of gateways, ends."""

    ordered_at_ms: dict[str, int] = field(default_factory=dict)
    confirmed_at_ms: dict[str, dict[str, int]] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)

    def on_records(self, records: Sequence[Received]) -> None:
        for record in records:
            jws, at_ms = parse(record.value), record.appended_at_ms
            if record.topic is REVOCATION_REQUEST:
                order = jws.unverified_claims(RevocationRequest)
                self.ordered_at_ms.setdefault(derived_id("revocation", order.iss, order.jti), at_ms)
            elif record.topic is REVOCATION_ACK:
                ack = jws.unverified_claims(RevocationAck)
                self.confirmed_at_ms.setdefault(ack.revocation_id, {}).setdefault(ack.iss, at_ms)
            elif record.topic is HEARTBEAT:
                self.alive.add((record.key or "").rpartition("/")[2])
            elif jws.unverified_claims(Lease).status in TERMINAL:
                self.ended.setdefault(record.key or "", at_ms)

    def cut_ms(self, order_id: str) -> int | None:
        """How long a cut took, or None while not all have given their word."""
        words = self.confirmed_at_ms.get(order_id, {})
        if len(words) < len(GATEWAYS) or order_id not in self.ordered_at_ms:
            return None
        return max(words.values()) - self.ordered_at_ms[order_id]


@contextlib.contextmanager
def _gateways(stack: Stack) -> Iterator[dict[str, int]]:
    """Processes that stand for gateways; their pids by name."""
    children: dict[str, Child] = {}
    try:
        for name in GATEWAYS:
            environment = {
                **os.environ,
                **stack.environment(),
                "RINGFENCE_CONFIG": os.devnull,
                "RINGFENCE_HTTP": f"127.0.0.1:{free_port()}",
                "RINGFENCE_KEY_FILE": str(stack.trust.service_key(name)),
            }
            children[name] = spawn(
                name,
                [sys.executable, "-m", "tests.support.cut_listener"],
                env=environment,
                log_path=stack.options.state / "logs" / f"{name}.log",
            )
        yield {name: child.pid for name, child in children.items()}
    finally:
        for child in children.values():
            child.stop()


class _Bench:
    def __init__(self, stack: Stack, publisher: Publisher, heard: Heard, pids: dict[str, int]) -> None:
        self._settings = stack.settings()
        self._key = SigningKey.load(stack.trust.service_key("issuer"))
        self._operator = SigningKey.load(stack.trust.user_key(stack.options.operator))
        self._valkey = Valkey(self._settings)
        self._publisher = publisher
        self._heard = heard
        self._pids = pids

    async def leases(self) -> list[SignedLease]:
        """Issue so many leases, and wait until the gateways know them."""
        deadline_s = int(time.time()) + 40_000
        leases = await asyncio.to_thread(
            signed_leases,
            self._key,
            self._settings.trust_domain,
            LEASES + 1,
            lambda _: deadline_s,
            lambda number: f"agent-{number % AGENTS}",
        )
        self._valkey.put(leases)
        for start in range(0, len(leases), _AT_A_TIME):
            records = [
                Outbound(one.claims.lease_id, one.jws.encode(), one.claims.jti)
                for one in leases[start : start + _AT_A_TIME]
            ]
            await asyncio.gather(*await self._publisher.send_many(LEASE, Lease.typ, records))
        await self._until_known(leases.pop().claims)
        return leases

    async def _until_known(self, last: Lease) -> None:
        """Revoke this one until all gateways say that they have: each has read by then what stood before it."""
        while True:
            id = await self._order("", lease_id=last.lease_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):
                    while self._heard.cut_ms(id) is None:
                        await asyncio.sleep(0.05)
                    return

    async def _order(self, key: str, **which: Any) -> str:
        """Order a revocation. Returns its id."""
        order = RevocationRequest(
            iss=self._operator.id,
            aud=self._settings.trust_domain,
            iat=int(time.time()),
            jti=os.urandom(8).hex(),
            kind="revocation",
            reason="bench",
            **which,
        )
        await self._publisher.publish_signed(REVOCATION_REQUEST, key or "all", order, self._operator)
        return derived_id("revocation", order.iss, order.jti)

    async def throw(self, leases: Sequence[SignedLease], selectors: dict[str, Selector]) -> list[float]:
        """Throw switches, by the agent that each is for ("" for all). Returns the time to cut of each lease, in ms."""
        before, start = cpu_s(self._pids), time.perf_counter()
        given = await asyncio.gather(*(self._order(key, selector=one) for key, one in selectors.items()))
        orders = dict(zip(selectors, given, strict=True))
        while any(self._heard.cut_ms(id) is None for id in orders.values()):
            await asyncio.sleep(0.05)
        ids = {one.claims.lease_id for one in leases}
        while ids - self._heard.ended.keys():
            await asyncio.sleep(0.05)
        took_s, after = time.perf_counter() - start, cpu_s(self._pids)
        ended_s = (max(self._heard.ended[id] for id in ids) - min(map(self._ordered, orders.values()))) / 1000
        print(
            f"    ended after {ended_s:.1f} s; CPU of the revoker {after['revoker'] - before['revoker']:.1f} s, "
            f"{(after['revoker'] - before['revoker']) / len(ids) * 1e6:.0f} µs a lease; seen after {took_s:.1f} s"
        )
        cut_ms = {agent_id: float(self._heard.cut_ms(id) or 0) for agent_id, id in orders.items()}
        return [cut_ms["" if "" in cut_ms else one.claims.agent_id] for one in leases]

    def _ordered(self, order_id: str) -> int:
        return self._heard.ordered_at_ms[order_id]


def _describe(name: str, cut_ms: list[float]) -> None:
    print(
        f"  {name}: time to cut of {len(cut_ms)} leases: p50 {percentile(cut_ms, 0.5):.0f} ms, "
        f"p99 {percentile(cut_ms, 0.99):.0f} ms, max {max(cut_ms):.0f} ms"
    )


async def _measure(stack: Stack, pids: dict[str, int]) -> None:
    heard, settings = Heard(), stack.settings()
    key = SigningKey.load(stack.trust.service_key("issuer"))
    topics: list[Topic[Any]] = [REVOCATION_REQUEST, REVOCATION_ACK, LEASE, HEARTBEAT]
    async with (
        Publisher(settings, key.id) as publisher,
        Follower(settings, topics, heard.on_records, since_ms=None),
    ):
        bench = _Bench(stack, publisher, heard, pids)
        while not heard.alive.issuperset(GATEWAYS):
            await asyncio.sleep(0.1)
        cut_ms: list[float] = []
        for _ in range(SWITCHES):
            cut_ms += await bench.throw(await bench.leases(), {"": Selector(all=True)})
        _describe(f"{SWITCHES} switches for all", cut_ms)
        agents = [f"agent-{number}" for number in range(AGENTS)]
        selectors = {agent_id: Selector(agent_id=agent_id) for agent_id in agents}
        cut_ms = await bench.throw(await bench.leases(), selectors)
        _describe(f"{AGENTS} switches at once, each for an agent", cut_ms)
        cuts = [heard.cut_ms(id) for id in heard.ordered_at_ms]
        late = sum(one is None or one > settings.grace_s * 1000 for one in cuts)
        print(f"  of {len(cuts)} orders {late} were not confirmed within the grace; the revoker says:")
        text = await asyncio.to_thread(lambda: httpx.get(f"{stack.url('revoker')}/metrics").text)
        for line in text.splitlines():
            if line.startswith(("ringfence_time_to_cut_seconds", "ringfence_cuts_unconfirmed_total ")):
                print("   ", line)


def run(kafka: str) -> None:
    """Print the numbers on this broker."""
    import uvloop

    with (
        running(kafka, ("registry", "revoker"), gateways=GATEWAYS) as (stack, _, pids),
        _gateways(stack) as more,
    ):
        print(f"{LEASES} leases of {AGENTS} agents, {len(GATEWAYS)} gateways")
        uvloop.run(_measure(stack, pids | more))
