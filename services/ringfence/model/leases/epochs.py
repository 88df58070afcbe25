"""Which records of leases count. The order of Kafka decides it, so every reader of `lease` comes to the same.

Whoever rebuilds Redis writes a marker with a new epoch into every partition, and then reads what stands before it. A
record that bears the epoch of the Redis before, and that arrives only after the marker, is void (ADR 0006).
"""

from __future__ import annotations

import logging

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.lease import LeaseEpoch

log = logging.getLogger(__name__)

_KEY = "epoch."


def marker_key(epoch: str) -> str:
    """The Kafka key of a marker: its own, so that compaction keeps each."""
    return _KEY + epoch


def number_of(epoch: str | None) -> int:
    """By which epochs are compared; 0 for none."""
    return int(epoch.partition(".")[0]) if epoch else 0


class Epochs:
    """The epochs of each partition, as far as it was read. What is read once more is judged as the first time."""

    def __init__(self, trust: TrustStore) -> None:
        self._trust = trust
        self._begun: dict[int, list[tuple[int, str]]] = {}
        """By partition: at which offset which epoch began."""

    def took(self, record: Received) -> bool:
        """Whether a record is a marker, and no lease. One that nobody signed who may changes nothing."""
        if record.key is None or not record.key.startswith(_KEY):
            return False
        epoch = self._opened(record)
        if epoch is not None:
            self.begin(record, epoch)
        return True

    def begin(self, record: Received, epoch: str) -> None:
        """An epoch begins here. Only a higher number than all before counts: of two equal ones the first does."""
        if number_of(epoch) > number_of(self.of(record.partition)):
            self._begun.setdefault(record.partition, []).append((record.offset, epoch))

    def of(self, partition: int) -> str | None:
        """The epoch of a partition now; None before its first marker."""
        begun = self._begun.get(partition)
        return begun[-1][1] if begun else None

    def highest(self) -> int:
        """The highest number of all partitions, 0 where there is no marker."""
        return max((number_of(begun[-1][1]) for begun in self._begun.values()), default=0)

    def is_void(self, record: Received, epoch: str | None) -> bool:
        """Whether a record of a lease counts for nothing where it stands. `epoch` is what it bears; None always counts.

        A higher one than is known counts: its marker stands before where this reader began.
        """
        if epoch is None:
            return False
        for offset, current in reversed(self._begun.get(record.partition, ())):
            if offset <= record.offset:
                return epoch != current and number_of(epoch) <= number_of(current)
        return False

    def _opened(self, record: Received) -> str | None:
        find = self._trust.finder(*LeaseEpoch.signed_by, at_s=record.appended_at_ms / 1000)
        try:
            marker = verify(parse(record.value), LeaseEpoch, find, audience=self._trust.trust_domain).claims
        except InvalidMessageError as error:
            log.warning(
                "not a marker: %s/%d@%d: %s",
                record.topic_name,
                record.partition,
                record.offset,
                error.code,
                extra=rate_limited(record.topic_name, error.code),
            )
            return None
        right = marker.partition == record.partition and record.key == marker_key(marker.epoch)
        return marker.epoch if right else None
