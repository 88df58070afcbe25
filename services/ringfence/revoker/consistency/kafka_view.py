"""What Kafka knows of leases and their revocations, read whole: what Redis is rebuilt from."""

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
from ringfence.model.leases.revocations import Revocation, objection, verify_revocation
from ringfence.model.leases.unverified import (
    may_have_selector,
    summarise,
    unverified_lease,
    unverified_revocation_id,
)
from ringfence.model.leases.verification import verify_lease
from ringfence.model.records.directory import Directory

log = logging.getLogger(__name__)

_PAUSE_EVERY = 100


@dataclass(frozen=True, slots=True)
class HighestRecord:
    """The highest record of a lease on Kafka, not verified yet."""

    seq: int
    status: str
    jws: bytes
    epoch: str | None = None
    granted: bool = False
    """Whether it says that it was issued on a grant."""


class LeaseFold:
    """Folds the records of `lease` by the highest `seq`; of two that are equal, the first counts. Void ones do not.

    What ended so long ago that Redis need not hold it is remembered by its id alone, unless Redis thinks it alive.
    """

    def __init__(
        self,
        *,
        trust: TrustStore,
        over_before_s: float,
        held: Collection[str] = (),
        counts: Callable[[str, bytes], bool] = lambda lease_id, jws: True,
    ) -> None:
        """Args:
            trust: who may say that an epoch begins.
            over_before_s: leases that have ended, and whose deadlines were before, are not needed any more.
            held: leases that Redis thinks alive, or of which every record is wanted for another reason.
            counts: whether a record of a lease counts at all.
        """  # fmt: skip
        self.highest: dict[str, HighestRecord] = {}
        self.contested: set[str] = set()
        """Leases whose end nobody has verified, and of which a record came after it that says otherwise."""
        self.epochs = Epochs(trust)
        self._over_before_s = over_before_s
        self._held = held
        self._counts = counts
        self._over: set[bytes] = set()

    def knows(self, lease_id: str) -> bool:
        """Whether a lease has any record that counts, also one that ended long ago."""
        return lease_id in self.highest or bytes.fromhex(lease_id.replace("-", "")) in self._over

    def add(self, records: Iterable[Received]) -> None:
        """Take records in, in any order."""
        for record in records:
            self._add(record)

    def _add(self, record: Received) -> None:
        if self.epochs.took(record):
            return
        summary = summarise(record.value)
        # Tombstones are passed over too: nobody signs them, and they follow upon what is over anyway.
        if summary is None or summary.lease_id != record.key:
            return
        if self.epochs.is_void(record, summary.epoch):
            return
        lease_id = summary.lease_id
        known = self.highest.get(lease_id)
        if (known is not None and known.seq >= summary.seq) or not self._counts(lease_id, record.value):
            return
        ended = summary.status in TERMINAL
        raw = bytes.fromhex(lease_id.replace("-", ""))
        if raw in self._over:
            if not ended:
                self.contested.add(lease_id)
        elif (
            ended and known is None and summary.deadline < self._over_before_s and lease_id not in self._held
        ):
            self._over.add(raw)
        else:
            self.highest[lease_id] = HighestRecord(
                summary.seq, summary.status, record.value, summary.epoch, summary.granted
            )


class Revocations:
    """The selectors of those who may give them, each by its first record."""

    def __init__(self, orders: Iterable[Revocation] = (), claimed: Iterable[tuple[str, int]] = ()) -> None:
        """`claimed`: id and append time, in ms, of all that claims to be a selector, nothing of it verified."""
        self.orders: dict[str, Revocation] = {}
        """By their ids."""
        claimed = list(claimed)
        self.claimed = frozenset(id for id, _ in claimed)
        """What is on the topic at all, followed or not."""
        self.claimed_at_ms = frozenset(at_ms for _, at_ms in claimed)
        for order in orders:
            first = self.orders.get(order.id)
            if first is None or order.at.appended_at_ms < first.at.appended_at_ms:
                self.orders[order.id] = order
        self._by_mark: dict[str, list[Revocation]] = {}
        for order in sorted(self.orders.values(), key=lambda order: order.at.appended_at_ms):
            if order.claims.selector is not None:
                self._by_mark.setdefault(selector_key_of(order.claims.selector), []).append(order)

    def fences(self, since_ms: int) -> dict[str, int]:
        """Marks by `issued_before` in ms, of the selectors that were first seen since a moment."""
        last = {selector_key: orders[-1].at.appended_at_ms for selector_key, orders in self._by_mark.items()}
        fences = {
            selector_key: before_ms for selector_key, before_ms in last.items() if before_ms >= since_ms
        }
        return fences | {cut_key(selector_key): before_ms for selector_key, before_ms in fences.items()}

    def covering(self, lease: Lease) -> Revocation | None:
        """The order that ends a lease, the first of several, or None."""
        found = [
            order
            for selector_key in (*selector_keys(lease), ALL_LEASES)
            for order in self._by_mark.get(selector_key, ())
            if is_covered(lease, order.at.appended_at_ms)
        ]
        return min(found, key=lambda order: order.at.appended_at_ms, default=None)


