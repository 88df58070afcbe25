"""Endurance: constant load for hours; memory, file handles, lag, Redis keys and Kafka records of each minute.

It fails if one of them is not flat after the first ten minutes. Leases last a minute, so what is live is constant too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from statistics import median

import psutil
from aiokafka import AIOKafkaConsumer, TopicPartition
from redis.asyncio import Redis

from bench.credentials import AGENTS, Agents, agents_of
from bench.machine import percentile
from bench.stack import running
from ringfence.client.settings import ClientSettings
from ringfence.dev.organisation import PLATFORM
from ringfence.dev.stack import Stack

HOURS = 2.0
RATE = 10
TTL_S = 60
WARM_UP_MINUTES = 10
_MINUTE_S = 60.0
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Minute:
    """Memory, handles, keys and records at the end of a minute; issues and latency of the load."""

    memory: Mapping[str, float]
    """Unique memory of each process and its children, in MiB."""
    handles: Mapping[str, int]
    redis_keys: int
    records: int
    """Records ever written to Kafka, all topics."""
    asked: int
    """Credentials ever issued."""
    p99_ms: float
    """Request to credential. It grows if a service lags behind."""


def run(kafka: str, hours: float = HOURS) -> None:
    """Run for `hours`, print a line each minute, then what grew. Exits with 1 if something is not flat."""
    import uvloop

    with running(kafka) as (stack, settings, pids):
        minutes = uvloop.run(_soak(stack, settings, pids, max(1, round(hours * 60))))
    problems = growth(minutes[WARM_UP_MINUTES:])
    if len(minutes) < 2 * WARM_UP_MINUTES:
        print(f"nothing is judged: it takes {2 * WARM_UP_MINUTES} minutes at least")
    elif problems:
        raise SystemExit("not flat: " + "; ".join(problems))
    else:
        print(
            f"flat: memory, handles, latency, Redis keys and records a credential after {WARM_UP_MINUTES} minutes"
        )


def growth(minutes: Sequence[Minute]) -> list[str]:
    """Return what grew: the medians of the first and of the last third are compared.

    Memory may grow by 5 % and 8 MiB, as allocators keep pages; handles by 3, keys and latency by half.
    """
    third = len(minutes) // 3
    if third < 2:
        return []
    first, last = minutes[:third], minutes[-third:]

    def grew(name: str, value: Callable[[Minute], float], share: float, more: float) -> list[str]:
        before, after = median(map(value, first)), median(map(value, last))
        return [f"{name} {before:,.1f} to {after:,.1f}"] if after > before * (1 + share) + more else []

    found = []
    for name in minutes[0].memory:
        found += grew(f"memory of {name} (MiB)", partial(_item, "memory", name), 0.05, 8)
        found += grew(f"handles of {name}", partial(_item, "handles", name), 0, 3)
    found += grew("Redis keys", lambda one: one.redis_keys, 0.5, 20)
    found += grew("p99 (ms)", lambda one: one.p99_ms, 0.5, 50)
    each = [
        (part[-1].records - part[0].records) / max(1, part[-1].asked - part[0].asked)
        for part in (first, last)
    ]
    if abs(each[1] - each[0]) > 0.1 * each[0]:
        found.append(f"Kafka records a credential {each[0]:.2f} to {each[1]:.2f}")
    return found


def _item(member: str, name: str, one: Minute) -> float:
    return float(getattr(one, member)[name])


async def _soak(stack: Stack, settings: ClientSettings, pids: Mapping[str, int], length: int) -> list[Minute]:
    minutes: list[Minute] = []
    latencies: list[float] = []
    asked = 0
    print(f"{RATE}/s for {length} minutes, leases of {TTL_S} s; MiB and handles of each process")
    async with (
        agents_of(stack, settings) as agents,
        AIOKafkaConsumer(bootstrap_servers=settings.kafka) as consumer,
        Redis.from_url(stack.redis_url) as redis,
    ):
        load = asyncio.create_task(_load(agents, latencies))
        try:
            for number in range(1, length + 1):
                done, _ = await asyncio.wait([load], timeout=_MINUTE_S)
                if done:
                    load.result()
                asked, taken = asked + len(latencies), sorted(latencies)
                latencies.clear()
                one = Minute(
                    {name: _memory_mib(pid) for name, pid in pids.items()},
                    {name: psutil.Process(pid).num_fds() for name, pid in pids.items()},
                    await redis.dbsize(),
                    await _records(consumer),
                    asked,
                    percentile(taken, 0.99) if taken else _MINUTE_S * 1000,
                )
                minutes.append(one)
                print(
                    f"{number:4}  {' '.join(f'{name} {one.memory[name]:.0f}/{one.handles[name]}' for name in pids)}  "
                    f"keys {one.redis_keys}  records {one.records}  issued {asked}  p99 {one.p99_ms:.0f} ms",
                    flush=True,
                )
        finally:
            load.cancel()
    return minutes


async def _load(agents: Agents, latencies: list[float]) -> None:
    """Ask for `RATE` credentials a second until cancelled. Raises the first failure."""

    async def one(number: int) -> None:
        agent, task = agents[number % AGENTS]
        start = time.perf_counter()
        await agent.request(
            task=task,
            target=PLATFORM,
            verbs=["read"],
            resources=["env/staging/web"],
            reason="soak",
            ttl_s=TTL_S,
        )
        latencies.append((time.perf_counter() - start) * 1000)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in count():
            await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
            group.create_task(one(number))


def _memory_mib(pid: int) -> float:
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(one.memory_full_info().uss for one in family) / _MIB


async def _records(consumer: AIOKafkaConsumer) -> int:
    """Return the sum of all partitions' end offsets."""
    topics = await consumer.topics()
    places = [
        TopicPartition(topic, number)
        for topic in topics
        for number in consumer.partitions_for_topic(topic) or ()
    ]
    return sum((await consumer.end_offsets(places)).values())
