"""How far a member of a consumer group has come, as it tells the broker: a few times a second, not after each batch.

A commit is a round trip, which would cost as much as handling a record where they come one by one. What is done and not
committed yet comes again after a crash; nothing is committed before it is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from ringfence.kernel.kafka.record import Received

log = logging.getLogger(__name__)

COMMIT_MS = 200
"""So long after a batch its offsets are committed at the latest, together with those of the batches that followed."""


class OffsetCommitter:
    """The offsets of one member that are not committed yet."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self._ends: dict[TopicPartition, int] = {}
        self._since_s = 0.0
        """When the first of them was done."""

    def done(self, records: Iterable[Received]) -> None:
        """The effects of these are durable."""
        if not self._ends:
            self._since_s = asyncio.get_running_loop().time()
        for record in records:
            partition = TopicPartition(record.topic_name, record.partition)
            self._ends[partition] = max(self._ends.get(partition, 0), record.offset + 1)

    @property
    def waiting(self) -> bool:
        """Whether anything is done and not committed."""
        return bool(self._ends)

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        return self.waiting and asyncio.get_running_loop().time() >= self._since_s + COMMIT_MS / 1000

    async def flush(self) -> None:
        """Commit what is done. Where that is refused, it comes again, to whoever has the partition then."""
        held = self._consumer.assignment()
        ends = {partition: end for partition, end in self._ends.items() if partition in held}
        self._ends = {}
        if not ends:
            return
        try:
            await self._consumer.commit(ends)
        except (CommitFailedError, IllegalStateError) as error:
            log.info("what was done was not committed: it comes again (%s)", error)
        except KafkaError as error:
            log.warning("committing failed, what was done may come again: %s", error)