class Known(Knowledge):
    """What Kafka knows that Redis's own records do not say."""

    def __init__(
        self, fold: LeaseFold, records: Mapping[str, HighestRecord], revocations: Revocations
    ) -> None:
        """`records`: those that count."""
        self._fold = fold
        self._records = records
        self._revocations = revocations

    def knows(self, lease_id: str) -> bool:
        return self._fold.knows(lease_id)

    def is_order(self, id: str) -> bool:
        return id in self._revocations.claimed

    def names_grant(self, lease_id: str, grant_id: str) -> bool | None:
        record = self._records.get(lease_id)
        if record is None:
            return None
        lease = unverified_lease(record.jws) if record.granted else None
        return lease is not None and grant_id in (lease.grants or ())


async def read_leases(
    settings: ServiceSettings, fold: LeaseFold, then: Callable[[Follower], Awaitable[None]] | None = None
) -> None:
    """Read `lease` from its beginning to its present end, and what comes while `then` goes on with its follower.

    Raises UnavailableError.
    """
    async with Follower(settings, [LEASE], fold.add) as follower:
        await whole(follower)
        if then is not None:
            await then(follower)


async def read_revocations(settings: ServiceSettings, directory: Directory, trust: TrustStore) -> Revocations:
    """The selectors that count, from all of `revocation.request`. Raises UnavailableError."""
    selectors: list[Received] = []
    await _read(
        settings, REVOCATION_REQUEST, lambda records: selectors.extend(filter(may_have_selector, records))
    )
    orders = []
    claimed: list[tuple[str, int]] = []
    for number, record in enumerate(selectors):
        if number % _PAUSE_EVERY == 0:
            await asyncio.sleep(0)
        if (id := unverified_revocation_id(record.value)) is not None:
            claimed.append((id, record.appended_at_ms))
        try:
            order = verify_revocation(record, directory, trust)
        except InvalidMessageError:
            continue  # its handler buries it
        if order.claims.selector is not None and objection(order, None, directory) is None:
            orders.append(order)
    return Revocations(orders, claimed)


async def verified(
    settings: ServiceSettings,
    trust: TrustStore,
    clock: Clock,
    records: Mapping[str, HighestRecord],
    contested: Collection[str],
    fold_anew: Callable[..., LeaseFold],
) -> AsyncIterator[list[SignedLease]]:
    """These leases with their records verified, some at a time.

    Where a record does not hold, whoever wrote it, and where a lease is contested, the topic is read once more for the
    highest record of that lease that does.
    """
    wanted = set(contested)
    async for leases, broken in _verified(trust, clock, records):
        wanted |= broken
        yield leases
    if not wanted:
        return
    log.error(
        "%d leases have records on their topic that are signed by nobody who may: those do not count",
        len(wanted),
    )
    fold = fold_anew(
        held=wanted, counts=lambda lease_id, jws: lease_id in wanted and _holds(lease_id, jws, trust, clock)
    )
    await read_leases(settings, fold)
    async for leases, _ in _verified(trust, clock, fold.highest):
        yield leases


async def _verified(
    trust: TrustStore, clock: Clock, records: Mapping[str, HighestRecord]
) -> AsyncIterator[tuple[list[SignedLease], set[str]]]:
    """What holds, and the ids of what does not, some at a time: others get their turn in between."""
    ids = list(records)
    for start in range(0, len(ids), _PAUSE_EVERY):
        leases: list[SignedLease] = []
        broken: set[str] = set()
        for lease_id in ids[start : start + _PAUSE_EVERY]:
            jws = records[lease_id].jws
            if (lease := _opened(lease_id, jws, trust, clock)) is not None:
                leases.append(SignedLease(lease, jws.decode("ascii")))
            else:
                broken.add(lease_id)
        await asyncio.sleep(0)
        yield leases, broken


def _holds(lease_id: str, jws: bytes, trust: TrustStore, clock: Clock) -> bool:
    return _opened(lease_id, jws, trust, clock) is not None


def _opened(lease_id: str, jws: bytes, trust: TrustStore, clock: Clock) -> Lease | None:
    try:
        lease = verify_lease(jws, trust, clock)
    except InvalidMessageError:
        return None
    return lease if lease.lease_id == lease_id else None


async def _read(
    settings: ServiceSettings, topic: Topic[Any], on_records: Callable[[Sequence[Received]], None]
) -> None:
    async with Follower(settings, [topic], on_records) as follower:
        await whole(follower)


async def whole(follower: Follower) -> None:
    """Wait until a follower has read what there was when it started. Raises UnavailableError where it cannot."""
    complete = asyncio.create_task(follower.complete.wait())
    try:
        while not complete.done():
            await asyncio.wait([complete], timeout=0.2)
            if follower.failed:
                raise UnavailableError(follower.failed)
    finally:
        complete.cancel()
