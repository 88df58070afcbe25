"""Looks up which events on `audit` an audit service handed over. Without a checkpoint, anybody may have written others.

Handed-over events are on `audit.intake`, signed.

The search starts at the offset up to which events are chained, and alternates between later and earlier ranges until
no event is missing. Earlier ranges hold what was handed over and chained last, which is all that callers look up.
Later ranges hold what was handed over since, and also the rest if somebody set the committed offset back.

The cost is bounded. Events are chained in the order of their handover, so few other events lie between those that are
looked up. An attacker who forges events, which are never found, or repeats old ones, cannot cause the whole topic to be
read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Final

import orjson

from ringfence.audit.trail.handover import PendingEvent, parse_intake
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import AUDIT_INTAKE
from ringfence.model.audit_log.merkle import Hash

_FIRST_RANGE, _MAX_RANGE = 50, 3200
"""Messages in the first and in the largest range that is read at a time."""
MAX_OTHERS: Final = 50_000
"""The search in earlier ranges ends after this many handed-over events that are not looked up.

Some are expected between those that are: events that were handed over twice and chained once. They are at most as many
as a chain remembers.
"""
_EMPTY_RANGE = 0, 0
_RETENTION_MS = (AUDIT_INTAKE.retention_s or 0) * 1000
ContentDigest = bytes
"""SHA-256 of an event without its chain link: identifies it before and after it is chained."""


class HandoverLookup:
    """Looks for events on `audit.intake`."""

    def __init__(
        self,
        kafka: Stretches,
        trust: TrustStore,
        chained: Mapping[int, int],
        *,
        max_others: int = MAX_OTHERS,
    ) -> None:
        """`chained`: by partition, the offset after the last message whose events are chained."""
        self._kafka = kafka
        self._trust = trust
        self._chained = chained
        self._max_others = max_others

    async def find(self, partition: int, events: Mapping[Hash, ContentDigest]) -> frozenset[Hash]:
        """The events, by their leaf hashes, that an audit service handed over.

        Only messages that the topic still keeps count.
        """
        start, end = await self._kafka.bounds(AUDIT_INTAKE, partition)
        chained = min(max(self._chained.get(partition, start), start), end)
        missing, others = _Missing(events), 0
        later, earlier = _forward_ranges(chained, end), _backward_ranges(start, chained)
        for forward, backward in zip_longest(later, earlier, fillvalue=_EMPTY_RANGE):
            if missing:
                await self._search(partition, *forward, missing)
            if missing and others < self._max_others:
                others += await self._search(partition, *backward, missing)
        return frozenset(events) - missing.hashes

    async def _search(self, partition: int, start: int, end: int, missing: _Missing) -> int:
        """Remove from `missing` the events in these messages. Returns how many other events they contain."""
        others = 0
        async for record in self._kafka.records(AUDIT_INTAKE, partition, start, end):
            events, missing_before = _events_of(record, self._trust), len(missing.hashes)
            for event in events:
                digest = content_digest(orjson.loads(event.body))
                missing.hashes.difference_update(missing.by_digest.get(digest, ()))
            others += max(0, len(events) - (missing_before - len(missing.hashes)))
        return others


class _Missing:
    """The events that were not found yet."""

    def __init__(self, events: Mapping[Hash, ContentDigest]) -> None:
        self.hashes = set(events)
        self.by_digest: dict[ContentDigest, list[Hash]] = {}
        for leaf, digest in events.items():
            self.by_digest.setdefault(digest, []).append(leaf)

    def __bool__(self) -> bool:
        return bool(self.hashes)


def _forward_ranges(start: int, end: int) -> Iterator[tuple[int, int]]:
    """As `_backward_ranges`, from `start` on."""
    for first, last in _backward_ranges(-end, -start):
        yield -last, -first


def _backward_ranges(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of offsets from `end` back to `start`, each four times as long as the one before."""
    stop, count = end, _FIRST_RANGE
    while stop > start:
        first = max(start, stop - count)
        yield first, stop
        stop, count = first, min(count * 4, _MAX_RANGE)


def _events_of(record: Received, trust: TrustStore) -> Sequence[PendingEvent]:
    """The verified events of a message; none if no audit service signed it."""
    try:
        return parse_intake(record, trust)
    except InvalidMessageError:
        return ()


def is_handover_retained(record: Received, now_ms: int) -> bool:
    """Whether the topic must still keep the handover of this event. For old events it does not."""
    return now_ms - record.appended_at_ms < _RETENTION_MS / 2


def content_digest(event: Mapping[str, Any]) -> ContentDigest:
    """The digest of an event, chained or not."""
    fields = event.get("unmapped")
    if isinstance(fields, dict):
        fields = {name: value for name, value in fields.items() if name != "chain"}
    return hashlib.sha256(orjson.dumps({**event, "unmapped": fields}, option=orjson.OPT_SORT_KEYS)).digest()
