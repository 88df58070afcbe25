"""Derives revocations from runs that are over: the leases of a run's instance end one by one."""

from __future__ import annotations

from ringfence.kernel.base.bounded_dict import BoundedDict
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.run import Run
from ringfence.messages.topics import REVOCATION_REQUEST
from ringfence.model.leases.lifecycle import agent_selector_key
from ringfence.model.records.directory import Directory
from ringfence.model.records.runs import OVER
from ringfence.revoker.domain import derived_revocation, run_record
from ringfence.revoker.lease_end.lease_ender import LeaseEnder
from ringfence.revoker.revocations.record_changes import RECORD_AGE_MS

_MAX_REVOKED = 10_000


class RunEndHandler:
    """The handler of `run`.

    `IssuedLeaseRecheck` finds a lease that is issued after the end of its run. Revocations are on Kafka, so that a
    rebuild of Redis revokes again.
    """

    def __init__(
        self, runtime: Runtime, directory: Directory, revoker: RunRevoker, *, patience_s: float
    ) -> None:
        """`patience_s`: the longest wait for the local tables to catch up."""
        self._runtime = runtime
        self._directory = directory
        self._revoker = revoker
        self._patience_s = patience_s

    async def __call__(self, received: Received) -> None:
        """Revoke the leases of a run, if its record says that it is over, and counts.

        Raises InvalidMessageError if no runner signed such a record, UnavailableError if that is not known yet.
        """
        now_ms = self._runtime.clock.now_ms()
        if not received.value or received.appended_at_ms < now_ms - RECORD_AGE_MS:
            return
        said = self._directory.runs.verified(received)
        if said.status not in OVER:
            return
        if not await self._runtime.tables_caught_up(self._patience_s):
            raise UnavailableError(f"run {said.run_id} as it is now is not known here yet")
        run = self._directory.runs.get(said.run_id)
        if run is None or run.status not in OVER:
            return  # somebody else's word, which the table refused and logged
        await self._revoker.revoke(run, f"run {run.run_id} is {run.status}", traceparent=received.traceparent)


class RunRevoker:
    """Revokes the leases of one run, one by one."""

    def __init__(self, runtime: Runtime, ender: LeaseEnder) -> None:
        self._runtime = runtime
        self._ender = ender
        self._revoked: BoundedDict[str, None] = BoundedDict(_MAX_REVOKED)
        """Leases whose revocation is on Kafka: it counts once, and repeated it would be a replay."""

    async def revoke(self, run: Run, reason: str, *, traceparent: str | None = None) -> None:
        """Publish a revocation for each lease of the run that has not ended. Returns once Kafka has them.

        Raises UnavailableError.
        """
        leases = [
            lease
            async for found in self._ender.find(agent_selector_key(run.agent_id), agent_id=run.agent_id)
            for lease in found.values()
            if lease.instance is not None
            and lease.instance.run is not None
            and lease.instance.run.run_id == run.run_id
            and lease.lease_id not in self._revoked
        ]
        acknowledged = []
        for lease in leases:
            revocation = derived_revocation(
                "run_ended",
                reason,
                by=self._runtime.key.id,
                trust_domain=self._runtime.settings.trust_domain,
                at_ms=self._runtime.clock.now_ms(),
                record=run_record(run.run_id),
                lease_id=lease.lease_id,
            )
            _, ack = await self._runtime.publisher.send_signed(
                REVOCATION_REQUEST, lease.agent_id, revocation, self._runtime.key, traceparent=traceparent
            )
            acknowledged.append(ack)
        await gather_all(acknowledged)
        for lease in leases:
            self._revoked[lease.lease_id] = None
