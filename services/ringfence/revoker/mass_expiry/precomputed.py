"""Background work: where very many leases are due soon, nearly all that their ends cost is done ahead.

That is to find out whose word their records are, and to sign their ends, which say the same whenever they are signed,
and to put together what Redis and Kafka will be told. Nothing rests on it: what was not foreseen is verified and signed
when its time has come.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.kafka.record import Outbound
from ringfence.model.lease_store import AHEAD_MS, LeaseStore, PreparedStep
from ringfence.revoker.lease_records import LeaseSummary

log = logging.getLogger(__name__)

WITHIN_MS = AHEAD_MS
"""As far ahead as there is an order of what is due: a busy machine has time for 100,000 then, too."""
MANY = 3_000
"""So many leases that are due within that time are worth it: fewer end as quickly by themselves."""
MOST = 100_000
"""So many are remembered: some 3 kB each, as much as the end of a lease weighs on its way to Redis and Kafka."""
_LATE_S = 60
"""So long after its deadline a lease has ended otherwise: what was foreseen of it goes."""
_AT_A_TIME = 20
_LOOK_EVERY_S = 1.0
_BUSY_S = 0.02


@dataclass(frozen=True, slots=True)
class PrecomputedEnd:
    """The one record with which an active lease ends at its deadline: signed, and as Redis and Kafka are told of it."""

    follows: bytes
    """A digest of the record, as Redis holds it, that was verified."""
    glance: LeaseSummary
    agent_id: str
    step: PreparedStep
    record: Outbound


class PrecomputedEnds:
    """The ends that this process has foreseen, each of a lease whose record was verified by then."""

    def __init__(
        self, circumstances: Callable[[], object], shard_of: Callable[[str], int], most: int = MOST
    ) -> None:
        """Args:
            circumstances: on what all that is remembered rests. Where it is another than before, nothing is known.
            shard_of: the shard of a lease.
        """  # fmt: skip
        self._circumstances = circumstances
        self._rests_on = circumstances()
        self._shard_of = shard_of
        self._most = most
        self._ends: dict[int, OrderedDict[str, PrecomputedEnd]] = {}
        """By shard and lease, about in the order in which they are due."""
        self._due: dict[int, deque[str]] = {}
        """By shard, leases of these that were found to be due, by agents."""

    def remember(self, end: PrecomputedEnd) -> None:
        """Remember what the end of a lease will be, whose record was found to hold now."""
        self._forget_if_changed()
        ends = self._ends.setdefault(self._shard_of(end.step.lease_id), OrderedDict())
        ends[end.step.lease_id] = end
        while sum(map(len, self._ends.values())) > self._most:
            ends.popitem(last=False)

    def take(self, lease_id: str, record: bytes) -> PrecomputedEnd | None:
        """What was remembered of a lease, once: if this, as Redis holds it, is the very record that was verified."""
        if not any(self._ends.values()):
            return None
        self._forget_if_changed()
        end = self._ends.get(self._shard_of(lease_id), OrderedDict()).pop(lease_id, None)
        return end if end is not None and end.follows == digest_of(record) else None

    def take_due(self, shard: int, by_ms: int, most: int) -> list[PrecomputedEnd]:
        """What was remembered of leases of a shard that are due by then, once, and only so many; not always of all.

        Those of an agent that are due together come together: Redis takes them from the indexes at once.
        """
        self._forget_if_changed()
        ends, found = self._ends.get(shard, OrderedDict()), list[PrecomputedEnd]()
        due = self._due.setdefault(shard, deque())
        if not due:
            some = itertools.takewhile(lambda end: end.glance.deadline * 1000 <= by_ms, ends.values())
            due.extend(
                end.step.lease_id for end in sorted(some, key=lambda end: (end.glance.deadline, end.agent_id))
            )
        while due and len(found) < most:
            end = ends.get(due.popleft())
            if end is not None and end.glance.deadline * 1000 <= by_ms:
                del ends[end.step.lease_id]
                found.append(end)
        return found

    def forget(self, due_before_s: float) -> None:
        """Forget the ends of leases that were due before then. Some may stay for a while that were foreseen later."""
        for ends in self._ends.values():
            while ends and next(iter(ends.values())).glance.deadline < due_before_s:
                ends.popitem(last=False)

    def _forget_if_changed(self) -> None:
        now = self._circumstances()
        if now != self._rests_on:
            self._rests_on = now
            self._ends.clear()
            self._due.clear()


def digest_of(record: bytes) -> bytes:
    """What tells a record, as Redis holds it, from every other."""
    return hashlib.sha256(record).digest()


class ExpiryScanner:
    """Looks for what is due soon, while there is nothing else to do."""

    def __init__(
        self,
        store: LeaseStore,
        foresight: PrecomputedEnds,
        foresee: Callable[[bytes], PrecomputedEnd | None],
        is_busy: Callable[[], bool],
        clock: Clock,
    ) -> None:
        """Args:
            foresight: what remembers.
            foresee: the end of an active lease, by what Redis holds of its record; None where it cannot be foreseen.
            is_busy: whether leases are being ended now.
        """  # fmt: skip
        self._store = store
        self._foresight = foresight
        self._foresee = foresee
        self._clock = clock
        self._is_busy = is_busy
        self._seen: list[Collection[str]] = [()] * len(store.shards)
        """Of each shard what was due soon when it was looked at last."""

    async def run(self) -> None:
        """Look out, for ever."""
        while True:
            self._foresight.forget(self._clock.now_ms() / 1000 - _LATE_S)
            try:
                if sum(await self._store.count_due(within_ms=WITHIN_MS)) >= MANY:
                    for shard in self._store.shards:
                        await self._look(shard)
            except UnavailableError as error:
                log.info("what is due soon is not looked at: %s", error)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _look(self, shard: int) -> None:
        """Look at what is due soon and was not seen before. It does not come in the order of deadlines: what waited for
        its minute comes to them little by little.
        """
        seen = self._seen[shard]
        due = await self._store.due_soon(shard, within_ms=WITHIN_MS, most=2 * MOST // len(self._seen))
        new = [id for id in due if id not in seen]
        while new:
            if self._is_busy():
                await asyncio.sleep(_BUSY_S)
                continue
            some, new = new[:_AT_A_TIME], new[_AT_A_TIME:]
            for lease in (await self._store.get(some)).values():
                end = self._foresee(lease.record) if lease.status == "active" else None
                if end is not None:
                    self._foresight.remember(end)
        self._seen[shard] = frozenset(due)
