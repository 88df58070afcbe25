"""Recovers the chains on `audit` at take-over: verifies and counts what follows their last checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from ringfence.audit.trail.handover import (
    ContentDigest,
    HandoverLookup,
    content_digest,
    is_handover_retained,
)
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
    """The chain of one partition, and the state of the partition."""

    tip: Tip
    signed_size: int
    """The number of events that the last checkpoint covers."""
    recent_uids: Sequence[str] = ()
    """The uids of the last events, the oldest first."""
    end: int = 0
    """The end offset of the partition."""
    unauthorised: Sequence[range] = ()
    """Offsets of records that do not belong to the chain."""
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _UnsignedEvent:
    """An event that no checkpoint covers."""

    link: ChainLink
    leaf: Hash
    digest: ContentDigest
    offset: int
    has_handover: bool
    """Whether `audit.intake` must still keep its handover, if there was one."""


class _TrailEntry(NamedTuple):
    """A record with a link, or consecutive records without one."""

    offsets: range
    is_event: bool
    link: ChainLink | None = None
    leaf: Hash = b""
    """Empty without a link."""


@dataclass(slots=True)
class _PartitionEnd:
    """The records at the end of one partition."""

    signed: Tip
    start: int
    """The first offset that the whole partition still keeps."""
    end: int
    entries: list[_TrailEntry] = field(default_factory=list)
    unsigned: list[_UnsignedEvent] = field(default_factory=list)
    predecessors: dict[Hash, tuple[str, Hash]] = field(default_factory=dict)
    """By the leaf hash of each event: its uid, and the leaf hash that it names as its predecessor's."""

    def add_unlinked(self, offset: int, *, is_event: bool) -> None:
        """Add a record without a link. Consecutive ones share an entry, so a flood of them takes no memory."""
        first = offset
        if self.entries and self.entries[-1].link is None and self.entries[-1].is_event == is_event:
            first = self.entries.pop().offsets.start
        self.entries.append(_TrailEntry(range(first, offset + 1), is_event))


async def recover_chains(
    settings: BusSettings,
    trust: TrustStore,
    *,
    remember: int,
    chained: Mapping[int, int],
    checked: Mapping[int, int],
    now_ms: int,
) -> dict[int, RecoveredChain]:
    """Recover the chain of each partition of `audit`.

    An event after a checkpoint is skipped, and is a fault, if it does not follow the chain or no audit service handed
    it over. The chain continues with the next event that fits. `ringfence audit verify` reports the faults as well.

    The chain never falls back behind a checkpoint: if signed events are lost, later ones do not take their numbers.

    Args:
        remember: how many uids of the last events of each chain to return.
        chained: by partition of `audit.intake`, the offset after the last message whose events are chained.
        checked: by partition of `audit`, the offset before which all records are judged already.
        now_ms: the time.

    Raises UnavailableError, also while a transaction is open on a partition: events behind it cannot be read yet, so
    the end of the chain is not known.
    """
    async with Stretches(settings) as kafka:
        signed, lookup = await _last_checkpoints(kafka, trust), HandoverLookup(kafka, trust, chained)
        recovered: dict[int, RecoveredChain] = {}
        for partition in await kafka.partitions(AUDIT):
            if not await kafka.is_settled(AUDIT, partition):
                raise UnavailableError(
                    f"somebody left a transaction open on partition {partition} of {AUDIT.what}: how far its chain has "
                    "come is not seen before that ends, which the broker sees to; nobody but audit should write there"
                )
            tip, judged_to = signed.get(str(partition), Tip()), checked.get(partition)
            tail = await _read_end(kafka, partition, tip, remember, judged_to, now_ms)
            questionable = {event.leaf: event.digest for event in tail.unsigned if event.has_handover}
            chain = _extend_chain(tail, str(partition), await lookup.find(partition, questionable))
            chain.recent_uids = _recent_uids(tail, chain.tip.last, remember)
            chain.end = tail.end
            chain.unauthorised = _find_unauthorised(tail, str(partition), chain.tip, judged_to)
            recovered[partition] = chain
        return recovered


async def _last_checkpoints(kafka: Stretches, trust: TrustStore) -> Mapping[str, Tip]:
    """The largest checkpoint of each tree that an audit service signed."""
    tips: dict[str, Tip] = {}
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
            continue  # no audit service wrote it; `ringfence audit verify` reports it
        if claims.tree not in tips or tips[claims.tree].head.size < tip.head.size:
            tips[claims.tree] = tip
    return tips


