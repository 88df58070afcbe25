"""Epochs decide which lease records count. They follow from Kafka's order, so every reader of `lease` agrees.

A rebuild of Redis writes a marker with a new epoch to every partition, and then reads what was appended before it. A
record with the epoch of the Redis before the rebuild that is appended after the marker is void (ADR 0006).
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
    """The Kafka key of a marker: each has its own, so that compaction keeps it."""
    return _KEY + epoch


def number_of(epoch: str | None) -> int:
    """The number of an epoch, by which epochs are compared; 0 for none."""
    return int(epoch.partition(".")[0]) if epoch else 0


class Epochs:
    """The epochs of each partition, as far as it was read. A record that is read again gets the same judgement."""

    def __init__(self, trust: TrustStore) -> None:
        self._trust = trust
        self._begun: dict[int, list[tuple[int, str]]] = {}
        """By partition: the offset at which each epoch began, and its name."""

    def took(self, record: Received) -> bool:
        """Whether a record has the key of a marker, and is no lease. A marker that verifies begins its epoch."""
        if record.key is None or not record.key.startswith(_KEY):
            return False
        epoch = self._verified_epoch(record)
        if epoch is not None:
            self.begin(record, epoch)
        return True

    def begin(self, record: Received, epoch: str) -> None:
        """An epoch begins at this record, unless its number is not higher than all before."""
        if number_of(epoch) > number_of(self.of(record.partition)):
            self._begun.setdefault(record.partition, []).append((record.offset, epoch))

    def of(self, partition: int) -> str | None:
        """The present epoch of a partition; None before its first marker."""
        begun = self._begun.get(partition)
        return begun[-1][1] if begun else None

    def highest(self) -> int:
        """The highest epoch number of all partitions, 0 without any marker."""
        return max((number_of(begun[-1][1]) for begun in self._begun.values()), default=0)

    def is_void(self, record: Received, epoch: str | None) -> bool:
        """Whether a lease record with this epoch is void at its offset. A record without an epoch is never void.

        A record with a higher epoch than is known is not void: its marker is before the offset where this reader began.
        """
        if epoch is None:
            return False
        for offset, current in reversed(self._begun.get(record.partition, ())):
            if offset <= record.offset:
                return epoch != current and number_of(epoch) <= number_of(current)
        return False

    def _verified_epoch(self, record: Received) -> str | None:
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
