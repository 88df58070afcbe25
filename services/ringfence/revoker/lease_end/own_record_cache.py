"""Cache of the records that this process has published: read back from Kafka, they need no parsing."""

from __future__ import annotations

from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.model.leases.unverified_records import LeaseSummary, summarise

MAX_RECORDS = 10_000
"""The most cached records, about 1.5 kB each: more than are on their way to Kafka and back."""


class OwnRecordCache:
    """The latest records that this process has published, byte for byte, with their summaries."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        """`max_records`: evicts the oldest records beyond it; 0 switches the cache off."""
        self._summaries: BoundedDict[bytes, LeaseSummary] = BoundedDict(max_records)

    def add(self, record: bytes, summary: LeaseSummary) -> None:
        """Add a record that this process publishes, with its summary."""
        self._summaries[record] = summary

    def has(self, record: bytes) -> bool:
        """Whether the cache has exactly these bytes."""
        return record in self._summaries

    def summarise(self, record: bytes) -> LeaseSummary | None:
        """The summary of any lease record, cached or not, as `unverified_records.summarise` returns it."""
        return self._summaries.get(record) or summarise(record)
