"""Compares Redis with Kafka and changes nothing: `ringfence rebuild --check`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Literal

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.trust_updates import apply_bundle
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.topics import TRUST
from ringfence.model.lease_store import (
    FENCE_KEEP_MS,
    GRANT_KEEP_MS,
    SELECTOR_KEEP_MS,
    SLACK_MS,
    LeaseKeys,
    LiveLease,
    Restoration,
    uses_of,
)
from ringfence.model.leases.epochs import number_of
from ringfence.model.leases.lifecycle import is_cut_key, is_over, own_selector_keys, statement
from ringfence.model.leases.unverified_records import summarise
from ringfence.model.records.directory import TABLES, Directory
from ringfence.revoker.consistency.kafka_view import (
    HighestRecord,
    KafkaKnowledge,
    LeaseFold,
    RevocationIndex,
    read_leases,
    read_revocations,
    verify_records,
    wait_complete,
)

AGAIN_S = 1.0
_BATCH_SIZE = 500

_LATER_MS = 60_000
"""A fence later than our own clock by more than this is wrong: it is the time of a revocation."""

DifferenceKind = Literal[
    "missing", "behind", "ahead", "differs", "unknown", "misplaced",
    "unfenced", "overfenced", "unseen", "uncounted", "stray", "miscounted", "mistimed", "stuck",
]  # fmt: skip
"""Kinds of differences.

