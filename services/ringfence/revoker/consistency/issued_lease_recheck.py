"""Leases as they come, held against the records as they are: nothing stays that was issued on older ones.

Policy and issuer may go by records that are a moment old, within the grace. Who acts on a new record fences off what
was asked for before it, and ends what there is; what was asked for after it, of services that had not heard of it yet,
is neither. It is found here: the lease was there before its record came, so what stood on the topics of the tables by
then, read to its end, is all that it can have been issued behind.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Iterator, Sequence

from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.lease import Lease
from ringfence.messages.topics import REVOCATION_REQUEST
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.verification import verify_lease
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.revoker.domain import StaleBasis, derived_revocation, stale_basis
from ringfence.revoker.mass_expiry import OwnRecordCache

log = logging.getLogger(__name__)

TOGETHER = 256
LINGER_MS = 250
"""So many leases are looked at together, and gather for so long: the tables are read to their ends once for all."""


_LONG_AGO_S = 24 * 3600
"""Long enough for a clock of ours that is hours ahead: what lives by Redis's must not be passed over."""


class IssuedLeaseRecheck:
    """The batch handler of `lease`. A group of its own, so that each lease is looked at though revokers die."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        store: LeaseStore,
        own_records: OwnRecordCache,
        *,
        patience_s: float,
    ) -> None:
        self._runtime = runtime
        self._directory = directory
        self._store = store
        self._own_records = own_records
        self._patience_s = patience_s

    async def __call__(self, batch: Sequence[Received]) -> None:
        """Order the end of those that no longer fit. Raises UnavailableError where that cannot be known yet, or whose
        word a lease is.
        """
        active = list(filter(self._is_active, batch))
        if not active:
            return
        if not await self._runtime.tables_caught_up(self._patience_s):
            raise UnavailableError("leases are looked at once the local tables have caught up")
        found = list(self._overtaken(active))
        stored = await self._store.get([lease.lease_id for lease, _ in found]) if found else {}
        acknowledged = []
        for lease, why in found:
            if lease.lease_id in stored and stored[lease.lease_id].status == "active":
                log.warning("lease %s was issued behind a change of %s", lease.lease_id, why.record[0])
                acknowledged.append(await self._order(lease, why))
        await gather_all(acknowledged)

    def _is_active(self, record: Received) -> bool:
        """Whether it may be the record of a lease that lives: what ended long ago is not looked at. Redis says more."""
        summary = self._own_records.summarise(record.value)
        if summary is None or summary.lease_id != record.key:
            return False
        return (
            summary.status == "active"
            and summary.deadline > self._runtime.clock.now_ms() / 1000 - _LONG_AGO_S
        )

    def _overtaken(self, records: Sequence[Received]) -> Iterator[tuple[Lease, StaleBasis]]:
        max_age_s = self._runtime.settings.entitlements_max_age_s
        for record in records:
            try:
                # Most fit, whoever wrote them; only what does not is worth the look at its signature.
                if stale_basis(parse(record.value).unverified_claims(Lease), self._directory, max_age_s):
                    lease = verify_lease(
                        record.value,
                        self._runtime.trust,
                        self._runtime.clock,
                        appended_at_ms=record.appended_at_ms,
                    )
                    if why := stale_basis(lease, self._directory, max_age_s):
                        yield lease, why
            except InvalidMessageError:
                self._runtime.trust.require_judgeable(
                    record.topic, record.value, record.appended_at_ms / 1000
                )
            except ChainError as error:
                log.error("lease %s is not held against a record: %s", record.key, error)

    async def _order(self, lease: Lease, why: StaleBasis) -> Awaitable[object]:
        order = derived_revocation(
            why.kind,
            why.reason,
            by=self._runtime.key.id,
            trust_domain=self._runtime.settings.trust_domain,
            at_ms=self._runtime.clock.now_ms(),
            record=why.record,
            lease_id=lease.lease_id,
        )
        _, ack = await self._runtime.publisher.send_signed(
            REVOCATION_REQUEST, lease.agent_id, order, self._runtime.key
        )
        return ack
