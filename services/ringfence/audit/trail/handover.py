"""How events get from whoever made them to whoever chains them: signed, many at a time, on `audit.intake`.

Versions before ADR 0063 also put `audit.chained` there: the hashes of events that they chained without a hand-over.
It is read for as long as `audit.intake` keeps it, 7 days, so that a trail of theirs does not fork.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import parse, sign_payload, verify, verify_payload
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.partitioning import partition_of
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.messages.audit import AuditChained, AuditIntake
from ringfence.messages.base import typ_header
from ringfence.messages.topics import AUDIT, AUDIT_INTAKE
from ringfence.model.audit_log.chain import linkable
from ringfence.model.audit_log.merkle import Hash

MOST_BYTES = 320 * 1024
"""Of events in one message: as a JWS it is a third longer, and no message may be over 512 KiB."""


class PendingEvent(NamedTuple):
    """One event that is to be chained: its Kafka key, its uid, its JSON as `linkable` makes it, the trace that it
    belongs to; and what that is the JSON of, where it is at hand.
    """

    key: str
    uid: str
    body: bytes
    traceparent: str | None
    event: Mapping[str, Any] | None = None


class Opened(NamedTuple):
    """What an audit service says by a message of `audit.intake`."""

    events: Sequence[PendingEvent] = ()
    """That are to be chained."""
    chained: Sequence[Hash] = ()
    """The hashes of events that it chained without a hand-over: of versions before ADR 0063."""


class HandoverCache:
    """What this process signed and handed over lately: when it comes back to the letter, it need not be taken apart.

    What stands on the topic is still what counts: another text, or a key that no longer may, is looked at as all
    others are.
    """

    def __init__(self, most_bytes: int = 16 * 1024 * 1024) -> None:
        """`most_bytes` of messages are kept, and some three times as much of what is in them; the oldest go first."""
        self._left = most_bytes
        self._kept: OrderedDict[str, tuple[bytes, SigningKey, Sequence[PendingEvent]]] = OrderedDict()

    def put(self, message: Outbound, key: SigningKey, events: Sequence[PendingEvent]) -> None:
        """Keep a message that `key` has signed, and what is in it."""
        self.take(message.id)
        self._kept[message.id] = (message.value, key, events)
        self._left -= len(message.value)
        while self._left < 0:
            self.take(next(iter(self._kept)))

    def take(self, id: str) -> tuple[bytes, SigningKey, Sequence[PendingEvent]] | None:
        """What is kept under an id; it is kept no longer."""
        known = self._kept.pop(id, None)
        if known is not None:
            self._left += len(known[0])
        return known

    def events(self, record: Received, trust: TrustStore) -> Sequence[PendingEvent] | None:
        """The events in a message of `audit.intake`, or None where it is not known to the letter."""
        value, key, events = self.take(record.headers.get("ce_id", "")) or (None, None, ())
        if key is None or value != record.value:
            return None
        finder = trust.finder(*AuditIntake.signed_by, at_s=record.appended_at_ms / 1000)
        return events if finder(key.id, key.kid) is not None else None


class Intake:
    """Hands events over. All of one partition of `audit` go into one partition of `audit.intake`, in their order."""

    def __init__(
        self,
        publisher: Publisher,
        key: Callable[[], SigningKey],
        trust_domain: str,
        clock: Clock,
        lately: HandoverCache | None = None,
    ) -> None:
        """Args:
            key: what to sign by, asked each time. It raises UnavailableError where nobody would believe it: handed over
                all the same, an event would be lost, and its dead letter be the next one.
            lately: keeps what is handed over, where this process may be the one that chains it.
        """  # fmt: skip
        self._lately = lately
        self._publisher = publisher
        self._key = key
        self._trust_domain = trust_domain
        self._clock = clock

    async def hand_over(self, events: Iterable[PendingEvent]) -> None:
        """Acknowledged by Kafka when this returns. Raises UnavailableError where it is to be handed over again."""
        every = await self._publisher.partitions(AUDIT)
        by_partition: dict[int, list[PendingEvent]] = {}
        for told in events:
            by_partition.setdefault(partition_of(told.key, every), []).append(told)
        if not by_partition:
            return
        key = self._key()
        await gather_all(
            self._publisher.send_to(
                partition, AUDIT_INTAKE, AuditIntake.typ, (self._signed(one, key) for one in _portions(some))
            )
            for partition, some in by_partition.items()
        )
        _require_still(key, self._key())

    def _signed(self, some: Sequence[PendingEvent], key: SigningKey) -> Outbound:
        jti = derived_id(AuditIntake.typ, *(told.uid for told in some))
        claims = {
            "iss": key.id,
            "aud": self._trust_domain,
            "iat": self._clock.now_ms() // 1000,
            "jti": jti,
            "entries": [_entry(told) for told in some],
        }
        compact = sign_payload(AuditIntake, orjson.dumps(claims), key)
        message = Outbound(some[0].key, compact.encode(), jti)
        if self._lately is not None:
            self._lately.put(message, key, some)
        return message


def _require_still(key: SigningKey, now: SigningKey) -> None:
    """Once what `key` signed is acknowledged: raises UnavailableError where another key signs by now. One that a bundle
    has ended meanwhile signed what was appended too late, perhaps; what comes twice is chained once.
    """
    if now.kid != key.kid:
        raise UnavailableError(f"{key.id} signs by another key now: once more", code="key_changed")


def opened_intake(record: Received, trust: TrustStore) -> Opened:
    """What a message of `audit.intake` says. Raises InvalidMessageError where no audit service signed it, or it has
    not that shape: looked at no further than the chain needs, as each event has its shape by what made it.
    """
    jws, at_s = parse(record.value), record.appended_at_ms / 1000
    if jws.header.typ == typ_header(AuditChained):
        find = trust.finder(*AuditChained.signed_by, at_s=at_s)
        chained = verify(jws, AuditChained, find, audience=trust.trust_domain).claims
        return Opened(chained=[bytes.fromhex(one) for one in chained.hashes])
    find = trust.finder(*AuditIntake.signed_by, at_s=at_s)
    claims = verify_payload(jws, AuditIntake, find, audience=trust.trust_domain)
    try:
        return Opened([_pending_event(entry) for entry in claims["entries"]])
    except (KeyError, TypeError, ValueError):
        raise InvalidMessageError("not an audit.intake: entries", code="claims_invalid") from None


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


def _entry(told: PendingEvent) -> dict[str, object]:
    entry: dict[str, object] = {"key": told.key, "event": orjson.Fragment(told.body)}
    if told.traceparent is not None:
        entry["traceparent"] = told.traceparent
    return entry


def _portions(events: Sequence[PendingEvent]) -> Iterator[Sequence[PendingEvent]]:
    """As many at a time as one message holds."""
    start = size = 0
    for index, told in enumerate(events):
        if index > start and size + len(told.body) > MOST_BYTES:
            yield events[start:index]
            start, size = index, 0
        size += len(told.body)
    yield events[start:]
