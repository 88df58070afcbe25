"""Ends the leases of runs that are over, or that no heartbeat has named for `RINGFENCE_RUN_GRACE_S`.

Silence is measured in the broker's time, from the append time of the last heartbeat that named the run to that of
this revoker's own last heartbeat that came back. So a revoker that is cut off itself ends nothing. The runner
measures from the sending of a heartbeat, which is earlier: if it lives, it has destroyed the sandbox by then.
A silent run stays `started`, since only its own runner reports its state. Its leases are looked for in Redis when it
becomes silent and for `_LOOK_AGAIN_MS` after that; `IssuedLeaseRecheck` finds those that are issued later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Final, NoReturn

from aiokafka.errors import KafkaError

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.operations import Heartbeat
from ringfence.messages.run import Run
from ringfence.messages.topics import REVOCATION_REQUEST
from ringfence.model.leases.lifecycle import agent_selector_key
from ringfence.model.records.directory import Directory
from ringfence.model.records.runs import OVER, RunTable
from ringfence.revoker.domain import StaleBasis, derived_revocation, run_record
from ringfence.revoker.lease_end.lease_ender import LeaseEnder
from ringfence.revoker.revocations.record_changes import RECORD_AGE_MS

_MAX_REVOKED = 10_000


@dataclass(slots=True, eq=False)
class RunEndHandler:
    """The handler of `run`.

    `IssuedLeaseRecheck` finds a lease that is issued after the end of its run. Revocations are on Kafka, so that a
    rebuild of Redis revokes again.
    """

    runtime: Runtime
    directory: Directory
    revoker: RunRevoker
    _: KW_ONLY
    patience_s: float
    """The longest wait for the local tables to catch up."""

    async def __call__(self, received: Received) -> None:
        """Revoke the leases of a run, if its record says that it is over, and counts.

        Raises InvalidMessageError if no runner signed such a record, UnavailableError if that is not known yet.
        """
        now_ms = self.runtime.clock.now_ms()
        if not received.value or received.appended_at_ms < now_ms - RECORD_AGE_MS:
            return
        said = self.directory.runs.verified(received)
        if said.status not in OVER:
            return
        if not await self.runtime.tables_caught_up(self.patience_s):
            raise UnavailableError(f"run {said.run_id} as it is now is not known here yet")
        run = self.directory.runs.get(said.run_id)
        if run is None or run.status not in OVER:
            return  # somebody else's word, which the table refused and logged
        await self.revoker.revoke(run, f"run {run.run_id} is {run.status}", traceparent=received.traceparent)


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
                StaleBasis("run_ended", reason, run_record(run.run_id)),
                by=self._runtime.key.id,
                trust_domain=self._runtime.settings.trust_domain,
                at_ms=self._runtime.clock.now_ms(),
                lease_id=lease.lease_id,
            )
            _, ack = await self._runtime.publisher.send_signed(
                REVOCATION_REQUEST, lease.agent_id, revocation, self._runtime.key, traceparent=traceparent
            )
            acknowledged.append(ack)
        await gather_all(acknowledged)
        for lease in leases:
            self._revoked[lease.lease_id] = None


log = logging.getLogger(__name__)

_EVERY_S: Final = 1.0
_LOOK_AGAIN_MS: Final = 15_000
"""How long a silent run is looked for again: until every revoker's own heartbeats say that it is silent, and what was
being issued meanwhile is in Redis."""
_CLOCKS_DIFFER_MS: Final = 60_000
"""The most by which a sender's clock may differ from the broker's. Beyond it, its heartbeats count as replays."""


@dataclass(slots=True)
class _LastHeartbeat:
    sent_at_ms: int
    appended_at_ms: int


class RunnerSilence:
    """When each run was last named by a heartbeat of its runner, in the broker's time. It does no I/O."""

    def __init__(self, trust: TrustStore, runs: RunTable, *, own_id: str, grace_ms: int) -> None:
        """`own_id`: the SPIFFE ID that this revoker's heartbeats are signed with."""
        self._trust = trust
        self._runs = runs
        self._own_id = own_id
        self._grace_ms = grace_ms
        self._named: dict[str, _LastHeartbeat] = {}
        """By run."""
        self._seen_ms: dict[str, int] = {}
        """By run: the broker's time when this revoker first looked at it."""
        self._own = _LastHeartbeat(0, 0)
        self._silent: frozenset[str] = frozenset()

    def on_heartbeats(self, records: Sequence[Received]) -> None:
        """Take records of `heartbeat`; those of other services are ignored."""
        for record in records:
            try:
                heartbeat = verify(
                    parse(record.value), Heartbeat,
                    self._trust.finder("runner", "revoker", at_s=record.appended_at_ms / 1000),
                    audience=self._trust.trust_domain,
                ).claims  # fmt: skip
            except InvalidMessageError:
                continue
            if abs(heartbeat.at_ms - record.appended_at_ms) > _CLOCKS_DIFFER_MS:
                continue
            last = _LastHeartbeat(heartbeat.at_ms, record.appended_at_ms)
            if heartbeat.iss == self._own_id:
                # A replayed one must not make others look silent.
                if last.sent_at_ms > self._own.sent_at_ms:
                    self._own = last
                continue
            for run_id in heartbeat.runs:
                self._on_named(run_id, heartbeat.iss, last)

    def silent(self) -> list[tuple[Run, int]]:
        """The runs that are not over and that no heartbeat has named for longer than the grace; for how long, in ms.

        Empty before a heartbeat of this revoker came back.
        """
        now_ms = self._own.appended_at_ms
        if not now_ms:
            return []
        living = [run for run in self._runs.all() if run.status not in OVER and run.deadline * 1000 > now_ms]
        # Nobody knows here since when a run is silent that was never named: it counts from the first look on.
        self._seen_ms = {run.run_id: self._seen_ms.get(run.run_id, now_ms) for run in living}
        self._named = {
            id: last
            for id, last in self._named.items()
            if id in self._seen_ms or now_ms - last.appended_at_ms <= self._grace_ms
        }
        silences = ((run, now_ms - self._since_ms(run.run_id)) for run in living)
        silent = [(run, silence_ms) for run, silence_ms in silences if silence_ms > self._grace_ms]
        self._silent = frozenset(run.run_id for run, _ in silent)
        return silent

    def is_silent(self, run_id: str) -> bool:
        """Whether a run was silent at the last look (`silent`)."""
        return run_id in self._silent

    @property
    def grace_ms(self) -> int:
        """How long a run may go unnamed."""
        return self._grace_ms

    def _since_ms(self, run_id: str) -> int:
        named = self._named.get(run_id)
        return max(self._seen_ms[run_id], named.appended_at_ms if named is not None else 0)

    def _on_named(self, run_id: str, runner: str, heartbeat: _LastHeartbeat) -> None:
        run = self._runs.get(run_id)
        if run is not None and run.iss != runner:
            return  # another runner's run
        last = self._named.get(run_id)
        if last is None or heartbeat.sent_at_ms > last.sent_at_ms:
            self._named[run_id] = heartbeat


