"""The handover of events to the chain writer: signs messages on `audit.intake`, and looks up which events they hold.

A message holds many events. Without a checkpoint, events on `audit` may be forged: only the handover tells. The
search starts at the offset up to which events are chained, and alternates between later and earlier ranges until no
event is missing. Earlier ranges hold what was chained last; later ones what was handed over since, and the rest if
the committed offset was set back. Events are chained in the order of handover, so the cost is bounded: an attacker
who forges events, or repeats old ones, cannot cause the whole topic to be read.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import zip_longest
from typing import Any, Final, NamedTuple

import orjson

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import parse, sign_payload, verify_payload
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Outbound, Received, partition_of
from ringfence.messages.audit import AuditIntake
from ringfence.messages.codes import Code
from ringfence.messages.topics import AUDIT, AUDIT_INTAKE
from ringfence.model.audit_log.chain import linkable
from ringfence.model.audit_log.merkle import Hash

_MAX_CHUNK_BYTES = 320 * 1024
"""The most bytes of events in one message. As a JWS they are a third longer, and a message has at most 512 KiB."""


class PendingEvent(NamedTuple):
    key: str
    """The Kafka key."""
    uid: str
    body: bytes
    """Its JSON, as `linkable` returns it."""
    traceparent: str | None
    event: Mapping[str, Any] | None = None
    """The parsed `body`, if it is at hand."""


class HandoverCache:
    """A cache of the messages that this process handed over lately: read back byte by byte, they need no parsing.

    The topic stays authoritative. A message with other bytes, or whose key is no longer trusted, is verified as usual.
    """

    def __init__(self, max_bytes: int = 16 * 1024 * 1024) -> None:
        """Keeps `max_bytes` of messages, and about three times as much of their events. Evicts the oldest first."""
        self._free_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[bytes, SigningKey, Sequence[PendingEvent]]] = OrderedDict()

    def put(self, message: Outbound, key: SigningKey, events: Sequence[PendingEvent]) -> None:
        self.take(message.id)
        self._entries[message.id] = (message.payload, key, events)
        self._free_bytes -= len(message.payload)
        while self._free_bytes < 0:
            self.take(next(iter(self._entries)))

    def take(self, id: str) -> tuple[bytes, SigningKey, Sequence[PendingEvent]] | None:
        entry = self._entries.pop(id, None)
        if entry is not None:
            self._free_bytes += len(entry[0])
        return entry

    def events(self, record: Received, trust: TrustStore) -> Sequence[PendingEvent] | None:
        """The events of a message of `audit.intake`, or None if its exact bytes are not in the cache. Removes it."""
        value, key, events = self.take(record.headers.get("ce_id", "")) or (None, None, ())
        if key is None or value != record.value:
            return None
        finder = trust.finder(*AuditIntake.signed_by, at_s=record.appended_at_ms / 1000)
        return events if finder(key.id, key.kid) is not None else None


@dataclass(slots=True, eq=False)
class Intake:
    """Hands events over. All of one partition of `audit` go into one partition of `audit.intake`, in their order.

    Args:
    key: returns the signing key; called for each handover. Raises UnavailableError while no reader would trust
    the key: otherwise the event would be lost, and its dead letter would be the next event.
    cache: keeps what is handed over, if this process may also be the chain writer.
    """

    publisher: Publisher
    key: Callable[[], SigningKey]
    trust_domain: str
    clock: Clock
    cache: HandoverCache | None = None

    async def hand_over(self, events: Iterable[PendingEvent]) -> None:
        """Hand events over; returns after Kafka acknowledged them. Raises UnavailableError: hand them over again."""
        partitions = await self.publisher.partitions(AUDIT)
        by_partition: dict[int, list[PendingEvent]] = {}
        for event in events:
            by_partition.setdefault(partition_of(event.key, partitions), []).append(event)
        if not by_partition:
            return
        key = self.key()
        await gather_all(
            self.publisher.send_to(
                partition,
                AUDIT_INTAKE,
                AuditIntake.typ,
                (self._signed(chunk, key) for chunk in _chunks(some)),
            )
            for partition, some in by_partition.items()
        )
        _require_same_key(key, self.key())

    def _signed(self, events: Sequence[PendingEvent], key: SigningKey) -> Outbound:
        jti = derived_id(AuditIntake.typ, *(event.uid for event in events))
        claims = {
            "iss": key.id,
            "aud": self.trust_domain,
            "iat": self.clock.now_ms() // 1000,
            "jti": jti,
            "entries": [_entry(event) for event in events],
        }
        compact = sign_payload(AuditIntake, orjson.dumps(claims), key)
        message = Outbound(events[0].key, compact.encode(), jti)
        if self.cache is not None:
            self.cache.put(message, key, events)
        return message


def _require_same_key(signed_by: SigningKey, current: SigningKey) -> None:
    """Require, after Kafka's acknowledgement, that the signing key is still the same. Raises UnavailableError.

    A trust bundle may have ended the old key before the messages were appended, so the events are handed over again.
    An event that comes twice is chained once.
    """
    if current.kid != signed_by.kid:
        raise UnavailableError(f"{signed_by.id} signs by another key now: once more", code=Code.KEY_CHANGED)


def parse_intake(record: Received, trust: TrustStore) -> Sequence[PendingEvent]:
    """Verify a message of `audit.intake`, and return its events.

    Raises InvalidMessageError if no audit service signed it or its shape is wrong. The shape is checked only as far as
    the chain needs it: the service that made an event is responsible for the rest.
    """
    find = trust.finder(*AuditIntake.signed_by, at_s=record.appended_at_ms / 1000)
    claims = verify_payload(parse(record.value), AuditIntake, find, audience=trust.trust_domain)
    try:
        return [_pending_event(entry) for entry in claims["entries"]]
    except (KeyError, TypeError, ValueError):
        raise InvalidMessageError("not an audit.intake: entries", code=Code.CLAIMS_INVALID) from None


def _pending_event(entry: dict[str, Any]) -> PendingEvent:
    key, event, traceparent = entry["key"], entry["event"], entry.get("traceparent")
    uid = event["metadata"]["uid"]
    if not (type(key) is type(uid) is str and key and uid and type(event["unmapped"]) is dict):
        raise ValueError("not an entry")
    if not event["unmapped"].keys() - {"chain"}:
        raise ValueError("not an event")
    if not (traceparent is None or type(traceparent) is str):
        raise ValueError("not a traceparent")
    return PendingEvent(key, uid, linkable(event), traceparent, event)


def _entry(event: PendingEvent) -> dict[str, object]:
    entry: dict[str, object] = {"key": event.key, "event": orjson.Fragment(event.body)}
    if event.traceparent is not None:
        entry["traceparent"] = event.traceparent
    return entry


def _chunks(events: Sequence[PendingEvent]) -> Iterator[Sequence[PendingEvent]]:
    start = size = 0
    for index, event in enumerate(events):
        if index > start and size + len(event.body) > _MAX_CHUNK_BYTES:
            yield events[start:index]
            start, size = index, 0
        size += len(event.body)
    yield events[start:]


_FIRST_RANGE, _MAX_RANGE = 50, 3200
"""Messages in the first and in the largest range that is read at a time."""
MAX_OTHERS: Final = 50_000
"""The search in earlier ranges ends after this many handed-over events that are not looked up.

