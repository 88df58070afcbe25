"""Rechecks issued leases against the present records, and revokes those that were issued on stale ones.

Policy and issuer may use records that are stale within the grace. When a record changes, a revoker fences off what was
asked for before the change, and ends existing leases (`record_changes`). That misses a lease that was requested after
the change from services that had not read it yet. This recheck finds such leases: when a lease record is on Kafka, the
tables' topics have every change that its issue can have missed. So the revoker reads those topics to their ends first.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence

from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.lease import Lease
from ringfence.messages.topics import REVOCATION_REQUEST
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.unverified_records import verify_lease
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.verdict import Allowed
from ringfence.revoker.domain import StaleBasis, check_basis, derived_revocation, run_record
from ringfence.revoker.lease_end.own_record_cache import OwnRecordCache

log = logging.getLogger(__name__)

BATCH_SIZE = 256
LINGER_MS = 250
"""The most leases in a batch, and its linger: the tables are read to their ends once per batch."""


_LONG_AGO_S = 24 * 3600
"""A lease is skipped this long after its deadline: enough even if our clock is hours ahead of Redis's."""


class IssuedLeaseRecheck:
    """The batch handler of `lease`. It has its own consumer group, so each lease is checked even if revokers die."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        store: LeaseStore,
        own_records: OwnRecordCache,
        *,
        patience_s: float,
        is_silent: Callable[[str], bool] = lambda run_id: False,
    ) -> None:
        """`patience_s`: the longest wait for the local tables to catch up. `is_silent` says whether a run is silent."""
        self._is_silent = is_silent
        self._runtime = runtime
        self._directory = directory
        self._store = store
        self._own_records = own_records
        self._patience_s = patience_s

    async def __call__(self, batch: Sequence[Received]) -> None:
        """Revoke the leases that do not fit the present records.

        Raises UnavailableError while the records, or the keys that signed a lease, are not known yet.
        """
        active = list(filter(self._is_active, batch))
        if not active:
            return
        if not await self._runtime.tables_caught_up(self._patience_s):
            raise UnavailableError("leases are looked at once the local tables have caught up")
        stale = list(self._stale(active))
        stored = await self._store.get([lease.lease_id for lease, _ in stale]) if stale else {}
        acknowledged = []
        for lease, basis in stale:
            if lease.lease_id in stored and stored[lease.lease_id].status == "active":
                log.warning("lease %s was issued behind a change of %s", lease.lease_id, basis.record[0])
                acknowledged.append(await self._revoke(lease, basis))
        await gather_all(acknowledged)

    def _is_active(self, record: Received) -> bool:
        """Whether this may be the record of a live lease, by its unverified claims. Redis decides later."""
        summary = self._own_records.summarise(record.value)
        if summary is None or summary.lease_id != record.key:
            return False
        return (
            summary.status == "active"
            and summary.deadline > self._runtime.clock.now_ms() / 1000 - _LONG_AGO_S
        )

    def _stale(self, records: Sequence[Received]) -> Iterator[tuple[Lease, StaleBasis]]:
        max_age_s = self._runtime.settings.entitlements_max_age_s
        for record in records:
            try:
                # Most leases fit, so signatures are verified only for the others.
                unverified = parse(record.value).unverified_claims(Lease)
                if isinstance(self._check_basis(unverified, max_age_s), StaleBasis):
                    lease = verify_lease(
                        record.value,
                        self._runtime.trust,
                        self._runtime.clock,
                        appended_at_ms=record.appended_at_ms,
                    )
                    if isinstance(basis := self._check_basis(lease, max_age_s), StaleBasis):
                        yield lease, basis
            except InvalidMessageError:
                self._runtime.trust.require_judgeable(
                    record.topic, record.value, record.appended_at_ms / 1000
                )
            except ChainError as error:
                log.error("lease %s is not held against a record: %s", record.key, error)

    def _check_basis(self, lease: Lease, max_age_s: int) -> Allowed | StaleBasis:
        """Check that a lease may stay: its run, if it has one, is not silent, and the records leave room for it."""
        run = lease.instance.run if lease.instance is not None else None
        if run is not None and self._is_silent(run.run_id):
            return StaleBasis(
                "run_ended", f"the runner of run {run.run_id} is silent", run_record(run.run_id)
            )
        return check_basis(lease, self._directory, max_age_s)

    async def _revoke(self, lease: Lease, basis: StaleBasis) -> Awaitable[object]:
        revocation = derived_revocation(
            basis,
            by=self._runtime.key.id,
            trust_domain=self._runtime.settings.trust_domain,
            at_ms=self._runtime.clock.now_ms(),
            lease_id=lease.lease_id,
        )
        _, ack = await self._runtime.publisher.send_signed(
            REVOCATION_REQUEST, lease.agent_id, revocation, self._runtime.key
        )
        return ack