@dataclass(slots=True, eq=False)
class SilentRunEnder:
    """Revokes the leases of runs whose runners fell silent."""

    runtime: Runtime
    silence: RunnerSilence
    revoker: RunRevoker
    is_leader: Callable[[], bool]
    _: KW_ONLY
    patience_s: float
    """The longest wait for the local tables to catch up."""
    _reported: set[str] = field(init=False, default_factory=set)
    _done: set[str] = field(init=False, default_factory=set)
    """Silent runs whose leases this revoker looks for no more."""

    async def run(self) -> NoReturn:
        await run_periodically(
            _EVERY_S, self.look, "silent runners are looked for again soon", log,
            expected=(RingfenceError, KafkaError, OSError),
        )  # fmt: skip

    async def look(self) -> None:
        """Revoke what runs of silent runners hold now. Raises UnavailableError."""
        # Heartbeats of a runner may be in a partition that is read later than that of this revoker.
        silent = {run.run_id for run, _ in self.silence.silent()}
        self._reported &= silent
        self._done &= silent
        if not silent or not self.is_leader():
            return
        if not await self.runtime.tables_caught_up(self.patience_s):
            return
        for run, silence_ms in self.silence.silent():
            reason = f"the runner of run {run.run_id} is silent"
            if run.run_id not in self._reported:
                metrics.RUNS_SILENCED.inc()
                self._reported.add(run.run_id)
                log.error("%s: no heartbeat has named it for %.0f s", reason, silence_ms / 1000)
            if run.run_id in self._done:
                continue
            await self.revoker.revoke(run, reason)
            if silence_ms > self.silence.grace_ms + _LOOK_AGAIN_MS:
                self._done.add(run.run_id)
