"""Records that Kafka removed, by age or by size, before they were read: to be told, and never passed over in silence.

A client that resets its position by itself says nothing of it, so readers are told not to (`NO_RESET`), and go on by
`find_gone` once what they find is told.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import NoOffsetForPartitionError, OffsetOutOfRangeError

log = logging.getLogger(__name__)

NO_RESET: Final = "none"
"""The `auto_offset_reset` of whoever goes on by `find_gone`."""
NO_POSITION = (OffsetOutOfRangeError, NoOffsetForPartitionError)
"""What a reader raises whose place in a partition is not there."""


class Gone(NamedTuple):
    """Records of one partition, `first` up to and without `until`, that nobody can read any more."""

    topic_name: str
    partition: int
    first: int
    until: int
    by: str
    """Who was to read them: a consumer group, or a service."""
    read: bool = False
    """Whether they had been read, and the broker lost them afterwards: what takes their places is read as well."""

    @property
    def message(self) -> str:
        """For people."""
        last = self.until - 1
        which = f"record {self.first}" if last == self.first else f"records {self.first} to {last}"
        when = "after" if self.read else "before"
        return f"{which} of {self.topic_name}, partition {self.partition}, went from Kafka {when} {self.by} had read it"


OnGone = Callable[[Gone], Awaitable[None]]


async def find_gone(
    consumer: AIOKafkaConsumer, error: Exception, by: str, on_gone: OnGone, *, from_the_first: bool
) -> None:
    """Tell what is gone where `consumer` was to read on, then let it go on with what is there.

    Args:
        error: one of `NO_POSITION`, which it raised.
        by: who reads.
        on_gone: told first; where it raises, the consumer stays where it is and raises `error` again.
        from_the_first: whether what was gone before a group read its first record counts.

    Raises KafkaError where the broker does not say what is there.
    """
    for at, wanted in _places(error).items():
        if at not in consumer.assignment() or (wanted is not None and await consumer.position(at) != wanted):
            continue  # of before it was assigned, or sought, anew
        start = (await consumer.beginning_offsets([at]))[at]
        end = (await consumer.end_offsets([at]))[at]
        if wanted is not None and start <= wanted <= end:
            continue  # it was there again by now
        gone = _gone(at, wanted, start, end, by)
        if gone is not None and (wanted is not None or from_the_first):
            await on_gone(gone)
            log.critical("%s", gone.message)
        consumer.seek(at, start)


def _places(error: Exception) -> dict[TopicPartition, int | None]:
    """Where the reader wanted to go on; None where nothing was committed."""
    (place,) = error.args
    return place if isinstance(place, dict) else {place: None}


def _gone(at: TopicPartition, wanted: int | None, start: int, end: int, by: str) -> Gone | None:
    if wanted is not None and wanted > end:
        return Gone(at.topic, at.partition, end, wanted, by, read=True)
    first = wanted or 0
    return Gone(at.topic, at.partition, first, start, by) if first < start else None
