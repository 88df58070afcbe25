"""Scans for leases that are due soon, and precomputes their ends while the revoker is idle."""

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
"""The horizon of a scan: as far as Redis has deadlines in order. It is time enough for 100,000 ends."""
MIN_DUE = 3_000
"""The least number of leases due within the horizon. With fewer, the fast path saves no time."""
_LATE_S = 60
"""This long after its deadline a lease has ended otherwise, and its precomputed end is dropped."""
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
            ends: stores precomputed ends.
            precompute: returns the end of an active lease, given its record in Redis's form; None if not known yet.
            is_busy: whether leases are being ended now.
        """  # fmt: skip
        self._store = store
        self._ends = ends
        self._precompute = precompute
        self._clock = clock
        self._is_busy = is_busy
        self._last_due: list[Collection[str]] = [()] * len(store.shards)
        """By shard: the leases that were due soon at the last scan."""

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
        """Precompute the ends of leases that are due soon and were not in the last scan.

        New leases do not arrive in order of deadlines: Redis moves those of a later minute to the deadlines bit by bit.
        """
        seen_before = self._last_due[shard]
        due = await self._store.due_soon(
            shard, within_ms=WITHIN_MS, limit=2 * MAX_ENDS // len(self._last_due)
        )
        new = [id for id in due if id not in seen_before]
        while new:
            if self._is_busy():
                await asyncio.sleep(_BUSY_S)
                continue
            batch, new = new[:_BATCH_SIZE], new[_BATCH_SIZE:]
            for lease in (await self._store.get(batch)).values():
                end = self._precompute(lease.record) if lease.status == "active" else None
                if end is not None:
                    self._ends.add(end)
        self._last_due[shard] = frozenset(due)
