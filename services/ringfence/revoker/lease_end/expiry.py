"""Background work: ends leases whose time is over, takes over what others left unfinished, sweeps the outbox."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial

from aiokafka.errors import KafkaError

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError
from ringfence.model.lease_store import MIN_LEFT_MS, Claimed, LeaseStore, LostError, StoredLease
from ringfence.revoker.domain import deadline_cause
from ringfence.revoker.lease_end.lease_ender import AT_A_TIME, TOGETHER, EndRequest, LeaseEnder
from ringfence.revoker.mass_expiry.precomputed import PrecomputedEnd
from ringfence.revoker.settings import RevokerSettings

log = logging.getLogger(__name__)

LOOK_EVERY_S = (MIN_LEFT_MS - 50) / 1000
"""How often a shard without a due lease is looked at: a lease that is activated after a look ends no sooner than the
next one, so every deadline is known before it comes."""
_AFTER_MS = 1
"""A claim comes just after a deadline, not just before it."""
_HINTED_AGAIN_S = 0.025
"""How often Redis's word that a key has expired may make a shard be looked at."""
_HINTS, _HINTS_WITHIN_S = 100, 1.0
_DEAF_S = 1.0
"""So long no hints are heard after so many came within so short a time."""
_FORESEEN_AT_A_TIME = 1500
"""So many leases whose ends were foreseen go together: little is left to do for each. Of one partition of Kafka they
fill a batch, of up to 512 KiB: three batches cost the broker, and all who read them, more."""
_FAILED_S = 0.5
_SWEEP_EVERY_S = 1.0


