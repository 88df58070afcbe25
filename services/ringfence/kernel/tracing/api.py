"""Tracing: spans for what one process did for one message, in the trace of that message.

Without a tracing backend nothing is recorded, and every method here does nothing. There is no ambient context: a span's
`traceparent` is passed along with the work, as a message's is, so that work for many messages at once is never mixed
up. Spans hold ids, outcomes and codes, never the content of messages.

W3C Trace Context (`traceparent`): one request is one trace across all hops.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def written(trace: str, span: str, *, sampled: bool) -> str:
    return f"00-{trace}-{span}-{sampled:02x}"


def new_traceparent(*, sampled: bool = True) -> str:
    # The id distinguishes spans; it is not secret.
    return written(secrets.token_hex(16), f"{random.getrandbits(63) + 1:016x}", sampled=sampled)


def traceparent_of(id: str) -> str:
    """Return the `traceparent` derived from a UUID. Neither half is zero: the variant bits are in the second."""
    digits = id.replace("-", "")
    return written(digits, digits[16:], sampled=True)


def well_formed(traceparent: str | None) -> str | None:
    """Return the `traceparent`, or None if it is of another version, malformed, or all zeros."""
    return traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None


def trace_id(traceparent: str | None) -> str | None:
    match = _TRACEPARENT.fullmatch(traceparent or "")
    return match.group(1) if match else None


def nearest(later: str | None, first: str | None) -> str | None:
    """Return `later` if it belongs to the same trace as `first`, else `first`.

    So nobody who sends something about a request can move it into a trace of their own.
    """
    if first is None or trace_id(later) == trace_id(first):
        return later
    return first


class Span:
    """A span that is not recorded. It only passes on the `traceparent` of its parent."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str | None = None) -> None:
        self.traceparent = traceparent
        """Trace context for what follows from this work."""

    def note(self, **facts: object) -> None:
        """Add attributes: `agent_id` becomes `ringfence.agent.id`. Values of None are left out."""

    def refused(self, *codes: str) -> None:
        """Mark the work as refused, with the codes of the reasons. Messages of reasons may quote others, so
        only codes.
        """

    def end(self, error: BaseException | None = None) -> None:
        """End the span, with an error if the work failed. Only the first call counts."""

    def end_when(self, acknowledged: asyncio.Future[Any], index: int = 0) -> None:
        """End the span when Kafka has acknowledged the record, the `index`th of those sent together."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.end(error)


NO_SPAN = Span()


class TraceableRecord(Protocol):
    """A received Kafka record, as far as tracing needs it."""

    @property
    def topic_name(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> str | None: ...
    @property
    def value(self) -> bytes: ...
    @property
    def headers(self) -> dict[str, str]: ...
    @property
    def traceparent(self) -> str: ...


class Work(NamedTuple):
    """The input of a span."""

    traceparent: str | None
    """The trace context of the message; without it no span is made."""
    facts: Mapping[str, object]
    """Attributes; see `Span.note`."""
    because_of: str | None = None
    """The `traceparent` of the cause. If it belongs to another trace, it becomes a link."""
    took_ns: int = 0
    """How long the work has been going on already, in ns."""


class Tracing:
    """Makes the spans of one service, or of the application that uses the SDK. This base class makes none."""

    @contextlib.contextmanager
    def received(self, batch: Sequence[TraceableRecord], group: str) -> Iterator[Sequence[Span]]:
        """Context manager around the handling of a batch. Yields as `steps` does."""
        yield ()

    def sending(self, topic: str, id: str, key: str, traceparent: str | None) -> Span:
        """The span of a record on its way to Kafka. If it has a `traceparent`, that goes into the record's headers."""
        return Span(well_formed(traceparent))

    def step(self, name: str, work: Work) -> Span:
        """The span of one step of the work; use it as a context manager. `name` must be one of few: put details into
        facts.
        """
        return Span(work.traceparent)

    @contextlib.contextmanager
    def steps(self, name: str, work: Iterable[Work]) -> Iterator[Sequence[Span]]:
        """`step` for many messages that are handled together. Yields a span for each, or nothing if none are
        recorded.
        """
        yield ()

    async def close(self) -> None:
        """Send what is left, within a time limit. No spans can be made afterwards."""


NOT_TRACING = Tracing()
