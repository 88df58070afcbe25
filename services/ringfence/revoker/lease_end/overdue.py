"""Leases that are cut and not undone at their targets after a while: counted, and the sponsor told, once for each."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

from ringfence.kernel.base import metrics
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Coordinates, Reason
from ringfence.messages.lease import Lease
from ringfence.messages.topics import SERVICE_EVENT
from ringfence.model.lease_store import SELECTOR_KEEP_MS, LeaseStore

log = logging.getLogger(__name__)


class Overdue:
    """What this revoker found overdue lately: another one may have undone it since."""

    def __init__(self, runtime: Runtime, store: LeaseStore, *, after_ms: int, forget_ms: int) -> None:
        """Args:
            after_ms: how long after its cut a lease is overdue.
            forget_ms: how long it counts without having failed again.
        """  # fmt: skip
        self._runtime = runtime
        self._store = store
        self._after_ms = after_ms
        self._forget_s = forget_ms / 1000
        self._failed_at: dict[str, float] = {}
        self._told: set[str] = set()
        self._telling: set[str] = set()
        """Those that are this revoker's to tell of."""
        metrics.REVOCATIONS_OVERDUE.set_function(self._count)

    def since_ms(self, lease: Lease, now_ms: int) -> int | None:
        """How long a lease is overdue, or None where it is not."""
        late_ms = now_ms - lease.iat * 1000 - self._after_ms
        return late_ms if lease.status in ("ending", "minting") and late_ms >= 0 else None

    async def failed(self, leases: Iterable[Lease], now_ms: int) -> None:
        """These could not be undone. Tells of those that are overdue and were not told of before."""
        late = [lease for lease in leases if self.since_ms(lease, now_ms) is not None]
        for lease in late:
            self._failed_at.pop(lease.lease_id, None)
            self._failed_at[lease.lease_id] = time.monotonic()  # the latest last
        self._forget()
        await self._tell([lease for lease in late if lease.lease_id not in self._told])

    def done(self, lease_ids: Iterable[str]) -> None:
        """These are undone."""
        for id in lease_ids:
            self._failed_at.pop(id, None)
            self._told.discard(id)

    async def _tell(self, leases: Sequence[Lease]) -> None:
        answers = await gather_all([self._told_first(lease) for lease in leases])
        for lease, told in zip(leases, answers, strict=True):
            if told:
                self._told.add(lease.lease_id)

    async def _told_first(self, lease: Lease) -> bool:
        """Tell of one lease, unless a revoker has. False where that has to be tried again."""
        now_ms = self._runtime.clock.now_ms()
        here = Coordinates(topic=SERVICE_EVENT.what, partition=0, offset=0, appended_at_ms=now_ms)
        try:
            id = derived_id("overdue", lease.lease_id)
            if (await self._store.first_seen({id: here}, keep_ms=SELECTOR_KEEP_MS))[id] == here:
                self._telling.add(lease.lease_id)
            if lease.lease_id in self._telling:
                await self._event(lease)
                self._telling.discard(lease.lease_id)
        except Exception as error:  # noqa: BLE001 - it is told at the next failure
            log.warning(
                "not told yet that lease %s is overdue: %s",
                lease.lease_id,
                error,
                extra=rate_limited(type(error).__name__),
            )
            return False
        return True

    async def _event(self, lease: Lease) -> None:
        what = "revoked" if lease.status == "ending" else "refused"
        message = (
            f"for {lease.sponsor}, the sponsor: lease {lease.lease_id} of agent {lease.agent_id} was {what}, and "
            f"target {lease.target_id} has not taken its credential back yet; it is tried again and again"
        )
        log.error("revocation overdue: %s", message, extra=rate_limited(lease.target_id))
        await self._runtime.event(
            "finding",
            Lease.typ,
            about=("overdue", lease.lease_id),
            reasons=(Reason(code="revocation_overdue", message=message),),
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
        """What has not failed again for so long another revoker has undone."""
        oldest = time.monotonic() - self._forget_s
        for id, at in list(self._failed_at.items()):
            if at >= oldest:
                break
            del self._failed_at[id]
            self._told.discard(id)
