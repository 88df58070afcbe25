"""Kafka records: as received, with nothing verified, and as they are to be sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.kafka.detached_signature import attach
from ringfence.kernel.tracing.api import NO_SPAN, Span
from ringfence.kernel.tracing.traceparent import traceparent_of, well_formed
from ringfence.messages.base import Topic
from ringfence.messages.credential import Coordinates


class Received(NamedTuple):
    """A received Kafka record, of which nothing is verified."""

    topic: Topic[Any]
    topic_name: str
    partition: int
    offset: int
    appended_at_ms: int
    key: str | None
    value: bytes
    """Empty for a tombstone. The compact JWS of a signed message, also if it was signed with a detached signature."""
    raw_headers: Sequence[tuple[str, bytes | None]] = ()
    span: Span = NO_SPAN
    """The tracing span of this process's work on the record."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers as text. Bytes that are not UTF-8 are replaced, because no decision uses headers."""
        return {
            name: value.decode("utf-8", "replace") for name, value in self.raw_headers if value is not None
        }

    @property
    def traceparent(self) -> str:
        """The W3C trace context for whatever this record causes."""
        return self.span.traceparent or self.own_traceparent

    @property
    def own_traceparent(self) -> str:
        """The `traceparent` header of the record. If it is missing or malformed, one is derived from the record's
        coordinates: all readers derive the same, so that their work is one trace.
        """
        for name, value in self.raw_headers:
            if name == "traceparent" and value is not None:
                if sent := well_formed(value.decode("ascii", "replace")):
                    return sent
                break
        return traceparent_of(
            derived_id("trace", self.topic_name, self.partition, self.offset, self.appended_at_ms)
        )

    @property
    def coordinates(self) -> Coordinates:
        return Coordinates(
            topic=self.topic_name,
            partition=self.partition,
            offset=self.offset,
            appended_at_ms=self.appended_at_ms,
        )


class Outbound(NamedTuple):
    """One of many records to send to a topic; see `Publisher.send` for the fields."""

    key: str
    value: bytes
    id: str
    traceparent: str | None = None


def missing_topics(names: Sequence[str]) -> UnavailableError:
    """The error for topics that do not exist."""
    return UnavailableError(f"missing on Kafka: {', '.join(names)}; run: ringfence topics apply")


def received(record: Any, topics: dict[str, Topic[Any]]) -> Received:
    """Convert a record of aiokafka. No decision uses the key, so bytes of it that are not UTF-8 are replaced."""
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
