"""Ends leases at their deadlines, takes over work of other revokers, sweeps the outbox, reports overdue removals.

A lease ends by its deadline in two ways, and either is enough. The sorted sets of deadlines in Redis say which leases
are due. And the expired TTL of a live key names its lease. Redis notifies late on big keyspaces, and of nothing while
no revoker listens: a scan finds what was missed. What a notification says is checked, as anybody may publish one.

A removal is overdue if its lease was cut a while ago and the credential is still at its target. A metric has the
number of them. The sponsor of each is notified once, by a `finding`, whichever revoker finds it first.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial

from aiokafka.errors import KafkaError

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import Coordinates, Reason
from ringfence.messages.lease import Lease
from ringfence.messages.topics import SERVICE_EVENT
from ringfence.model.lease_store import (
    MIN_LEFT_MS,
    SELECTOR_KEEP_MS,
    ClaimedLeases,
    LeaseStore,
    LostError,
    StoredLease,
)
from ringfence.revoker.domain import deadline_cause
from ringfence.revoker.lease_end.lease_ender import BATCH_SIZE, CONCURRENT_BATCHES, EndRequest, LeaseEnder
from ringfence.revoker.settings import RevokerSettings

log = logging.getLogger(__name__)


class Overdue:
    """The leases that this revoker found overdue lately. Another revoker may have removed a credential since."""

    def __init__(self, runtime: Runtime, store: LeaseStore, *, after_ms: int, forget_ms: int) -> None:
        """Args:
            after_ms: the time after its cut at which a lease is overdue.
            forget_ms: the time after its last failure at which it no longer counts: another revoker has removed its
                credential.
        """  # fmt: skip
        self._runtime = runtime
        self._store = store
        self._after_ms = after_ms
        self._forget_s = forget_ms / 1000
        self._failed_at: dict[str, float] = {}
        """By lease: the monotonic time of its last failure, in ascending order."""
        self._reported: set[str] = set()
        self._to_report: set[str] = set()
        """Leases that this revoker has to report: it was the first to find them."""
        metrics.REVOCATIONS_OVERDUE.set_function(self._count)

    def since_ms(self, lease: Lease, now_ms: int) -> int | None:
        """The time in ms for which a lease has been overdue, or None if it is not."""
        late_ms = now_ms - lease.iat * 1000 - self._after_ms
        return late_ms if lease.status in ("ending", "minting") and late_ms >= 0 else None

    async def failed(self, leases: Iterable[Lease], now_ms: int) -> None:
        """Note a failed removal for these leases. Reports those that are overdue and were not reported before."""
        late = [lease for lease in leases if self.since_ms(lease, now_ms) is not None]
        for lease in late:
            self._failed_at.pop(lease.lease_id, None)
            self._failed_at[lease.lease_id] = time.monotonic()  # moves it to the end
        self._forget()
        await self._report([lease for lease in late if lease.lease_id not in self._reported])

    def done(self, lease_ids: Iterable[str]) -> None:
        """Note that the credentials of these leases are removed."""
        for id in lease_ids:
            self._failed_at.pop(id, None)
            self._reported.discard(id)

    async def _report(self, leases: Sequence[Lease]) -> None:
        answers = await gather_all([self._report_once(lease) for lease in leases])
        for lease, reported in zip(leases, answers, strict=True):
            if reported:
                self._reported.add(lease.lease_id)

    async def _report_once(self, lease: Lease) -> bool:
        """Report one lease unless a revoker has already. False if the report has to be tried again."""
        now_ms = self._runtime.clock.now_ms()
        position = Coordinates(topic=SERVICE_EVENT.what, partition=0, offset=0, appended_at_ms=now_ms)
        try:
            id = derived_id("overdue", lease.lease_id)
            if (await self._store.first_seen({id: position}, keep_ms=SELECTOR_KEEP_MS))[id] == position:
                self._to_report.add(lease.lease_id)
            if lease.lease_id in self._to_report:
                await self._event(lease)
                self._to_report.discard(lease.lease_id)
        except Exception as error:  # noqa: BLE001 - it is reported at the next failure
            log.warning(
                "not told yet that lease %s is overdue: %s",
                lease.lease_id,
                error,
                extra=rate_limited(type(error).__name__),
            )
            return False
        return True

    async def _event(self, lease: Lease) -> None:
        outcome = "revoked" if lease.status == "ending" else "refused"
        message = (
            f"for {lease.sponsor}, the sponsor: lease {lease.lease_id} of agent {lease.agent_id} was {outcome}, and "
            f"target {lease.target_id} has not taken its credential back yet; it is tried again and again"
        )
        log.error("revocation overdue: %s", message, extra=rate_limited(lease.target_id))
        await self._runtime.event(
            "finding",
            Lease.typ,
            about=("overdue", lease.lease_id),
            reasons=(Reason(code=Code.REVOCATION_OVERDUE, message=message),),
            traceparent=lease.traceparent,
            lease_id=lease.lease_id,
            agent_id=lease.agent_id,
            task_id=lease.task_id,
            request_id=lease.request_id,
            sponsor=lease.sponsor,
        )

    def _count(self) -> float:
        self._forget()
        return len(self._failed_at)

    def _forget(self) -> None:
        oldest = time.monotonic() - self._forget_s
        for id, at in list(self._failed_at.items()):
            if at >= oldest:
                break
            del self._failed_at[id]
            self._reported.discard(id)


LOOK_EVERY_S = (MIN_LEFT_MS - 50) / 1000
"""The interval of looks at a shard without a due lease. A lease that is activated after a look ends no sooner than the
next look, so every deadline is known in time."""
_AFTER_MS = 1
"""A claim is made just after a deadline, not just before it."""
_MAX_EXPIRED, _WITHIN_S = 2_000, 1.0
_IGNORE_S = 1.0
"""The time for which notifications are ignored after `_MAX_EXPIRED` arrived within `_WITHIN_S`: reading them costs more
than to claim many leases at a time by the deadline sets. Then a scan finds what those do not have.
"""
_SCAN_EVERY_S = 0.5
_SHARDS_AT_ONCE = 4
"""As many as one batch has leases: the store looks at some dozens in each."""
_SCAN_AT_ONCE = 1_000
"""How many leases a scan looks at before it pauses: so each of a thousand within a second, and each of a million within
nine minutes.
"""
_FAILED_S = 0.5
_SWEEP_EVERY_S = 1.0


class Expiry:
    """Claims due leases in all shards, and ends them: by their deadline sets, and by the TTL of their live keys."""

    def __init__(
        self,
        store: LeaseStore,
        ender: LeaseEnder,
        settings: RevokerSettings,
        clock: Clock,
    ) -> None:
        self._store = store
        self._ender = ender
        self._clock = clock
        self._limit = settings.claim_limit
        self._visibility_ms = settings.visibility_ms
        self._outbox_age_ms = settings.outbox_age_ms
        self._next_look = [0.0] * len(store.shards)
        self._slots = asyncio.Semaphore(CONCURRENT_BATCHES)
        self._failure: Exception | None = None

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                now = asyncio.get_running_loop().time()
                due = [shard for shard in self._store.shards if self._next_look[shard] <= now]
                try:
                    if due:
                        await self._end_due(due, now, tasks)
                    else:
                        await asyncio.sleep(min(self._next_look) - now)
                    failure, self._failure = self._failure, None
                except Exception as error:  # noqa: BLE001 - logged below
                    failure = error
                if failure is not None:
                    log.log(
                        _level(failure),
                        "ending leases failed, again in %.1f s: %s",
                        _FAILED_S,
                        failure,
                        exc_info=_trace(failure),
                    )
                    await asyncio.sleep(_FAILED_S)

    async def _end_due(self, shards: Sequence[int], now: float, tasks: asyncio.TaskGroup) -> None:
        """Claim due leases, and start to end them all: the next claim overlaps with the ends of the last.

        A claim takes no more than what is ended at a time, and waits for revocations before, not after it: other
        revokers take leases over once `visibility_ms` has passed.
        """
        await self._ender.yield_to_revocations()
        limit = max(1, min(self._limit, CONCURRENT_BATCHES * BATCH_SIZE // len(shards)))
        claimed = await self._store.claim(shards, limit=limit, visibility_ms=self._visibility_ms)
        for shard_claim in claimed:
            self._next_look[shard_claim.shard] = now + self._pause_s(shard_claim, limit, now)
        due = [(id, lease) for shard_claim in claimed for id, lease in shard_claim.leases.items()]
        for start in range(0, len(due), BATCH_SIZE):
            await self._slots.acquire()
            tasks.create_task(self._end_in_slot(dict(due[start : start + BATCH_SIZE])))

    async def _end_in_slot(self, due: Mapping[str, StoredLease | None]) -> None:
        try:
            await self._end_claimed(due)
        except Exception as error:  # noqa: BLE001 - `run` logs it; leases that did not end are claimed again
            self._failure = error
        finally:
            self._slots.release()

    async def _end_claimed(self, due: Mapping[str, StoredLease | None]) -> None:
        leases = await self._ender.read(due)
        now_ms = self._clock.now_ms()
        await self._ender.end([EndRequest(lease, deadline_cause(lease, now_ms)) for lease in leases.values()])

    def _pause_s(self, claimed: ClaimedLeases, limit: int, now: float) -> float:
        """The time in seconds until the next look at the shard."""
        if len(claimed.leases) >= limit:
            return 0.0
        # On a grid, so that idle shards are looked at together, in one round trip.
        pause_s = (math.floor(now / LOOK_EVERY_S) + 1) * LOOK_EVERY_S - now
        if claimed.next_ms is not None:
            pause_s = min(pause_s, max(1, claimed.next_ms - claimed.now_ms + _AFTER_MS) / 1000)
        return pause_s

    async def listen(self) -> None:
        """End each lease whose TTL has expired, for ever. After very many, notifications are ignored for a while."""
        while True:
            try:
                async with contextlib.aclosing(self._store.expirations()) as expired:
                    await self._end_by_ttl(expired)
            except Exception as error:
                log.log(_level(error), "reading notifications failed: %s", error, exc_info=_trace(error))
            await asyncio.sleep(_IGNORE_S)

    async def _end_by_ttl(self, expired: AsyncIterator[list[str]]) -> None:
        """End what is notified, until too many notifications arrive within too short a time."""
        loop = asyncio.get_running_loop()
        since, count = loop.time(), 0
        async for lease_ids in expired:
            for start in range(0, len(lease_ids), BATCH_SIZE):
                some = lease_ids[start : start + BATCH_SIZE]
                await self._end_expired(
                    partial(self._store.claim_expired, some, visibility_ms=self._visibility_ms)
                )
            count += len(lease_ids)
            if count >= _MAX_EXPIRED:
                now = loop.time()
                if now - since < _WITHIN_S:
                    return
                since, count = now, 0

    async def scan(self) -> None:
        """End leases whose TTL expired and of which Redis has not notified, for ever: a part of all at a time."""
        cursors: dict[int, int] = {}
        while True:
            cursors = await self._scan_on(cursors or dict.fromkeys(self._store.shards, 0))
            await asyncio.sleep(_SCAN_EVERY_S)

    async def _scan_on(self, cursors: dict[int, int]) -> dict[int, int]:
        """Scan some leases. Returns where the next scan continues; empty if this one has come to the end."""
        seen = 0

        async def claim_part() -> Mapping[str, StoredLease | None]:
            nonlocal seen
            shards = dict(itertools.islice(cursors.items(), _SHARDS_AT_ONCE))
            part = await self._store.scan_expired(shards, visibility_ms=self._visibility_ms)
            for shard in shards:
                del cursors[shard]
            cursors.update(part.cursors)
            seen += part.seen
            return part.leases

        while cursors and seen < _SCAN_AT_ONCE:
            if not await self._end_expired(claim_part):
                break
        return cursors

    async def _end_expired(self, claim: Callable[[], Awaitable[Mapping[str, StoredLease | None]]]) -> bool:
        """End what this claims, a batch at most. False if it failed: the leases are found again by a scan."""
        await self._ender.yield_to_revocations()
        try:
            due = await claim()
        except Exception as error:
            log.log(
                _level(error),
                "claiming leases whose TTL has expired failed: %s",
                error,
                extra=rate_limited(type(error).__name__),
                exc_info=_trace(error),
            )
            return False
        if due:
            await self._slots.acquire()
            await self._end_in_slot(due)
        return True

    async def sweep(self) -> None:
        """Publish records that have waited in the outbox for too long, for ever."""
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
    """The log level. A lost Redis, as at every first start, is no failure: the rebuild logs for itself."""
    return logging.INFO if isinstance(error, LostError) else logging.ERROR


def _trace(error: Exception) -> Exception | None:
    """The error, if its traceback is to be logged: not for failures that are expected of networks."""
    return None if isinstance(error, RingfenceError | KafkaError | OSError) else error
