"""Detection of data loss: records that Kafka removed before they were read, or lost afterwards.

A Kafka client that resets its position by itself hides the loss. Readers therefore set `NO_RESET`, and read through
`LossAwareReader`, which reports the lost range and then goes on with what is left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import NoOffsetForPartitionError, OffsetOutOfRangeError

log = logging.getLogger(__name__)

NO_RESET: Final = "none"
"""The `auto_offset_reset` of every consumer that `LossAwareReader` reads from."""
_NO_POSITION = (OffsetOutOfRangeError, NoOffsetForPartitionError)
"""What aiokafka raises if the position of a reader does not exist."""


class LostRange(NamedTuple):
    """Records of one partition, from offset `first` up to but excluding `until`, that nobody can read any more."""

    topic_name: str
    partition: int
    first: int
    until: int
    by: str
    """The reader that needed them: a consumer group or a service."""
    read: bool = False
    """True if the reader had read them, and the broker lost them later. Records that take their offsets are read as
    well.
    """

    @property
    def message(self) -> str:
        """A sentence for people."""
        last = self.until - 1
        which = f"record {self.first}" if last == self.first else f"records {self.first} to {last}"
        when = "after" if self.read else "before"
        return f"{which} of {self.topic_name}, partition {self.partition}, went from Kafka {when} {self.by} had read it"


OnDataLoss = Callable[[LostRange], Awaitable[None]]


class LossAwareReader:
    """Reads batches from one aiokafka consumer, and reports lost ranges before it skips them."""

    def __init__(
        self, by: str, on_data_loss: OnDataLoss | None = None, *, report_initial_gap: bool = False
    ) -> None:
        """Args:
            by: the name of the reader.
            on_data_loss: called with each lost range; while it raises, the reader does not go on.
            report_initial_gap: whether to report records that were removed before a group's first read.
        """  # fmt: skip
        self._by = by
        self._on_data_loss = on_data_loss
        self._report_initial_gap = report_initial_gap
        self.lost_ranges: dict[tuple[str, int], LostRange] = {}
        """The last lost range, by topic name and partition."""

    async def next(
        self, consumer: AIOKafkaConsumer, *, timeout_ms: int, max_records: int
    ) -> dict[TopicPartition, list[Any]]:
        """The next batch; empty after `timeout_ms`, and after a lost range. Raises KafkaError."""
        try:
            found: dict[TopicPartition, list[Any]] = await consumer.getmany(
                timeout_ms=timeout_ms, max_records=max_records
            )
            return found
        except _NO_POSITION as error:
            await self._report_and_skip_lost(consumer, error)
            return {}

    async def _report_and_skip_lost(self, consumer: AIOKafkaConsumer, error: Exception) -> None:
        try:
            for at, wanted in _positions_wanted(error).items():
                if at in consumer.assignment():
                    await self._skip_lost(consumer, at, wanted)
        except Exception as problem:  # noqa: BLE001 - it keeps its position, and asks again
            log.warning("nobody could be told yet of what is gone, trying again: %s", problem)
            await asyncio.sleep(0.5)

    async def _skip_lost(self, consumer: AIOKafkaConsumer, at: TopicPartition, wanted: int | None) -> None:
        """Report the lost range of one partition, then seek to the first record that exists."""
        if wanted is not None and await consumer.position(at) != wanted:
            return  # of before it was assigned, or sought, anew
        start = (await consumer.beginning_offsets([at]))[at]
        end = (await consumer.end_offsets([at]))[at]
        if wanted is not None and start <= wanted <= end:
            return  # it was there again by now
        lost = _lost_range(at, wanted, start, end, self._by)
        if lost is not None and (wanted is not None or self._report_initial_gap):
            await self._report(lost)
        consumer.seek(at, start)

    async def _report(self, lost: LostRange) -> None:
        if self._on_data_loss is not None:
            await self._on_data_loss(lost)
        self.lost_ranges[lost.topic_name, lost.partition] = lost
        log.critical("%s", lost.message)


def _positions_wanted(error: Exception) -> dict[TopicPartition, int | None]:
    """The positions that the reader wanted; None for a partition without a committed offset."""
    (place,) = error.args
    return place if isinstance(place, dict) else {place: None}


def _lost_range(at: TopicPartition, wanted: int | None, start: int, end: int, by: str) -> LostRange | None:
    if wanted is not None and wanted > end:
        return LostRange(at.topic, at.partition, end, wanted, by, read=True)
    first = wanted or 0
    return LostRange(at.topic, at.partition, first, start, by) if first < start else None
