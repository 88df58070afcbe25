"""Retention of `lease`: writes tombstones for leases that ended long ago, so that the topic does not grow for ever.

The topic is compacted: the last record of a key stays until a tombstone follows. One revoker reads the topic from where
it stopped, up to the first record that is not old enough.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable

from aiokafka.errors import KafkaError

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.lease import Lease
from ringfence.messages.topics import LEASE
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.lifecycle import is_over
from ringfence.model.leases.verification import verify_lease

log = logging.getLogger(__name__)

_BATCH_SIZE = 500


class LeaseTombstoner:
    """Writes tombstones for leases that ended long ago."""

    def __init__(
        self, runtime: Runtime, is_leader: Callable[[], bool], *, after_s: int, every_s: float
    ) -> None:
        """Args:
            is_leader: whether this revoker, of several, does it now.
            after_s: the age of its last record, by append time, at which a lease is deleted.
            every_s: the interval at which the topic is read for such leases.
        """  # fmt: skip
        self._runtime = runtime
        self._is_leader = is_leader
        self._after_ms = after_s * 1000
        self._every_s = every_s
        self._epochs = Epochs(runtime.trust)
        self._read_to: dict[int, int] = {}
        """By partition: the offset to continue at. A restart reads the whole topic once more."""

    async def run(self) -> None:
        """Delete old leases, for ever."""
        await run_periodically(
            self._every_s, self._delete_if_leader, "old leases are deleted later", log,
            expected=(KafkaError, RingfenceError, OSError), at_once=True,
        )  # fmt: skip

    async def _delete_if_leader(self) -> None:
        if self._is_leader():
            await self.delete_old()

    async def delete_old(self) -> int:
        """Delete leases that are old enough; returns their number. Raises KafkaError, UnavailableError."""
        before_ms = self._runtime.clock.now_ms() - self._after_ms
        async with Stretches(self._runtime.settings) as reader:
            partitions = await reader.partitions(LEASE)
            return sum([await self._delete_in(reader, partition, before_ms) for partition in partitions])

    async def _delete_in(self, reader: Stretches, partition: int, before_ms: int) -> int:
        start, end = await reader.bounds(LEASE, partition)
        start = max(start, self._read_to.get(partition, start))
        deleted, old = 0, list[Received]()
        async with contextlib.aclosing(reader.records(LEASE, partition, start, end)) as records:
            async for record in records:
                if record.appended_at_ms >= before_ms:
                    break
                old.append(record)
                if len(old) >= _BATCH_SIZE:
                    deleted += await self._delete(old)
                    old = []
        return deleted + await self._delete(old)

    async def _delete(self, old: list[Received]) -> int:
        """Write tombstones for leases that end in these records of one partition; the next read starts after them."""
        if not old:
            return 0
        sent = [
            await self._runtime.publisher.send(
                LEASE, lease.lease_id, b"", id=f"{lease.jti}.deleted", type=Lease.typ
            )
            for lease in _ended(old, self._verify)
        ]
        await gather_all(sent)
        metrics.TOMBSTONES.inc(len(sent))
        self._read_to[old[-1].partition] = old[-1].offset + 1
        return len(sent)

    def _verify(self, record: Received) -> Lease | None:
        """The lease of a record; None if it does not verify, or was void when it was appended."""
        if self._epochs.took(record):
            return None
        try:
            lease = verify_lease(
                record.value, self._runtime.trust, self._runtime.clock, appended_at_ms=record.appended_at_ms
            )
        except InvalidMessageError:
            return None
        return None if self._epochs.is_void(record, lease.epoch) else lease


def _ended(records: Iterable[Received], verify: Callable[[Received], Lease | None]) -> list[Lease]:
    """The leases whose end is among these records, each under its own key, and that were not deleted after it."""
    ended: dict[str, Lease] = {}
    for record in records:
        key = record.key or ""
        if not record.value:
            ended.pop(key, None)
            continue
        lease = verify(record)
        if lease is not None and lease.lease_id == key and is_over(lease):
            ended[key] = lease
    return list(ended.values())
