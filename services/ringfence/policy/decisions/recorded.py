"""Decisions as they stand on Kafka, read from a time up to now: for what asks about the past, not for serving."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.connection import connection, no_answer
from ringfence.kernel.kafka.record import Received, missing_topics, received
from ringfence.kernel.kafka.table_reader import Follower, paced
from ringfence.messages.topics import CREDENTIAL_DECISION, TRUST

_BATCH = 500


class Recorded:
    """The decisions since a time. `total` is how many records that are; some may be no decision at all."""

    def __init__(
        self, consumer: AIOKafkaConsumer, name: str, start: dict[TopicPartition, int], end: dict[TopicPartition, int]
    ) -> None:  # fmt: skip
        self._consumer = consumer
        self._topics = {name: CREDENTIAL_DECISION}
        self._end = end
        self.total = sum(end[partition] - offset for partition, offset in start.items())

    async def batches(self) -> AsyncIterator[list[Received]]:
        """At most 500 at a time, in the order of each partition. No more is read than is asked for."""
        behind = {p for p, end in self._end.items() if await self._consumer.position(p) < end}
        while behind:
            fetched = await self._consumer.getmany(*behind, timeout_ms=500, max_records=_BATCH)
            for partition, records in fetched.items():
                here = [record for record in records if record.offset < self._end[partition]]
                if here:
                    yield [received(record, self._topics) for record in here]
            behind = {p for p in behind if await self._consumer.position(p) < self._end[p]}


@asynccontextmanager
async def recorded_decisions(settings: BusSettings, since_ms: int) -> AsyncIterator[Recorded]:
    """The decisions that were appended since `since_ms` (milliseconds since 1970) and until now.

    Raises UnavailableError where Kafka or the topic is not there, or stops answering.
    """
    name = CREDENTIAL_DECISION.name(settings.topic_prefix)
    consumer = AIOKafkaConsumer(
        **connection(settings), enable_auto_commit=False, auto_offset_reset="earliest"
    )
    paced(consumer, settings)
    try:
        await consumer.start()
        await consumer._client.set_topics(
            [name]
        )  # as in `Follower`: a client that has just started knows none
        numbers = consumer._client.cluster.partitions_for_topic(name)
        if not numbers:
            raise missing_topics([name])
        partitions = [TopicPartition(name, number) for number in sorted(numbers)]
        consumer.assign(partitions)
        end = dict(await consumer.end_offsets(partitions))
        found = await consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
        start = {p: at.offset if (at := found.get(p)) else end[p] for p in partitions}
        for partition, offset in start.items():
            consumer.seek(partition, offset)
        yield Recorded(consumer, name, start, end)
    except KafkaError as error:
        raise await no_answer(settings, error) from None
    finally:
        await consumer.stop()


async def trust_of(settings: BusSettings, clock: Clock) -> TrustStore:
    """Who may speak as what, by the trust bundle on Kafka. Raises UnavailableError where there is none."""
    trust = TrustStore(settings.trust_domain, settings.trust_root)

    def take_in(records: Sequence[Received]) -> None:
        for record in records:
            try:
                trust.load(record.value, clock.now_ms() / 1000)
            except InvalidMessageError:
                continue  # whoever can write to the topic can write anything; what the root signed counts

    async with Follower(settings, [TRUST], take_in) as follower:
        await follower.complete.wait()
    trust.require()
    return trust
