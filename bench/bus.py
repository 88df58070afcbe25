"""Our consumer, the same declared on a FastStream router, and FastStream's own batch subscriber: CPU a message, and the
latency of a single one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from bench.machine import percentile
from ringfence.dev.kafka import EmbeddedKafka
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.consumer import Consumer, ConsumerOptions
from ringfence.kernel.kafka.embedded_broker import adapt_to_embedded_broker
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupBroker, GroupRouter
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from ringfence.messages.topics import CREDENTIAL_REQUEST

MESSAGES = 20_000
PROBES = 200
PAYLOAD = "x" * 769

Arrived = Callable[[int], None]


class _Counter:
    """Counts what arrived, and wakes who waits for a number."""

    def __init__(self) -> None:
        self.count = 0
        self._goal = 0
        self._reached = asyncio.Event()

    def add(self, number: int) -> None:
        self.count += number
        if self.count >= self._goal:
            self._reached.set()

    async def until(self, goal: int) -> None:
        self._goal = goal
        self._reached.clear()
        if self.count < goal:
            await self._reached.wait()


@contextlib.asynccontextmanager
async def _ours(settings: ServiceSettings, arrived: Arrived) -> AsyncIterator[None]:
    async def handle(batch: Sequence[Received]) -> None:
        arrived(len(batch))

    task = asyncio.create_task(
        Consumer(settings, ConsumerOptions(uuid.uuid4().hex), {CREDENTIAL_REQUEST: handle}).run()
    )
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def _declared(settings: ServiceSettings, arrived: Arrived) -> AsyncIterator[None]:
    """As services do it: see `ringfence.kernel.kafka.faststream_adapter`."""
    router, broker = GroupRouter(), GroupBroker(settings)

    @router.subscriber(CREDENTIAL_REQUEST, group=ConsumerGroup(uuid.uuid4().hex))
    async def handle(batch: Sequence[Received]) -> None:
        arrived(len(batch))

    broker.include(router)
    await broker.start()
    try:
        yield
    finally:
        await broker.stop()


@contextlib.asynccontextmanager
async def _faststream(settings: ServiceSettings, arrived: Arrived) -> AsyncIterator[None]:
    from faststream import AckPolicy
    from faststream.kafka import KafkaBroker

    logging.getLogger("faststream").setLevel(logging.ERROR)
    broker = KafkaBroker(settings.kafka, apply_types=False, logger=None)

    async def raw(message: Any) -> Any:
        return message.body

    @broker.subscriber(
        CREDENTIAL_REQUEST.name(settings.topic_prefix),
        batch=True,
        group_id=uuid.uuid4().hex,
        ack_policy=AckPolicy.NACK_ON_ERROR,
        auto_offset_reset="earliest",
        batch_timeout_ms=10,
        max_records=32,
        decoder=raw,
    )
    async def handle(batch: list[bytes]) -> None:
        arrived(len(batch))

    await broker.start()
    # The same manners towards the embedded broker for both.
    for subscriber in broker.subscribers:
        adapt_to_embedded_broker(subscriber.consumer)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        await broker.stop()


async def _measure(name: str, settings: ServiceSettings, kind: Any) -> None:
    async with Publisher(settings, "spiffe://bench/client") as publisher:
        counter = _Counter()
        async with kind(settings, counter.add):
            await (await publisher.send(CREDENTIAL_REQUEST, "bench", Outbound("a", PAYLOAD, id="0")))
            await counter.until(1)
            latencies = []
            for _ in range(PROBES):
                start, goal = (
                    time.perf_counter(),
                    counter.count + 1,
                )  # it may arrive before its acknowledgement
                await (await publisher.send(CREDENTIAL_REQUEST, "bench", Outbound("a", PAYLOAD, id="0")))
                await counter.until(goal)
                latencies.append((time.perf_counter() - start) * 1000)
        sent = [
            await publisher.send(CREDENTIAL_REQUEST, "bench", Outbound(str(n), PAYLOAD, id="0"))
            for n in range(MESSAGES)
        ]
        await asyncio.gather(*sent)
        counter = _Counter()
        cpu, wall = time.process_time(), time.perf_counter()
        async with kind(settings, counter.add):
            await counter.until(MESSAGES)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(
        f"{name:12} {counter.count / wall:7.0f}/s, CPU {cpu / counter.count * 1e6:4.0f} µs a message; "
        f"one alone: p50 {percentile(latencies, 0.5):.1f} ms, p99 {percentile(latencies, 0.99):.1f} ms"
    )


async def _all(bootstrap: str) -> None:
    for name, kind in (("aiokafka", _ours), ("declared", _declared), ("FastStream", _faststream)):
        settings = ServiceSettings(
            kafka=bootstrap, topic_prefix=f"bus-{uuid.uuid4().hex[:6]}", partitions=4, embedded_broker=True
        )
        async with TopicsAdmin(settings) as admin:
            await admin.apply()
        await _measure(name, settings, kind)


def run(kafka: str) -> None:
    """Print all on the embedded broker, whatever `kafka` says."""
    import uvloop

    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as folder:
        broker = EmbeddedKafka(Path(folder))
        broker.start()
        try:
            uvloop.run(_all(broker.bootstrap))
        finally:
            broker.stop()
