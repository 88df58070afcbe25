"""Groups that are declared on FastStream routers, on a real broker: what FastStream may not change of `Consumer`.

The suites of the bus run declared as well (`make_consumer`). Here stands what only FastStream brings, and what happens
in the middle of a batch. SIGTERM: `tests/flows/test_draining.py`, whose service is declared like all others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from faststream import BaseMiddleware

from ringfence.dev.stack import Stack
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.dead_letters import DeadLetters, HaltedError
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupBroker, GroupRouter
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.messages.base import SERVICE_ROLES
from ringfence.messages.codes import Code
from ringfence.messages.topics import CREDENTIAL_REQUEST

pytestmark = pytest.mark.broker

WITHIN_S = 60


async def send(publisher: Publisher, *values: str, partition_of: str = "bot") -> None:
    for value in values:
        await (await publisher.send(CREDENTIAL_REQUEST, "test", Outbound(partition_of, value, id=value)))


async def committed(settings: ServiceSettings) -> int:
    """How many records the group `g` is done with, over all partitions."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka, group_id=f"{settings.topic_prefix}.g", enable_auto_commit=False
    )
    await consumer.start()
    try:
        name = CREDENTIAL_REQUEST.name(settings.topic_prefix)
        return sum(
            [await consumer.committed(TopicPartition(name, p)) or 0 for p in range(settings.partitions)]
        )
    finally:
        await consumer.stop()


@contextlib.asynccontextmanager
async def reading(broker: GroupBroker) -> AsyncIterator[None]:
    await broker.start()
    try:
        yield
    finally:
        await broker.stop()


async def until(condition: Any) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.02)


async def until_committed(settings: ServiceSettings, count: int) -> None:
    async with asyncio.timeout(WITHIN_S):
        while await committed(settings) != count:
            await asyncio.sleep(0.05)


def declared(
    settings: ServiceSettings, handle: Any, *, middlewares: Sequence[Any] = (), **options: Any
) -> GroupBroker:
    """A broker that reads the group `g` for `handle`, a handler of batches."""
    router, broker = GroupRouter(), GroupBroker(settings, middlewares=middlewares)
    router.subscriber(CREDENTIAL_REQUEST, group=ConsumerGroup("g", **options))(handle)
    broker.include(router)
    return broker


