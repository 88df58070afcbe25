"""How far the chains on `audit` have come: from their last checkpoints on, what follows is read and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from ringfence.audit.trail.handover_lookup import HandoverLookup, Mark, is_kept_for, mark_of
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.messages.audit import AuditCheckpoint, ChainLink
from ringfence.messages.base import typ_header
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT
from ringfence.model.audit_log.chain import Tip, event_of
from ringfence.model.audit_log.merkle import Hash, leaf_hash


@dataclass(slots=True)
class RecoveredChain:
    """One chain: how far it has come, how far that is signed, and the uids of its last events; of its partition where
    it ended, and where there is what is none of the chain.
    """

    tip: Tip
    signed_size: int
    recent: Sequence[str] = ()
    end: int = 0
    strays: Sequence[range] = ()
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Unsigned:
    """An event that no checkpoint covers."""

    link: ChainLink
    hashed: Hash
    mark: Mark
    offset: int
    judged: bool
    """Whether it can be told that somebody handed it over."""


class _Stood(NamedTuple):
    """A record, or several in a row that have no link."""

    places: range
    is_event: bool
    link: ChainLink | None = None
    hashed: Hash = b""
    """Of one with a link."""


@dataclass(slots=True)
class _Stretch:
    """The end of one partition."""

    signed: Tip
    start: int
    """The first offset that is still there in all of the partition."""
    end: int
    stood: list[_Stood] = field(default_factory=list)
    unsigned: list[_Unsigned] = field(default_factory=list)
    before: dict[Hash, tuple[str, Hash]] = field(default_factory=dict)
    """By the hash of each event: its uid, and the hash that it names as that of the event before."""

    def unlinked(self, offset: int, *, is_event: bool) -> None:
        """Take note of a record without a link. However many a stranger writes there, they take no memory."""
        first = offset
        if self.stood and self.stood[-1].link is None and self.stood[-1].is_event == is_event:
            first = self.stood.pop().places.start
        self.stood.append(_Stood(range(first, offset + 1), is_event))


async def recover_chains(
    settings: BusSettings,
    trust: TrustStore,
    *,
    remember: int,
    taken: Mapping[int, int],
    marks: Mapping[int, int],
    now_ms: int,
) -> dict[int, RecoveredChain]:
    """By partition of `audit`. Raises UnavailableError.

    Args:
        remember: how many uids of the last events to bring along, of each chain.
        taken: by partition of `audit.intake`, the offset after the last message whose events are chained.
        marks: by partition of `audit`, the offset before which no stray is looked for.
        now_ms: the time.

    What follows a checkpoint and does not fit, or was handed over by no audit service, is passed over: it is a fault,
    told to whoever verifies, and the chain goes on from what fits. It never goes back behind a checkpoint: where events
    are gone, those that come do not take their places. While somebody has a transaction open there nothing is taken for
    the end of a chain: what was chained behind that is not read yet.
    """
    async with Stretches(settings) as kafka:
        signed, handed_over = await _last_checkpoints(kafka, trust), HandoverLookup(kafka, trust, taken)
        found: dict[int, RecoveredChain] = {}
        for partition in await kafka.partitions(AUDIT):
            if not await kafka.is_settled(AUDIT, partition):
                raise UnavailableError(
                    f"somebody left a transaction open on partition {partition} of {AUDIT.what}: how far its chain has "
                    "come is not seen before that ends, which the broker sees to; nobody but audit should write there"
                )
            tip, mark = signed.get(str(partition), Tip()), marks.get(partition)
            stretch = await _read(kafka, partition, tip, remember, mark, now_ms)
            judged = {one.hashed: one.mark for one in stretch.unsigned if one.judged}
            one = _followed(stretch, str(partition), await handed_over.find(partition, judged))
            one.recent = _recent(stretch, one.tip.last, remember)
            one.end, one.strays = stretch.end, _strays(stretch, str(partition), one.tip, mark)
            found[partition] = one
        return found


async def _last_checkpoints(kafka: Stretches, trust: TrustStore) -> Mapping[str, Tip]:
    """The largest checkpoint of each tree that an audit service signed."""
    found: dict[str, Tip] = {}
    async for record in kafka.whole(AUDIT_CHECKPOINT):
        try:
            jws = parse(record.value)
            if jws.header.typ != typ_header(AuditCheckpoint):
                continue
            claims = verify(
                jws, AuditCheckpoint, trust.finder("audit", at_s=record.appended_at_ms / 1000),
                audience=trust.trust_domain,
            ).claims  # fmt: skip
            tip = Tip.of(claims)
        except (InvalidMessageError, ValueError):
            continue  # somebody else wrote it; whoever verifies the trail says so
        if claims.tree not in found or found[claims.tree].head.size < tip.head.size:
            found[claims.tree] = tip
    return found


async def _read(
    kafka: Stretches, partition: int, signed: Tip, remember: int, mark: int | None, now_ms: int
) -> _Stretch:
    """The last events, all that are not signed, and all that stands from `mark` on."""
    start, end = await kafka.bounds(AUDIT, partition)
    look_back = remember
    while True:
        begin = max(start, end - look_back)
        found, first = _Stretch(signed, start, end), None
        async for record in kafka.records(AUDIT, partition, begin, end):
            event = event_of(record.value)
            link = event.link if event is not None else None
            if event is None or link is None:
                found.unlinked(record.offset, is_event=event is not None)
                continue
            hashed, first = leaf_hash(record.value), first or link.seq
            found.stood.append(_Stood(range(record.offset, record.offset + 1), True, link, hashed))
            found.before[hashed] = event.uid, bytes.fromhex(link.prev)
            if link.seq > signed.head.size:
                known_by, judged = mark_of(orjson.loads(record.value)), is_kept_for(record, now_ms)
                found.unsigned.append(_Unsigned(link, hashed, known_by, record.offset, judged))
        # What is not signed yet may be more than is looked at.
        if begin == start or (
            first is not None and first <= signed.head.size + 1 and (mark is None or begin <= mark)
        ):
            return found
        look_back *= 8


def _followed(stretch: _Stretch, tree: str, handed_over: frozenset[Hash]) -> RecoveredChain:
    """How far it goes on from what is signed."""
    found = RecoveredChain(stretch.signed, stretch.signed.head.size)
    for one in stretch.unsigned:
        where = f"event {one.link.seq} at offset {one.offset}"
        if one.judged and one.hashed not in handed_over:
            found.faults.append(f"no audit service handed over {where}")
        elif not found.tip.fits(one.link, tree):
            found.faults.append(f"{where} does not follow event {found.tip.head.size}")
        else:
            found.tip = found.tip.grown(one.hashed)
    return found


def _recent(stretch: _Stretch, last: Hash, most: int) -> list[str]:
    """The uids of the last events of the chain, as each names the one before: others that stand there are none of it,
    and nothing is taken for chained because of them.
    """
    uids: list[str] = []
    while last in stretch.before and len(uids) < most:
        uid, last = stretch.before[last]
        uids.append(uid)
    return uids[::-1]


def _strays(stretch: _Stretch, tree: str, tip: Tip, mark: int | None) -> list[range]:
    """What is not on the way from the tip of the chain back, from event to event.

    Places that this does not lead to are not judged, as events of before are gone or were not read; nor is, where no
    mark is known, what stands before the tip. And what has no link, ahead of the first event that has one, is from
    before there were chains.
    """
    path: set[Hash] = set()
    last = tip.last
    while last in stretch.before and last not in path:
        path.add(last)
        last = stretch.before[last][1]
    first = tip.head.size - len(path) + 1
    if mark is None:
        behind = [one.places.stop for one in stretch.stood if one.hashed == tip.last]
        mark = behind[0] if behind else stretch.end if tip.head.size else stretch.start
    found: list[range] = []
    chained = len(path)
    for one in stretch.stood:
        if one.hashed in path:  # what comes again is a copy
            path.remove(one.hashed)
            continue
        ahead = len(path) == chained  # of all events on the way: those that are not led to stand there
        elsewhere = ahead and one.link is not None and one.link.tree == tree and one.link.seq < first
        unchained = ahead and one.is_event and one.link is None and first == 1
        places = range(max(one.places.start, mark), one.places.stop)
        if places and not elsewhere and not unchained:
            found.append(places)
    return found
