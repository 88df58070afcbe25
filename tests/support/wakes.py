"""Wakes the consumers of this process when a producer of this process writes to their topics.

The embedded broker holds no fetch, so consumers fetch again and again: idle services in the process of a test took a
sixth of a core, and each record waited for the next fetch. Here a consumer fetches when there is news, and rarely
otherwise: for records of other processes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

from aiokafka.client import AIOKafkaClient

from ringfence.kernel.kafka import embedded_broker
from ringfence.kernel.kafka.fetch_control import FetchPauses

_PRODUCE, _END_TRANSACTION = 0, 26
"""API keys of the Kafka protocol."""
_RARELY = 5
"""How much longer than by itself a consumer waits for records of other processes."""

_written: Counter[str] = Counter()
"""How often a topic was written to."""
_seen: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""By consumer: the writes to its topics before its last fetch."""
_open: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""By producer: topics of its transaction, whose readers see nothing before its end."""
_waiting: dict[asyncio.Future[None], frozenset[str]] = {}


@contextmanager
def installed() -> Iterator[None]:
    """Within it, consumers and producers of this process do so."""
    send, pause = AIOKafkaClient.send, embedded_broker.pause

    async def telling_send(client: Any, node_id: int, request: Any, **options: Any) -> Any:
        response = await send(client, node_id, request, **options)
        if request.API_KEY == _PRODUCE:
            topics = {name for name, *_ in response.topics}
            _open.setdefault(client, set()).update(topics)
            _wake(topics)
        elif request.API_KEY == _END_TRANSACTION:
            _wake(_open.pop(client, ()))
        return response

    AIOKafkaClient.send, embedded_broker.pause = telling_send, _pause
    try:
        yield
    finally:
        AIOKafkaClient.send, embedded_broker.pause = send, pause


def _wake(topics: Iterable[str]) -> None:
    _written.update(topics)
    for future, wanted in tuple(_waiting.items()):
        if not wanted.isdisjoint(topics):
            # A command in another thread may have closed its loop since; the record is written all the same.
            with suppress(RuntimeError):
                future.get_loop().call_soon_threadsafe(_end, future)


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _pause(seconds: float, client: Any, topics: Any, pauses: FetchPauses) -> None:
    names = frozenset(name for name, _ in topics)
    if seconds > 0 and sum(_written[name] for name in names) == _seen.get(client):
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = future.get_loop().call_later(seconds * _RARELY, _end, future)
        _waiting[future] = names
        try:
            await future
        finally:
            timer.cancel()
            del _waiting[future]
    else:
        await asyncio.sleep(0)
    _seen[client] = sum(_written[name] for name in names)
