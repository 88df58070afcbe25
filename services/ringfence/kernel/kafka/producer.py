"""Kafka for everybody: the producer, and a follower that reads whole topics without a group.

Consumer groups, which only services have, are in `ringfence.kernel.kafka.consumer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.connection import connection, no_answer
from ringfence.kernel.kafka.data_loss import NO_RESET, OnGone, Onward
from ringfence.kernel.kafka.detached_signature import SIGNATURE, apart, together
from ringfence.kernel.kafka.embedded_broker import QUICK_MS, TABLE_MS, adapt_to_embedded_broker
from ringfence.kernel.kafka.fetch_control import Fetches, fetch_options
from ringfence.kernel.kafka.partitioning import partition_number
from ringfence.kernel.tracing.api import NO_SPAN, NOT_TRACING, Span, Tracing
from ringfence.kernel.tracing.traceparent import new_traceparent, traceparent_of, well_formed
from ringfence.messages.base import Claims, Message, Topic
from ringfence.messages.credential import Coordinates

log = logging.getLogger(__name__)


@lru_cache(maxsize=8192)
def _partition_of(key: bytes, count: int) -> int:
    """Where records with this key go. Remembered: it is counted in Python, and few keys come again and again."""
    return partition_number(key, count)


def _partitioner(key: bytes, every: Sequence[int], available: Sequence[int]) -> int:
    return every[_partition_of(key, len(every))]


@lru_cache(maxsize=256)
def _ce_type(type: str) -> bytes:
    return f"ringfence.{type}.v1".encode()


@lru_cache(maxsize=64)
def _to_the_second(now_s: int) -> str:
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _ce_time(now_ms: int) -> bytes:
    return f"{_to_the_second(now_ms // 1000)}.{now_ms % 1000:03}Z".encode()


_VERSION = ("ce_specversion", b"1.0")
_LOOKS, _LOOK_AGAIN_S = 10, 0.2
_CONTENT_TYPES = {"jws": b"application/jose", "jwe": b"application/jose", "json": b"application/json"}


class Received(NamedTuple):
    """One Kafka record as it arrived, nothing of it verified."""

    topic: Topic[Any]
    topic_name: str
    partition: int
    offset: int
    appended_at_ms: int
    key: str | None
    value: bytes
    """Empty for a tombstone. Of what is signed in the clear the compact JWS, as of everything that is signed."""
    raw_headers: Sequence[tuple[str, bytes | None]] = ()
    span: Span = NO_SPAN
    """What this process does for it."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers as text; what is not UTF-8 is replaced, as nothing is decided by it."""
        return {
            name: value.decode("utf-8", "replace") for name, value in self.raw_headers if value is not None
        }

    @property
    def traceparent(self) -> str:
        """What comes of this record goes on from here."""
        return self.span.traceparent or self.own_traceparent

    @property
    def own_traceparent(self) -> str:
        """As it was sent; where it was not, or is malformed, it follows from the record's place: every reader finds
        the same, so that what they make of the record is one trace.
        """
        for name, value in self.raw_headers:
            if name == "traceparent" and value is not None:
                if sent := well_formed(value.decode("ascii", "replace")):
                    return sent
                break
        return traceparent_of(
            derived_id("trace", self.topic_name, self.partition, self.offset, self.appended_at_ms)
        )

    @property
    def coordinates(self) -> Coordinates:
        return Coordinates(
            topic=self.topic_name,
            partition=self.partition,
            offset=self.offset,
            appended_at_ms=self.appended_at_ms,
        )


class Outbound(NamedTuple):
    """One of many messages for a topic: see `Publisher.send` for what they are."""

    key: str
    value: bytes
    id: str
    traceparent: str | None = None
    key_number: int | None = None
    """That of the key (`partitioning.key_number`), where it was counted before."""


def missing_topics(names: Sequence[str]) -> UnavailableError:
    """What is said of topics that are not there."""
    return UnavailableError(f"missing on Kafka: {', '.join(names)}; run: ringfence topics apply")


def partition_of(key: str, partitions: Sequence[int]) -> int:
    """Which of a topic's partitions records with this key go to."""
    return _partitioner(key.encode(), partitions, partitions)


