"""Kafka's view of leases and revocations: `lease` and `revocation.request`, read whole. Redis is rebuilt from it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.base import Topic
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.topics import LEASE, REVOCATION_REQUEST
from ringfence.model.lease_store import Knowledge, SignedLease
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.lifecycle import ALL_LEASES, cut_key, is_covered, selector_key_of, selector_keys
from ringfence.model.leases.revocations import Revocation, check_revocation, verify_revocation
from ringfence.model.leases.unverified_records import (
    may_have_selector,
    summarise,
    unverified_lease,
    unverified_revocation_id,
    verify_lease,
)
from ringfence.model.records.directory import Directory
from ringfence.model.verdict import Allowed

log = logging.getLogger(__name__)

_PAUSE_EVERY = 100


@dataclass(frozen=True, slots=True)
class HighestRecord:
    """The record of a lease with the highest `seq` on Kafka, not verified yet."""

    seq: int
    status: str
    jws: bytes
    epoch: str | None = None
    granted: bool = False
    """Whether it claims to be issued on a grant."""


class LeaseFold:
    """Folds the records of `lease`: the highest `seq` of each counts, of equal ones the first. Void ones do not count.

    Of a lease that ended so long ago that Redis need not hold it, only the id is remembered, unless it is in `needed`.
    """

    def __init__(
        self,
        *,
        trust: TrustStore,
        over_before_s: float,
        needed: Collection[str] = (),
        counts: Callable[[str, bytes], bool] = lambda lease_id, jws: True,
    ) -> None:
        """Args:
            trust: verifies the markers of epochs.
            over_before_s: leases that have ended, with deadlines before then, are not needed any more.
            needed: leases that Redis holds as alive, or whose records are needed for another reason.
            counts: whether a record of a lease counts at all.
        """  # fmt: skip
        self.highest: dict[str, HighestRecord] = {}
        self.contested: set[str] = set()
        """Leases with an unverified end, and a later record that contradicts it."""
        self.epochs = Epochs(trust)
        self._over_before_s = over_before_s
        self._needed = needed
        self._counts = counts
        self._over: set[bytes] = set()

    def knows(self, lease_id: str) -> bool:
        """Whether a lease has any record that counts, also if it ended long ago."""
        return lease_id in self.highest or bytes.fromhex(lease_id.replace("-", "")) in self._over

    def add(self, records: Iterable[Received]) -> None:
        for record in records:
            self._add(record)

    def _add(self, record: Received) -> None:
        if self.epochs.took(record):
            return
        summary = summarise(record.value)
        # Tombstones are skipped too: they are unsigned, and follow the end of a lease.
        if summary is None or summary.lease_id != record.key:
            return
        if self.epochs.is_void(record, summary.epoch):
            return
        lease_id = summary.lease_id
        highest = self.highest.get(lease_id)
        if (highest is not None and highest.seq >= summary.seq) or not self._counts(lease_id, record.value):
            return
        ended = summary.status in TERMINAL
        raw = bytes.fromhex(lease_id.replace("-", ""))
        if raw in self._over:
            if not ended:
                self.contested.add(lease_id)
        elif (
            ended
            and highest is None
            and summary.deadline < self._over_before_s
            and lease_id not in self._needed
        ):
            self._over.add(raw)
        else:
            self.highest[lease_id] = HighestRecord(
                summary.seq, summary.status, record.value, summary.epoch, summary.granted
            )


class RevocationIndex:
    """The revocations with selectors that count, each by its first record, indexed by selector key."""

    def __init__(
        self, revocations: Iterable[Revocation] = (), claimed: Iterable[tuple[str, int]] = ()
    ) -> None:
        """`claimed`: id and append time, in ms, of every record that claims to be a selector, verified or not."""
        self.by_id: dict[str, Revocation] = {}
        claimed = list(claimed)
        self.claimed = frozenset(id for id, _ in claimed)
        """The ids of all selectors on the topic, followed or not."""
        self.claimed_at_ms = frozenset(at_ms for _, at_ms in claimed)
        for revocation in revocations:
            first = self.by_id.get(revocation.id)
            if first is None or revocation.at.appended_at_ms < first.at.appended_at_ms:
                self.by_id[revocation.id] = revocation
        self._by_selector_key: dict[str, list[Revocation]] = {}
        for revocation in sorted(self.by_id.values(), key=lambda revocation: revocation.at.appended_at_ms):
            if revocation.claims.selector is not None:
                self._by_selector_key.setdefault(selector_key_of(revocation.claims.selector), []).append(
                    revocation
                )

    def fences(self, since_ms: int) -> dict[str, int]:
        """The fences of selectors first seen since `since_ms`: `issued_before` in ms by selector key."""
        last = {
            selector_key: revocations[-1].at.appended_at_ms
            for selector_key, revocations in self._by_selector_key.items()
        }
        fences = {
            selector_key: before_ms for selector_key, before_ms in last.items() if before_ms >= since_ms
        }
        return fences | {cut_key(selector_key): before_ms for selector_key, before_ms in fences.items()}

    def covering(self, lease: Lease) -> Revocation | None:
        """The first revocation that covers a lease, or None."""
        revocations = [
            revocation
            for selector_key in (*selector_keys(lease), ALL_LEASES)
            for revocation in self._by_selector_key.get(selector_key, ())
            if is_covered(lease, revocation.at.appended_at_ms)
        ]
        return min(revocations, key=lambda revocation: revocation.at.appended_at_ms, default=None)


class KafkaKnowledge(Knowledge):
    """Kafka's knowledge of leases, grants and revocations, for the survey of Redis."""

    def __init__(
        self, fold: LeaseFold, records: Mapping[str, HighestRecord], revocations: RevocationIndex
    ) -> None:
        """`records`: the highest records that count."""
        self._fold = fold
        self._records = records
        self._revocations = revocations

    def knows(self, lease_id: str) -> bool:
        return self._fold.knows(lease_id)

    def has_revocation(self, id: str) -> bool:
        return id in self._revocations.claimed

    def names_grant(self, lease_id: str, grant_id: str) -> bool | None:
        record = self._records.get(lease_id)
        if record is None:
            return None
        lease = unverified_lease(record.jws) if record.granted else None
        return lease is not None and grant_id in (lease.grants or ())


