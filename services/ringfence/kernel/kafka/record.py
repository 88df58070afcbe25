"""Records of Kafka: as they arrive, with nothing of them verified, and as they are sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.kafka.detached_signature import attach
from ringfence.kernel.tracing.api import NO_SPAN, Span
from ringfence.kernel.tracing.traceparent import traceparent_of, well_formed
from ringfence.messages.base import Topic
from ringfence.messages.credential import Coordinates


class Received(NamedTuple):
    """One Kafka record as it arrived, nothing of it verified."""

    topic: Topic[Any]
    topic_name: str
    partition: int
    offset: int
    appended_at_ms: int
    key: str | None
    value: bytes
    """Empty for a tombstone. Of what is signed in the clear the compact JWS, as of everything that is signed."""
    raw_headers: Sequence[tuple[str, bytes | None]] = ()
    span: Span = NO_SPAN
    """What this process does for it."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers as text; what is not UTF-8 is replaced, as nothing is decided by it."""
        return {
            name: value.decode("utf-8", "replace") for name, value in self.raw_headers if value is not None
        }

    @property
    def traceparent(self) -> str:
        """What comes of this record goes on from here."""
        return self.span.traceparent or self.own_traceparent

    @property
    def own_traceparent(self) -> str:
        """As it was sent; where it was not, or is malformed, it follows from the record's place: every reader finds
        the same, so that what they make of the record is one trace.
        """
        for name, value in self.raw_headers:
            if name == "traceparent" and value is not None:
                if sent := well_formed(value.decode("ascii", "replace")):
                    return sent
                break
        return traceparent_of(
            derived_id("trace", self.topic_name, self.partition, self.offset, self.appended_at_ms)
        )

    def with_span(self, span: Span) -> Self:
        """See `TraceableRecord`."""
        return self._replace(span=span)

    @property
    def coordinates(self) -> Coordinates:
        return Coordinates(
            topic=self.topic_name,
            partition=self.partition,
            offset=self.offset,
            appended_at_ms=self.appended_at_ms,
        )


class Outbound(NamedTuple):
    """One of many messages for a topic: see `Publisher.send` for what they are."""

    key: str
    value: bytes
    id: str
    traceparent: str | None = None
    key_number: int | None = None
    """That of the key (`partitioning.key_number`), where it was counted before."""


def missing_topics(names: Sequence[str]) -> UnavailableError:
    """What is said of topics that are not there."""
    return UnavailableError(f"missing on Kafka: {', '.join(names)}; run: ringfence topics apply")


def received(record: Any, topics: dict[str, Topic[Any]]) -> Received:
    """aiokafka's record as ours; a key that is not UTF-8 is replaced, as nothing is decided by it."""
    topic, value = topics[record.topic], record.value or b""
    return Received(
        topic,
        record.topic,
        record.partition,
        record.offset,
        record.timestamp,
        record.key.decode("utf-8", "replace") if record.key is not None else None,
        attach(value, record.headers) if topic.in_the_clear else value,
        record.headers,
    )
