"""Watches `lease` and repairs differences between Redis and Kafka as they appear.

Invariant: every lease record on Kafka was in Redis first, and the records of a lease appear in `seq` order. Two
failures can violate it, both by a process that was paused or cut off at the wrong moment:

- An issuer publishes a record that it wrote to a Redis that has been lost and rebuilt since. Then the record is
  restored to Redis.
- An issuer publishes a record that others have already succeeded, or a revoker publishes one that is void by now. Then
  the record that counts is published again.

If Kafka has a marker of a newer epoch than Redis, Redis is behind, and is rebuilt.

Every revoker sees all records that are appended while it runs. A consumer group remembers those of other times.

Rechecks issued leases against the present records, and revokes those that were issued on stale ones.

Policy and issuer may use records that are stale within the grace. When a record changes, a revoker fences off what was
asked for before the change, and ends existing leases (`record_changes`). That misses a lease that was requested after
the change from services that had not read it yet. This recheck finds such leases: when a lease record is on Kafka, the
tables' topics have every change that its issue can have missed. So the revoker reads those topics to their ends first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.topics import REVOCATION_REQUEST
from ringfence.model.lease_store import LeaseStore, LostError, OutboxRecord, SignedLease, StoredLease
from ringfence.model.leases.epochs import Epochs, number_of
from ringfence.model.leases.lifecycle import comes_after
from ringfence.model.leases.unverified_records import LeaseSummary, verify_lease
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.verdict import Allowed
from ringfence.revoker.consistency.rebuild import Rebuilder
from ringfence.revoker.domain import StaleBasis, check_basis, derived_revocation, run_record
from ringfence.revoker.lease_end.lease_ender import LeaseEnder, OwnRecordCache

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


"""The linger of batches that are checked together."""
BACK_MS = 15_000
"""The age of the first record that a revoker reads: one that was killed may have read records and not checked them."""
_CAUGHT_UP_WITHIN_S = 5.0
_FAILED_S = 1.0
_BATCH_SIZE = 500


@dataclass(frozen=True, slots=True)
class _ArrivedRecord:
    """A record of a lease, under its own key, not verified."""

    summary: LeaseSummary
    jws: bytes
    void: bool
    void_is_certain: bool
    """Whether a marker was seen before it. Otherwise Redis's epoch decides, which repairs too much at worst."""

    @property
    def id(self) -> str:
        return self.summary.lease_id


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    """A caller that waits until the records of these leases have been checked."""

    ids: frozenset[str]
    done: asyncio.Event = field(default_factory=asyncio.Event)


