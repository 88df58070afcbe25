"""Overdue removals: leases that were cut a while ago and whose credentials are still not removed at their targets.

They are counted in a metric. The sponsor of each is notified once, by a `finding`, whichever revoker finds it first.
"""

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
        oldest = time.monotonic() - self._forget_s
        for id, at in list(self._failed_at.items()):
            if at >= oldest:
                break
            del self._failed_at[id]
            self._reported.discard(id)