Some are expected between those that are: events that were handed over twice and chained once. They are at most as many
as a chain remembers.
"""
_EMPTY_RANGE = 0, 0
_RETENTION_MS = (AUDIT_INTAKE.retention_s or 0) * 1000
ContentDigest = bytes
"""SHA-256 of an event without its chain link: identifies it before and after it is chained."""


@dataclass(slots=True, eq=False)
class HandoverLookup:
    """Looks for events on `audit.intake`."""

    kafka: Stretches
    trust: TrustStore
    chained: Mapping[int, int]
    """By partition, the offset after the last message whose events are chained."""
    _: KW_ONLY
    max_others: int = MAX_OTHERS

    async def find(self, partition: int, events: Mapping[Hash, ContentDigest]) -> frozenset[Hash]:
        """The events, by their leaf hashes, that an audit service handed over.

        Only messages that the topic still keeps count.
        """
        start, end = await self.kafka.bounds(AUDIT_INTAKE, partition)
        chained = min(max(self.chained.get(partition, start), start), end)
        missing, others = _Missing(events), 0
        later, earlier = _forward_ranges(chained, end), _backward_ranges(start, chained)
        for forward, backward in zip_longest(later, earlier, fillvalue=_EMPTY_RANGE):
            if missing:
                await self._search(partition, *forward, missing)
            if missing and others < self.max_others:
                others += await self._search(partition, *backward, missing)
        return frozenset(events) - missing.hashes

    async def _search(self, partition: int, start: int, end: int, missing: _Missing) -> int:
        """Remove from `missing` the events in these messages. Returns how many other events they contain."""
        others = 0
        async for record in self.kafka.records(AUDIT_INTAKE, partition, start, end):
            events, missing_before = _events_of(record, self.trust), len(missing.hashes)
            for event in events:
                digest = content_digest(orjson.loads(event.body))
                missing.hashes.difference_update(missing.by_digest.get(digest, ()))
            others += max(0, len(events) - (missing_before - len(missing.hashes)))
        return others


class _Missing:
    """The events that were not found yet."""

    def __init__(self, events: Mapping[Hash, ContentDigest]) -> None:
        self.hashes = set(events)
        self.by_digest: dict[ContentDigest, list[Hash]] = {}
        for leaf, digest in events.items():
            self.by_digest.setdefault(digest, []).append(leaf)

    def __bool__(self) -> bool:
        return bool(self.hashes)


def _forward_ranges(start: int, end: int) -> Iterator[tuple[int, int]]:
    """As `_backward_ranges`, from `start` on."""
    for first, last in _backward_ranges(-end, -start):
        yield -last, -first


def _backward_ranges(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of offsets from `end` back to `start`, each four times as long as the one before."""
    stop, count = end, _FIRST_RANGE
    while stop > start:
        first = max(start, stop - count)
        yield first, stop
        stop, count = first, min(count * 4, _MAX_RANGE)


def _events_of(record: Received, trust: TrustStore) -> Sequence[PendingEvent]:
    """The verified events of a message; none if no audit service signed it."""
    try:
        return parse_intake(record, trust)
    except InvalidMessageError:
        return ()


def is_handover_retained(record: Received, now_ms: int) -> bool:
    """Whether the topic must still keep the handover of this event. For old events it does not."""
    return now_ms - record.appended_at_ms < _RETENTION_MS / 2


def content_digest(event: Mapping[str, Any]) -> ContentDigest:
    """The digest of an event, chained or not."""
    fields = event.get("unmapped")
    if isinstance(fields, dict):
        fields = {name: value for name, value in fields.items() if name != "chain"}
    return hashlib.sha256(orjson.dumps({**event, "unmapped": fields}, option=orjson.OPT_SORT_KEYS)).digest()
