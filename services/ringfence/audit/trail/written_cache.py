"""A cache of the events that this process wrote to `audit`: read back byte by byte, they need no parsing or hashing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ringfence.kernel.kafka.record import Received
from ringfence.model.audit_log.chain import loaded
from ringfence.model.audit_log.merkle import Hash, leaf_hash


class ParsedRecord(NamedTuple):
    """A record of the trail: the parsed JSON of its event, None if it is not JSON, and its leaf hash in the tree."""

    event: Any
    leaf: Hash


class WrittenEventCache:
    """The events that this process chained lately, by their exact bytes. Any other bytes are parsed as usual.

    An event whose transaction failed is never read back; it is evicted in the end.
    """

    def __init__(self, max_bytes: int = 8 * 1024 * 1024) -> None:
        """Keeps `max_bytes` of events, and about three times as much parsed JSON. The oldest are evicted first."""
        self._free_bytes = max_bytes
        self._entries: dict[bytes, ParsedRecord] = {}

    def put(self, value: bytes, event: Mapping[str, Any], leaf: Hash) -> None:
        """Keep an event that is written. `event` must be the parsed `value`."""
        self._take(value)
        self._entries[value] = ParsedRecord(event, leaf)
        self._free_bytes -= len(value)
        while self._free_bytes < 0:
            self._take(next(iter(self._entries)))

    def parse(self, records: Sequence[Received]) -> list[ParsedRecord]:
        """Return the records, parsed and hashed. Removes them from the cache, as each is read back once."""
        return [
            self._take(record.value) or ParsedRecord(loaded(record.value), leaf_hash(record.value))
            for record in records
        ]

    def _take(self, value: bytes) -> ParsedRecord | None:
        entry = self._entries.pop(value, None)
        if entry is not None:
            self._free_bytes += len(value)
        return entry
