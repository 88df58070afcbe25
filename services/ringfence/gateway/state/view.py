"""The gateway's view of records, leases and revocations, and its freshness. A stale view denies everything.

Freshness is checked against what registry and revokers sign once a second (`heartbeat`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from aiokafka.errors import KafkaError

from ringfence.gateway.domain import stale_view
from ringfence.gateway.state.cuts import LeaseFeed, RevocationApplier
from ringfence.gateway.state.leases import LEASES_SINCE_MS, REVOCATIONS_KEPT_MS, SLACK_MS, LeaseTable
from ringfence.kernel.base.clock import RemoteClock, suspend_aware_ms
from ringfence.kernel.base.clock_skew import MAX_SKEW_MS
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Reason
from ringfence.messages.operations import Heartbeat
from ringfence.messages.run import Run
from ringfence.messages.topics import HEARTBEAT, LEASE, REVOCATION_REQUEST
from ringfence.model.leases.revoker_halts import RevokerHalts
from ringfence.model.leases.stream_digests import CONFIRMED, StreamCheck, StreamDigests
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.directory import RUN_TABLES, Directory
from ringfence.model.records.runs import OVER

log = logging.getLogger(__name__)

BEAT_EVERY_S = 1.0
_CHECK_EVERY_S = 0.1
_OVERDUE_MS = 250
_COMPARE_EVERY = 2
"""Comparing asks each follower for its positions, so only every second check does it."""


class View:
    """Everything that decisions rest on: records, leases, revocations. Fed from Kafka once `runtime` runs."""

    def __init__(self, runtime: Runtime, *, acknowledges: bool = True) -> None:
        """Register all readers with `runtime`. `acknowledges`: see `RevocationApplier`."""
        self._runtime = runtime
        grace_ms = int(runtime.settings.grace_s * 1000)
        self.directory = Directory(
            runtime.trust, runtime.clock, grace_ms=grace_ms, on_alarm=report_alarms(runtime)
        )
        self._broker_clock = RemoteClock()
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
        halted = self._halts.denial()
        # `clock_behind`: while nothing arrives, leases expire only by this gateway's own clock.
        stale = halted.message if halted else self._stale_reason()
        self._fresh_at_ms = now_ms if stale is None else 0
        return stale

    def denial(self) -> Reason | None:
        """`stale` as the reason of a denial."""
        if (stale := self.stale()) is None:
            return None
        return self._halts.denial() or stale_view(stale)

    def view_problem(self) -> Reason | None:
        """Why it is unknown whether a lease that cannot be used here has ended, or None."""
        if (denial := self.denial()) is not None:
            return denial
        ahead_ms = self._runtime.clock.now_ms() - self._broker_clock.now_ms()
        if ahead_ms <= MAX_SKEW_MS:
            return None
        return stale_view(f"the clock of this gateway is {ahead_ms / 1000:.1f} s ahead of the broker's")

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
