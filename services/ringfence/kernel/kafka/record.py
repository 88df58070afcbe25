"""Kafka records as received and as sent, the partition of a key, and JSON records with a detached signature.

Nothing in a received record is verified. A key goes to the partition that Kafka's own clients choose, so that all
readers find everything of a key in one.

Some signed messages are plain JSON on their topic, for any JSON reader, with the signature in a header (RFC 7515,
appendix F). A service that acts on one joins the two parts to an ordinary JWS (`attach`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.keys import b64decode, b64encode
from ringfence.kernel.tracing.api import NO_SPAN, Span, traceparent_of, well_formed
from ringfence.messages.base import Topic
from ringfence.messages.credential import Coordinates

_MASK = 0xFFFFFFFF
_M = 0x5BD1E995
_SEED = 0x9747B28C


def partition_number(key: bytes, count: int) -> int:
    """The number, from 0, of `count` partitions: what the default partitioners of Java and aiokafka say."""
    return (_murmur2(key) & 0x7FFFFFFF) % count


def _murmur2(data: bytes) -> int:
    """MurmurHash2 by Austin Appleby (32 bits), as Kafka seeds it; half the time of aiokafka's, word by word."""
    size = len(data)
    whole = size & ~3
    h = _SEED ^ size
    for k in struct.unpack_from(f"<{whole >> 2}I", data):
        k = k * _M & _MASK
        h = (h * _M & _MASK) ^ ((k ^ k >> 24) * _M & _MASK)
    if size != whole:
        h = (h ^ int.from_bytes(data[whole:], "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    return h ^ h >> 15


@lru_cache(maxsize=8192)
def _partition_of(key: bytes, count: int) -> int:
    """Where records with this key go. Remembered: it is counted in Python, and few keys come again and again."""
    return partition_number(key, count)


def partitioner(key: bytes, every: Sequence[int], available: Sequence[int]) -> int:
    return every[_partition_of(key, len(every))]


def partition_of(key: str, partitions: Sequence[int]) -> int:
    """Which of a topic's partitions records with this key go to."""
    return partitioner(key.encode(), partitions, partitions)


SIGNATURE = "signature"
"""The header: the compact JWS without its payload, `<header>..<signature>`."""


def detach(compact: str) -> tuple[bytes, bytes]:
    """The JSON that was signed, to the byte, and what makes a JWS of it again."""
    head, payload, signature = compact.split(".")
    return b64decode(payload), f"{head}..{signature}".encode()


def attach(value: bytes, headers: Sequence[tuple[str, bytes | None]]) -> bytes:
    """The compact JWS of JSON and its signature; nothing is verified. As it came where either is missing."""
    beside = next((header for name, header in headers if name == SIGNATURE), None)
    if beside is None or not value.startswith(b"{"):
        return value
    head, _, signature = beside.partition(b"..")
    return b".".join((head, b64encode(value).encode(), signature))


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
    """A record to send to a topic."""

    key: str
    value: str | bytes
    """A compact JWS or JWE, or JSON. Empty writes a tombstone."""
    id: str
    """`ce_id`, derived from what the message says, so that a repeat has the same one."""
    traceparent: str | None = None
    """The trace to continue; None: a new one."""

    @property
    def payload(self) -> bytes:
        return self.value.encode() if isinstance(self.value, str) else self.value


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
