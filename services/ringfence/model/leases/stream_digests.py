"""Whether what has been read of a topic is all that there is: held against what revokers sign once a second.

A reader of `lease` or `revocation.request` that is cut off, or from which records are kept back, does not notice it by
itself. Revokers sign, for each partition, up to where it goes and a digest of what came since their heartbeat before.
A reader that has got as far and saw the same is as fresh as that heartbeat.

No digest over all that lives (as the registry's): a revoker would have to hold every lease in memory for that. What a
reader missed it has missed for good, so one difference counts until it reads everything anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ringfence.kernel.base.clock import Clock, RemoteClock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic
from ringfence.messages.operations import Heartbeat, StreamDigest
from ringfence.messages.topics import LEASE, REVOCATION_REQUEST

log = logging.getLogger(__name__)

CONFIRMED: Final[tuple[Topic[Any], ...]] = (LEASE, REVOCATION_REQUEST)
"""What revokers sign about."""
Partition = tuple[str, int]
"""Topic's name and number."""
REMEMBERED = 10_000
"""So many records of each partition are kept for comparison, by 32 bytes of each."""
_CLOCKS_DIFFER_MS = 60_000
"""How far a revoker's clock may be from the broker's before its heartbeats count as old ones, sent again."""


class StreamDigests:
    """What came, by partition and offset."""

    def __init__(self) -> None:
        self._marks: dict[Partition, deque[tuple[int, int]]] = {}
        self._said: dict[Partition, int] = {}

    def on_records(self, records: Sequence[Received]) -> None:
        """Take in what came, in the order of each partition."""
        for record in records:
            marks = self._marks.setdefault((record.topic_name, record.partition), deque(maxlen=REMEMBERED))
            marks.append((record.offset, _mark(record)))

    def digest(self, partition: Partition, start: int, end: int) -> int | None:
        """The digest over a part of a partition; None where not all of that is remembered."""
        marks = self._marks.get(partition, ())
        if marks and len(marks) == REMEMBERED and marks[0][0] > start:
            return None
        value = 0
        for offset, mark in reversed(marks):
            if offset < start:
                break
            if offset < end:
                value ^= mark
        return value

    def digests(self, positions: Mapping[Partition, int]) -> tuple[StreamDigest, ...]:
        """What came since this was called last, up to these positions; it is not remembered any more then."""
        found = []
        for partition, end in sorted(positions.items()):
            start = min(self._said.get(partition, end), end)
            value = self.digest(partition, start, end)
            if value is None:
                start, value = end, 0
            self._said[partition] = end
            marks = self._marks.get(partition, deque())
            while marks and marks[0][0] < end:
                marks.popleft()
            found.append(
                StreamDigest(
                    topic=partition[0], partition=partition[1], start=start, end=end, digest=f"{value:064x}"
                )
            )
        return tuple(found)


class StreamCheck:
    """Says whether a reader's view is as revokers sign it. It has read these partitions since `since`."""

    def __init__(self, streams: StreamDigests, trust: TrustStore, clock: Clock, *, grace_ms: int) -> None:
        self._streams = streams
        self._trust = trust
        self._clock = clock
        self._grace_ms = grace_ms
        self._since: dict[Partition, int] = {}
        self._waiting: dict[Partition, deque[tuple[StreamDigest, int]]] = {}
        self._confirmed_ms: dict[Partition, int] = {}
        self._broker = RemoteClock()
        self._broken: str | None = None

    def begin(self, positions: Mapping[Partition, int]) -> None:
        """From these offsets on everything was read: what a revoker says of before is not compared."""
        self._since = dict(positions)
        self._confirmed_ms = dict.fromkeys(positions, 0)

    def on_heartbeats(self, records: Iterable[Received]) -> None:
        """Take in what came on `heartbeat`; those of other services are passed over."""
        for record in records:
            find = self._trust.finder("revoker", at_s=record.appended_at_ms / 1000)
            try:
                beat = verify(parse(record.value), Heartbeat, find, audience=self._trust.trust_domain).claims
            except InvalidMessageError:
                continue
            # One that was sent before must not make an old view young.
            if abs(beat.at_ms - record.appended_at_ms) <= _CLOCKS_DIFFER_MS:
                self._broker.observe(record.appended_at_ms)
                for stream in beat.streams:
                    waiting = self._waiting.setdefault((stream.topic, stream.partition), deque(maxlen=100))
                    waiting.append((stream, min(beat.at_ms, record.appended_at_ms)))

    def compare(self, positions: Mapping[Partition, int]) -> None:
        """Hold what was signed against what has been read up to these offsets."""
        for partition, position in positions.items():
            waiting = self._waiting.get(partition, deque())
            for stream, at_ms in [one for one in waiting if one[0].end <= position]:
                waiting.remove((stream, at_ms))
                self._compare(partition, stream, at_ms)

    def _compare(self, partition: Partition, stream: StreamDigest, at_ms: int) -> None:
        if stream.start >= self._since.get(partition, 0):
            seen = self._streams.digest(partition, stream.start, stream.end)
            if seen is not None and f"{seen:064x}" != stream.digest:
                self._broken = f"{partition[0]}/{partition[1]} is not what a revoker has read there"
                log.error("%s, from %d to %d", self._broken, stream.start, stream.end)
                return
        self._confirmed_ms[partition] = max(at_ms, self._confirmed_ms.get(partition, 0))

    def stale(self) -> str | None:
        """Why this view must deny, or None: one partition was not confirmed within the grace, or differs."""
        if self._broken is not None:
            return f"{self._broken}: read everything anew"
        if not self._confirmed_ms:
            return "nothing has been read yet"
        oldest_ms, partition = min((at_ms, one) for one, at_ms in self._confirmed_ms.items())
        # Our own clock may be set back, and then an old view is none the younger.
        age_ms = max(self._clock.now_ms(), self._broker.now_ms()) - oldest_ms
        if age_ms <= self._grace_ms:
            return None
        return f"{partition[0]}/{partition[1]} was not confirmed by a revoker within the grace"


def _mark(record: Received) -> int:
    return int.from_bytes(hashlib.sha256(b"%d@%b" % (record.offset, record.value)).digest())