async def test_a_batch_that_raises_is_retried_and_nothing_behind_it_is_handled_or_committed(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    """The gate comes before the first record, and once."""
    order, may = list[str](), asyncio.Event()

    async def gate() -> None:
        order.append("gate")

    async def handle(batch: Sequence[Received]) -> None:
        values = [record.value.decode() for record in batch]
        order.extend(values)
        if "2" in values and not may.is_set():
            raise UnavailableError("Redis is away")

    await send(publisher, *"0123")
    broker = declared(settings, handle, max_records=1, on_assigned=gate)
    async with reading(broker):
        await until(lambda: order.count("2") >= 3)
        assert await committed(settings) == 2
        assert "3" not in order
        may.set()
        await until(lambda: "3" in order)
        await broker.drain()
    assert order[0] == "gate"
    assert order.count("gate") == 1
    assert await committed(settings) == 4


async def test_unfinished_batch_is_redelivered_to_the_next_member(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    reached, seen = asyncio.Event(), list[str]()

    async def hang(batch: Sequence[Received]) -> None:
        if batch[0].value == b"1":
            reached.set()
            await asyncio.Event().wait()

    async def take(batch: Sequence[Received]) -> None:
        seen.extend(record.value.decode() for record in batch)

    await send(publisher, *"012")
    async with reading(declared(settings, hang, max_records=1)), asyncio.timeout(WITHIN_S):
        await reached.wait()
    assert await committed(settings) == 1
    async with reading(declared(settings, take)):
        await until(lambda: "2" in seen)
    assert seen == ["1", "2"]


class Swallows(BaseMiddleware):
    """Ends an error, as FastStream's `ExceptionMiddleware` does."""

    async def after_processed(self, *error: object) -> bool:
        return True


async def test_a_middleware_that_swallows_errors_has_nothing_committed(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    tries, done, may = list[int](), list[bytes](), asyncio.Event()

    async def handle(batch: Sequence[Received]) -> None:
        tries.append(len(batch))
        if not may.is_set():
            raise UnavailableError("Redis is away")
        done.extend(record.value for record in batch)

    await send(publisher, "a")
    broker = declared(settings, handle, middlewares=[Swallows])
    async with reading(broker):
        await until(lambda: len(tries) >= 3)
        assert await committed(settings) == 0
        may.set()
        await until(lambda: done)
        await broker.drain()
    assert done == [b"a"]
    assert await committed(settings) == 1


async def test_a_header_that_is_not_text_holds_up_nobody(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    seen = list[Received]()

    async def handle(batch: Sequence[Received]) -> None:
        seen.extend(batch)

    name = CREDENTIAL_REQUEST.name(settings.topic_prefix)
    headers = [("h", b"\xff"), ("content-type", b"\xfe"), ("correlation_id", b"\xfd"), ("reply_to", b"\xfc")]
    assert publisher._producer is not None
    await (await publisher._producer.send(name, b"x", key=b"bot", headers=headers))
    await send(publisher, "y")
    broker = declared(settings, handle)
    async with reading(broker):
        await until(lambda: len(seen) == 2)
        await broker.drain()
    assert [record.value for record in seen] == [b"x", b"y"]
    assert seen[0].headers["h"] == "\ufffd"
    assert await committed(settings) == 2


async def test_a_halted_group_commits_what_stands_before_and_nothing_more(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    told = list[HaltedError]()

    async def report(error: HaltedError) -> None:
        told.append(error)

    async def handle(batch: Sequence[Received]) -> None:
        for record in batch:
            if record.value == b"halts":
                raise HaltedError("too many malformed records", record)

    router, broker = GroupRouter(), GroupBroker(settings, on_halted=report)
    router.subscriber(CREDENTIAL_REQUEST, group=ConsumerGroup("g"))(handle)
    broker.include(router)
    await send(publisher, "good", "halts", "behind")
    async with reading(broker):
        await until(lambda: told)
        assert broker.unready() == "too many malformed records"
        assert broker.halted() == (f"{settings.topic_prefix}.g",)
        await send(publisher, "later")
        await until_committed(settings, 1)
    assert await committed(settings) == 1


async def test_a_rebalance_in_the_middle_of_a_batch_loses_nothing(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    """The batch goes on. Of it, what is with another member now is that member's: it comes again there."""
    begun, may, first, second = asyncio.Event(), asyncio.Event(), list[str](), list[str]()

    async def slow(batch: Sequence[Received]) -> None:
        begun.set()
        await may.wait()
        first.extend(record.value.decode() for record in batch)

    async def quick(batch: Sequence[Received]) -> None:
        second.extend(record.value.decode() for record in batch)

    keys = [f"agent-{n}" for n in range(12)]
    for key in keys:
        await send(publisher, key, partition_of=key)
    name = CREDENTIAL_REQUEST.name(settings.topic_prefix)
    one, two = declared(settings, slow), declared(settings, quick)
    async with reading(one), asyncio.timeout(WITHIN_S):
        await begun.wait()
        async with reading(two):
            (joined,) = two.consumers
            await until(lambda: any(joined.owns(name, p) for p in range(settings.partitions)))
            may.set()
            # The first member handles its whole batch. What it may not commit comes again to the other. Both stay
            # until all is committed: a member that leaves begins a rebalance, in which the other may commit nothing.
            await until_committed(settings, len(keys))
    assert set(first) | set(second) == set(keys)
    assert second


PAGES = (
    "", "/", "/docs", "/docs/asyncapi", "/docs/asyncapi/try", "/asyncapi", "/asyncapi/try", "/asyncapi.json",
    "/asyncapi.yaml", "/schema", "/try", "/redoc", "/openapi.json",
)  # fmt: skip
"""Where FastStream, and what is like it, serves its pages."""


def test_no_service_serves_a_page_of_its_description_or_lets_anybody_try_it(stack: Stack) -> None:
    """FastStream's page loads scripts from elsewhere, and its route `/try` publishes for whoever asks."""
    roles = [role for role in stack.options.services if role in SERVICE_ROLES and role != "gateway"]
    assert {"registry", "policy", "issuer", "revoker", "audit"} <= set(roles)
    for role in roles:
        assert httpx.get(f"{stack.url(role)}/healthz").status_code == 200
        for page in PAGES:
            for method in ("GET", "POST"):
                answer = httpx.request(method, f"{stack.url(role)}{page}", json={})
                assert answer.status_code in (404, 405), (role, method, page)
                assert "asyncapi" not in answer.text.lower(), (role, method, page)


async def test_single_records_that_are_invalid_are_dead_lettered_and_committed(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    good = list[bytes]()
    letters = DeadLetters(publisher, "test", SystemClock())
    router, broker = GroupRouter(), GroupBroker(settings)

    @router.subscriber(CREDENTIAL_REQUEST, group=ConsumerGroup("g", letters), order="sequential")
    async def handle(record: Received) -> None:
        if record.value.startswith(b"bad"):
            raise InvalidMessageError("not a JWS", code=Code.NOT_A_JWS)
        good.append(record.value)

    broker.include(router)
    await send(publisher, "bad 1", "good", "bad 2")
    async with reading(broker):
        await until(lambda: good == [b"good"])
        await broker.drain()
    assert await committed(settings) == 3
