"""Cache of the records that this process has published: when Kafka gives one back, it need not be parsed."""

from __future__ import annotations

from collections import OrderedDict

from ringfence.model.leases.unverified_records import LeaseSummary, summarise

MAX_RECORDS = 10_000
"""How many records are cached, some 1.5 kB each: more than are on their way to Kafka and back."""


class OwnRecordCache:
    """The latest records that this process has published, byte for byte, with their summaries."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        """`max_records`: the oldest ones beyond it are forgotten; 0 switches the cache off."""
        self._max_records = max_records
        self._summaries: OrderedDict[bytes, LeaseSummary] = OrderedDict()

    def add(self, record: bytes, summary: LeaseSummary) -> None:
        """This process publishes a record with this summary."""
        self._summaries[record] = summary
        if len(self._summaries) > self._max_records:
            self._summaries.popitem(last=False)

    def has(self, record: bytes) -> bool:
        """Whether this is, to the byte, one of these records."""
        return record in self._summaries

    def summarise(self, record: bytes) -> LeaseSummary | None:
        """The summary of any lease record, whoever wrote it: as `unverified_records.summarise`."""
        return self._summaries.get(record) or summarise(record)
