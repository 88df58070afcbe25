"""The table of event streams, from signed `signal.stream` records on Kafka. Nothing else is kept."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.operations import DeliveryMethod, SignalStream
from ringfence.messages.topics import SIGNAL_STREAM
from ringfence.signals.events import SUPPORTED

log = logging.getLogger(__name__)

_CAUGHT_UP_S = 10.0


@dataclass(frozen=True, slots=True)
class SignalStreamState:
    """One receiver's stream."""

    claims: SignalStream
    since_ms: int
    """Leases that ended before are not delivered. Milliseconds since 1970."""

    @property
    def id(self) -> str:
        return self.claims.stream_id

    @property
    def delivered(self) -> tuple[str, ...]:
        """The event types that the stream carries."""
        requested = self.claims.events_requested
        return SUPPORTED if requested is None else tuple(one for one in SUPPORTED if one in requested)


class StreamTable:
    """Reads and writes `signal.stream`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._by_receiver: dict[str, SignalStreamState] = {}
        self._writing = asyncio.Lock()
        self.changed = asyncio.Event()
        """Set with each record that counts; whoever acts on it clears it."""

    def on_records(self, records: Sequence[Received]) -> None:
        """Take in records. Ignores those without a valid signature of this service, and replays of older revisions."""
        for record in records:
            claims = self._verified(record)
            if claims is None or record.key != claims.receiver:
                continue
            known = self._by_receiver.get(claims.receiver)
            if known is not None and known.claims.revision >= claims.revision:
                continue
            since_ms = record.appended_at_ms if claims.since_ms is None else claims.since_ms
            self._by_receiver[claims.receiver] = SignalStreamState(claims, since_ms)
            self.changed.set()

    def of(self, receiver: str) -> SignalStreamState | None:
        found = self._by_receiver.get(receiver)
        return None if found is None or found.claims.status == "deleted" else found

    def all(self) -> list[SignalStreamState]:
        return [one for one in self._by_receiver.values() if one.claims.status != "deleted"]

    async def caught_up(self) -> None:
        """Return once the table holds what Kafka had when this was called. Raises UnavailableError."""
        if not await self._runtime.tables_caught_up(_CAUGHT_UP_S):
            raise UnavailableError("the table of streams is behind; ask again")

    async def create(self, receiver: str, method: DeliveryMethod, **fields: Any) -> SignalStreamState | None:
        """Create a stream; None if the receiver has one already."""
        async with self._writing:
            await self.caught_up()
            if self.of(receiver) is not None:
                return None
            before = self._by_receiver.get(receiver)
            revision = 1 if before is None else before.claims.revision + 1
            stream_id = str(uuid.uuid4())
            return await self._write(
                receiver, stream_id=stream_id, revision=revision, status="enabled", method=method, **fields
            )

    async def change(self, receiver: str, stream_id: str, **changed: Any) -> SignalStreamState | None:
        """Change a stream; None if it no longer exists.

        A stream that is enabled again delivers events from then on.
        """
        async with self._writing:
            await self.caught_up()
            stream = self.of(receiver)
            if stream is None or stream.id != stream_id:
                return None
            before = stream.claims
            enabled_again = before.status == "disabled" and changed.get("status", "disabled") != "disabled"
            unchanged = {name: getattr(before, name) for name in _RECEIVER_FIELDS}
            return await self._write(
                receiver,
                **{**unchanged, "since_ms": None if enabled_again else stream.since_ms, **changed},
                stream_id=stream_id,
                revision=before.revision + 1,
            )

    async def _write(self, receiver: str, **fields: Any) -> SignalStreamState:
        """Sign and publish a record. Returns once it is on Kafka and in the table."""
        runtime = self._runtime
        claims = SignalStream(
            iss=runtime.key.id,
            aud=runtime.settings.trust_domain,
            iat=runtime.clock.now_ms() // 1000,
            jti=derived_id("signal.stream", receiver, fields["stream_id"], fields["revision"]),
            receiver=receiver,
            **fields,
        )
        await runtime.publisher.publish_signed(SIGNAL_STREAM, receiver, claims, runtime.key)
        await self.caught_up()
        stored = self._by_receiver.get(receiver)
        if stored is None or stored.claims != claims:
            raise UnavailableError("the stream was changed by another at the same time; ask again")
        return stored

    def _verified(self, record: Received) -> SignalStream | None:
        find = self._runtime.trust.finder(*SignalStream.signed_by, at_s=record.appended_at_ms / 1000)
        audience = self._runtime.settings.trust_domain
        try:
            return verify(parse(record.value), SignalStream, find, audience=audience).claims
        except InvalidMessageError as error:
            where = (record.topic_name, record.partition, record.offset)
            log.warning(
                "not a stream: %s/%d@%d: %s",
                *where,
                error.code,
                extra=rate_limited(record.topic_name, error.code),
            )
            return None


_RECEIVER_FIELDS = ("status", "reason", "method", "events_requested", "description", "removed")
"""The fields that a receiver chooses."""
