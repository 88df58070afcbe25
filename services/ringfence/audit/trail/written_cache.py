"""What stands on `audit` by this very process: read back to the letter, it need not be taken apart or hashed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ringfence.kernel.kafka.record import Received
from ringfence.model.audit_log.chain import loaded
from ringfence.model.audit_log.merkle import Hash, leaf_hash


class Trailed(NamedTuple):
    """A record of the trail: the JSON of its event, None where it is none, and its hash in the tree."""

    event: Any
    leaf: Hash


class WrittenEventCache:
    """What this process chained lately, by its bytes: other bytes are other events, and are looked at as all are.

    What is not read back goes at last: where the transaction that it was written in failed, it stands nowhere.
    """

    def __init__(self, most_bytes: int = 8 * 1024 * 1024) -> None:
        """`most_bytes` of events are kept, and some three times as much of their JSON; the oldest go first."""
        self._left = most_bytes
        self._kept: dict[bytes, Trailed] = {}

    def put(self, value: bytes, event: Mapping[str, Any], leaf: Hash) -> None:
        """Keep an event that is written. `event` must be what the JSON says."""
        self._take(value)
        self._kept[value] = Trailed(event, leaf)
        self._left -= len(value)
        while self._left < 0:
            self._take(next(iter(self._kept)))

    def of(self, records: Sequence[Received]) -> list[Trailed]:
        """What these are. Each is kept no longer."""
        return [
            self._take(record.value) or Trailed(loaded(record.value), leaf_hash(record.value))
            for record in records
        ]

    def _take(self, value: bytes) -> Trailed | None:
        known = self._kept.pop(value, None)
        if known is not None:
            self._left += len(value)
        return known
