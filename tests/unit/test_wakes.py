"""Producers wake the consumers of their process, also where the event loop of a consumer is closed already."""

from __future__ import annotations

import asyncio
from typing import Any

from ringfence.kernel.kafka.fetch_control import FetchPauses
from tests.support import wakes

PAUSE_S = 60


class Consumer:
    """Any object that a weak reference can be made of."""


async def test_write_ends_the_pause_of_a_consumer() -> None:
    consumer = Consumer()
    waiting = await _paused(consumer)
    wakes._wake({"of-wakes"})
    await asyncio.wait_for(waiting, 5)


async def test_write_passes_over_a_consumer_whose_loop_is_closed() -> None:
    closed = asyncio.new_event_loop()
    left = closed.create_future()
    closed.close()
    wakes._waiting[left] = frozenset({"of-wakes"})
    try:
        waiting = await _paused(Consumer())
        wakes._wake({"of-wakes"})
        await asyncio.wait_for(waiting, 5)
    finally:
        del wakes._waiting[left]


async def _paused(consumer: Any) -> asyncio.Task[None]:
    """A consumer that has seen all, and waits for more: the first pause only notes what was written so far."""
    topics = [("of-wakes", 0)]
    await wakes._pause(PAUSE_S, consumer, topics, FetchPauses())
    before = len(wakes._waiting)
    waiting = asyncio.create_task(wakes._pause(PAUSE_S, consumer, topics, FetchPauses()))
    await asyncio.sleep(0)  # the task runs up to its wait
    assert len(wakes._waiting) == before + 1
    return waiting
