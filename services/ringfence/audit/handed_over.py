"""Which events on `audit` an audit service handed over: of what stands there unsigned, anybody may have written some.

What was handed over stands on `audit.intake`, signed. It is read backwards from where the chains have read to, so that
what was chained last, which is all that is ever asked for, is found at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import orjson

from ringfence.audit.intake import Told, opened_intake
from ringfence.kernel.errors import InvalidMessageError
from ringfence.kernel.kafka import Received
from ringfence.kernel.kafka_reading import Stretches
from ringfence.kernel.trust import TrustStore
from ringfence.messages.topics import AUDIT_INTAKE

_AT_FIRST = 50
_KEPT_MS = (AUDIT_INTAKE.retention_s or 0) * 1000
Mark = bytes
"""What an event is known by, whatever its place in a chain."""


class HandedOver:
    """Looks for events on `audit.intake`."""

    def __init__(self, kafka: Stretches, trust: TrustStore, taken: Mapping[int, int]) -> None:
        """`taken`: by partition, the offset after the last message whose events are chained."""
        self._kafka = kafka
        self._trust = trust
        self._taken = taken

    async def among(self, partition: int, marks: frozenset[Mark]) -> frozenset[Mark]:
        """Those of these that an audit service handed over, as far as its messages are still kept."""
        missing = set(marks)
        async for stretch in self._stretches(partition):
            if not missing:
                break
            async for record in self._kafka.records(AUDIT_INTAKE, partition, *stretch):
                missing.difference_update(
                    mark_of(orjson.loads(one.body)) for one in entries_of(record, self._trust)
                )
        return marks - missing

    async def _stretches(self, partition: int) -> AsyncIterator[tuple[int, int]]:
        start, end = await self._kafka.bounds(AUDIT_INTAKE, partition)
        taken = at = min(max(self._taken.get(partition, start), start), end)
        count = _AT_FIRST
        while at > start:
            begin = max(start, at - count)
            yield begin, at
            at, count = begin, count * 4
        yield taken, end  # where somebody set back how far was read


def entries_of(record: Received, trust: TrustStore) -> Sequence[Told]:
    """What a message holds that an audit service signed; nothing where none did."""
    try:
        return opened_intake(record, trust)
    except InvalidMessageError:
        return ()


def is_kept_for(record: Received, now_ms: int) -> bool:
    """Whether what an event was handed over with must still be there: it is not, long after the event."""
    return now_ms - record.appended_at_ms < _KEPT_MS / 2


def mark_of(event: Mapping[str, Any]) -> Mark:
    """The mark of an event, be it chained or not."""
    words = event.get("unmapped")
    if isinstance(words, dict):
        words = {name: value for name, value in words.items() if name != "chain"}
    return hashlib.sha256(orjson.dumps({**event, "unmapped": words}, option=orjson.OPT_SORT_KEYS)).digest()
