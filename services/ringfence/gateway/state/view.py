"""The gateway's view: applies records, leases and revocations from Kafka, and denies everything once it is stale.

Freshness is checked against what registry and revokers sign once a second (`heartbeat`).

A revocation (a cut) is acknowledged once nothing more can be forwarded under it: the table has it, and every decision
in progress checks the table once more at its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka.errors import KafkaError

from ringfence.gateway.domain import stale_view
from ringfence.gateway.state.leases import LEASES_SINCE_MS, REVOCATIONS_KEPT_MS, SLACK_MS, LeaseTable
from ringfence.kernel.base.clock import MAX_SKEW_MS, RemoteClock, suspend_aware_ms
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.lease import RevocationAck
from ringfence.messages.operations import Heartbeat
from ringfence.messages.run import Run
from ringfence.messages.topics import HEARTBEAT, LEASE, REVOCATION_ACK, REVOCATION_REQUEST
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.lifecycle import selector_key_of
from ringfence.model.leases.revocations import Revocation, check_revocation, verify_revocation
from ringfence.model.leases.revoker_halts import RevokerHalts
from ringfence.model.leases.stream_digests import CONFIRMED, StreamCheck, StreamDigests
from ringfence.model.leases.unverified_records import verify_lease
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.directory import RUN_TABLES, Directory
from ringfence.model.records.runs import OVER
from ringfence.model.verdict import ALLOWED, Allowed, Refused

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
        return (
            revocation if isinstance(check_revocation(revocation, lease, self._directory), Allowed) else None
        )

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


BEAT_EVERY_S = 1.0
_CHECK_EVERY_S = 0.1
_OVERDUE_MS = 250
_COMPARE_EVERY = 2
"""Comparing asks each follower for its positions, so only every second check does it."""


class View:
    """Everything that decisions rest on: records, leases, revocations. Fed from Kafka once `runtime` runs."""

    def __init__(
        self, runtime: Runtime, *, acknowledges: bool = True, broker_clock: RemoteClock | None = None
    ) -> None:
        """Register all readers with `runtime`.

        `acknowledges`: see `RevocationApplier`; `broker_clock`: the broker's time, by default that of heartbeats.
        """
        self._runtime = runtime
        grace_ms = int(runtime.settings.grace_s * 1000)
        self.directory = Directory(
            runtime.trust, runtime.clock, grace_ms=grace_ms, on_alarm=report_alarms(runtime)
        )
        self._broker_clock = broker_clock or RemoteClock()
        self.table = LeaseTable(runtime.clock, self._broker_clock.now_ms)
        self._streams = StreamDigests()
        self._halts = RevokerHalts(runtime.trust, grace_ms=grace_ms)
        self._check = StreamCheck(self._streams, runtime.trust, runtime.clock, grace_ms=grace_ms)
        self._revocations = RevocationApplier(runtime, self.directory, self.table, acknowledges=acknowledges)
        take_leases = runtime.redeliver_after_rotation(LeaseFeed(runtime, self.table).on_records)
        self._looked_ms = suspend_aware_ms()
        now_ms = runtime.clock.now_ms()

        self._fresh_at_ms = 0
        """When it was last found not to be stale, if nothing has arrived since."""

        def on_leases(records: Sequence[Received]) -> None:
            self._fresh_at_ms = 0
            self._streams.on_records(records)
            take_leases(records)

        def on_revocations(records: Sequence[Received]) -> None:
            self._fresh_at_ms = 0
            self._streams.on_records(records)
            self._revocations.on_records(records)

        def on_tables(records: Sequence[Received]) -> None:
            self._fresh_at_ms = 0
            self.directory.on_records(records)

        self.directory.runs.on_change(self._on_run)
        runtime.table(RUN_TABLES, on_tables)
        runtime.table([HEARTBEAT], self._on_heartbeats)
        leases = runtime.history([LEASE], on_leases, since_ms=max(now_ms - LEASES_SINCE_MS, 1))
        runtime.history([REVOCATION_REQUEST], on_revocations, since_ms=max(now_ms - REVOCATIONS_KEPT_MS, 1))
        self._revocations.set_lease_follower(leases)
        self._lease_follower: Follower = leases
        """It reads revocations too."""
        runtime.background("view", self._check_periodically)
        runtime.background("heartbeat", self._send_heartbeats)
        runtime.denies_when(self.stale)

    def stale(self) -> str | None:
        """Why nothing may be decided by this view, or None: it is too old, or a revoker has halted.

        It is called for each request, several times in a millisecond.
        """
        now_ms = self._runtime.clock.now_ms()
        if now_ms == self._fresh_at_ms:
            return None
        halts = self._halts.check()
        # `clock_behind`: while nothing arrives, leases expire only by this gateway's own clock.
        stale = halts.reason.message if isinstance(halts, Refused) else self._stale_reason()
        self._fresh_at_ms = now_ms if stale is None else 0
        return stale

    def check_freshness(self) -> Allowed | Refused:
        """Check whether anything may be decided by this view: see `stale`, whose text is in the reason."""
        if (stale := self.stale()) is None:
            return ALLOWED
        halts = self._halts.check()
        return halts if isinstance(halts, Refused) else Refused(stale_view(stale))

    def check_view(self) -> Allowed | Refused:
        """Check whether a lease that cannot be used here has ended for certain:

        1. The view is fresh (`check_freshness`).
        2. The clock of this gateway is not ahead of the broker's (`stale_view`).
        """
        if isinstance(freshness := self.check_freshness(), Refused):
            return freshness
        ahead_ms = self._runtime.clock.now_ms() - self._broker_clock.now_ms()
        if ahead_ms <= MAX_SKEW_MS:
            return ALLOWED
        return Refused(
            stale_view(f"the clock of this gateway is {ahead_ms / 1000:.1f} s ahead of the broker's")
        )

    def _on_run(self, run: Run) -> None:
        """Cut the leases of a run's instance once the run is over. Runs of long ago have no lease any more."""
        if run.status in OVER and run.deadline * 1000 + SLACK_MS > self._runtime.clock.now_ms():
            self.table.end_run(run.run_id)

    def _stale_reason(self) -> str | None:
        return (
            self.directory.stale()
            or self._check.stale()
            or self._revocations.backlog()
            or self._runtime.clock_behind()
        )

    def view_expired(self) -> bool:
        """Whether the process was suspended: the periodic check is overdue, and the view has become stale."""
        return suspend_aware_ms() - self._looked_ms > _OVERDUE_MS and self.stale() is not None

    def _on_heartbeats(self, records: Sequence[Received]) -> None:
        self._fresh_at_ms = 0
        if records:
            self._broker_clock.observe(records[-1].appended_at_ms)
        self.directory.on_records(records)
        self._check.on_heartbeats(records)
        self._halts.on_heartbeats(records)

    async def _check_periodically(self) -> None:
        """Check freshness and sweep the lease table, forever. Notify the watchers of leases when the view
        gets stale.
        """
        self._check.begin(await self._lease_follower.positions(CONFIRMED))
        turn = 0
        while True:
            if turn % _COMPARE_EVERY == 0:
                positions = await self._lease_follower.positions(CONFIRMED)
                self._fresh_at_ms = 0
                self._check.compare(positions)
            turn += 1
            self.table.sweep()
            if self.stale() is not None:
                self.table.end_all_watched()
            self._looked_ms = suspend_aware_ms()
            await asyncio.sleep(_CHECK_EVERY_S)

    async def _send_heartbeats(self) -> None:
        """Send signed heartbeats, forever: cuts wait for acknowledgements of live gateways only."""
        self._revocations.start_acknowledging()
        while True:
            try:
                await self._send_heartbeat()
            except (RingfenceError, KafkaError, OSError) as error:
                log.warning("a heartbeat is left out: %s", error)
            await asyncio.sleep(BEAT_EVERY_S)

    async def _send_heartbeat(self) -> None:
        key, now_ms = self._runtime.key, self._runtime.clock.now_ms()
        heartbeat = Heartbeat(
            iss=key.id,
            aud=self._runtime.settings.trust_domain,
            iat=now_ms // 1000,
            jti=derived_id("heartbeat", key.id, now_ms),
            at_ms=now_ms,
        )
        await self._runtime.publisher.publish_signed(HEARTBEAT, key.id, heartbeat, key)
