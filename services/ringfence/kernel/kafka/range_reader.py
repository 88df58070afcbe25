"""Reads a stretch of a topic once, from an offset to where it ended when it was asked. For what follows a topic, see
`ringfence.kernel.kafka.table_reader.Follower`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.kafka.connection import connection, no_answer
from ringfence.kernel.kafka.fetch_control import WAIT_MS
from ringfence.kernel.kafka.record import Received, missing_topics, received
from ringfence.kernel.kafka.table_reader import paced
from ringfence.messages.base import Topic

_AT_A_TIME = 2000
_WAIT_MS = 1000


class Stretches:
    """Reads stretches of topics, one after the other. Use as an async context manager.

    Of topics that are written in transactions, what is committed; of no others, see `fetch_options`.
    """

    def __init__(self, settings: BusSettings) -> None:
        self._settings = settings
        self._asking: dict[bool, AIOKafkaConsumer] = {}
        """Those that ask, of what is committed or of everything, and read nothing."""

    def _another(self, *, committed: bool) -> AIOKafkaConsumer:
        consumer = AIOKafkaConsumer(
            **connection(self._settings),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed" if committed else "read_uncommitted",
            fetch_max_wait_ms=WAIT_MS,
        )
        paced(consumer, self._settings)
        return consumer

    async def _asker(self, *, committed: bool) -> AIOKafkaConsumer:
        if committed not in self._asking:
            consumer = self._another(committed=committed)
            await self._start(consumer)
            self._asking[committed] = consumer
        return self._asking[committed]

    async def __aenter__(self) -> Self:
        await self._asker(committed=False)
        return self

    async def _start(self, consumer: AIOKafkaConsumer) -> None:
        try:
            await consumer.start()
        except KafkaError as error:
            await consumer.stop()
            raise await no_answer(self._settings, error) from None
        except BaseException:
            await consumer.stop()
            raise

    async def __aexit__(self, *error: object) -> None:
        for consumer in self._asking.values():
            await consumer.stop()

    async def partitions(self, topic: Topic[Any]) -> list[int]:
        """The partitions of a topic. Raises UnavailableError if there is none."""
        name = topic.name(self._settings.topic_prefix)
        # As in `Follower.start`: a client that has just started knows of no topics.
        client = (await self._asker(committed=False))._client
        await client.set_topics([name])
        found = sorted(client.cluster.partitions_for_topic(name) or ())
        if not found:
            raise missing_topics([name])
        return found

    async def bounds(self, topic: Topic[Any], partition: int) -> tuple[int, int]:
        """The first offset that is still there, and the one after the last."""
        at = TopicPartition(topic.name(self._settings.topic_prefix), partition)
        consumer = await self._asker(committed=topic.in_transactions)
        starts, ends = await consumer.beginning_offsets([at]), await consumer.end_offsets([at])
        return starts[at], ends[at]

    async def is_settled(self, topic: Topic[Any], partition: int) -> bool:
        """Whether no transaction is open there: behind the first that is, nothing is read as committed, whosever."""
        at = TopicPartition(topic.name(self._settings.topic_prefix), partition)
        everything, committed = await self._asker(committed=False), await self._asker(committed=True)
        end = (await everything.end_offsets([at]))[at]
        settled: bool = (await committed.end_offsets([at]))[at] >= end
        return settled

    async def records(
        self, topic: Topic[Any], partition: int, start: int, end: int
    ) -> AsyncGenerator[Received, None]:
        """What stands from `start` up to `end`."""
        if start >= end:
            return
        name = topic.name(self._settings.topic_prefix)
        at = TopicPartition(name, partition)
        # Of its own: aiokafka may not stop a consumer any more that was given other partitions while it fetched.
        consumer = self._another(committed=topic.in_transactions)
        await self._start(consumer)
        try:
            consumer.assign([at])
            consumer.seek(at, start)
            while await consumer.position(at) < end:
                batches = await consumer.getmany(at, timeout_ms=_WAIT_MS, max_records=_AT_A_TIME)
                for record in batches.get(at, ()):
                    if record.offset >= end:
                        return
                    yield received(record, {name: topic})
        finally:
            await consumer.stop()

    async def whole(self, topic: Topic[Any]) -> AsyncIterator[Received]:
        """All records on a topic now, partition by partition."""
        for partition in await self.partitions(topic):
            async for record in self.records(topic, partition, *await self.bounds(topic, partition)):
                yield record
