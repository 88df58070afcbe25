"""Applies lease records and revocations from Kafka to the lease table, and acknowledges each revocation (a cut).

A revocation is acknowledged once nothing more can be forwarded under it: the table has it, and every decision in
progress checks the table once more at its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka.errors import KafkaError

from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.lease import RevocationAck
from ringfence.messages.topics import REVOCATION_ACK
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.lifecycle import selector_key_of
from ringfence.model.leases.revocations import Revocation, objection, verify_revocation
from ringfence.model.leases.verification import verify_lease
from ringfence.model.records.directory import Directory

log = logging.getLogger(__name__)

_CATCH_UP_TIMEOUT_S = 5.0
"""How long to wait for one answer about the records that a revocation rests on, and that may not have arrived yet."""
_RETRY_S = 0.2


class LeaseFeed:
    """Applies records of the topic `lease`."""

    def __init__(self, runtime: Runtime, table: LeaseTable) -> None:
        self._runtime = runtime
        self._table = table
        self._epochs = Epochs(runtime.trust)

    def on_records(self, records: Sequence[Received]) -> None:
        """Apply records. Those that no issuer or revoker signed, and void ones, change nothing."""
        for record in records:
            if not record.value or self._epochs.took(record):
                continue
            try:
                lease = verify_lease(
                    record.value,
                    self._runtime.trust,
                    self._runtime.clock,
                    appended_at_ms=record.appended_at_ms,
                )
            except InvalidMessageError as error:
                log.warning(
                    "not a lease: %s/%d@%d: %s",
                    record.topic_name,
                    record.partition,
                    record.offset,
                    error,
                    extra=rate_limited(record.topic_name, error.code),
                )
                continue
            if self._epochs.is_void(record, lease.epoch):
                continue
            if lease.epoch is not None:
                self._epochs.begin(
                    record, lease.epoch
                )  # its marker may be older than the first record that was read
            self._table.apply(lease)


@dataclass(frozen=True, slots=True)
class _Unverified:
    """A revocation whose signer or lease is not known here yet."""

    record: Received
    acknowledge: bool


class RevocationApplier:
    """Applies each valid revocation of the topic `revocation.request`, and publishes a `RevocationAck` for it.

    Topics have no common order: a revocation may be read before its signer's key, or before the lease that it names.
    Such a one is kept as unverified until all those records have been read. See `backlog`.
    """

    def __init__(
        self, runtime: Runtime, directory: Directory, table: LeaseTable, *, acknowledges: bool = True
    ) -> None:
        """Without `acknowledges` it applies revocations but publishes nothing: so a gateway that hangs
        looks to others.
        """
        self._runtime = runtime
        self._directory = directory
        self._table = table
        self._acknowledges = acknowledges
        self._leases: Follower | None = None
        self._acknowledging = False
        self._unverified: list[_Unverified] = []
        """In the order of arrival: those from before the start come first."""
        self._verifying = False
        self._tasks: set[asyncio.Task[None]] = set()

    def set_lease_follower(self, leases: Follower) -> None:
        """The reader of leases: a revocation of a lease that is not here yet waits for it."""
        self._leases = leases

    def start_acknowledging(self) -> None:
        """Acknowledge revocations from now on: all that were published before this process began have been read."""
        self._acknowledging = True

    def backlog(self) -> str | None:
        """Why the lease table may lack a revocation that was published before this process began; None once it has all.

        The process before this one may have acknowledged such a revocation, which promised that nothing more is
        forwarded under it. So nothing may be decided until each is applied or refused. Revocations that arrive later
        make nobody wait: they are acknowledged only once they are applied.
        """
        if not self._unverified or self._unverified[0].acknowledge:
            return None
        return "revocations from before the start are not verified yet"

    def on_records(self, records: Sequence[Received]) -> None:
        """Apply revocations. Most are in force when this returns."""
        for record in records:
            revocation = self._verified(record)
            if revocation is not None:
                self._apply(revocation, acknowledge=self._acknowledging)
                continue
            # Its signer or its lease may not have arrived yet. It is acknowledged only after that.
            self._unverified.append(_Unverified(record, acknowledge=self._acknowledging))
            if not self._verifying:
                self._verifying = True
                self._run_in_background(self._verify_later())

    def _apply(self, revocation: Revocation, *, acknowledge: bool) -> None:
        claims = revocation.claims
        if claims.selector is not None:
            self._table.fence(
                selector_key_of(claims.selector), revocation.at.appended_at_ms, revocation_id=revocation.id
            )
        elif claims.lease_id is not None:
            self._table.revoke(claims.lease_id, revocation.at.appended_at_ms)
        if self._acknowledges and acknowledge:
            self._run_in_background(self._acknowledge(revocation, self._runtime.clock.now_ms()))

    async def _verify_later(self) -> None:
        """Verify the unverified once everything is read that they may rest on. Those that are still invalid then
        count for nothing, as anybody who may write to the topic can send such.
        """
        try:
            while self._unverified:
                count = len(self._unverified)
                if not await self._caught_up():
                    await asyncio.sleep(_RETRY_S)
                    continue
                for unverified in self._unverified[:count]:
                    revocation = self._verified(unverified.record)
                    if revocation is not None:
                        self._apply(revocation, acknowledge=unverified.acknowledge)
                del self._unverified[:count]
        finally:
            self._verifying = False

    async def _caught_up(self) -> bool:
        try:
            if not await self._runtime.tables_caught_up(_CATCH_UP_TIMEOUT_S):
                return False
            return self._leases is None or await self._leases.caught_up(_CATCH_UP_TIMEOUT_S)
        except (KafkaError, OSError) as error:
            log.warning(
                "revocations wait to be verified: %s", error, extra=rate_limited("revocation.request")
            )
            return False

    def _verified(self, record: Received) -> Revocation | None:
        try:
            revocation = verify_revocation(record, self._directory, self._runtime.trust)
        except InvalidMessageError:
            return None
        lease = self._table.get(revocation.claims.lease_id or "")
        return revocation if objection(revocation, lease, self._directory) is None else None

    async def _acknowledge(self, revocation: Revocation, cut_at_ms: int) -> None:
        key = self._runtime.key
        ack = RevocationAck(
            iss=key.id,
            aud=self._runtime.settings.trust_domain,
            iat=cut_at_ms // 1000,
            jti=derived_id("revocation.ack", key.id, revocation.id),
            revocation_id=revocation.id,
            cut_at_ms=cut_at_ms,
        )
        try:
            await self._runtime.publisher.publish_signed(
                REVOCATION_ACK, key.id, ack, key, traceparent=revocation.traceparent
            )
        except Exception:
            # The revocation is applied. Without the acknowledgement the revoker waits for the grace period.
            log.exception("the acknowledgement of revocation %s was not published", revocation.id)

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="order")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
