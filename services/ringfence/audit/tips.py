"""How far the chains on `audit` have come: from their last checkpoints on, what follows is read and counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ringfence.kernel.errors import InvalidMessageError
from ringfence.kernel.jws import open_signed, parse
from ringfence.kernel.kafka_reading import Stretches
from ringfence.kernel.settings import BusSettings
from ringfence.kernel.trust import TrustStore
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.base import typ_header
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT
from ringfence.model.audit_chain import Tip, event_of


@dataclass(slots=True)
class TipsRead:
    """One chain: how far it has come, how far that is signed, and the uids of its last events."""

    tip: Tip
    signed_size: int
    recent: deque[str]
    faults: list[str] = field(default_factory=list)


async def read_tips(settings: BusSettings, trust: TrustStore, *, remember: int) -> dict[int, TipsRead]:
    """By partition of `audit`. Raises UnavailableError.

    Args:
        remember: how many uids of the last events to bring along, of each chain.

    What follows a checkpoint and does not fit is passed over: it is a fault, told to whoever verifies, and the chain
    goes on from what fits. It never goes back behind a checkpoint: where events are gone, those that come do not take
    their places.
    """
    async with Stretches(settings) as kafka:
        signed = await _last_checkpoints(kafka, trust)
        return {
            partition: await _read(kafka, partition, signed.get(str(partition)), remember)
            for partition in await kafka.partitions(AUDIT)
        }


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


async def _read(kafka: Stretches, partition: int, signed: Tip | None, remember: int) -> TipsRead:
    start, end = await kafka.bounds(AUDIT, partition)
    look_back = remember
    while True:
        begin = max(start, end - look_back)
        found, first = await _read_from(kafka, partition, (begin, end), signed or Tip(), remember)
        # What is not signed yet may be more than is looked at.
        if begin == start or (first is not None and first <= found.signed_size + 1):
            return found
        look_back *= 8


async def _read_from(
    kafka: Stretches, partition: int, stretch: tuple[int, int], tip: Tip, remember: int
) -> tuple[TipsRead, int | None]:
    """And the `seq` of the first event that was read."""
    found, first = TipsRead(tip, tip.head.size, deque(maxlen=remember)), None
    async for record in kafka.records(AUDIT, partition, *stretch):
        event = event_of(record.value)
        if event is None or (one := event.link) is None:
            continue
        first = first or one.seq
        found.recent.append(event.uid)
        if one.seq <= found.signed_size:
            continue
        if not found.tip.fits(one, str(partition)):
            found.faults.append(
                f"event {one.seq} at offset {record.offset} does not follow event {found.tip.head.size}"
            )
            continue
        found.tip = found.tip.followed_by(record.value)
    return found, first
