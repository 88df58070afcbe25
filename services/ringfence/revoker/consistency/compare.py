"""Compares Redis with Kafka and changes nothing: `ringfence rebuild --check`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
"""How far beyond our own clock a fence is wrong: it stands for the time of a revocation."""

What = Literal[
    "missing", "behind", "ahead", "differs", "unknown", "misplaced",
    "unfenced", "overfenced", "unseen", "uncounted", "stray", "miscounted", "mistimed", "stuck",
]  # fmt: skip
"""Kinds of differences.

- `missing`: Redis has no record of a lease. `behind`, `ahead`: it has another `seq`, or is of an older epoch.
- `differs`: its record of the same `seq` says something else. `unknown`: Kafka does not know the lease.
- `misplaced`: the lease is not in the sets and indexes that its status requires.
- `unfenced`: the fence of a revocation is missing. `overfenced`: a fence refuses requests that nobody revoked.
- `unseen`: it is not known where a revocation was seen first, so that a repeat of it would cover more.
- `uncounted`: a lease does not count for the grant that it names.
- `stray`: something in Redis follows from no record there.
- `miscounted`: the number of leases of an agent with a sponsor or user is wrong.
- `mistimed`: a key expires at another time than it should.
- `stuck`: a record waits to be published, and no sweeper comes to it.
"""


@dataclass(frozen=True, slots=True)
class LeaseDifference:
    """One difference between Redis and Kafka.

    `about`: a lease, a lease and a grant, a selector key and a shard, a revocation, `epoch`, or an entry of a key of a
    shard.
    """

    about: str
    what: What
    kafka: str
    redis: str


class Checker:
    """Finds differences. It only reads, so it needs no signing key."""

    def __init__(
        self,
        settings: ServiceSettings,
        directory: Directory,
        trust: TrustStore,
        clock: Clock,
        *,
        record_keep_ms: int,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._trust = trust
        self._clock = clock
        self._record_keep_ms = record_keep_ms

    async def differences(self) -> list[LeaseDifference]:
        """Lasting differences: those found twice, `AGAIN_S` apart. Others were under way. Raises UnavailableError."""
        found = await self._look()
        if found:
            await asyncio.sleep(AGAIN_S)
            found = {about: one for about, one in (await self._look()).items() if about in found}
        return sorted(found.values(), key=lambda one: (one.what, one.about))

    async def _look(self) -> dict[tuple[str, What], LeaseDifference]:
        restoration = Restoration(self._settings)
        try:
            await restoration.look()
            return {(one.about, one.what): one async for one in self._compared(restoration)}
        finally:
            await restoration.close()

    async def _compared(self, restoration: Restoration) -> AsyncIterator[LeaseDifference]:
        now_ms = self._clock.now_ms()
        ids = await restoration.ids()
        waiting = await restoration.waiting()

        new_fold = partial(LeaseFold, trust=self._trust, over_before_s=(now_ms - self._record_keep_ms) / 1000)
        fold = new_fold(held=frozenset(ids))
        await read_leases(self._settings, fold)
        if not restoration.complete:
            yield LeaseDifference("epoch", "missing", str(fold.epochs.highest()), "")
        for epoch in sorted(restoration.epochs):
            if number_of(epoch) < fold.epochs.highest():
                yield LeaseDifference("epoch", "behind", str(fold.epochs.highest()), epoch)
        records = await self._verified_records(restoration, fold, new_fold)
        wanted = list(dict.fromkeys([*records, *ids]))
        alive: dict[str, LiveLease] = {}
        for start in range(0, len(wanted), _BATCH_SIZE):
            some = wanted[start : start + _BATCH_SIZE]
            selector_keys = {id: _selector_keys(records[id].jws) if id in records else () for id in some}
            found = await restoration.held(selector_keys)
            # Of leases that Kafka does not know (yet), Redis's own record gives the selector keys.
            alone = {
                id: _selector_keys(held.stored.jws)
                for id, held in found.items()
                if id not in records and held.stored
            }
            selector_keys |= alone
            for id, held in (found | await restoration.held(alone)).items():
                if held.stored is not None and held.stored.status not in TERMINAL:
                    alive[id] = LiveLease.of(held.stored)
                for one in _differences(
                    id, records.get(id), held, selector_keys[id], waiting, now_ms, self._record_keep_ms
                ):
                    yield one
        async for one in self._uncounted(restoration, records, now_ms):
            yield one
        revocations = await read_revocations(self._settings, self._directory, self._trust)
        async for stray in restoration.survey(
            alive, KafkaKnowledge(fold, records, revocations), now_ms
        ).strays():
            yield LeaseDifference(stray.about, stray.what, stray.wanted, stray.found)
        fences = revocations.fences(now_ms - FENCE_KEEP_MS)
        for shard, known in enumerate(await restoration.fences()):
            for key, before_ms in fences.items():
                if known.get(key, 0) < before_ms:
                    about = f"{key} in shard {shard}"
                    yield LeaseDifference(about, "unfenced", str(before_ms), str(known.get(key, "")))
            for key, before_ms in known.items():
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
        seen = await restoration.first_seen_positions(list(first))
        for id, at in first.items():
            if seen.get(id) != at:
                yield LeaseDifference(
                    id, "unseen", _coordinates_text(at), _coordinates_text(seen[id]) if id in seen else ""
                )

    async def _uncounted(
        self, restoration: Restoration, records: Mapping[str, HighestRecord], now_ms: int
    ) -> AsyncIterator[LeaseDifference]:
        granted = (parse(one.jws).unverified_claims(Lease) for one in records.values() if one.granted)
        uses = [use for one in granted if one.iat * 1000 > now_ms - GRANT_KEEP_MS for use in uses_of(one)]
        for start in range(0, len(uses), _BATCH_SIZE):
            some = uses[start : start + _BATCH_SIZE]
            for (grant_id, lease_id), is_counted in zip(some, await restoration.counted(some), strict=True):
                if not is_counted:
                    yield LeaseDifference(f"{lease_id} on grant {grant_id}", "uncounted", "named", "")

    async def _verified_records(
        self, restoration: Restoration, fold: LeaseFold, new_fold: Callable[..., LeaseFold]
    ) -> dict[str, HighestRecord]:
        """The highest records that verify. A terminal record that Redis has too is not verified."""
        to_verify: dict[str, HighestRecord] = {}
        ids = list(fold.highest)
        for start in range(0, len(ids), _BATCH_SIZE):
            some = ids[start : start + _BATCH_SIZE]
            for id, held in (await restoration.held(dict.fromkeys(some, ()))).items():
                record = fold.highest[id]
                if held.stored is None or held.stored.jws != record.jws or record.status not in TERMINAL:
                    to_verify[id] = record
        found = {id: record for id, record in fold.highest.items() if id not in to_verify}
        async for leases in verify_records(
            self._settings, self._trust, self._clock, to_verify, fold.contested, new_fold
        ):
            for one in leases:
                claims = one.claims
                record = HighestRecord(
                    claims.seq, claims.status, one.jws.encode(), granted=claims.grants is not None
                )
                found[one.claims.lease_id] = record
        return found


def _differences(
    id: str,
    record: HighestRecord | None,
    held: LeaseKeys,
    selector_keys: Sequence[str],
    waiting: set[tuple[str, int]],
    now_ms: int,
    record_keep_ms: int,
) -> Iterator[LeaseDifference]:
    stored = held.stored
    redis = f"{stored.status} {stored.seq}" if stored else ""
    if record is None:
        if stored is None or (id, stored.seq) not in waiting:
            yield LeaseDifference(id, "unknown", "", redis)
        if stored is not None:
            yield from _inconsistent(id, "", held, selector_keys, now_ms, record_keep_ms)
        return
    kafka = _record_text(record)
    if stored is None:
        if not _is_long_over(record, now_ms - record_keep_ms):
            yield LeaseDifference(id, "missing", kafka, "")
        return
    if stored.seq < record.seq:
        yield LeaseDifference(id, "behind", kafka, redis)
    elif stored.seq > record.seq:
        if (id, stored.seq) not in waiting:
            yield LeaseDifference(id, "ahead", kafka, redis)
    elif stored.jws != record.jws and not _say_the_same(stored.jws, record.jws):
        yield LeaseDifference(id, "differs", kafka, redis)
    yield from _inconsistent(id, kafka, held, selector_keys, now_ms, record_keep_ms)


def _inconsistent(
    id: str, kafka: str, held: LeaseKeys, selector_keys: Sequence[str], now_ms: int, record_keep_ms: int
) -> Iterator[LeaseDifference]:
    """Keys that do not fit the record that Redis has of a lease."""
    for place in _misplaced(held, selector_keys, now_ms):
        yield LeaseDifference(id, "misplaced", kafka, place)
    for when in _mistimed(held, now_ms, record_keep_ms):
        yield LeaseDifference(id, "mistimed", kafka, when)


def _misplaced(held: LeaseKeys, selector_keys: Sequence[str], now_ms: int) -> Iterator[str]:
    """Sets and indexes that a lease is in and should not be, or the other way round, by its record in Redis."""
    stored = held.stored
    assert stored is not None
    over = stored.status not in ("minting", "active", "ending")
    is_due, is_live = held.deadline_ms is not None, held.live_until_ms is not None
    if over and (is_due or held.claimed or is_live or held.selector_keys):
        yield "ended, and still to be ended"
    elif not over and not (is_due or held.claimed):
        yield "no revoker will come to it"
    elif not over and is_due and (held.claimed or stored.status != "active"):
        yield "due, and taken by somebody already"
    elif held.deadline_ms is not None and held.deadline_ms != stored.deadline_ms:
        yield "due at another time than its deadline"
    if not over and held.selector_keys != frozenset(selector_keys):
        yield "not found by: " + ", ".join(sorted(set(selector_keys) - held.selector_keys))
    if stored.status == "active" and not is_live and stored.deadline_ms > now_ms:
        yield "active, and its credential is refused"
    if stored.status in ("minting", "ending") and is_live:
        yield "cut, or not issued yet, and not refused by its live key"


def _mistimed(held: LeaseKeys, now_ms: int, record_keep_ms: int) -> Iterator[str]:
    """Keys of a lease that expire at another time than they should."""
    stored, kept_until_ms = held.stored, held.kept_until_ms
    assert stored is not None
    if held.live_until_ms not in (None, stored.deadline_ms):
        yield f"live until {_when(held.live_until_ms)}, and due at {stored.deadline_ms}"
    if stored.status in TERMINAL and kept_until_ms is not None:
        # It is kept from its end, or from its deadline if that is later.
        latest_ms = max(now_ms, stored.deadline_ms) + record_keep_ms + SLACK_MS
        if not stored.deadline_ms + record_keep_ms <= kept_until_ms <= latest_ms:
            yield f"its record is kept until {_when(kept_until_ms)}"


def _when(at_ms: int | None) -> str:
    return "for ever" if at_ms == -1 else str(at_ms)


def _is_rightly_fenced(
    selector_key: str, before_ms: int, wanted_ms: int, revocations: RevocationIndex, now_ms: int
) -> bool:
    """Whether a fence has a cause.

    Changed records of agents, tasks and users fence as well, and need not be on Kafka any more. A cut comes of a
    selector alone: one that is on Kafka, or was until a while ago.
    """
    if before_ms <= wanted_ms:
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


def _say_the_same(one: bytes, other: bytes) -> bool:
    """Whether two records differ only in signer and epoch."""
    try:
        first, second = (
            parse(jws).unverified_claims(Lease) for jws in (one, other)
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
