"""What a revoker has said of leases of late: read back from Kafka, it need not be taken apart to know what it says."""

from __future__ import annotations

from collections import OrderedDict

from ringfence.messages.lease import Lease
from ringfence.revoker.lease_records import LeaseSummary, summarise

MOST = 10_000
"""So many records are remembered, some 1.5 kB each: more than are on their way to Kafka and back."""


class OwnRecordCache:
    """The latest records that this process has published, byte for byte."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._glances: OrderedDict[bytes, LeaseSummary] = OrderedDict()

    def add(self, record: bytes, glance: LeaseSummary) -> None:
        """This process publishes a record, of which it knows what it says."""
        self._glances[record] = glance
        if len(self._glances) > self._most:
            self._glances.popitem(last=False)

    def has(self, record: bytes) -> bool:
        """Whether this is, to the byte, one of these records."""
        return record in self._glances

    def peek(self, record: bytes) -> LeaseSummary | None:
        """What a record says of itself, whoever wrote it, as `truth.peek` says it."""
        return self._glances.get(record) or summarise(record)


def glance_of(claims: Lease) -> LeaseSummary:
    """What `summarise` says of the record that is made of these claims."""
    return LeaseSummary(
        claims.lease_id, claims.seq, claims.status, claims.deadline, claims.epoch, claims.grants is not None
    )
