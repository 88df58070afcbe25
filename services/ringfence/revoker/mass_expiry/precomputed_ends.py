"""Store of precomputed ends: for each lease that is due soon, the signed record with which it will end."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from ringfence.kernel.kafka.record import Outbound
from ringfence.model.lease_store import PreparedStep
from ringfence.model.leases.unverified_records import LeaseSummary

MAX_ENDS = 100_000
"""The most ends that are kept, about 3 kB each: as much as the end of a lease takes on its way to Redis and Kafka."""


@dataclass(frozen=True, slots=True)
class PrecomputedEnd:
    """The one record with which an active lease ends at its deadline: signed, and serialised for Redis and Kafka."""

    follows: bytes
    """`digest_of` the verified record in Redis that this end follows."""
    summary: LeaseSummary
    agent_id: str
    step: PreparedStep
    record: Outbound


class PrecomputedEnds:
    """Precomputed ends of leases whose records were verified. Each is given out once."""

    def __init__(
        self, basis: Callable[[], object], shard_of: Callable[[str], int], max_ends: int = MAX_ENDS
    ) -> None:
        """Args:
            basis: returns the state that verification and signatures depend on. When it changes, all ends are dropped.
            shard_of: the shard of a lease.
            max_ends: beyond it, the newest ends of the shard that grows are dropped.
        """  # fmt: skip
        self._basis = basis
        self._known_basis = basis()
        self._shard_of = shard_of
        self._max_ends = max_ends
        self._ends: dict[int, OrderedDict[str, PrecomputedEnd]] = {}
        """By shard and lease, roughly in order of deadlines."""
        self._due: dict[int, deque[str]] = {}
        """By shard: the leases that were found to be due, grouped by agent."""

    def add(self, end: PrecomputedEnd) -> None:
        """Keep the end of a lease whose record has just been verified."""
        self._forget_if_changed()
        ends = self._ends.setdefault(self._shard_of(end.step.lease_id), OrderedDict())
        ends[end.step.lease_id] = end
        while sum(map(len, self._ends.values())) > self._max_ends:
            ends.popitem(last=False)

    def take(self, lease_id: str, record: bytes) -> PrecomputedEnd | None:
        """Take the end of a lease; None if there is none, or if `record` is not the one that was verified.

        `record`: as Redis holds it.
        """
        if not any(self._ends.values()):
            return None
        self._forget_if_changed()
        end = self._ends.get(self._shard_of(lease_id), OrderedDict()).pop(lease_id, None)
        return end if end is not None and end.follows == digest_of(record) else None

    def take_due(self, shard: int, by_ms: int, limit: int) -> list[PrecomputedEnd]:
        """Take at most `limit` ends of leases of a shard that are due at `by_ms`. It may return fewer than are due.

        Leases of one agent with the same deadline stay together: Redis removes them from the indexes at once.
        """
        self._forget_if_changed()
        ends, taken_ends = self._ends.get(shard, OrderedDict()), list[PrecomputedEnd]()
        due = self._due.setdefault(shard, deque())
        if not due:
            due_ends = itertools.takewhile(lambda end: end.summary.deadline * 1000 <= by_ms, ends.values())
            due.extend(
                end.step.lease_id
                for end in sorted(due_ends, key=lambda end: (end.summary.deadline, end.agent_id))
            )
        while due and len(taken_ends) < limit:
            end = ends.get(due.popleft())
            if end is not None and end.summary.deadline * 1000 <= by_ms:
                del ends[end.step.lease_id]
                taken_ends.append(end)
        return taken_ends

    def forget(self, due_before_s: float) -> None:
        """Drop ends of leases that were due before `due_before_s`. One added out of order may stay for a while."""
        for ends in self._ends.values():
            while ends and next(iter(ends.values())).summary.deadline < due_before_s:
                ends.popitem(last=False)

    def _forget_if_changed(self) -> None:
        basis = self._basis()
        if basis != self._known_basis:
            self._known_basis = basis
            self._ends.clear()
            self._due.clear()


def digest_of(record: bytes) -> bytes:
    """SHA-256 of a record as Redis holds it."""
    return hashlib.sha256(record).digest()
