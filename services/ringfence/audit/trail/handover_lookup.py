"""Which events on `audit` an audit service handed over: of what stands there unsigned, anybody may have written some.

What was handed over stands on `audit.intake`, signed. Versions before ADR 0063 also chained events without a hand-over,
and put their hashes there, signed (`audit.chained`): those count as well, for as long as the topic keeps them.

The topic is read from where the chains have read to, in turns on and back, until nothing is missing. Back stands what
was handed over and chained last, which is all that is ever asked for; on, the last hashes of an earlier version, and
all that others handed over since. As events are chained in the order in which they were handed over, none of it stands
before many that are not asked for. So whoever makes events up, which are never found, or repeats old ones, makes nobody
read all that is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, Final

import orjson

from ringfence.audit.trail.handover import Opened, opened_intake
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import AUDIT_INTAKE
from ringfence.model.audit_log.merkle import Hash

_AT_FIRST, _MOST = 50, 3200
"""Messages, read at a time."""
ENOUGH: Final = 50_000
"""Past so many events that an audit service handed over, and that are not asked for, none is looked at. Some stand
among those that are, as they were handed over twice and chained once: no more than a chain remembers.
"""
_HASHES = 30
"""So many hashes take as many bytes as one event that was handed over: they count as one."""
_NOTHING = 0, 0
_KEPT_MS = (AUDIT_INTAKE.retention_s or 0) * 1000
Mark = bytes
"""What an event is known by, whatever its place in a chain."""


class HandoverLookup:
    """Looks for events on `audit.intake`."""

    def __init__(
        self, kafka: Stretches, trust: TrustStore, taken: Mapping[int, int], *, enough: int = ENOUGH
    ) -> None:
        """`taken`: by partition, the offset after the last message whose events are chained."""
        self._kafka = kafka
        self._trust = trust
        self._taken = taken
        self._enough = enough

    async def find(self, partition: int, events: Mapping[Hash, Mark]) -> frozenset[Hash]:
        """Those of these, by their hashes in the tree, that an audit service handed over, or of which it signed the
        hash, as far as the messages are still kept.
        """
        start, end = await self._kafka.bounds(AUDIT_INTAKE, partition)
        taken = min(max(self._taken.get(partition, start), start), end)
        missing, others = _Missing(events), 0
        ahead, back = _forwards(taken, end), _backwards(start, taken)
        for (begin, until), (earlier, later) in zip_longest(ahead, back, fillvalue=_NOTHING):
            if missing:
                await self._look(partition, begin, until, missing)
            if missing and others < self._enough:
                others += await self._look(partition, earlier, later, missing)
        return frozenset(events) - missing.left

    async def _look(self, partition: int, begin: int, until: int, missing: _Missing) -> int:
        """Take out of `missing` what these messages tell of. Returns how many events they tell of besides."""
        others = 0
        async for record in self._kafka.records(AUDIT_INTAKE, partition, begin, until):
            opened, before = _opened(record, self._trust), len(missing.left)
            missing.left.difference_update(opened.chained)
            for one in opened.events:
                missing.left.difference_update(missing.by_mark.get(mark_of(orjson.loads(one.body)), ()))
            told = len(opened.events) + math.ceil(len(opened.chained) / _HASHES)
            others += max(0, told - (before - len(missing.left)))
        return others


class _Missing:
    """Events that were not found yet."""

    def __init__(self, events: Mapping[Hash, Mark]) -> None:
        self.left = set(events)
        self.by_mark: dict[Mark, list[Hash]] = {}
        for hashed, mark in events.items():
            self.by_mark.setdefault(mark, []).append(hashed)

    def __bool__(self) -> bool:
        return bool(self.left)


def _forwards(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The same stretches, the other way."""
    for begin, until in _backwards(-end, -start):
        yield -until, -begin


def _backwards(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Stretches from the end on, growing as nothing is found."""
    at, count = end, _AT_FIRST
    while at > start:
        begin = max(start, at - count)
        yield begin, at
        at, count = begin, min(count * 4, _MOST)


def _opened(record: Received, trust: TrustStore) -> Opened:
    """What a message says that an audit service signed; nothing where none did."""
    try:
        return opened_intake(record, trust)
    except InvalidMessageError:
        return Opened()


def is_kept_for(record: Received, now_ms: int) -> bool:
    """Whether what an event was handed over with must still be there: it is not, long after the event."""
    return now_ms - record.appended_at_ms < _KEPT_MS / 2


def mark_of(event: Mapping[str, Any]) -> Mark:
    """The mark of an event, be it chained or not."""
    words = event.get("unmapped")
    if isinstance(words, dict):
        words = {name: value for name, value in words.items() if name != "chain"}
    return hashlib.sha256(orjson.dumps({**event, "unmapped": words}, option=orjson.OPT_SORT_KEYS)).digest()
