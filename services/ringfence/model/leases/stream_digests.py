"""Stream digests: readers of `lease` and `revocation.request` check that they have read everything, and how fresh it
is.

A reader that is cut off, or from which records are withheld, does not notice it by itself. So revokers sign, once a
second and for each partition, its end offset and a digest of the records since their heartbeat before. A reader that
has read as far, with the same digest, is as fresh as that heartbeat.

Unlike the registry's, the digest does not cover all live leases: a revoker would have to hold them in memory. A record
that a reader missed is missed for good. So one difference counts until the reader starts anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
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
"""The topics that revokers sign digests of."""
Partition = tuple[str, int]
"""Name of the topic, and number."""
REMEMBERED = 10_000
"""How many records of each partition are kept for comparison: 32 bytes of each."""
_CLOCKS_DIFFER_MS = 60_000
"""How far a revoker's clock may be from the broker's before its heartbeats count as replays of old ones."""


class StreamDigests:
    """Hashes of the latest records of each partition, by offset."""

    def __init__(self) -> None:
        self._hashes: dict[Partition, deque[tuple[int, int]]] = {}
        self._signed_to: dict[Partition, int] = {}

    def on_records(self, records: Sequence[Received]) -> None:
        """Add records, in the order of each partition."""
        for record in records:
            hashes = self._hashes.setdefault((record.topic_name, record.partition), deque(maxlen=REMEMBERED))
            hashes.append((record.offset, _hash_of(record)))

    def digest(self, partition: Partition, start: int, end: int) -> int | None:
        """The digest of the records from `start` to before `end`; None if not all of them are remembered."""
        hashes = self._hashes.get(partition, ())
        if hashes and len(hashes) == REMEMBERED and hashes[0][0] > start:
            return None
        value = 0
        for offset, hash in reversed(hashes):
            if offset < start:
                break
            if offset < end:
                value ^= hash
        return value

    def digests(self, positions: Mapping[Partition, int]) -> tuple[StreamDigest, ...]:
        """The digests of what came since the last call, up to these positions; those records are forgotten."""
        results = []
        for partition, end in sorted(positions.items()):
            start = min(self._signed_to.get(partition, end), end)
            value = self.digest(partition, start, end)
            if value is None:
                start, value = end, 0
            self._signed_to[partition] = end
            hashes = self._hashes.get(partition, deque())
            while hashes and hashes[0][0] < end:
                hashes.popleft()
            results.append(
                StreamDigest(
                    topic=partition[0], partition=partition[1], start=start, end=end, digest=f"{value:064x}"
                )
            )
        return tuple(results)


@dataclass(slots=True, eq=False)
class StreamCheck:
    """Compares a reader's view with the digests that revokers sign."""

    streams: StreamDigests
    trust: TrustStore
    clock: Clock
    _: KW_ONLY
    grace_ms: int
    _since: dict[Partition, int] = field(default_factory=dict, init=False)
    _waiting: dict[Partition, deque[tuple[StreamDigest, int]]] = field(default_factory=dict, init=False)
    _confirmed_ms: dict[Partition, int] = field(default_factory=dict, init=False)
    _broker: RemoteClock = field(default_factory=RemoteClock, init=False)
    _broken: str | None = field(default=None, init=False)

    def begin(self, positions: Mapping[Partition, int]) -> None:
        """Everything from these offsets on was read: digests of earlier records are not compared."""
        self._since = dict(positions)
        self._confirmed_ms = dict.fromkeys(positions, 0)

    def on_heartbeats(self, records: Iterable[Received]) -> None:
        """Process records of `heartbeat`. Those of other services are ignored."""
        for record in records:
            find = self.trust.finder("revoker", at_s=record.appended_at_ms / 1000)
            try:
                heartbeat = verify(
                    parse(record.value), Heartbeat, find, audience=self.trust.trust_domain
                ).claims
            except InvalidMessageError:
                continue
            # A replayed heartbeat must not make a stale view look fresh.
            if abs(heartbeat.at_ms - record.appended_at_ms) <= _CLOCKS_DIFFER_MS:
                self._broker.observe(record.appended_at_ms)
                for stream in heartbeat.streams:
                    waiting = self._waiting.setdefault((stream.topic, stream.partition), deque(maxlen=100))
                    waiting.append((stream, min(heartbeat.at_ms, record.appended_at_ms)))

    def compare(self, positions: Mapping[Partition, int]) -> None:
        """Compare signed digests with what has been read up to these offsets."""
        for partition, position in positions.items():
            waiting = self._waiting.get(partition, deque())
            for stream, at_ms in [one for one in waiting if one[0].end <= position]:
                waiting.remove((stream, at_ms))
                self._compare(partition, stream, at_ms)

    def _compare(self, partition: Partition, stream: StreamDigest, at_ms: int) -> None:
        if stream.start >= self._since.get(partition, 0):
            seen = self.streams.digest(partition, stream.start, stream.end)
            if seen is not None and f"{seen:064x}" != stream.digest:
                self._broken = f"{partition[0]}/{partition[1]} is not what a revoker has read there"
                log.error("%s, from %d to %d", self._broken, stream.start, stream.end)
                return
        self._confirmed_ms[partition] = max(at_ms, self._confirmed_ms.get(partition, 0))

    def stale(self) -> str | None:
        """Why this view is stale, or None: a partition was not confirmed within the grace, or differs."""
        if self._broken is not None:
            return f"{self._broken}: read everything anew"
        if not self._confirmed_ms:
            return "nothing has been read yet"
        oldest_ms, partition = min((at_ms, one) for one, at_ms in self._confirmed_ms.items())
        # Our own clock may be set back: the broker's time counts too.
        age_ms = max(self.clock.now_ms(), self._broker.now_ms()) - oldest_ms
        if age_ms <= self.grace_ms:
            return None
        return f"{partition[0]}/{partition[1]} was not confirmed by a revoker within the grace"


def _hash_of(record: Received) -> int:
    return int.from_bytes(hashlib.sha256(b"%d@%b" % (record.offset, record.value)).digest())