- `missing`: Redis has no record of a lease. `behind`, `ahead`: it has another `seq`, or is of an older epoch.
- `differs`: its record of the same `seq` says something else. `unknown`: Kafka does not know the lease.
- `misplaced`: the lease is not in the sets and indexes that its status requires.
- `unfenced`: the fence of a revocation is missing. `overfenced`: a fence refuses requests that were not revoked.
- `unseen`: the coordinates at which a revocation was seen first are missing, so a repeat of it would cover more.
- `uncounted`: a lease does not count for the grant that it names.
- `stray`: something in Redis follows from no record there.
- `miscounted`: the number of leases of an agent with a sponsor or user is wrong.
- `mistimed`: a key expires at another time than it should.
- `stuck`: a record waits to be published, and no sweeper finds it.
"""


@dataclass(frozen=True, slots=True)
class LeaseDifference:
    """One difference between Redis and Kafka.

    `about`: a lease, a lease and a grant, a selector key and a shard, a revocation, `epoch`, or an entry of a key of a
    shard.
    """

    about: str
    what: DifferenceKind
    kafka: str
    redis: str


@dataclass(slots=True, eq=False)
class Checker:
    """Finds differences. It only reads, so it needs no signing key."""

    settings: ServiceSettings
    directory: Directory
    trust: TrustStore
    clock: Clock
    _: KW_ONLY
    record_keep_ms: int

    async def differences(self) -> list[LeaseDifference]:
        """Lasting differences: those found twice, `AGAIN_S` apart. Others are only late. Raises UnavailableError."""
        differences = await self._find_differences()
        if differences:
            await asyncio.sleep(AGAIN_S)
            differences = {
                about: difference
                for about, difference in (await self._find_differences()).items()
                if about in differences
            }
        return sorted(differences.values(), key=lambda difference: (difference.what, difference.about))

    async def _find_differences(self) -> dict[tuple[str, DifferenceKind], LeaseDifference]:
        restoration = Restoration(self.settings)
        try:
            await restoration.look()
            return {
                (difference.about, difference.what): difference
                async for difference in self._compare(restoration)
            }
        finally:
            await restoration.close()

    async def _compare(self, restoration: Restoration) -> AsyncIterator[LeaseDifference]:
        now_ms = self.clock.now_ms()
        ids = await restoration.ids()
        unpublished = await restoration.waiting()

        new_fold = partial(LeaseFold, trust=self.trust, over_before_s=(now_ms - self.record_keep_ms) / 1000)
        fold = new_fold(needed=frozenset(ids))
        await read_leases(self.settings, fold)
        if not restoration.complete:
            yield LeaseDifference("epoch", "missing", str(fold.epochs.highest()), "")
        for epoch in sorted(restoration.epochs):
            if number_of(epoch) < fold.epochs.highest():
                yield LeaseDifference("epoch", "behind", str(fold.epochs.highest()), epoch)
        records = await self._verified_records(restoration, fold, new_fold)
        lease_ids = list(dict.fromkeys([*records, *ids]))
        alive: dict[str, LiveLease] = {}
        for start in range(0, len(lease_ids), _BATCH_SIZE):
            batch = lease_ids[start : start + _BATCH_SIZE]
            selector_keys = {id: _selector_keys(records[id].jws) if id in records else () for id in batch}
            keys_by_lease = await restoration.held(selector_keys)
            # Of leases that Kafka does not know (yet), Redis's own record gives the selector keys.
            redis_only = {
                id: _selector_keys(keys.stored.jws)
                for id, keys in keys_by_lease.items()
                if id not in records and keys.stored
            }
            selector_keys |= redis_only
            for id, keys in (keys_by_lease | await restoration.held(redis_only)).items():
                if keys.stored is not None and keys.stored.status not in TERMINAL:
                    alive[id] = LiveLease.of(keys.stored)
                for difference in _differences(
                    id, records.get(id), keys, selector_keys[id], unpublished, now_ms, self.record_keep_ms
                ):
                    yield difference
        async for difference in self._uncounted(restoration, records, now_ms):
            yield difference
        revocations = await read_revocations(self.settings, self.directory, self.trust)
        async for stray in restoration.survey(
            alive, KafkaKnowledge(fold, records, revocations), now_ms
        ).strays():
            yield LeaseDifference(stray.about, stray.what, stray.wanted, stray.found)
        fences = revocations.fences(now_ms - FENCE_KEEP_MS)
        for shard, in_redis in enumerate(await restoration.fences()):
            for key, before_ms in fences.items():
                if in_redis.get(key, 0) < before_ms:
                    about = f"{key} in shard {shard}"
                    yield LeaseDifference(about, "unfenced", str(before_ms), str(in_redis.get(key, "")))
            for key, before_ms in in_redis.items():
                if not _is_rightly_fenced(key, before_ms, fences.get(key, 0), revocations, now_ms):
                    about = f"{key} in shard {shard}"
                    yield LeaseDifference(about, "overfenced", str(fences.get(key, "")), str(before_ms))
        # Kafka may keep revocations for longer than Redis remembers them.
        since_ms = now_ms - SELECTOR_KEEP_MS + SLACK_MS
        first = {
            id: revocation.at
            for id, revocation in revocations.by_id.items()
            if revocation.at.appended_at_ms > since_ms
        }
        positions = await restoration.first_seen_positions(list(first))
        for id, at in first.items():
            if positions.get(id) != at:
                yield LeaseDifference(
                    id,
                    "unseen",
                    _coordinates_text(at),
                    _coordinates_text(positions[id]) if id in positions else "",
                )

    async def _uncounted(
        self, restoration: Restoration, records: Mapping[str, HighestRecord], now_ms: int
    ) -> AsyncIterator[LeaseDifference]:
        granted = (
            parse(record.jws).unverified_claims(Lease) for record in records.values() if record.granted
        )
        uses = [
            use for record in granted if record.iat * 1000 > now_ms - GRANT_KEEP_MS for use in uses_of(record)
        ]
        for start in range(0, len(uses), _BATCH_SIZE):
            batch = uses[start : start + _BATCH_SIZE]
            for (grant_id, lease_id), is_counted in zip(batch, await restoration.counted(batch), strict=True):
                if not is_counted:
                    yield LeaseDifference(f"{lease_id} on grant {grant_id}", "uncounted", "named", "")

    async def _verified_records(
        self, restoration: Restoration, fold: LeaseFold, new_fold: Callable[..., LeaseFold]
    ) -> dict[str, HighestRecord]:
        """The highest records that verify. A terminal record that Redis has too is not verified."""
        to_verify: dict[str, HighestRecord] = {}
        ids = list(fold.highest)
        for start in range(0, len(ids), _BATCH_SIZE):
            batch = ids[start : start + _BATCH_SIZE]
            for id, keys in (await restoration.held(dict.fromkeys(batch, ()))).items():
                record = fold.highest[id]
                if keys.stored is None or keys.stored.jws != record.jws or record.status not in TERMINAL:
                    to_verify[id] = record
        verified = {id: record for id, record in fold.highest.items() if id not in to_verify}
        async for leases in verify_records(
            self.settings, self.trust, self.clock, to_verify, fold.contested, new_fold
        ):
            for lease in leases:
                claims = lease.claims
                record = HighestRecord(
                    claims.seq, claims.status, lease.jws.encode(), granted=claims.grants is not None
                )
                verified[lease.claims.lease_id] = record
        return verified


def _differences(
    id: str,
    record: HighestRecord | None,
    keys: LeaseKeys,
    selector_keys: Sequence[str],
    unpublished: set[tuple[str, int]],
    now_ms: int,
    record_keep_ms: int,
) -> Iterator[LeaseDifference]:
    stored = keys.stored
    redis = f"{stored.status} {stored.seq}" if stored else ""
    if record is None:
        if stored is None or (id, stored.seq) not in unpublished:
            yield LeaseDifference(id, "unknown", "", redis)
        if stored is not None:
            yield from _inconsistent(id, "", keys, selector_keys, now_ms, record_keep_ms)
        return
    kafka = _record_text(record)
    if stored is None:
        if not _is_long_over(record, now_ms - record_keep_ms):
            yield LeaseDifference(id, "missing", kafka, "")
        return
    if stored.seq < record.seq:
        yield LeaseDifference(id, "behind", kafka, redis)
    elif stored.seq > record.seq:
        if (id, stored.seq) not in unpublished:
            yield LeaseDifference(id, "ahead", kafka, redis)
    elif stored.jws != record.jws and not _same_statement(stored.jws, record.jws):
        yield LeaseDifference(id, "differs", kafka, redis)
    yield from _inconsistent(id, kafka, keys, selector_keys, now_ms, record_keep_ms)


def _inconsistent(
    id: str, kafka: str, keys: LeaseKeys, selector_keys: Sequence[str], now_ms: int, record_keep_ms: int
) -> Iterator[LeaseDifference]:
    for misplaced in _misplaced(keys, selector_keys, now_ms):
        yield LeaseDifference(id, "misplaced", kafka, misplaced)
    for mistimed in _mistimed(keys, now_ms, record_keep_ms):
        yield LeaseDifference(id, "mistimed", kafka, mistimed)


def _misplaced(keys: LeaseKeys, selector_keys: Sequence[str], now_ms: int) -> Iterator[str]:
    """Sets and indexes that a lease is in and should not be, or the other way round, by its record in Redis."""
    stored = keys.stored
    assert stored is not None
    over = stored.status not in ("minting", "active", "ending")
    is_due, is_live = keys.deadline_ms is not None, keys.live_until_ms is not None
    if over and (is_due or keys.claimed or is_live or keys.selector_keys):
        yield "ended, and still to be ended"
    elif not over and not (is_due or keys.claimed):
        yield "no revoker will come to it"
    elif not over and is_due and (keys.claimed or stored.status != "active"):
        yield "due, and taken by somebody already"
    elif keys.deadline_ms is not None and keys.deadline_ms != stored.deadline_ms:
        yield "due at another time than its deadline"
    if not over and keys.selector_keys != frozenset(selector_keys):
        yield "not found by: " + ", ".join(sorted(set(selector_keys) - keys.selector_keys))
    if stored.status == "active" and not is_live and stored.deadline_ms > now_ms:
        yield "active, and its credential is refused"
    if stored.status in ("minting", "ending") and is_live:
        yield "cut, or not issued yet, and not refused by its live key"


def _mistimed(keys: LeaseKeys, now_ms: int, record_keep_ms: int) -> Iterator[str]:
    """Keys of a lease that expire at another time than they should."""
    stored, kept_until_ms = keys.stored, keys.kept_until_ms
    assert stored is not None
    if keys.live_until_ms not in (None, stored.deadline_ms):
        yield f"live until {_expiry_text(keys.live_until_ms)}, and due at {stored.deadline_ms}"
    if stored.status in TERMINAL and kept_until_ms is not None:
        # It is kept from its end, or from its deadline if that is later.
        latest_ms = max(now_ms, stored.deadline_ms) + record_keep_ms + SLACK_MS
        if not stored.deadline_ms + record_keep_ms <= kept_until_ms <= latest_ms:
            yield f"its record is kept until {_expiry_text(kept_until_ms)}"


def _expiry_text(at_ms: int | None) -> str:
    return "for ever" if at_ms == -1 else str(at_ms)


def _is_rightly_fenced(
    selector_key: str, before_ms: int, expected_ms: int, revocations: RevocationIndex, now_ms: int
) -> bool:
    """Whether a fence has a cause.

    Changed records of agents, tasks and users fence as well, and need not be on Kafka any more. A cut has only one
    cause: a selector that is on Kafka, or was within `FENCE_KEEP_MS`.
    """
    if before_ms <= expected_ms:
        return True
    if before_ms > now_ms + _LATER_MS:
        return False
    was_kept = now_ms - before_ms < FENCE_KEEP_MS
    return not (is_cut_key(selector_key) and was_kept) or before_ms in revocations.claimed_at_ms


def _coordinates_text(at: Coordinates) -> str:
    return f"{at.topic}/{at.partition}@{at.offset}"


def _selector_keys(jws: bytes) -> tuple[str, ...]:
    try:
        return own_selector_keys(parse(jws).unverified_claims(Lease))  # compared, not believed
    except InvalidMessageError:
        return ()


def _same_statement(jws: bytes, other_jws: bytes) -> bool:
    """Whether two records differ only in signer and epoch."""
    try:
        first, second = (
            parse(each).unverified_claims(Lease) for each in (jws, other_jws)
        )  # compared, not believed
    except InvalidMessageError:
        return False
    return statement(first) == statement(second)


def _is_long_over(record: HighestRecord, before_ms: int) -> bool:
    """Whether a lease ended so long ago that Redis need not hold its record any more."""
    summary = summarise(record.jws)
    return summary is not None and summary.status in TERMINAL and summary.deadline * 1000 < before_ms


def _record_text(record: HighestRecord) -> str:
    lease = parse(record.jws).unverified_claims(Lease)  # shown to a person
    return f"{lease.status} {lease.seq}" + (", over" if is_over(lease) else "")


@contextlib.asynccontextmanager
async def checking(settings: ServiceSettings, clock: Clock, *, record_keep_ms: int) -> AsyncIterator[Checker]:
    """A checker, after its trust bundle and tables were read from Kafka. Raises UnavailableError."""
    trust = TrustStore(settings.trust_domain, settings.trust_root)

    def on_trust(records: Sequence[Received]) -> None:
        for record in records:
            apply_bundle(trust, record, clock)

    directory = Directory(trust, clock, grace_ms=None, on_alarm=lambda alarm: None)
    async with Follower(settings, [TRUST], on_trust) as bundles:
        await wait_complete(bundles)
        trust.require()
        async with Follower(settings, list(TABLES), directory.on_records) as tables:
            await wait_complete(tables)
            yield Checker(settings, directory, trust, clock, record_keep_ms=record_keep_ms)
