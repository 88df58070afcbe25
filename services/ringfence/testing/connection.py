"""A connection of the SDK to an in-memory bus: all of `ringfence.Agent`, `Sponsor` and `Administrator` stands on it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ringfence.client.connection import Connection, Coordinate
from ringfence.client.settings import ClientSettings
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Claims, Topic
from ringfence.testing.bus import InMemoryBus, InMemoryPublisher
from ringfence.testing.clock import MovableClock

T = TypeVar("T")


class InMemoryConnection(Connection):
    """Starting it twice is the same as starting it once, so that code under test may enter an agent or not."""

    def __init__(
        self, bus: InMemoryBus, key: SigningKey, settings: ClientSettings, clock: MovableClock
    ) -> None:
        super().__init__(key, settings, clock)
        self._bus = bus
        self._publisher = InMemoryPublisher(bus, settings, key.id, clock)
        self._read: list[tuple[frozenset[Topic[Any]], Callable[[Sequence[Received]], None]]] = []

    async def follow(
        self,
        topics: Sequence[Topic[Any]],
        on_records: Callable[[Sequence[Received]], None],
        *,
        since_ms: int | None = 0,
        key: str | None = None,
    ) -> None:
        """See `Connection.follow`. All records of a topic have one partition here, whatever `key` is."""
        following = (frozenset(topics), on_records)
        if following not in self._read:
            self._read.append(following)
            self._bus.read(topics, on_records, since_ms=since_ms)

    async def publish(
        self,
        topic: Topic[Any],
        key: str,
        claims: Claims,
        *,
        compact: str | None = None,
        traceparent: str | None = None,
    ) -> Coordinate:
        """See `Connection.publish`. When it returns, the services have done all that follows from it."""
        at = await super().publish(topic, key, claims, compact=compact, traceparent=traceparent)
        await self._bus.settle()
        return at

    async def close(self) -> None:
        """Read nothing more. It may be started again."""
        for _, reader in self._read:
            self._bus.forget(reader)
        self._read.clear()
        await super().close()


def run_at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing, without an event loop. Raises RuntimeError if it waits."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("it waits for something, and so it needs an event loop")
