"""Background work: where very many leases are due soon, nearly all that their ends cost is done ahead.

That is to find out whose word their records are, and to sign their ends, which say the same whenever they are signed,
and to put together what Redis and Kafka will be told. Nothing rests on it: what was not foreseen is verified and signed
when its time has come.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ringfence.kernel.clock import Clock
from ringfence.kernel.errors import UnavailableError
from ringfence.kernel.kafka import Outbound
from ringfence.model.lease_store import AHEAD_MS, LeaseStore, Place, Told
from ringfence.revoker.truth import Glance

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
class ForeseenEnd:
    """The one record with which an active lease ends at its deadline: signed, and as Redis and Kafka are told of it."""

    glance: Glance
    step: Told
    record: Outbound


class Foresight:
    """The ends that this process has foreseen, each by the record, verified by then, that it follows."""

    def __init__(self, circumstances: Callable[[], object], most: int = MOST) -> None:
        """`circumstances`: on what all that is remembered rests. Where it is another than before, nothing is known."""
        self._circumstances = circumstances
        self._rests_on = circumstances()
        self._most = most
        self._ends: OrderedDict[bytes, ForeseenEnd] = OrderedDict()
        """By digests of records as Redis holds them."""

    def remember(self, record: bytes, end: ForeseenEnd) -> None:
        """Remember what the end of a lease will be, whose record, as Redis holds it, was found to hold now."""
        self._forget_if_changed()
        self._ends[hashlib.sha256(record).digest()] = end
        while len(self._ends) > self._most:
            self._ends.popitem(last=False)

    def take(self, record: bytes) -> ForeseenEnd | None:
        """What was remembered for this very record, once."""
        if not self._ends:
            return None
        self._forget_if_changed()
        return self._ends.pop(hashlib.sha256(record).digest(), None)

    def forget(self, due_before_s: float) -> None:
        """Forget the ends of leases that were due before then. Some may stay for a while that were foreseen later."""
        while self._ends and next(iter(self._ends.values())).glance.deadline < due_before_s:
            self._ends.popitem(last=False)

    def _forget_if_changed(self) -> None:
        now = self._circumstances()
        if now != self._rests_on:
            self._rests_on = now
            self._ends.clear()


class Lookout:
    """Looks for what is due soon, while there is nothing else to do."""

    def __init__(
        self,
        store: LeaseStore,
        foresight: Foresight,
        foresee: Callable[[bytes], ForeseenEnd | None],
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
        self._seen_to = [Place()] * len(store.shards)

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
        """Go through what is due soon and was not seen before."""
        while True:
            if self._is_busy():
                await asyncio.sleep(_BUSY_S)
                continue
            place, records = await self._store.due_after(
                shard, self._seen_to[shard], within_ms=WITHIN_MS, limit=_AT_A_TIME
            )
            self._seen_to[shard] = place
            for record in records:
                end = self._foresee(record)
                if end is not None:
                    self._foresight.remember(record, end)
            if len(records) < _AT_A_TIME:
                return