class Expiry:
    """Claims what is due in all shards. The deadline sets decide; Redis's expired events wake it early."""

    def __init__(self, store: LeaseStore, ender: LeaseEnder, settings: RevokerSettings, clock: Clock) -> None:
        self._store = store
        self._ender = ender
        self._clock = clock
        self._limit = settings.claim_limit
        self._visibility_ms = settings.visibility_ms
        self._outbox_age_ms = settings.outbox_age_ms
        self._look_at = [0.0] * len(store.shards)
        self._looked_at = [0.0] * len(store.shards)
        self._more_by_ms = [0] * len(store.shards)
        """When, by Redis's clock, more was due in a shard than was claimed: what of it was foreseen need not be."""
        self._turn_of = random.sample(store.shards, len(store.shards))
        """Where more is due in several shards, one comes after the other: of several revokers each begins elsewhere."""
        self._hinted = asyncio.Event()
        self._turns = asyncio.Semaphore(TOGETHER)
        self._under_way = 0
        self._failure: Exception | None = None

    async def run(self) -> None:
        """End what is due, for ever."""
        async with asyncio.TaskGroup() as ending:
            while True:
                now = asyncio.get_running_loop().time()
                due = [shard for shard in self._store.shards if self._look_at[shard] <= now]
                try:
                    if due:
                        await self._end_due(due, now, ending)
                    else:
                        await self._wait(min(self._look_at) - now)
                    failure, self._failure = self._failure, None
                except Exception as error:  # noqa: BLE001 - logged below
                    failure = error
                if failure is not None:
                    self._more_by_ms = [0] * len(self._look_at)  # what was foreseen may not hold any more
                    log.log(
                        _level(failure),
                        "ending leases failed, again in %.1f s: %s",
                        _FAILED_S,
                        failure,
                        exc_info=_trace(failure),
                    )
                    await asyncio.sleep(_FAILED_S)

    async def _wait(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._hinted.wait()
        self._hinted.clear()

    async def _end_due(self, shards: Sequence[int], now: float, ending: asyncio.TaskGroup) -> None:
        """Claim what is due, and begin to end all of it: the next is claimed while the last is on its way."""
        foreseen = self._take_foreseen(shards)
        if foreseen is not None:
            shard, ends = foreseen
            await self._begin(ending, partial(self._end_foreseen, shard, ends))
        shards = [shard for shard in shards if not self._more_by_ms[shard]]
        if not shards:
            return
        claimed = await self._store.claim(shards, limit=self._limit, visibility_ms=self._visibility_ms)
        for one in claimed:
            self._looked_at[one.shard] = now
            self._look_at[one.shard] = now + self._pause_s(one, now)
            if len(one.leases) >= self._limit:
                self._more_by_ms[one.shard] = one.now_ms
        due = [(id, lease) for one in claimed for id, lease in one.leases.items()]
        for start in range(0, len(due), AT_A_TIME):
            await self._begin(ending, partial(self._end_claimed, dict(due[start : start + AT_A_TIME])))

    def _take_foreseen(self, shards: Sequence[int]) -> tuple[int, list[PrecomputedEnd]] | None:
        """A shard of these in which more is due than was claimed, and foreseen ends of it; None where none are."""
        for shard in sorted(shards, key=self._turn_of.__getitem__):
            if self._more_by_ms[shard]:
                if ends := self._ender.take_foreseen(shard, self._more_by_ms[shard], _FORESEEN_AT_A_TIME):
                    return shard, ends
                self._more_by_ms[shard] = 0
        return None

    async def _begin(self, ending: asyncio.TaskGroup, work: Callable[[], Awaitable[None]]) -> None:
        await self._turns.acquire()
        self._under_way += 1
        ending.create_task(self._in_turn(work))

    async def _in_turn(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - `run` logs it; what did not end comes again
            self._failure = error
        finally:
            self._turns.release()
            self._under_way -= 1

    async def _end_claimed(self, due: Mapping[str, StoredLease | None]) -> None:
        leases = await self._ender.read(await self._ender.end_foreseen(due))
        now_ms = self._clock.now_ms()
        await self._ender.end([EndRequest(lease, deadline_cause(lease, now_ms)) for lease in leases.values()])

    async def _end_foreseen(self, shard: int, ends: Sequence[PrecomputedEnd]) -> None:
        if await self._ender.end_due(ends) < len(ends) / 2:
            self._more_by_ms[shard] = 0  # another revoker is at it: claims tell what is left

    def is_busy(self) -> bool:
        """Whether leases are being ended now."""
        return self._under_way > 0

    def _pause_s(self, claimed: Claimed, now: float) -> float:
        """How long the shard can be left alone."""
        if len(claimed.leases) >= self._limit:
            return 0.0
        # On a grid, so that idle shards are looked at together, in one round trip.
        pause_s = (math.floor(now / LOOK_EVERY_S) + 1) * LOOK_EVERY_S - now
        if claimed.next_ms is not None:
            pause_s = min(pause_s, max(1, claimed.next_ms - claimed.now_ms + _AFTER_MS) / 1000)
        return pause_s

    async def listen(self) -> None:
        """Be woken by expired keys, for ever. Where very many expire, it costs less to look than to be told of each."""
        while True:
            async with contextlib.aclosing(self._store.expirations()) as expired:
                await self._wake(expired)
            await asyncio.sleep(_DEAF_S)

    async def _wake(self, expired: AsyncIterator[int]) -> None:
        """Take hints, until there were too many in too short a time."""
        loop = asyncio.get_running_loop()
        since, heard = loop.time(), 0
        async for shard in expired:
            soon = self._looked_at[shard] + _HINTED_AGAIN_S
            if soon < self._look_at[shard]:
                self._look_at[shard] = soon
                self._hinted.set()
            heard += 1
            if heard >= _HINTS:
                now = loop.time()
                if now - since < _HINTS_WITHIN_S:
                    return
                since, heard = now, 0

    async def sweep(self) -> None:
        """Publish what waits in the outbox for too long, for ever."""
        while True:
            try:
                stale = await self._store.unpublished(older_than_ms=self._outbox_age_ms)
                if stale:
                    log.warning(
                        "publishing %d lease records that their authors left in the outbox", len(stale)
                    )
                    await self._ender.republish(stale)
            except Exception as error:
                log.log(_level(error), "sweeping the outbox failed: %s", error, exc_info=_trace(error))
            await asyncio.sleep(_SWEEP_EVERY_S)


def _level(error: Exception) -> int:
    """That Redis is to be rebuilt first, as at every first start, is no failure; the rebuild tells of itself."""
    return logging.INFO if isinstance(error, LostError) else logging.ERROR


def _trace(error: Exception) -> Exception | None:
    """The traceback belongs in the log where the failure is not one that is expected of networks."""
    return None if isinstance(error, RingfenceError | KafkaError | OSError) else error
