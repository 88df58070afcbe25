"""Tracing: spans for what one process did for one message, in the trace of that message.

Without a tracing backend nothing is recorded, and every method here does nothing. There is no ambient context: a span's
`traceparent` is passed along with the work, as a message's is, so that work for many messages at once is never mixed
up. Spans hold ids, outcomes and codes, never the content of messages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from ringfence.kernel.tracing.traceparent import well_formed


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