async def _read_end(
    kafka: Stretches, partition: int, signed: Tip, remember: int, judged_to: int | None, now_ms: int
) -> _PartitionEnd:
    """Read the last `remember` records, all events after the checkpoint `signed`, and all records from `judged_to`."""
    start, end = await kafka.bounds(AUDIT, partition)
    look_back = remember
    while True:
        begin = max(start, end - look_back)
        tail, first_seq = _PartitionEnd(signed, start, end), None
        async for record in kafka.records(AUDIT, partition, begin, end):
            event = event_of(record.value)
            link = event.link if event is not None else None
            if event is None or link is None:
                tail.add_unlinked(record.offset, is_event=event is not None)
                continue
            leaf, first_seq = leaf_hash(record.value), first_seq or link.seq
            tail.entries.append(_TrailEntry(range(record.offset, record.offset + 1), True, link, leaf))
            tail.predecessors[leaf] = event.uid, bytes.fromhex(link.prev)
            if link.seq > signed.head.size:
                digest, has_handover = (
                    content_digest(orjson.loads(record.value)),
                    is_handover_retained(record, now_ms),
                )
                tail.unsigned.append(_UnsignedEvent(link, leaf, digest, record.offset, has_handover))
        reaches_signed = first_seq is not None and first_seq <= signed.head.size + 1
        if begin == start or (reaches_signed and (judged_to is None or begin <= judged_to)):
            return tail
        look_back *= 8


def _extend_chain(tail: _PartitionEnd, tree: str, handed_over: frozenset[Hash]) -> RecoveredChain:
    """Extend the signed chain by the events that follow it."""
    chain = RecoveredChain(tail.signed, tail.signed.head.size)
    for event in tail.unsigned:
        place = f"event {event.link.seq} at offset {event.offset}"
        if event.has_handover and event.leaf not in handed_over:
            chain.faults.append(f"no audit service handed over {place}")
        elif not chain.tip.fits(event.link, tree):
            chain.faults.append(f"{place} does not follow event {chain.tip.head.size}")
        else:
            chain.tip = chain.tip.grown(event.leaf)
    return chain


def _recent_uids(tail: _PartitionEnd, last: Hash, max_uids: int) -> list[str]:
    """The uids of the last events of the chain, the oldest first, found from each event to its predecessor.

    Other records at the end of the partition are not part of the chain, and do not count as chained.
    """
    uids: list[str] = []
    while last in tail.predecessors and len(uids) < max_uids:
        uid, last = tail.predecessors[last]
        uids.append(uid)
    return uids[::-1]


def _find_unauthorised(tail: _PartitionEnd, tree: str, tip: Tip, judged_to: int | None) -> list[range]:
    """Offsets of the records that are not on the path from the tip of the chain back, from event to predecessor.

    Not judged are:

    - events before the first one on the path, as lost or unread events may interrupt the path;
    - without `judged_to`, records before the tip;
    - events without a link before the first event of the chain, as they are older than the chain.
    """
    path: set[Hash] = set()
    last = tip.last
    while last in tail.predecessors and last not in path:
        path.add(last)
        last = tail.predecessors[last][1]
    first_seq = tip.head.size - len(path) + 1
    if judged_to is None:
        after_tip = [entry.offsets.stop for entry in tail.entries if entry.leaf == tip.last]
        judged_to = after_tip[0] if after_tip else tail.end if tip.head.size else tail.start
    unauthorised: list[range] = []
    path_length = len(path)
    for entry in tail.entries:
        if entry.leaf in path:  # the first copy is the chain's, any other is unauthorised
            path.remove(entry.leaf)
            continue
        before_path = len(path) == path_length  # the path does not lead to events that stand before it
        is_earlier = (
            before_path and entry.link is not None and entry.link.tree == tree and entry.link.seq < first_seq
        )
        is_unchained = before_path and entry.is_event and entry.link is None and first_seq == 1
        offsets = range(max(entry.offsets.start, judged_to), entry.offsets.stop)
        if offsets and not is_earlier and not is_unchained:
            unauthorised.append(offsets)
    return unauthorised
