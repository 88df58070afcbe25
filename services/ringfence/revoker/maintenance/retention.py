"""Background work: deletes leases from their topic, long after their end, so that it does not grow for ever.

The topic is compacted: the last record under a key stays until a tombstone comes. One revoker reads it from where it
stopped, as far as what is old enough.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.connection import connection
from ringfence.kernel.kafka.fetch_control import fetch_options
from ringfence.kernel.kafka.record import Received, received
from ringfence.kernel.kafka.table_reader import paced
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.lease import Lease
from ringfence.messages.topics import LEASE
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.lifecycle import is_over
from ringfence.model.leases.verification import verify_lease

log = logging.getLogger(__name__)

_AT_A_TIME = 500
_ANSWERS_WITHIN_S = 30.0


class LeaseTombstoner:
    """Writes tombstones for leases that ended long ago."""

    def __init__(self, runtime: Runtime, mine: Callable[[], bool], *, after_s: int, every_s: float) -> None:
        """Args:
            mine: whether it is this revoker that does it now.
            after_s: how long after the broker took its last record a lease is deleted.
            every_s: how often that is looked for.
        """  # fmt: skip
        self._runtime = runtime
        self._mine = mine
        self._after_ms = after_s * 1000
        self._every_s = every_s
        self._topics = {LEASE.name(runtime.settings.topic_prefix): LEASE}
        self._epochs = Epochs(runtime.trust)
        self._read_to: dict[int, int] = {}
        """By partition: the offset before which everything was looked at. A restart looks at all once more."""

    async def run(self) -> None:
        """Look for old leases, for ever."""
        while True:
            try:
                if self._mine():
                    await self.forget()
            except (KafkaError, RingfenceError, OSError) as error:
                log.warning("old leases are deleted later: %s", str(error) or type(error).__name__)
            await asyncio.sleep(self._every_s)

    async def forget(self) -> int:
        """Delete what is old enough now. Returns how many leases. Raises KafkaError, UnavailableError."""
        settings = self._runtime.settings
        consumer = AIOKafkaConsumer(
            **connection(settings), enable_auto_commit=False, auto_offset_reset="earliest",
            **fetch_options([LEASE]),
        )  # fmt: skip
        paced(consumer, settings)
        await consumer.start()
        try:
            name = LEASE.name(settings.topic_prefix)
            cluster = await consumer._client.fetch_all_metadata()
            numbers = sorted(cluster.partitions_for_topic(name) or ())
            before_ms = self._runtime.clock.now_ms() - self._after_ms
            return sum([await self._forget_in(consumer, TopicPartition(name, n), before_ms) for n in numbers])
        finally:
            await consumer.stop()

    async def _forget_in(self, consumer: AIOKafkaConsumer, partition: TopicPartition, before_ms: int) -> int:
        consumer.assign([partition])
        end = (await consumer.end_offsets([partition]))[partition]
        start = (await consumer.beginning_offsets([partition]))[partition]
        consumer.seek(partition, max(start, self._read_to.get(partition.partition, start)))
        forgotten = 0
        while await consumer.position(partition) < end:
            batches = await asyncio.wait_for(
                consumer.getmany(timeout_ms=1000, max_records=_AT_A_TIME), _ANSWERS_WITHIN_S
            )
            records = batches.get(partition, [])
            old = [received(record, self._topics) for record in records if record.timestamp < before_ms]
            forgotten += await self._delete(_over(old, self._opened))
            if old:
                self._read_to[partition.partition] = old[-1].offset + 1
            if len(old) < len(records):
                break
        return forgotten

    def _opened(self, record: Received) -> Lease | None:
        """None where it is nobody's word that a lease is over, or came too late to count."""
        if self._epochs.took(record):
            return None
        try:
            lease = verify_lease(
                record.value, self._runtime.trust, self._runtime.clock, appended_at_ms=record.appended_at_ms
            )
        except InvalidMessageError:
            return None
        return None if self._epochs.is_void(record, lease.epoch) else lease

    async def _delete(self, leases: Iterable[Lease]) -> int:
        sent = [
            await self._runtime.publisher.send(
                LEASE, lease.lease_id, b"", id=f"{lease.jti}.deleted", type=Lease.typ
            )
            for lease in leases
        ]
        await gather_all(sent)
        metrics.TOMBSTONES.inc(len(sent))
        return len(sent)


def _over(records: Iterable[Received], opened: Callable[[Received], Lease | None]) -> list[Lease]:
    """The leases whose end stands among these records, each under its own key, and that were not deleted since."""
    over: dict[str, Lease] = {}
    for record in records:
        key = record.key or ""
        if not record.value:
            over.pop(key, None)
            continue
        lease = opened(record)
        if lease is not None and lease.lease_id == key and is_over(lease):
            over[key] = lease
    return list(over.values())
