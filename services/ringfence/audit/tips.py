"""How far the chains on `audit` have come: from their last checkpoints on, what follows is read and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from ringfence.audit.handed_over import HandedOver, Mark, is_kept_for, mark_of
from ringfence.kernel.errors import InvalidMessageError
from ringfence.kernel.jws import open_signed, parse
from ringfence.kernel.kafka_reading import Stretches
from ringfence.kernel.settings import BusSettings
from ringfence.kernel.trust import TrustStore
from ringfence.messages.audit import AuditCheckpoint, ChainLink
from ringfence.messages.base import typ_header
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT
from ringfence.model.audit_chain import Tip, event_of
from ringfence.model.merkle import Hash, leaf_hash


@dataclass(slots=True)
class TipsRead:
    """One chain: how far it has come, how far that is signed, and the uids of its last events."""

    tip: Tip
    signed_size: int
    recent: Sequence[str] = ()
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


@dataclass(slots=True)
class _Stretch:
    """The end of one partition."""

    signed: Tip
    unsigned: list[_Unsigned] = field(default_factory=list)
    before: dict[Hash, tuple[str, Hash]] = field(default_factory=dict)
    """By the hash of each event: its uid, and the hash that it names as that of the event before."""


async def read_tips(
    settings: BusSettings, trust: TrustStore, *, remember: int, taken: Mapping[int, int], now_ms: int
) -> dict[int, TipsRead]:
    """By partition of `audit`. Raises UnavailableError.

    Args:
        remember: how many uids of the last events to bring along, of each chain.
        taken: by partition of `audit.intake`, the offset after the last message whose events are chained.
        now_ms: the time.

    What follows a checkpoint and does not fit, or was handed over by no audit service, is passed over: it is a fault,
    told to whoever verifies, and the chain goes on from what fits. It never goes back behind a checkpoint: where events
    are gone, those that come do not take their places.
    """
    async with Stretches(settings) as kafka:
        signed, handed_over = await _last_checkpoints(kafka, trust), HandedOver(kafka, trust, taken)
        found: dict[int, TipsRead] = {}
        for partition in await kafka.partitions(AUDIT):
            stretch = await _read(kafka, partition, signed.get(str(partition), Tip()), remember, now_ms)
            marks = frozenset(one.mark for one in stretch.unsigned if one.judged)
            found[partition] = _followed(stretch, str(partition), await handed_over.among(partition, marks))
            found[partition].recent = _recent(stretch, found[partition].tip.last, remember)
        return found


async def _last_checkpoints(kafka: Stretches, trust: TrustStore) -> Mapping[str, Tip]:
    """The largest checkpoint of each tree that an audit service signed."""
    found: dict[str, Tip] = {}
    async for record in kafka.whole(AUDIT_CHECKPOINT):
        try:
            jws = parse(record.value)
            if jws.header.typ != typ_header(AuditCheckpoint):
                continue
            claims = open_signed(
                jws, AuditCheckpoint, trust.finder("audit", at_s=record.appended_at_ms / 1000),
                audience=trust.trust_domain,
            ).claims  # fmt: skip
            tip = Tip.of(claims)
        except (InvalidMessageError, ValueError):
            continue  # somebody else wrote it; whoever verifies the trail says so
        if claims.tree not in found or found[claims.tree].head.size < tip.head.size:
            found[claims.tree] = tip
    return found


async def _read(kafka: Stretches, partition: int, signed: Tip, remember: int, now_ms: int) -> _Stretch:
    """The last events, and all that are not signed."""
    start, end = await kafka.bounds(AUDIT, partition)
    look_back = remember
    while True:
        begin = max(start, end - look_back)
        found, first = _Stretch(signed), None
        async for record in kafka.records(AUDIT, partition, begin, end):
            event = event_of(record.value)
            if event is None or event.link is None:
                continue
            first = first or event.link.seq
            hashed = leaf_hash(record.value)
            found.before[hashed] = event.uid, bytes.fromhex(event.link.prev)
            if event.link.seq > signed.head.size:
                mark, judged = mark_of(orjson.loads(record.value)), is_kept_for(record, now_ms)
                found.unsigned.append(_Unsigned(event.link, hashed, mark, record.offset, judged))
        # What is not signed yet may be more than is looked at.
        if begin == start or (first is not None and first <= signed.head.size + 1):
            return found
        look_back *= 8


def _followed(stretch: _Stretch, tree: str, handed_over: frozenset[Mark]) -> TipsRead:
    """How far it goes on from what is signed."""
    found = TipsRead(stretch.signed, stretch.signed.head.size)
    for one in stretch.unsigned:
        where = f"event {one.link.seq} at offset {one.offset}"
        if one.judged and one.mark not in handed_over:
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