def received(record: Any, topics: dict[str, Topic[Any]]) -> Received:
    """aiokafka's record as ours; a key that is not UTF-8 is replaced, as nothing is decided by it."""
    topic, value = topics[record.topic], record.value or b""
    return Received(
        topic,
        record.topic,
        record.partition,
        record.offset,
        record.timestamp,
        record.key.decode("utf-8", "replace") if record.key is not None else None,
        together(value, record.headers) if topic.in_the_clear else value,
        record.headers,
    )


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
        """Connect. Raises UnavailableError where the broker does not answer."""
        producer = AIOKafkaProducer(
            **connection(self._settings),
            enable_idempotence=True,
            acks="all",
            max_request_size=2 * 1024 * 1024,
            # At the default of 16 KiB three decisions fill a batch, and every further sender is woken by every answer
            # only to wait again.
            max_batch_size=512 * 1024,
            partitioner=_partitioner,
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
        """What else the producer is told."""
        return {}

    async def stop(self) -> None:
        """Send what is buffered, then disconnect."""
        if self._producer is not None:
            await self._producer.stop()
            self._producer = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()

    async def send(
        self,
        topic: Topic[Any],
        key: str,
        value: str | bytes,
        *,
        id: str,
        type: str,
        traceparent: str | None = None,
        partition: int | None = None,
        content_type: str | None = None,
        signature: bytes | None = None,
    ) -> Awaitable[Any]:
        """Hand one record to the producer. Await what it returns for the broker's acknowledgement.

        Args:
            topic: where to; `key`: the Kafka key.
            value: a compact JWS or JWE, or JSON. Empty writes a tombstone.
            id: `ce_id`, derived from what the message says, so that a repeat has the same one.
            type: the message's name, for `ce_type`.
            traceparent: the trace to go on with; a new one where None.
            partition: where to; where the key says where None.
            content_type: what the value is; what the topic's usually are where None.
            signature: of JSON that is signed in the clear (`kernel.in_the_clear`).
        """
        payload = value.encode() if isinstance(value, str) else value
        producer, name = self._connected(), topic.name(self._settings.topic_prefix)
        span = self._tracing.sending(name, id, key, traceparent)
        headers = self._headers_of(topic, type, content_type)(id, span)
        if signature is not None:
            headers.append((SIGNATURE, signature))
        try:
            future: asyncio.Future[Any] = await producer.send(
                name,
                payload or None,
                partition=partition,
                key=key.encode(),
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
            number = record.key_number
            to = partition_of(record.key, every) if number is None else every[number % len(every)]
            by_partition.setdefault(to, []).append(record)
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
                "value": record.value or None,
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
        """Raises UnavailableError where one of them is not there: what is sent to it would wait for a while first."""
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
        """The partitions of a topic."""
        return sorted(await self._connected().partitions_for(topic.name(self._settings.topic_prefix)))

    async def send_signed(
        self, topic: Topic[Any], key: str, claims: Claims, by: SigningKey, *, traceparent: str | None = None
    ) -> tuple[str, Awaitable[Any]]:
        """Sign a message and send it. Returns its compact JWS, and the acknowledgement to await."""
        compact = sign(claims, by)
        value, signature = apart(compact) if type(claims) in topic.in_the_clear else (compact, None)
        return compact, await self.send(
            topic, key, value, id=claims.jti, type=claims.typ, traceparent=traceparent, signature=signature
        )

    async def publish_signed(
        self, topic: Topic[Any], key: str, claims: Claims, by: SigningKey, *, traceparent: str | None = None
    ) -> str:
        """`send_signed`, acknowledged by all replicas when it returns. Returns the compact JWS."""
        compact, acknowledged = await self.send_signed(topic, key, claims, by, traceparent=traceparent)
        await acknowledged
        return compact

    async def publish_plain(
        self, topic: Topic[Any], key: str, message: Message, *, id: str, traceparent: str | None = None
    ) -> None:
        """Publish a message that is plain JSON; acknowledged when it returns."""
        await (
            await self.send(
                topic,
                key,
                message.model_dump_json(exclude_none=True),
                id=id,
                type=topic.what,
                traceparent=traceparent,
            )
        )


def to_json(value: Any) -> bytes:
    """Compact JSON with sorted keys: the same value always gives the same bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def paced(
    consumer: AIOKafkaConsumer, settings: BusSettings, linger_ms: int = 0, *, quick_ms: int = QUICK_MS
) -> Fetches:
    """See that `consumer` asks for records when it should. Call it once, before `consumer.start()`.

    Args:
        linger_ms: let records gather for so long after others came, where nobody waits for them.
        quick_ms: where somebody does: from fetch to fetch of the embedded broker, which holds none.
    """
    if settings.embedded_broker:
        adapt_to_embedded_broker(consumer, linger_ms=linger_ms or quick_ms)
        return Fetches(consumer)
    return Fetches(consumer, linger_ms=linger_ms)


Reader = Callable[[Sequence[Received]], None]
"""Takes what came of one partition, in its order. Must not block, must not raise."""


class _Followed(NamedTuple):
    reader: Reader
    since_ms: int | None


class Follower:
    """Reads whole topics, every partition, from a starting point on and for ever. No group, nothing committed."""

    def __init__(
        self,
        settings: BusSettings,
        topics: Sequence[Topic[Any]],
        on_records: Reader,
        *,
        since_ms: int | None = 0,
        linger_ms: int = 0,
        key: str | None = None,
        reader: str = "a reader",
        on_gone: OnGone | None = None,
    ) -> None:
        """Args:
            since_ms: where to start: 0 at the beginning, a time at the first record appended then or later, None at
                the present end.
            linger_ms: let records gather for so long, where nobody waits for them.
            key: read only the partitions that records with this key go to (by Kafka's default partitioner).
            reader: who reads, in what is said of records that Kafka removed before they were read; `on_gone` is told.
        """  # fmt: skip
        self._key = key.encode() if key is not None else None
        self._onward = Onward(reader, on_gone)
        self.gone = self._onward.gone
        """What Kafka removed, or lost."""
        self._settings = settings
        self._topics: dict[str, Topic[Any]] = {}
        self._followed: dict[str, _Followed] = {}
        self._linger_ms = linger_ms
        self._consumer: AIOKafkaConsumer | None = None
        self._goal: dict[TopicPartition, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._asking: AIOKafkaConsumer | None = None
        self._asking_lock = asyncio.Lock()
        self._next_question: asyncio.Task[bool] | None = None
        self._questions: set[asyncio.Task[bool]] = set()
        self._advanced = asyncio.Event()
        self.complete = asyncio.Event()
        """Set once everything has been read that was there at the start."""
        self.also(topics, on_records, since_ms=since_ms)

    def also(self, topics: Sequence[Topic[Any]], on_records: Reader, *, since_ms: int | None) -> None:
        """Read these too, to be said before `start`. A fetch costs little more for many topics than for one."""
        for topic in topics:
            name = topic.name(self._settings.topic_prefix)
            if name in self._topics:
                raise ValueError(f"{name} is followed already")
            self._topics[name] = topic
            self._followed[name] = _Followed(on_records, since_ms)

    async def start(self) -> None:
        """Connect, find the starting points, begin to read. Raises UnavailableError where topics are missing."""
        consumer = AIOKafkaConsumer(
            **connection(self._settings),
            enable_auto_commit=False,
            auto_offset_reset=NO_RESET,
            **fetch_options(self._topics.values()),
        )
        whole = all(followed.since_ms == 0 for followed in self._followed.values())
        paced(consumer, self._settings, self._linger_ms, quick_ms=TABLE_MS if whole else QUICK_MS)
        try:
            await consumer.start()
            partitions = await self._partitions(consumer)
            consumer.assign(partitions)
            self._goal = dict(await consumer.end_offsets(partitions))
            await self._seek(consumer, partitions)
        except KafkaError as error:
            await consumer.stop()
            raise await no_answer(self._settings, error) from None
        except BaseException:
            await consumer.stop()
            raise
        self._consumer = consumer
        self._task = asyncio.create_task(self._run(consumer), name="follower")

    async def _partitions(self, consumer: AIOKafkaConsumer) -> list[TopicPartition]:
        """Of all topics. Raises UnavailableError where one is missing."""
        # `consumer.partitions_for_topic` knows nothing yet: Apache Kafka, unlike the embedded broker, tells a client
        # that has just started of no topics. An answer that was on its way before it named any may come first.
        client = consumer._client
        await client.set_topics(list(self._topics))
        if any(client.cluster.partitions_for_topic(name) is None for name in self._topics):
            await client.force_metadata_update()
        found = {name: self._wanted(client.cluster.partitions_for_topic(name) or ()) for name in self._topics}
        if missing := sorted(name for name, numbers in found.items() if not numbers):
            raise missing_topics(missing)
        return [TopicPartition(name, number) for name, numbers in found.items() for number in numbers]

    def _wanted(self, partitions: Iterable[int]) -> list[int]:
        every = sorted(partitions)
        return every if self._key is None or not every else [_partitioner(self._key, every, every)]

    async def _seek(self, consumer: AIOKafkaConsumer, partitions: list[TopicPartition]) -> None:
        together: dict[int | None, list[TopicPartition]] = {}
        for partition in partitions:
            together.setdefault(self._followed[partition.topic].since_ms, []).append(partition)
        for since_ms, some in together.items():
            for partition, offset in (await self._starts(consumer, some, since_ms)).items():
                consumer.seek(partition, offset)

    async def _starts(
        self, consumer: AIOKafkaConsumer, partitions: list[TopicPartition], since_ms: int | None
    ) -> dict[TopicPartition, int]:
        if since_ms is None:
            return {partition: self._goal[partition] for partition in partitions}
        if since_ms == 0:
            return dict(await consumer.beginning_offsets(partitions))
        found = await consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
        return {p: at.offset if (at := found.get(p)) else self._goal[p] for p in partitions}

    async def _run(self, consumer: AIOKafkaConsumer) -> None:
        behind = {p for p, end in self._goal.items() if await consumer.position(p) < end}
        while True:
            if not behind:
                self.complete.set()
            try:
                timeout_ms = 200 if behind else 1000
                batches = await self._onward.next(consumer, timeout_ms=timeout_ms, max_records=2000)
            except KafkaError as error:
                log.warning("reading failed, trying again: %s", error)
                await asyncio.sleep(0.5)
                continue
            for partition, records in batches.items():
                reader = self._followed[partition.topic].reader
                reader([received(record, self._topics) for record in records])
            if batches:
                advanced, self._advanced = self._advanced, asyncio.Event()
                advanced.set()
            if behind:
                behind = {p for p in behind if await consumer.position(p) < self._goal[p]}

    async def positions(self, topics: Iterable[Topic[Any]]) -> dict[tuple[str, int], int]:
        """By the name and partition of these topics: the offset after the last record that was handed on, or passed
        over.
        """
        consumer = self._consumer
        if consumer is None:
            return {}
        names = {topic.name(self._settings.topic_prefix) for topic in topics}
        return {
            (at.topic, at.partition): await consumer.position(at)
            for at in consumer.assignment()
            if at.topic in names
        }

    async def caught_up(self, timeout_s: float) -> bool:
        """Wait until everything is taken in that stood on the topics when this was called.

        So that nobody is refused for what a table did not hold *yet*: whoever saw a record acknowledged and then sent a
        message is judged with that record. Costs one round trip where nothing is outstanding. False where `timeout_s`
        passed before, or Kafka did not answer.
        """
        if self._consumer is None:
            return False
        if self._next_question is None:
            self._next_question = asyncio.create_task(self._read_to_the_end(self._consumer), name="caught up")
            self._questions.add(self._next_question)
            self._next_question.add_done_callback(self._questions.discard)
        question = self._next_question
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(question)
        log.warning("not known to be caught up with %s after %.1f s", ", ".join(self._topics), timeout_s)
        return False

    async def _read_to_the_end(self, consumer: AIOKafkaConsumer) -> bool:
        """One question to Kafka answers all who asked before it was sent: a batch of refusals costs one."""
        async with self._asking_lock:
            self._next_question = None
            try:
                asking = await self._asking_consumer()
                ends = await asking.end_offsets(list(consumer.assignment()))
            except KafkaError as error:
                log.warning("not known where %s end: %r", ", ".join(self._topics), error)
                return False
        while True:
            advanced = self._advanced
            if not [p for p, end in ends.items() if await consumer.position(p) < end]:
                return True
            await advanced.wait()

    async def _asking_consumer(self) -> AIOKafkaConsumer:
        """A connection of its own: on the reading one, a question waits behind the fetch that waits for records."""
        if self._asking is None:
            asking = AIOKafkaConsumer(**connection(self._settings), enable_auto_commit=False)
            try:
                await asking.start()
            except BaseException:
                await asking.stop()
                raise
            self._asking = asking
        return self._asking

    async def stop(self) -> None:
        """Stop reading and disconnect."""
        for question in tuple(self._questions):
            question.cancel()
        if self._asking is not None:
            await self._asking.stop()
            self._asking = None
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self._consumer is not None:
            await self._consumer.stop()
            self._consumer = None

    @property
    def failed(self) -> str | None:
        """Why reading has ended, or None while it goes on."""
        if self._task is None or not self._task.done() or self._task.cancelled():
            return None
        return f"the follower ended: {self._task.exception()!r}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()