async def read_leases(
    settings: ServiceSettings,
    fold: LeaseFold,
    while_following: Callable[[Follower], Awaitable[None]] | None = None,
) -> None:
    """Read `lease` from its beginning to its present end, and go on reading during `while_following`.

    Raises UnavailableError.
    """
    async with Follower(settings, [LEASE], fold.add) as follower:
        await wait_complete(follower)
        if while_following is not None:
            await while_following(follower)


async def read_revocations(
    settings: ServiceSettings, directory: Directory, trust: TrustStore
) -> RevocationIndex:
    """All valid revocations with selectors, from the whole of `revocation.request`. Raises UnavailableError."""
    selectors: list[Received] = []
    await _read_whole(
        settings, REVOCATION_REQUEST, lambda records: selectors.extend(filter(may_have_selector, records))
    )
    revocations = []
    claimed: list[tuple[str, int]] = []
    for number, record in enumerate(selectors):
        if number % _PAUSE_EVERY == 0:
            await asyncio.sleep(0)
        if (id := unverified_revocation_id(record.value)) is not None:
            claimed.append((id, record.appended_at_ms))
        try:
            revocation = verify_revocation(record, directory, trust)
        except InvalidMessageError:
            continue  # its handler sends it to the dead letters
        if revocation.claims.selector is None:
            continue
        if isinstance(check_revocation(revocation, None, directory), Allowed):
            revocations.append(revocation)
    return RevocationIndex(revocations, claimed)


async def verify_records(
    settings: ServiceSettings,
    trust: TrustStore,
    clock: Clock,
    records: Mapping[str, HighestRecord],
    contested: Collection[str],
    new_fold: Callable[..., LeaseFold],
) -> AsyncIterator[list[SignedLease]]:
    """Verify the records of leases; yields them in batches.

    If a record does not verify, or a lease is contested, the topic is read again for that lease's highest valid record.
    """
    unverified = set(contested)
    async for leases, broken in _verified(trust, clock, records):
        unverified |= broken
        yield leases
    if not unverified:
        return
    log.error(
        "%d leases have records on their topic that are signed by nobody who may: those do not count",
        len(unverified),
    )
    fold = new_fold(
        needed=unverified,
        counts=lambda lease_id, jws: lease_id in unverified and _verifies(lease_id, jws, trust, clock),
    )
    await read_leases(settings, fold)
    async for leases, _ in _verified(trust, clock, fold.highest):
        yield leases


async def _verified(
    trust: TrustStore, clock: Clock, records: Mapping[str, HighestRecord]
) -> AsyncIterator[tuple[list[SignedLease], set[str]]]:
    """In batches: the records that verify, and the ids of the others. Other tasks run in between."""
    ids = list(records)
    for start in range(0, len(ids), _PAUSE_EVERY):
        leases: list[SignedLease] = []
        broken: set[str] = set()
        for lease_id in ids[start : start + _PAUSE_EVERY]:
            jws = records[lease_id].jws
            if (lease := _verify(lease_id, jws, trust, clock)) is not None:
                leases.append(SignedLease(lease, jws.decode("ascii")))
            else:
                broken.add(lease_id)
        await asyncio.sleep(0)
        yield leases, broken


def _verifies(lease_id: str, jws: bytes, trust: TrustStore, clock: Clock) -> bool:
    return _verify(lease_id, jws, trust, clock) is not None


def _verify(lease_id: str, jws: bytes, trust: TrustStore, clock: Clock) -> Lease | None:
    try:
        lease = verify_lease(jws, trust, clock)
    except InvalidMessageError:
        return None
    return lease if lease.lease_id == lease_id else None


async def _read_whole(
    settings: ServiceSettings, topic: Topic[Any], on_records: Callable[[Sequence[Received]], None]
) -> None:
    async with Follower(settings, [topic], on_records) as follower:
        await wait_complete(follower)


async def wait_complete(follower: Follower) -> None:
    """Wait until a follower has read all records from before its start. Raises UnavailableError if it cannot."""
    complete = asyncio.create_task(follower.complete.wait())
    try:
        while not complete.done():
            await asyncio.wait([complete], timeout=0.2)
            if follower.failed:
                raise UnavailableError(follower.failed)
    finally:
        complete.cancel()
