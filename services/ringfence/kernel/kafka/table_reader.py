"""Readers of whole topics, without a consumer group: for local tables, and for histories."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.kafka.connection import connection, no_answer
from ringfence.kernel.kafka.data_loss import NO_RESET, LossAwareReader
from ringfence.kernel.kafka.embedded_broker import QUICK_MS, TABLE_MS, adapt_to_embedded_broker
from ringfence.kernel.kafka.fetch_control import FetchControl, FetchPauses, fetch_options
from ringfence.kernel.kafka.record import Received, missing_topics, partitioner, received
from ringfence.messages.base import Topic

log = logging.getLogger(__name__)


def paced(
    consumer: AIOKafkaConsumer, settings: BusSettings, linger_ms: int = 0, *, quick_ms: int = QUICK_MS
) -> FetchControl:
    """Control when `consumer` fetches. Call it once, before `consumer.start()`.

    Args:
        linger_ms: let records gather for so long after others came, if nobody waits for them.
        quick_ms: if somebody waits: the time between fetches from the embedded broker, which holds no fetch.
    """
    if settings.embedded_broker:
        pauses = adapt_to_embedded_broker(consumer, linger_ms=linger_ms or quick_ms)
        return FetchControl(consumer, pauses=pauses)
    return FetchControl(consumer, linger_ms=linger_ms)


Reader = Callable[[Sequence[Received]], None]
"""Takes records of one partition, in order. Must not block, must not raise."""


class _Followed(NamedTuple):
    reader: Reader
    since_ms: int | None


class Follower:
    """Reads all partitions of topics from a starting point, and goes on for ever. No group, no commits."""

    def __init__(
        self,
        settings: BusSettings,
        topics: Sequence[Topic[Any]],
        on_records: Reader,
        *,
        since_ms: int | None = 0,
        linger_ms: int = 0,
        key: str | None = None,
        reader: LossAwareReader | None = None,
    ) -> None:
        """Args:
            since_ms: where to start: 0 at the beginning, a time at the first record appended then or later, None at
                the present end.
            linger_ms: let records gather for so long, if nobody waits for them.
            key: read only the partitions that records with this key go to (by Kafka's default partitioner).
            reader: reports records that Kafka removed unread; None: the log reports them.
        """  # fmt: skip
        self._key = key.encode() if key is not None else None
        self._reader = reader or LossAwareReader("a reader")
        self.lost_ranges = self._reader.lost_ranges
        """The last lost range of each partition; see `LossAwareReader`."""
        self._settings = settings
        self._topics: dict[str, Topic[Any]] = {}
        self._followed: dict[str, _Followed] = {}
        self._linger_ms = linger_ms
        self._consumer: AIOKafkaConsumer | None = None
        self._pauses = FetchPauses()
        self._goal: dict[TopicPartition, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._asking: AIOKafkaConsumer | None = None
        self._asking_lock = asyncio.Lock()
        self._next_question: asyncio.Task[bool] | None = None
        self._questions: set[asyncio.Task[bool]] = set()
        self._advanced = asyncio.Event()
        self.complete = asyncio.Event()
        """Set once everything was read that was on the topics at the start."""
        self.also(topics, on_records, since_ms=since_ms)

    def also(self, topics: Sequence[Topic[Any]], on_records: Reader, *, since_ms: int | None) -> None:
        """Read these topics too. Call it before `start`. A fetch costs little more for many topics than for one."""
        for topic in topics:
            name = topic.name(self._settings.topic_prefix)
            if name in self._topics:
                raise ValueError(f"{name} is followed already")
            self._topics[name] = topic
            self._followed[name] = _Followed(on_records, since_ms)

    async def start(self) -> None:
        """Connect, seek to the starting points, and begin to read. Raises UnavailableError if a topic is missing."""
        consumer = AIOKafkaConsumer(
            **connection(self._settings),
            enable_auto_commit=False,
            auto_offset_reset=NO_RESET,
            **fetch_options(self._topics.values()),
        )
        whole = all(followed.since_ms == 0 for followed in self._followed.values())
        quick_ms = TABLE_MS if whole else QUICK_MS
        self._pauses = paced(consumer, self._settings, self._linger_ms, quick_ms=quick_ms).pauses
        try:
            await consumer.start()
            partitions = await self._partitions(consumer)
            self._goal = dict(await consumer.end_offsets(partitions))
            starts = await self._starts(consumer, partitions)
            # aiokafka fetches at once only if it finds a position with each assignment; otherwise 200 ms later.
            consumer.assign(partitions)
            for partition, offset in starts.items():
                consumer.seek(partition, offset)
        except KafkaError as error:
            await consumer.stop()
            raise await no_answer(self._settings, error) from None
        except BaseException:
            await consumer.stop()
            raise
        self._consumer = consumer
        self._task = asyncio.create_task(self._run(consumer), name="follower")

    async def _partitions(self, consumer: AIOKafkaConsumer) -> list[TopicPartition]:
        """The partitions of all topics. Raises UnavailableError if a topic does not exist."""
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
        return every if self._key is None or not every else [partitioner(self._key, every, every)]

    async def _starts(
        self, consumer: AIOKafkaConsumer, partitions: list[TopicPartition]
    ) -> dict[TopicPartition, int]:
        """The offset of each partition to read from."""
        together: dict[int | None, list[TopicPartition]] = {}
        for partition in partitions:
            together.setdefault(self._followed[partition.topic].since_ms, []).append(partition)
        starts: dict[TopicPartition, int] = {}
        for since_ms, some in together.items():
            starts |= await self._starts_since(consumer, some, since_ms)
        return starts

    async def _starts_since(
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
                batches = await self._reader.next(consumer, timeout_ms=timeout_ms, max_records=2000)
            except KafkaError as error:
                log.warning("reading failed, trying again: %s", error)
                await asyncio.sleep(0.5)
                continue
            for partition, records in batches.items():
                reader = self._followed[partition.topic].reader
                reader([received(record, self._topics) for record in records])
            # Also without records: a position moves past markers of transactions.
            advanced, self._advanced = self._advanced, asyncio.Event()
            advanced.set()
            if behind:
                behind = {p for p in behind if await consumer.position(p) < self._goal[p]}

    async def positions(self, topics: Iterable[Topic[Any]]) -> dict[tuple[str, int], int]:
        """The next offset to be read, by topic name and partition, for these topics."""
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
        """Wait until all records are read that were on the topics when this was called.

        A table may simply not hold a record *yet*. After this wait, nobody is refused for that. A sender who saw a
        record acknowledged before sending is judged with that record. Costs one round trip if nothing is outstanding.
        Otherwise fetches do not linger until it is read.

        False if `timeout_s` passed first, or if Kafka did not answer.
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
        """Ask Kafka for the end offsets, and wait until they are read. One request serves all callers that waited for
        it.
        """
        async with self._asking_lock:
            self._next_question = None
            try:
                asking = await self._asking_consumer()
                ends = await asking.end_offsets(list(consumer.assignment()))
            except KafkaError as error:
                log.warning("not known where %s end: %r", ", ".join(self._topics), error)
                return False
        advanced = self._advanced
        if not await _is_behind(consumer, ends):
            return True
        with self._pauses.hurried():
            while True:
                await advanced.wait()
                advanced = self._advanced
                if not await _is_behind(consumer, ends):
                    return True

    async def _asking_consumer(self) -> AIOKafkaConsumer:
        """A second connection: on the reading one, a request waits behind the fetch that waits for records."""
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
        """Stop reading, and disconnect."""
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
        """The reason why reading has ended; None while it goes on."""
        if self._task is None or not self._task.done() or self._task.cancelled():
            return None
        return f"the follower ended: {self._task.exception()!r}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()


async def _is_behind(consumer: AIOKafkaConsumer, ends: Mapping[TopicPartition, int]) -> bool:
    for partition, end in ends.items():
        if await consumer.position(partition) < end:
            return True
    return False
