"""Background work: looks for leases that are due soon, and has their ends precomputed while the revoker is idle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.model.lease_store import AHEAD_MS, LeaseStore
from ringfence.revoker.mass_expiry.precomputed_ends import MAX_ENDS, PrecomputedEnd, PrecomputedEnds

log = logging.getLogger(__name__)

WITHIN_MS = AHEAD_MS
"""How far ahead is looked: as far as Redis has deadlines in order. It is time enough for 100,000 ends."""
MIN_DUE = 3_000
"""How many leases must be due within that time for the path to pay: fewer end as quickly without it."""
_LATE_S = 60
"""So long after its deadline a lease has ended otherwise, and its precomputed end is forgotten."""
_BATCH_SIZE = 20
_LOOK_EVERY_S = 1.0
_BUSY_S = 0.02


class ExpiryScanner:
    """Finds leases that are due soon and precomputes their ends, while no leases are being ended."""

    def __init__(
        self,
        store: LeaseStore,
        ends: PrecomputedEnds,
        precompute: Callable[[bytes], PrecomputedEnd | None],
        is_busy: Callable[[], bool],
        clock: Clock,
    ) -> None:
        """Args:
            ends: where precomputed ends are kept.
            precompute: the end of an active lease, by its record in Redis's form; None where it cannot be known yet.
            is_busy: whether leases are being ended now.
        """  # fmt: skip
        self._store = store
        self._ends = ends
        self._precompute = precompute
        self._clock = clock
        self._is_busy = is_busy
        self._seen: list[Collection[str]] = [()] * len(store.shards)
        """By shard: what was due soon at the last scan."""

    async def run(self) -> None:
        """Scan, for ever."""
        while True:
            self._ends.forget(self._clock.now_ms() / 1000 - _LATE_S)
            try:
                if sum(await self._store.count_due(within_ms=WITHIN_MS)) >= MIN_DUE:
                    for shard in self._store.shards:
                        await self._scan(shard)
            except UnavailableError as error:
                log.info("what is due soon is not looked at: %s", error)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _scan(self, shard: int) -> None:
        """Look at what is due soon and was not seen before.

        New leases do not come in order of deadlines: Redis moves what waited for its minute to the deadlines little by
        little.
        """
        seen = self._seen[shard]
        due = await self._store.due_soon(shard, within_ms=WITHIN_MS, limit=2 * MAX_ENDS // len(self._seen))
        new = [id for id in due if id not in seen]
        while new:
            if self._is_busy():
                await asyncio.sleep(_BUSY_S)
                continue
            some, new = new[:_BATCH_SIZE], new[_BATCH_SIZE:]
            for lease in (await self._store.get(some)).values():
                end = self._precompute(lease.record) if lease.status == "active" else None
                if end is not None:
                    self._ends.add(end)
        self._seen[shard] = frozenset(due)
