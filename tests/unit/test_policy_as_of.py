"""When policy has to ask Kafka again before it takes in an answer, and when what it asked before will do."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from ringfence.kernel.base.clock import MAX_SKEW_MS
from ringfence.policy.incoming.approvals import ReadBarrier


class Kafka:
    """Counts the questions. `past_ms`: as `Runtime.broker_past_ms`."""

    def __init__(self) -> None:
        self.asked = 0
        self.past_ms: int | None = None
        self.answer: bool | None = None

    def broker_past_ms(self) -> int | None:
        return self.past_ms

    async def ask(self) -> bool | None:
        self.asked += 1
        return self.answer


@pytest.fixture
def kafka() -> Kafka:
    return Kafka()


@pytest.fixture
def as_of(kafka: Kafka) -> ReadBarrier:
    return ReadBarrier(cast("Any", kafka), kafka.ask)


async def test_one_question_is_the_answer_for_all_that_came_together(
    kafka: Kafka, as_of: ReadBarrier
) -> None:
    as_of.received(5000)
    for at_ms in (4000, 5000, 3000):
        await as_of.wait_until_known(at_ms)
    assert kafka.asked == 1
    await as_of.wait_until_known(5001)
    assert kafka.asked == 2
    await as_of.wait_until_known(None)
    assert kafka.asked == 3


async def test_earlier_time_from_a_slower_broker_is_asked_again(kafka: Kafka, as_of: ReadBarrier) -> None:
    """Its time may lie before that of one that was here already, and what stood there then is not known."""
    as_of.received(5000)
    await as_of.wait_until_known(5000)
    as_of.received(4900)
    await as_of.wait_until_known(4900)
    assert kafka.asked == 2


async def test_record_received_during_a_question_is_asked_again(kafka: Kafka) -> None:
    async def ask() -> None:
        await kafka.ask()
        if kafka.asked == 1:
            one.received(5000)

    one = ReadBarrier(cast("Any", kafka), ask)
    one.received(5000)
    await one.wait_until_known(4000)
    await one.wait_until_known(5000)
    assert kafka.asked == 2


async def test_time_past_on_every_broker_is_not_asked_again(kafka: Kafka, as_of: ReadBarrier) -> None:
    kafka.past_ms = 6000
    as_of.received(1000)
    await as_of.wait_until_known(1000)
    as_of.received(6000)
    await as_of.wait_until_known(6000)
    assert kafka.asked == 1
    as_of.received(6000 + MAX_SKEW_MS)
    await as_of.wait_until_known(6001)
    assert kafka.asked == 2


async def test_after_a_failure_or_without_an_answer_all_is_asked_for_again(
    kafka: Kafka, as_of: ReadBarrier
) -> None:
    as_of.received(5000)
    await as_of.wait_until_known(5000)
    as_of.invalidate()
    kafka.answer = False
    for _ in range(2):
        await as_of.wait_until_known(5000)
    assert kafka.asked == 3


async def test_messages_that_wait_together_share_one_read(kafka: Kafka, as_of: ReadBarrier) -> None:
    as_of.received(5000)
    await asyncio.gather(*(as_of.wait_until_known(at_ms) for at_ms in (4000, 5000, 4500)))
    assert kafka.asked == 1


async def test_failure_during_a_read_makes_the_read_prove_nothing(kafka: Kafka) -> None:
    async def ask() -> None:
        await kafka.ask()
        if kafka.asked == 1:
            barrier.invalidate()

    kafka.past_ms, barrier = 6000, ReadBarrier(cast("Any", kafka), ask)
    barrier.received(5000)
    for _ in range(3):
        await barrier.wait_until_known(5000)
    assert kafka.asked == 2