class LeaseWatch:
    """Checks the records of `lease` as they come. Each revoker checks all of them."""

    def __init__(
        self,
        store: LeaseStore,
        trust: TrustStore,
        ender: LeaseEnder,
        rebuilder: Rebuilder,
        clock: Clock,
        own_records: OwnRecordCache,
        *,
        since_ms: int,
    ) -> None:
        """`since_ms`: `on_records` is given all records appended since then, `catch_up` the earlier ones."""
        self._store = store
        self._trust = trust
        self._ender = ender
        self._rebuilder = rebuilder
        self._clock = clock
        self._own_records = own_records
        self._epochs = Epochs(trust)
        self._since_ms = since_ms
        self._unchecked: list[_ArrivedRecord] = []
        self._undecided: set[str] = set()
        """Leases with records that have arrived and are not decided yet, including those being checked."""
        self._waiting: list[_Waiter] = []
        self._news = asyncio.Event()

    def on_records(self, records: Sequence[Received]) -> None:
        """Queue records to be checked. Never blocks, never raises."""
        epoch = self._epoch()
        for record in records:
            if self._epochs.took(record):
                continue
            summary = self._own_records.summarise(record.value)
            if summary is None or summary.lease_id != record.key:
                continue
            void = self._epochs.is_void(record, summary.epoch)
            by_itself = not void and summary.lease_id not in self._undecided
            if by_itself and self._ended_here(summary, record.value, epoch):
                continue  # like most ends, it agrees with Redis, and no other record of the lease is being checked
            void_is_certain = self._epochs.of(record.partition) is not None
            self._take(_ArrivedRecord(summary, record.value, void, void_is_certain))
        self._news.set()

    def _take(self, record: _ArrivedRecord) -> None:
        self._unchecked.append(record)
        self._undecided.add(record.id)

    async def catch_up(self, records: Sequence[Received]) -> None:
        """Check the records that are too old for `on_records`. Returns when that is done.

        Skips records of leases that Redis need not hold any more.
        """
        known_since_s = (self._clock.now_ms() - self._store.record_keep_ms) / 1000
        summaries = [
            (summary, record.value)
            for record in records
            if record.appended_at_ms < self._since_ms
            if (summary := self._own_records.summarise(record.value)) is not None
            if summary.lease_id == record.key and summary.deadline > known_since_s
        ]
        if not summaries:
            return
        # A revoker that published a record too late checks it itself when it wakes.
        for summary, jws in summaries:
            self._take(_ArrivedRecord(summary, jws, void=False, void_is_certain=True))
        waiter = _Waiter(frozenset(summary.lease_id for summary, _ in summaries))
        self._waiting.append(waiter)
        self._news.set()
        await waiter.done.wait()

    async def run(self, follower: Follower) -> None:
        """Check the records that `follower` reads, for ever."""
        while True:
            await self._news.wait()
            self._news.clear()
            records, self._unchecked = self._unchecked, []
            waiters = list(self._waiting)
            try:
                await self._check_epochs()
                records = self._mark_void(records)
                undecided = await self._check(records, follower)
                self._release(waiters, {record.id for record in undecided})
                self._unchecked = undecided + self._unchecked
                self._undecided = {record.id for record in self._unchecked}
                if undecided:
                    self._news.set()
                    await asyncio.sleep(LINGER_MS / 1000)
            except UnavailableError as error:
                log.info("records of leases are looked at later: %s", error)
                self._unchecked = records + self._unchecked
                self._news.set()
                await asyncio.sleep(_FAILED_S)

    def _release(self, waiters: Iterable[_Waiter], undecided: Collection[str]) -> None:
        for waiter in waiters:
            if waiter.ids.isdisjoint(undecided):
                waiter.done.set()
                self._waiting.remove(waiter)

    async def _check_epochs(self) -> None:
        """If Kafka is in a newer epoch, have Redis rebuilt, and raise LostError: records of the old epoch are void."""
        if self._epochs.highest() <= number_of(self._store.epoch):
            return
        log.warning("Kafka is in a newer epoch than Redis, which is rebuilt once more")
        await self._store.request_rebuild()
        raise LostError("Redis is of an older epoch than Kafka")

    def _mark_void(self, records: Sequence[_ArrivedRecord]) -> list[_ArrivedRecord]:
        """Mark records of earlier epochs than Redis's as void, if no marker came before them."""
        epoch = number_of(self._store.epoch)

        def mark(record: _ArrivedRecord) -> _ArrivedRecord:
            void = record.summary.epoch is not None and number_of(record.summary.epoch) < epoch
            return record if record.void_is_certain or record.void == void else replace(record, void=void)

        return list(map(mark, records))

    async def _check(self, records: list[_ArrivedRecord], follower: Follower) -> list[_ArrivedRecord]:
        """Compare records with Redis, and repair differences.

        Returns those to check once more: records that arrived meanwhile, and those of leases with a later record in the
        outbox. That record may be on its way, or on Kafka already: the outbox is cleared after the acknowledgement.
        """
        epoch = self._epoch()
        at_their_ends = {one.id for one in records if self._ended_here(one.summary, one.jws, epoch)}
        seqs = {id: seq for id, seq in _highest(records).items() if id not in at_their_ends}
        behind, ahead = await self._compare(seqs)
        waiting = await self._store.is_waiting(list(ahead.items()))
        acknowledged = {id for id, waits in zip(ahead, waiting, strict=True) if not waits}
        undecided = [one for one in records if one.id in ahead.keys() - acknowledged]
        if not (behind or acknowledged or _outdated(records)):
            return undecided
        if not await follower.caught_up(_CAUGHT_UP_WITHIN_S):
            raise UnavailableError("Kafka does not say what else there is")
        arrived, self._unchecked = self._mark_void(self._unchecked), []
        records += arrived
        outdated, later, compared = _outdated(records), _highest(records), {*behind, *acknowledged}
        behind, ahead = await self._compare({id: later[id] for id in compared})
        await self._restore([one for one in records if one.id in behind and not one.void])
        await self._republish(outdated | (ahead.keys() & acknowledged), records)
        return [one for one in (*undecided, *arrived) if one.id not in outdated | compared]

    def _ended_here(self, summary: LeaseSummary, jws: bytes, epoch: str | None) -> bool:
        """Whether Redis has this end of a lease for certain: it took it from this process, in this epoch."""
        return (
            epoch is not None
            and summary.status in TERMINAL
            and summary.epoch == epoch
            and self._own_records.has(jws)
        )

    def _epoch(self) -> str | None:
        """Redis's epoch; None while it is unknown."""
        try:
            return self._store.epoch
        except LostError:
            return None

    async def _compare(self, seqs: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Compare `seqs`, the highest `seq` on Kafka by lease, with Redis.

        Returns the leases of which Redis has a lower one, and those of which it has a higher one, each with Redis's.
        """
        in_redis: dict[str, int] = {}
        ids = list(seqs)
        for start in range(0, len(ids), _BATCH_SIZE):
            in_redis |= await self._store.seqs(ids[start : start + _BATCH_SIZE])
        behind = {id: seq for id, seq in in_redis.items() if seq < seqs[id]}
        return behind, {id: seq for id, seq in in_redis.items() if seq > seqs[id]}

    async def _restore(self, records: Iterable[_ArrivedRecord]) -> None:
        """Restore leases that issuers published late. A revoker's record is in Redis, or of another epoch."""
        epoch = self._store.epoch
        leases: dict[str, SignedLease] = {}
        for record in records:
            lease = self._verify(record)
            if lease is None or lease.epoch not in (None, epoch):
                continue
            highest = leases.get(lease.lease_id)
            if highest is None or lease.seq > highest.claims.seq:
                leases[lease.lease_id] = SignedLease(lease, record.jws.decode("ascii"))
        if leases:
            log.warning("restoring %d leases that were published after Redis had been rebuilt", len(leases))
            revocations = await self._rebuilder.revocations()
            await self._store.restore(
                await self._rebuilder.cut_revoked(list(leases.values()), revocations, epoch)
            )

    async def _republish(self, ids: Collection[str], records: Sequence[_ArrivedRecord]) -> None:
        """Republish Redis's records of these leases, if a verified older record came after them on Kafka."""
        last = {one.id: one for one in records if one.id in ids}
        old = [id for id, one in last.items() if self._verify(one) is not None]
        if not old:
            return
        log.warning("publishing the latest records of %d leases again: older ones came after them", len(old))
        stored = await self._store.get(old)
        cuts = [one for one in records if one.void and one.id in stored and one.summary.status == "ending"]
        to_publish = {
            (one.id, one.summary.seq): one.jws for one in cuts if self._leads_to(one, stored[one.id])
        }
        to_publish |= {(id, one.seq): one.jws for id, one in stored.items()}
        await self._ender.republish(
            [OutboxRecord(id, seq, jws) for (id, seq), jws in sorted(to_publish.items())]
        )

    def _leads_to(self, cut: _ArrivedRecord, stored: StoredLease) -> bool:
        """Whether a void cut precedes the end that Redis has, so that it has to be published before that end."""
        if stored.seq <= cut.summary.seq:
            return False
        before, after = self._verify(cut), self._verify(stored)
        return before is not None and after is not None and comes_after(before, after)

    def _verify(self, record: _ArrivedRecord | StoredLease) -> Lease | None:
        """The claims of a record, or None if it does not verify: such a record has no effect."""
        try:
            lease = verify_lease(record.jws, self._trust, self._clock)
        except InvalidMessageError:
            return None
        return lease if isinstance(record, StoredLease) or lease.lease_id == record.id else None


def _highest(records: Iterable[_ArrivedRecord]) -> dict[str, int]:
    """The highest `seq` of each lease, not verified. Void records do not count."""
    highest: dict[str, int] = {}
    for record in records:
        if not record.void:
            highest[record.id] = max(highest.get(record.id, 0), record.summary.seq)
    return highest


def _outdated(records: Iterable[_ArrivedRecord]) -> set[str]:
    """Leases whose last record is void, or not the highest."""
    last = {record.id: record for record in records}
    highest = _highest(records)
    return {id for id, record in last.items() if record.void or record.summary.seq < highest[id]}
