"""Whoever is in no hurry fetches from the embedded broker seldom, and nothing else of the consumer waits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ringfence.kernel.embedded_broker import space_fetches
from ringfence.kernel.kafka import fetch_options

_FETCH, _HEARTBEAT = 1, 12


@dataclass
class Client:
    """Notes when each request is sent."""

    sent: list[tuple[int, int, float]] = field(default_factory=list)

    async def send(self, node_id: int, request: Any, **_: Any) -> str:
        self.sent.append((node_id, request.API_KEY, asyncio.get_running_loop().time()))
        return "answer"


def at(client: Client, node: int, api_key: int = _FETCH) -> list[float]:
    return [when for n, key, when in client.sent if (n, key) == (node, api_key)]


async def test_fetches_from_one_broker_start_apart() -> None:
    client = Client()
    consumer: Any = SimpleNamespace(_client=client)
    space_fetches(consumer, linger_ms=50)
    fetch, heartbeat = SimpleNamespace(API_KEY=_FETCH), SimpleNamespace(API_KEY=_HEARTBEAT)
    for _ in range(3):
        assert await consumer._client.send(1, fetch) == "answer"
        await consumer._client.send(2, fetch)
        await consumer._client.send(1, heartbeat)
    first, second, third = at(client, 1)
    assert second - first >= 0.049
    assert third - second >= 0.049
    assert len(at(client, 2)) == 3
    assert len(at(client, 1, _HEARTBEAT)) == 3


def test_a_real_broker_does_the_waiting_itself_and_gives_what_is_committed() -> None:
    committed = {"isolation_level": "read_committed"}
    assert fetch_options(100) == {**committed, "fetch_min_bytes": 256 * 1024, "fetch_max_wait_ms": 100}
    assert fetch_options(0) == {**committed, "fetch_max_wait_ms": 500}
