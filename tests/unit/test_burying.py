"""Dead letters are waited for together: else a flood of garbage would hold up what stands between it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.issuer.decisions import DecisionHandler
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.kafka.batch_handlers import BatchHandler, concurrent, sequential
from ringfence.kernel.kafka.dead_letters import MAX_INVALID_SIGNED, DeadLetters, HaltedError
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.messages.base import typ_header
from ringfence.messages.codes import Code
from ringfence.messages.registry import UserRecord
from ringfence.messages.topics import REGISTRY_COMMAND, USER
from ringfence.revoker.revocations.revocations import RevocationHandler
from tests.support.malformed_records import Services, malformed

WITHIN_S = 10
TOGETHER = 8


class Broker:
    """Acknowledges nothing before so many letters have come."""

    def __init__(self, together: int = TOGETHER) -> None:
        self.dead_letters: list[str] = []
        self._together = together
        self._waiting: list[asyncio.Future[None]] = []

    async def send(self, topic: Any, type: str, record: Outbound, **_: Any) -> Awaitable[None]:
        self.dead_letters.append(str(record.value))
        self._waiting.append(asyncio.get_running_loop().create_future())
        if len(self.dead_letters) == self._together:
            for one in self._waiting:
                one.set_result(None)
        return self._waiting[-1]


def records(*values: str) -> list[Received]:
    return [
        Received(REGISTRY_COMMAND, "commands", 0, offset, 0, "key", value.encode(), ())
        for offset, value in enumerate(values)
    ]


def letters(broker: Broker) -> DeadLetters:
    return DeadLetters(cast(Any, broker), "test", SystemClock())


async def handle(record: Received) -> None:
    if record.value == b"bad":
        raise InvalidMessageError("no message")


def of_a_bus(order: Any) -> Any:
    return lambda broker: order(handle, letters(broker))


def of_the_revoker(broker: Broker) -> BatchHandler:
    async def opened(batch: Sequence[Received]) -> Any:
        return [], [(record, InvalidMessageError("no message")) for record in batch if record.value == b"bad"]

    async def nothing(*_: Any) -> Any:
        return []

    settings = SimpleNamespace(trust_domain="test.example")
    runtime = SimpleNamespace(dead_letters=letters(broker), settings=settings, clock=SystemClock())
    orders = SimpleNamespace(verify=opened, check=nothing)
    store, ender = (
        SimpleNamespace(epoch=None, confirm=nothing),
        SimpleNamespace(end=nothing, revoking=nullcontext),
    )
    return RevocationHandler(*cast(Any, (runtime, orders, store, ender, None)))


def of_the_issuer(broker: Broker) -> BatchHandler:
    runtime = SimpleNamespace(dead_letters=letters(broker))
    handler = DecisionHandler(*cast(Any, (runtime, *[None] * 4)))

    async def opened(batch: Sequence[Received]) -> None:
        assert await handler._verified([record for record in batch if record.value == b"bad"]) == []

    return opened


@pytest.mark.parametrize("make", [of_a_bus(sequential), of_a_bus(concurrent), of_the_revoker, of_the_issuer])
async def test_the_letters_of_a_batch_are_waited_for_together(make: Any):
    broker = Broker()
    async with asyncio.timeout(WITHIN_S):
        await make(broker)(records(*["good", "bad"] * TOGETHER))
    assert len(broker.dead_letters) == TOGETHER


async def test_a_batch_is_not_over_before_its_letters_are_there():
    broker = Broker(2)
    batch = asyncio.ensure_future(sequential(handle, letters(broker))(records("bad", "good")))
    while not broker.dead_letters:
        await asyncio.sleep(0)
    for _ in range(100):  # everything else that it could do, it does
        await asyncio.sleep(0)
    assert not batch.done()
    await letters(broker).enqueue(records("another")[0], InvalidMessageError("no message"))
    await asyncio.wait_for(batch, WITHIN_S)


async def test_halting_record_stops_the_records_after_it():
    handled = []

    async def refuse(record: Received) -> None:
        handled.append(record.offset)
        raise InvalidMessageError("a field is missing", code=Code.CLAIMS_INVALID)

    broker, services = Broker(MAX_INVALID_SIGNED), Services()
    typ, now_ms = typ_header(UserRecord), SystemClock().now_ms()
    batch = [
        Received(
            USER, "users", 0, n, now_ms, "k", malformed(services.keys["registry"], typ, services.td).encode()
        )
        for n in range(MAX_INVALID_SIGNED + 5)
    ]
    counting = DeadLetters(cast(Any, broker), "test", SystemClock(), services.trust)
    with pytest.raises(HaltedError) as halted:
        await asyncio.wait_for(sequential(refuse, counting)(batch), WITHIN_S)
    assert halted.value.record == batch[MAX_INVALID_SIGNED]
    assert handled == [record.offset for record in batch[: MAX_INVALID_SIGNED + 1]]
    assert len(broker.dead_letters) == MAX_INVALID_SIGNED
