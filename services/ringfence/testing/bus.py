"""Kafka in memory: topics of one partition each, readers that are told at once, and consumers that a pump serves."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar

from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.batch_handlers import BatchHandler
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.table_reader import Reader
from ringfence.kernel.tracing.api import new_traceparent
from ringfence.messages.base import Claims, Topic
from ringfence.testing.clock import MovableClock

T = TypeVar("T")
PARTITION = 0
_inside_pump: ContextVar[bool] = ContextVar("ringfence_inside_pump", default=False)
"""Whether this is the pump, or what it calls: to wait for it there would be to wait for ever."""


class Place(NamedTuple):
    """Where a record stands, as Kafka's client says it."""

    topic: str
    partition: int
    offset: int
    timestamp: int


class Done(Generic[T]):
    """An awaitable whose result is there already: awaiting it suspends nothing."""

    def __init__(self, result: T) -> None:
        self._result = result

    def __await__(self) -> Generator[Any, None, T]:
        yield from ()
        return self._result


class InMemoryBus:
    """All topics of one Ringfence. Not for several threads."""

    def __init__(self, clock: MovableClock, topic_prefix: str) -> None:
        self._clock = clock
        self._prefix = topic_prefix
        self._records: list[Received] = []
        self._offsets: dict[str, int] = defaultdict(int)
        self._readers: dict[Topic[Any], list[Reader]] = defaultdict(list)
        self._consumers: dict[Topic[Any], list[BatchHandler]] = defaultdict(list)
        self._waiting: deque[tuple[BatchHandler, Received]] = deque()
        self._pumping: asyncio.Task[None] | None = None
        self._when_idle: list[Callable[[], Awaitable[None]]] = []

    # --- reading ---

    def read(self, topics: Iterable[Topic[Any]], reader: Reader, *, since_ms: int | None = 0) -> None:
        """Give a reader the records from `since_ms` on (None: those to come), then each as it is appended."""
        wanted = set(topics)
        if since_ms is not None:
            for record in list(self._records):
                if record.topic in wanted and record.appended_at_ms >= since_ms:
                    reader([record])
        for topic in wanted:
            self._readers[topic].append(reader)

    def forget(self, reader: Reader) -> None:
        for readers in self._readers.values():
            readers[:] = [one for one in readers if one != reader]

    def consume(self, handlers: Mapping[Topic[Any], BatchHandler]) -> None:
        """Have the pump call these handlers with each record to come."""
        for topic, handler in handlers.items():
            self._consumers[topic].append(handler)

    def when_idle(self, work: Callable[[], Awaitable[None]]) -> None:
        """Have the pump call this whenever all records are handled; what it publishes is handled next."""
        self._when_idle.append(work)

    def of(self, topic: Topic[Any]) -> list[Received]:
        return [record for record in self._records if record.topic is topic]

    # --- writing ---

    def append(
        self, topic: Topic[Any], key: str, value: bytes, headers: Sequence[tuple[str, bytes]]
    ) -> Place:
        """Append a record. Readers have it when this returns; consumers have it with the next `settle`."""
        record = self._appended(topic, key, value, headers)
        self._waiting.extend((handler, record) for handler in self._consumers[topic])
        return Place(record.topic_name, PARTITION, record.offset, record.appended_at_ms)

    def append_unconsumed(self, topic: Topic[Any], key: str, value: bytes) -> Received:
        """Append a record that the caller hands to its consumer by itself, without an event loop."""
        return self._appended(topic, key, value, ())

    def _appended(
        self, topic: Topic[Any], key: str, value: bytes, headers: Sequence[tuple[str, bytes]]
    ) -> Received:
        name = topic.name(self._prefix)
        offset = self._offsets[name]
        self._offsets[name] += 1
        record = Received(topic, name, PARTITION, offset, self._clock.tick_ms(), key, value, tuple(headers))
        self._records.append(record)
        for reader in list(self._readers[topic]):
            reader([record])
        return record

    async def settle(self) -> None:
        """Return once all that was appended, and all that followed from it, is handled.

        From inside a handler it returns at once. Whoever is cancelled meanwhile leaves the pump running.
        """
        if _inside_pump.get():
            return
        task = self._pumping
        if task is None or task.done() or task.get_loop().is_closed():
            task = self._pumping = asyncio.ensure_future(self._pump())
        await asyncio.shield(task)

    async def _pump(self) -> None:
        _inside_pump.set(True)
        while True:
            while self._waiting:
                handler, record = self._waiting.popleft()
                await handler([record])
            for work in self._when_idle:
                await work()
            if not self._waiting:
                return


class InMemoryPublisher(Publisher):
    """A publisher to the topics of an in-memory bus. All that it sends is acknowledged at once."""

    def __init__(self, bus: InMemoryBus, settings: BusSettings, source: str, clock: MovableClock) -> None:
        super().__init__(settings, source, clock)
        self._bus = bus

    async def start(self) -> None:
        """There is nothing to connect to."""

    async def stop(self) -> None:
        """There is nothing to disconnect from."""

    async def require(self, *topics: Topic[Any]) -> None:
        """Every topic is there."""

    async def partitions(self, topic: Topic[Any]) -> list[int]:
        return [PARTITION]

    async def send(
        self,
        topic: Topic[Any],
        type: str,
        record: Outbound,
        *,
        partition: int | None = None,
        content_type: str | None = None,
        signature: bytes | None = None,
    ) -> Awaitable[Any]:
        trace = record.traceparent or new_traceparent()
        headers = [("ce_id", record.id.encode()), ("traceparent", trace.encode())]
        if content_type is not None:
            headers.append(("content-type", content_type.encode()))
        return Done(self._bus.append(topic, record.key, record.payload, headers))

    async def send_many(
        self, topic: Topic[Any], type: str, records: Iterable[Outbound]
    ) -> list[Awaitable[Any]]:
        offsets = []
        for one in records:
            sent: Place = await (await self.send(topic, type, one))
            offsets.append(range(sent.offset, sent.offset + 1))
        return [Done(offsets)] if offsets else []

    async def send_signed(
        self, topic: Topic[Any], key: str, claims: Claims, by: SigningKey, *, traceparent: str | None = None
    ) -> tuple[str, Awaitable[Any]]:
        # Readers get the compact JWS of what is signed in the clear as well: nothing has to be detached.
        compact = sign(claims, by)
        return compact, await self.send(
            topic, claims.typ, Outbound(key, compact, id=claims.jti, traceparent=traceparent)
        )


class SettlingPublisher(InMemoryPublisher):
    """For what is no handler of the pump: what it sends is acknowledged once all that follows from it is handled."""

    async def send(
        self,
        topic: Topic[Any],
        type: str,
        record: Outbound,
        *,
        partition: int | None = None,
        content_type: str | None = None,
        signature: bytes | None = None,
    ) -> Awaitable[Any]:
        sent = await super().send(
            topic, type, record, partition=partition, content_type=content_type, signature=signature
        )
        return _Settled(self._bus, sent)


class _Settled:
    """An awaitable of an acknowledgement, and of all that follows from the record."""

    def __init__(self, bus: InMemoryBus, sent: Awaitable[Any]) -> None:
        self._bus = bus
        self._sent = sent

    def __await__(self) -> Generator[Any, None, Any]:
        yield from self._bus.settle().__await__()
        return (yield from self._sent.__await__())
