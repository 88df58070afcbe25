"""Whoever is in no hurry fetches from the embedded broker seldom, and nothing else of the consumer waits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.kernel.embedded_broker import hold_fetches
from ringfence.kernel.kafka import fetch_options

_FETCH, _HEARTBEAT = 1, 12


def answer(*records: bytes, error_code: int = 0) -> Any:
    """What a fetch of one partition brings."""
    return SimpleNamespace(topics=[("t", [(0, error_code, 0, 0, 0, [], b"".join(records))])])


@dataclass
class Client:
    """Notes when each request is sent, and answers fetches with what it is given, then with nothing."""

    answers: list[Any] = field(default_factory=list)
    sent: list[tuple[int, int, float]] = field(default_factory=list)

    async def send(self, node_id: int, request: Any, **_: Any) -> Any:
        self.sent.append((node_id, request.API_KEY, asyncio.get_running_loop().time()))
        return self.answers.pop(0) if self.answers and request.API_KEY == _FETCH else answer()


def at(client: Client, node: int, api_key: int = _FETCH) -> list[float]:
    return [when for n, key, when in client.sent if (n, key) == (node, api_key)]


FETCH, HEARTBEAT = SimpleNamespace(API_KEY=_FETCH), SimpleNamespace(API_KEY=_HEARTBEAT)


async def test_fetches_from_one_broker_start_apart() -> None:
    client = Client([answer(b"record")] * 6)
    consumer: Any = SimpleNamespace(_client=client)
    hold_fetches(consumer, linger_ms=50)
    for _ in range(3):
        await consumer._client.send(1, FETCH)
        await consumer._client.send(2, FETCH)
        await consumer._client.send(1, HEARTBEAT)
    first, second, third = at(client, 1)
    assert second - first >= 0.049
    assert third - second >= 0.049
    assert len(at(client, 2)) == 3
    assert len(at(client, 1, _HEARTBEAT)) == 3


@pytest.mark.parametrize("last", [answer(b"record"), answer(error_code=6)])
async def test_a_fetch_that_brings_nothing_is_sent_again_until_it_brings_something(last: Any) -> None:
    client = Client([answer(), answer(), last])
    consumer: Any = SimpleNamespace(_client=client)
    hold_fetches(consumer, linger_ms=1, ceiling_ms=1, hold_ms=600_000)
    assert await consumer._client.send(1, FETCH) is last
    assert len(at(client, 1)) == 3


async def test_a_fetch_that_brings_nothing_for_too_long_is_answered_with_nothing() -> None:
    client = Client()
    consumer: Any = SimpleNamespace(_client=client)
    hold_fetches(consumer, linger_ms=10, ceiling_ms=10, hold_ms=25)
    assert (await consumer._client.send(1, FETCH)).topics == answer().topics
    assert 1 <= len(at(client, 1)) <= 3
    assert (await consumer._client.send(1, HEARTBEAT)).topics == answer().topics, "nothing else waits"


def test_a_real_broker_does_the_waiting_itself_and_gives_what_is_committed() -> None:
    committed = {"isolation_level": "read_committed"}
    assert fetch_options(100) == {**committed, "fetch_min_bytes": 256 * 1024, "fetch_max_wait_ms": 100}
    assert fetch_options(0) == {**committed, "fetch_max_wait_ms": 500}
