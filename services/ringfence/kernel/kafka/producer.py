"""Publishes records to Kafka with CloudEvents headers, by an idempotent producer or in transactions.

All in-sync replicas acknowledge a record. A transaction commits records and the consumer offsets behind them together
or not at all.

A new `TransactionalPublisher` fences all earlier ones with its id: a process that was paused and wakes can write
nothing more. Its open transaction is aborted, and readers (`read_committed`) never see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import orjson
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import InvalidProducerEpoch, KafkaError, ProducerFenced

from ringfence.kernel.base.clock import Clock, SystemClock, utc_text
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.connection import connection, no_answer
from ringfence.kernel.kafka.record import (
    SIGNATURE,
    Outbound,
    detach,
    missing_topics,
    partition_of,
    partitioner,
)
from ringfence.kernel.tracing.api import NOT_TRACING, Span, Tracing, new_traceparent
from ringfence.messages.base import Claims, Topic
from ringfence.messages.codes import Code

log = logging.getLogger(__name__)


@lru_cache(maxsize=256)
def _ce_type(type: str) -> bytes:
    return f"ringfence.{type}.v1".encode()


@lru_cache(maxsize=64)
def _to_the_second(now_s: int) -> str:
    return utc_text(now_s, "%Y-%m-%dT%H:%M:%S")


def _ce_time(now_ms: int) -> bytes:
    return f"{_to_the_second(now_ms // 1000)}.{now_ms % 1000:03}Z".encode()


_VERSION = ("ce_specversion", b"1.0")
_LOOKS, _LOOK_AGAIN_S = 10, 0.2
_CONTENT_TYPES = {"jws": b"application/jose", "jwe": b"application/jose", "json": b"application/json"}


class Publisher:
    """Publishes messages: idempotent producer, acks=all, CloudEvents attributes and `traceparent` as headers."""

    def __init__(
        self,
        settings: BusSettings,
        source: str,
        clock: Clock | None = None,
        tracing: Tracing = NOT_TRACING,
    ) -> None:
        """`source` is the `ce_source`: the SPIFFE ID of who publishes."""
        self._tracing = tracing
        self._settings = settings
        self._source = source.encode()
        self._clock = clock or SystemClock()
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Connect. Raises UnavailableError if the broker does not answer."""
        producer = AIOKafkaProducer(
            **connection(self._settings),
            enable_idempotence=True,
            acks="all",
            max_request_size=2 * 1024 * 1024,
            # At the default of 16 KiB three decisions fill a batch, and every further sender is woken by every answer
            # only to wait again.
            max_batch_size=512 * 1024,
            partitioner=partitioner,
            request_timeout_ms=15_000,
            **self._producer_options(),
        )
        try:
            await producer.start()
        except KafkaError as error:
            await producer.stop()
            raise await no_answer(self._settings, error) from None
        except BaseException:
            await producer.stop()
            raise
        self._producer = producer

    def _producer_options(self) -> dict[str, Any]:
        return {}

    async def stop(self) -> None:
        """Send what is buffered, then disconnect."""
        if self._producer is not None:
            await self._producer.stop()
            self._producer = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

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
        """Hand one record to the producer. Await what it returns for the broker's acknowledgement.

        Args:
            type: the message's name, for `ce_type`.
            partition: None: by the key.
            content_type: the value's media type; None: the topic's usual one.
            signature: the detached signature of plain JSON (`detach`).
        """
        producer, name = self._connected(), topic.name(self._settings.topic_prefix)
        span = self._tracing.sending(name, record.id, record.key, record.traceparent)
        headers = self._headers_of(topic, type, content_type)(record.id, span)
        if signature is not None:
            headers.append((SIGNATURE, signature))
        try:
            future: asyncio.Future[Any] = await producer.send(
                name,
                record.payload or None,
                partition=partition,
                key=record.key.encode(),
                headers=headers,
            )
        except BaseException as error:
            span.end(error)
            raise
        span.end_when(future)
        return future

    async def send_many(
        self, topic: Topic[Any], type: str, records: Iterable[Outbound]
    ) -> list[Awaitable[Any]]:
        """Hand over many messages of one type. Await all that it returns: then all are acknowledged.

        Those of a partition travel, and are acknowledged, together: half the CPU of sending each by itself.
        """
        every = await self.partitions(topic)
        by_partition: dict[int, list[Outbound]] = {}
        for record in records:
            by_partition.setdefault(partition_of(record.key, every), []).append(record)
        return [self.send_to(partition, topic, type, some) for partition, some in by_partition.items()]

    async def send_to(
        self, partition: int, topic: Topic[Any], type: str, records: Iterable[Outbound]
    ) -> list[range]:
        """Send messages of one type to one partition; all are acknowledged when this returns. Returns their offsets."""
        producer, name = self._connected(), topic.name(self._settings.topic_prefix)
        batch, spans, places = producer.create_batch(), list[Span](), list[range]()
        headers = self._headers_of(topic, type)
        for record in records:
            span = self._tracing.sending(name, record.id, record.key, record.traceparent)
            message = {
                "key": record.key.encode(),
                "value": record.payload or None,
                "timestamp": None,
                "headers": headers(record.id, span),
            }
            if batch.append(**message) is None:  # it is full; into an empty one goes a message of any size
                places.append(await self._send_batch(batch, spans, name, partition))
                batch, spans = producer.create_batch(), []
                batch.append(**message)
            spans.append(span)
        places.append(await self._send_batch(batch, spans, name, partition))
        return places

    async def _send_batch(self, batch: Any, spans: Sequence[Span], name: str, partition: int) -> range:
        batch.close()
        try:
            acknowledged = await self._connected().send_batch(batch, name, partition=partition)
        except BaseException as error:
            for span in spans:
                span.end(error)
            raise
        for index, span in enumerate(spans):
            span.end_when(acknowledged, index)
        first: int = (await acknowledged).offset
        return range(first, first + len(spans))

    def _connected(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise UnavailableError("the publisher is not started")
        return self._producer

    def _headers_of(
        self, topic: Topic[Any], type: str, content_type: str | None = None
    ) -> Callable[[str, Span], list[tuple[str, bytes]]]:
        """What makes the headers of messages of a type that are sent now, by their ids and spans."""
        version, kind, source = _VERSION, ("ce_type", _ce_type(type)), ("ce_source", self._source)
        time = ("ce_time", _ce_time(self._clock.now_ms()))
        content = ("content-type", content_type.encode() if content_type else _CONTENT_TYPES[topic.encoding])

        def headers(id: str, span: Span) -> list[tuple[str, bytes]]:
            trace = ("traceparent", (span.traceparent or new_traceparent()).encode())
            return [version, ("ce_id", id.encode()), kind, source, time, content, trace]

        return headers

    async def require(self, *topics: Topic[Any]) -> None:
        """Raises UnavailableError if one of them is not there: what is sent to it would wait for a while first."""
        client = self._connected().client
        names = [topic.name(self._settings.topic_prefix) for topic in topics]
        for name in names:
            await client.add_topic(name)
        for look in range(_LOOKS):  # of one that was made a moment ago not every broker knows yet
            missing = [name for name in names if client.cluster.partitions_for_topic(name) is None]
            if not missing:
                return
            if look == _LOOKS - 1:
                raise missing_topics(missing)
            await asyncio.sleep(_LOOK_AGAIN_S)
            await client.force_metadata_update()

    async def partitions(self, topic: Topic[Any]) -> list[int]:
        return sorted(await self._connected().partitions_for(topic.name(self._settings.topic_prefix)))

    async def send_signed(
        self, topic: Topic[Any], key: str, claims: Claims, by: SigningKey, *, traceparent: str | None = None
    ) -> tuple[str, Awaitable[Any]]:
        """Sign a message and send it. Returns its compact JWS, and the acknowledgement to await."""
        compact = sign(claims, by)
        value, signature = detach(compact) if type(claims) in topic.in_the_clear else (compact, None)
        return compact, await self.send(
            topic,
            claims.typ,
            Outbound(key, value, id=claims.jti, traceparent=traceparent),
            signature=signature,
        )

    async def publish_signed(
        self, topic: Topic[Any], key: str, claims: Claims, by: SigningKey, *, traceparent: str | None = None
    ) -> str:
        """`send_signed`, acknowledged by all replicas when it returns. Returns the compact JWS."""
        compact, acknowledged = await self.send_signed(topic, key, claims, by, traceparent=traceparent)
        await acknowledged
        return compact


def to_json(value: Any) -> bytes:
    """Compact JSON with sorted keys: the same value always gives the same bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


TRANSACTION_MS = 30_000
"""A transaction that takes longer is aborted by the broker: readers wait for one that is open."""
_ABANDON_S = 2.0
_WITHIN_S = 10.0


class FencedError(UnavailableError):
    """Another process writes under this id now."""

    code = Code.FENCED


class TransactionalPublisher(Publisher):
    """A publisher that publishes inside of `transaction` only."""

    def __init__(
        self,
        settings: BusSettings,
        source: str,
        id: str,
        clock: Clock | None = None,
        tracing: Tracing = NOT_TRACING,
        *,
        owns: Sequence[Topic[Any]] = (),
    ) -> None:
        """Args:
            id: the `transactional.id`, without the topic prefix.
            owns: topics in which only writers of this id have transactions. What a partition holds open is ended at
                start.
        """  # fmt: skip
        super().__init__(settings, source, clock, tracing)
        self._id = f"{settings.topic_prefix}.{id}"
        self._owns = owns

    async def start(self) -> None:
        """Connect, and fence whoever wrote under this id before. Raises UnavailableError if that cannot be done."""
        await super().start()
        producer = self._connected()
        try:
            # The id is claimed by the first transaction.
            await producer.begin_transaction()
            for topic in self._owns:
                await self._mark(producer, topic)
            await producer.abort_transaction()
        except KafkaError as error:
            await self.abandon()
            raise _given_up(self._id, error) from None
        except BaseException:
            await self.abandon()
            raise

    async def _mark(self, producer: AIOKafkaProducer, topic: Topic[Any]) -> None:
        """Add all partitions to the transaction, so that its end writes a marker to each.

        Claiming the id aborts transactions that its coordinator knows to be open. After a crash of the broker, a
        partition may hold a transaction open that the coordinator has lost (a hanging transaction, KIP-664), and
        readers wait behind it. The marker ends it: it has the same producer id, and a later epoch.
        """
        name = topic.name(self._settings.topic_prefix)
        for partition in await producer.partitions_for(name):
            producer._txn_manager.maybe_add_partition_to_txn(TopicPartition(name, partition))

    def _producer_options(self) -> dict[str, Any]:
        return {"transactional_id": self._id, "transaction_timeout_ms": TRANSACTION_MS}

    @contextlib.asynccontextmanager
    async def transaction(
        self, group: str | None = None, offsets: Mapping[tuple[str, int], int] | None = None
    ) -> AsyncIterator[None]:
        """All that is sent in it is committed at its end, together with the offsets that `group` has read to.

        Raises FencedError if another process took over, UnavailableError if Kafka did not commit. Nothing of it counts
        then, and this publisher is unusable: stop it.
        """
        producer = self._connected()
        try:
            # Bounded: the client asks again for ever what the broker does not answer as it should.
            async with asyncio.timeout(_WITHIN_S):
                await producer.begin_transaction()
                yield
                if group is not None and offsets:
                    ends = {TopicPartition(*where): offset for where, offset in offsets.items()}
                    await producer.send_offsets_to_transaction(ends, group)
                await producer.commit_transaction()
        except TimeoutError:
            raise UnavailableError(
                f"the transaction of {self._id} took longer than {_WITHIN_S:.0f} s"
            ) from None
        except KafkaError as error:
            raise _given_up(self._id, error) from None

    async def abandon(self) -> None:
        """Disconnect without long waiting for what is not committed: who starts next under this id aborts it."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            with contextlib.suppress(KafkaError, TimeoutError):
                async with asyncio.timeout(_ABANDON_S):
                    await producer.stop()
        finally:
            await producer.client.close()


def _given_up(id: str, error: KafkaError) -> UnavailableError:
    if isinstance(error, ProducerFenced | InvalidProducerEpoch):
        return FencedError(f"another process writes as {id} now")
    return UnavailableError(f"the transaction of {id} was not committed: {type(error).__name__}")
