"""Very many leases that are due in the same second: how long until all have their signed ends, and what that costs.

First with nothing but revokers (`--revokers`: how many), then while somebody asks for credentials: with the services
that issue them, and with audit as well, which tells of each end.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence

from aiokafka import AIOKafkaConsumer, TopicPartition

from bench import credentials
from bench.filling import Valkey, signed_leases
from bench.machine import cpu_s, percentile
from bench.stack import WITHOUT_GATEWAY, more_of, running
from ringfence.client.agent.agent import Agent
from ringfence.client.settings import ClientSettings
from ringfence.dev.stack import Stack
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.connection import connection
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.base import ServiceRole
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import SignedLease
from ringfence.revoker.consistency.kafka_view import wait_complete

DUE = 100_000
AGENTS = 1_000
_TRIAL = 1_000
"""So many are made first, to find out how long that takes here: all must be there before they are due."""
AHEAD_S = 25
"""All are there so long before they are due."""
GIVE_UP_S = 300
ISSUING: tuple[ServiceRole, ...] = ("registry", "policy", "issuer", "revoker")
RATE = 10
"""Credentials asked for in a second."""


class _Asking:
    """Somebody who asks for credentials at an even rate, and how long each took."""

    def __init__(self) -> None:
        self.took_ms: list[tuple[float, float]] = []
        """With the time of asking."""
        self.refused: list[str] = []

    async def run(self, agents: credentials.Agents) -> None:
        async with asyncio.TaskGroup() as asked:
            start = time.perf_counter()
            for number in itertools.count():
                await asyncio.sleep(max(0.0, start + number / RATE - time.perf_counter()))
                asked.create_task(self._ask(*agents[number % len(agents)]))

    async def _ask(self, agent: Agent, task: str) -> None:
        at_s = time.time()
        try:
            self.took_ms.append((at_s, await credentials.request(agent, task)))
        except RingfenceError as error:
            self.refused.append(error.code)

    def describe(self, name: str, from_s: float, to_s: float) -> None:
        took = [ms for at_s, ms in self.took_ms if from_s <= at_s < to_s]
        if took:
            print(
                f"  credentials asked for {name}: {len(took)}, p50 {percentile(took, 0.5):.0f} ms, "
                f"p99 {percentile(took, 0.99):.0f} ms, max {max(took):.0f} ms"
            )


async def _written(consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]) -> int:
    return sum((await consumer.end_offsets(partitions)).values())


async def _drain(stack: Stack, pids: dict[str, int]) -> tuple[float, float]:
    """Have so many leases end; print how it went. Returns when they were due, and when the last had ended."""
    settings = stack.settings()
    key = SigningKey.load(stack.trust.service_key("issuer"))
    valkey = Valkey(settings)

    def made(count: int, due_s: int) -> list[SignedLease]:
        leases = signed_leases(
            key, settings.trust_domain, count, lambda _: due_s, lambda n: f"due-{n % AGENTS}"
        )
        valkey.put(leases)
        return leases

    start = time.perf_counter()
    await asyncio.to_thread(made, _TRIAL, int(time.time()) + 80_000)
    due_s = int(time.time() + AHEAD_S + 2 * (time.perf_counter() - start) * DUE / _TRIAL)
    leases = await asyncio.to_thread(made, DUE, due_s)
    ids = {one.claims.lease_id for one in leases}
    name = LEASE.name(settings.topic_prefix)
    consumer = AIOKafkaConsumer(**connection(settings), enable_auto_commit=False)
    await consumer.start()
    try:
        await consumer._client.set_topics([name])
        partitions = [
            TopicPartition(name, n) for n in consumer._client.cluster.partitions_for_topic(name) or ()
        ]
        if time.time() > due_s - 1:
            raise SystemExit("the leases were due before all were there: the machine became slower meanwhile")
        await asyncio.sleep(due_s - time.time())
        before, written = cpu_s(pids), await _written(consumer, partitions)
        while await _written(consumer, partitions) < written + DUE and time.time() < due_s + GIVE_UP_S:
            await asyncio.sleep(0.1)
        done = cpu_s(pids)
        await asyncio.sleep(3)  # the outbox is cleared, and what was published looked at
        after = cpu_s(pids)
    finally:
        await consumer.stop()
    ends = await _read(settings, ids)
    lags_s = [at_ms / 1000 - due_s for _, at_ms in ends]
    print(
        f"  {len({id for id, _ in ends})} of {DUE} ended, {len(ends)} ends: p50 {percentile(lags_s, 0.5):.2f} s, "
        f"p99 {percentile(lags_s, 0.99):.2f} s, the last after {max(lags_s):.2f} s"
    )
    for what, since, until in (("meanwhile", before, done), ("and after", done, after)):
        each = {name: (until[name] - since[name]) / DUE * 1e6 for name in pids}
        print(f"  CPU µs a lease {what}: " + ", ".join(f"{name} {us:.0f}" for name, us in each.items()))
    return due_s, due_s + max(lags_s)


async def _read(settings: ServiceSettings, ids: set[str]) -> list[tuple[str, int]]:
    """The distinct ends of these leases on Kafka, and when each stood there first."""
    ends: dict[tuple[str, bytes], int] = {}

    def on_records(records: Sequence[Received]) -> None:
        for record in records:
            if record.key in ids and parse(record.value).unverified_claims(Lease).status in TERMINAL:
                ends.setdefault((record.key or "", record.value), record.appended_at_ms)

    async with Follower(settings, [LEASE], on_records) as follower:
        await wait_complete(follower)
    return [(id, at_ms) for (id, _), at_ms in ends.items()]


async def _while_issuing(stack: Stack, pids: dict[str, int], agents: credentials.Agents) -> None:
    asking = _Asking()
    task = asyncio.create_task(asking.run(agents))
    due_s, ended_s = await _drain(stack, pids)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    asking.describe("in the 10 s before", due_s - 10, due_s)
    asking.describe("meanwhile", due_s, ended_s)
    print(f"  refused or unanswered: {len(asking.refused)} {sorted(set(asking.refused)) or ''}")


def run(kafka: str, revokers: int = 1) -> None:
    """Print the numbers on this broker, with so many revokers."""
    import uvloop

    with (
        running(kafka, ("registry", "revoker")) as (stack, _, pids),
        more_of(stack, "revoker", revokers - 1) as more,
    ):
        print(f"{DUE} leases due in the same second, revokers alone: {revokers}")
        uvloop.run(_drain(stack, pids | more))
    for services, told in ((ISSUING, "the services that issue"), (WITHOUT_GATEWAY, "all services")):
        with (
            running(kafka, services) as (stack, settings, pids),
            more_of(stack, "revoker", revokers - 1) as more,
        ):
            print(f"the same with {told}, and {RATE} credentials a second asked for")

            async def work(stack: Stack, settings: ClientSettings, pids: dict[str, int]) -> None:
                async with credentials.agents_of(stack, settings) as agents:
                    await _while_issuing(stack, pids, agents)

            uvloop.run(work(stack, settings, pids | more))
