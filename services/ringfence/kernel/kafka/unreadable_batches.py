"""Unreadable batches: compressed by a missing codec, with a header name that is not UTF-8, or with a timestamp of their
writer instead of the broker's.

Anybody with Write on a topic can write one. aiokafka raises each time that it reaches it, and loses what it had read of
other partitions. Here the rest of the batch, which one writer sent, becomes one meaningless record. Handlers refuse it
like other garbage, and reading continues after it (ADR 0041).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Final

from aiokafka import AIOKafkaConsumer
from aiokafka.consumer.fetcher import FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.structs import ConsumerRecord

from ringfence.kernel.base.log_limiter import rate_limited

log = logging.getLogger(__name__)

_LOG_APPEND_TIME: Final = 1
UNREADABLE: Final = b"unreadable"
"""The value of the record that stands for what cannot be read. No message of any topic looks like it."""


def pass_over_unreadable(consumer: AIOKafkaConsumer) -> None:
    """See that `consumer`, which has been started, reads on behind what cannot be read. Once is enough."""
    fetcher = consumer._fetcher
    if not isinstance(fetcher._records, _Fetched):
        fetcher._records = _Fetched(fetcher._records)


class _Fetched(OrderedDict[Any, Any]):
    """By partition: what a fetch brought, as it waits in aiokafka to be read."""

    def __setitem__(self, partition: Any, fetched: Any) -> None:
        if isinstance(fetched, FetchResult):
            records = fetched._partition_records
            records._records = batches = _Batches(records._records, str(partition))
            records._check_crcs = False  # done there
            records._records_iterator = _read(records, batches)
        super().__setitem__(partition, fetched)


class _Batches:
    """Batches of records as they came, each with the checksum that its writer gave it."""

    def __init__(self, batches: Any, partition: str) -> None:
        self._batches = batches
        self._partition = partition
        self.current: Any = None

    def has_next(self) -> bool:
        return bool(self._batches.has_next())

    def next_batch(self) -> Any:
        self.current = None
        batch = self._batches.next_batch()
        if not batch.validate_crc():
            # Of the way here, or of the broker's disk: fetched again it may be whole.
            raise CorruptRecordException(f"Invalid CRC - {self._partition}")
        self.current = batch
        if batch.timestamp_type != _LOG_APPEND_TIME and not batch.is_control_batch:
            # What has expired is judged by when the broker had it. One that cannot read a batch may keep it as it came.
            raise ValueError("its time is not the broker's; message.timestamp.type has to be LogAppendTime")
        return batch


def _read(records: PartitionRecords, batches: _Batches) -> Iterator[ConsumerRecord]:
    while True:
        try:
            yield from records._unpack_records()
        except Exception as error:
            batch = batches.current
            if batch is None:
                raise
            first, until = records.next_fetch_offset, batch.next_offset
            at = records._tp
            log.warning(
                "%s/%d@%d to %d cannot be read, and count as garbage: %r",
                at.topic, at.partition, first, until - 1, error,
                extra=rate_limited(at.topic, type(error).__name__),
            )  # fmt: skip
            records.next_fetch_offset = until
            yield ConsumerRecord(
                at.topic, at.partition, until - 1, batch.max_timestamp, batch.timestamp_type,
                b"", UNREADABLE, None, 0, len(UNREADABLE), (),
            )  # fmt: skip
        else:
            return
