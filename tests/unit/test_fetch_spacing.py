"""Consumers fetch when it is worth a request, and nothing else of them waits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import NodeNotReadyError

from ringfence.kernel.kafka.embedded_broker import hold_fetches
from ringfence.kernel.kafka.fetch_control import MUCH_BYTES, BatchDelay, FetchControl

_FETCH, _HEARTBEAT = 1, 12


def answer(*records: bytes, error_code: int = 0) -> Any:
    """What a fetch of one partition brings."""
    return SimpleNamespace(topics=[("t", [(0, error_code, 0, 0, 0, [], b"".join(records))])])


@dataclass
class Client:
    """Notes when each request is sent, and answers fetches with what it is given, then with nothing."""

    answers: list[Any] = field(default_factory=list)
    sent: list[tuple[int, int, float]] = field(default_factory=list)
    _conns: dict[Any, Any] = field(default_factory=dict)

    async def send(self, node_id: int, request: Any, **_: Any) -> Any:
        self.sent.append((node_id, request.API_KEY, asyncio.get_running_loop().time()))
        return self.answers.pop(0) if self.answers and request.API_KEY == _FETCH else answer()


def of(client: Client) -> Any:
    """A consumer that has this client."""
    subscription = SimpleNamespace(fetch_context=None)
    return SimpleNamespace(_client=client, _fetcher=SimpleNamespace(_records={}), _subscription=subscription)


def at(client: Client, node: int, api_key: int = _FETCH) -> list[float]:
    return [when for n, key, when in client.sent if (n, key) == (node, api_key)]


FETCH, HEARTBEAT = SimpleNamespace(API_KEY=_FETCH, topics=()), SimpleNamespace(API_KEY=_HEARTBEAT)


async def test_fetches_from_one_broker_start_apart() -> None:
    client = Client([answer(b"record")] * 6)
    hold_fetches(of(client), linger_ms=50)
    for _ in range(3):
        await client.send(1, FETCH)
        await client.send(2, FETCH)
        await client.send(1, HEARTBEAT)
    first, second, third = at(client, 1)
    assert second - first >= 0.049
    assert third - second >= 0.049
    assert len(at(client, 2)) == 3
    assert len(at(client, 1, _HEARTBEAT)) == 3


@pytest.mark.parametrize("last", [answer(b"record"), answer(error_code=6)])
async def test_a_fetch_that_brings_nothing_is_sent_again_until_it_brings_something(last: Any) -> None:
    client = Client([answer(), answer(), last])
    hold_fetches(of(client), linger_ms=1, ceiling_ms=1, hold_ms=600_000)
    assert await client.send(1, FETCH) is last
    assert len(at(client, 1)) == 3


async def test_a_fetch_that_brings_nothing_for_too_long_is_answered_with_nothing() -> None:
    client = Client()
    hold_fetches(of(client), linger_ms=10, ceiling_ms=10, hold_ms=25)
    assert (await client.send(1, FETCH)).topics == answer().topics
    assert 1 <= len(at(client, 1)) <= 3
    assert (await client.send(1, HEARTBEAT)).topics == answer().topics, "nothing else waits"


async def test_after_what_came_records_gather_and_the_first_after_a_silence_does_not_wait() -> None:
    client = Client([answer(), answer(b"record"), answer(b"record")])
    FetchControl(of(client), linger_ms=50)
    for _ in range(3):
        await client.send(1, FETCH)
        await client.send(1, HEARTBEAT)
    first, second, third = at(client, 1)
    assert second - first < 0.049, "nothing came, so there is nothing to gather behind"
    assert third - second >= 0.049
    assert at(client, 1, _HEARTBEAT)[1] - second < 0.049, "nothing else waits"
    assert await asyncio.wait_for(client.send(2, FETCH), 0.049), "nor does another broker"


async def test_lingering_fetch_goes_out_at_once_while_somebody_waits_for_records() -> None:
    client = Client([answer(b"record")] * 4)
    pauses = FetchControl(of(client), linger_ms=600_000).pauses
    await client.send(1, FETCH)
    lingering = asyncio.create_task(client.send(1, FETCH))
    await asyncio.sleep(0)  # the task runs up to its wait
    assert len(at(client, 1)) == 1
    async with asyncio.timeout(10):
        with pauses.hurried():
            await lingering
            await client.send(1, FETCH)
    lingering = asyncio.create_task(client.send(1, FETCH))
    await asyncio.sleep(0.01)
    assert not lingering.done(), "records gather again once nobody waits"
    lingering.cancel()


async def test_held_fetch_of_the_embedded_broker_goes_out_at_once_while_somebody_waits_for_records() -> None:
    client = Client([answer(b"record"), answer(), answer(), answer(b"record")])
    pauses = hold_fetches(of(client), linger_ms=600_000, ceiling_ms=600_000, hold_ms=10**9)
    await client.send(1, FETCH)
    held = asyncio.create_task(client.send(1, FETCH))
    await asyncio.sleep(0)  # the task runs up to its wait
    assert len(at(client, 1)) == 1
    with pauses.hurried():
        assert (await asyncio.wait_for(held, 10)).topics == answer(b"record").topics
    assert len(at(client, 1)) == 4


async def test_after_a_fetch_that_failed_the_next_waits_where_it_can_be_called_off() -> None:
    """aiokafka waits after a failure as well, and then what it calls off comes out of its `stop` as a cancellation."""
    client = Client()
    failed = NodeNotReadyError("gone")

    async def fails(*_: Any, **__: Any) -> Any:
        raise failed

    client.send = fails  # type: ignore[method-assign]
    FetchControl(of(client))
    began_s = asyncio.get_running_loop().time()
    assert list((await client.send(1, FETCH)).topics) == [], (
        "nothing came, and aiokafka is told of no failure"
    )
    assert asyncio.get_running_loop().time() - began_s >= 0.09, (
        "a broker that is away is not asked all the time"
    )
    with pytest.raises(NodeNotReadyError):
        await client.send(1, HEARTBEAT)


async def test_behind_a_broker_that_has_much_nobody_waits() -> None:
    client = Client([answer(b"x" * MUCH_BYTES)])
    FetchControl(of(client), linger_ms=600_000)
    async with asyncio.timeout(10):
        await client.send(1, FETCH)
        await client.send(1, FETCH)


async def test_paused_consumer_does_not_fetch() -> None:
    client = Client([answer(b"record")])
    fetches = FetchControl(of(client))
    fetches.pause()
    fetching = asyncio.create_task(client.send(1, FETCH))
    for _ in range(10):  # the fetch has its turns
        await asyncio.sleep(0)
    await client.send(1, HEARTBEAT)
    assert at(client, 1) == []
    done_s = asyncio.get_running_loop().time()
    fetches.resume(0.05)
    assert list((await fetching).topics) == [], (
        "made when some partitions still had records here, so it lacks them"
    )
    assert at(client, 1) == []
    await client.send(1, FETCH)
    assert at(client, 1)[0] - done_s >= 0.049


def test_records_gather_where_several_come_twice_in_a_row_and_are_not_here_already() -> None:
    gathering = BatchDelay(full=32)
    waits_ms = [round(gathering.after(handled) * 1000) for handled in (1, 1, 5, 1, 3, 4, 20, 30, 32, 31)]
    assert waits_ms == [0, 0, 0, 0, 0, 4, 6, 12, 0, 12]
