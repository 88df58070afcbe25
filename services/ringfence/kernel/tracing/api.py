"""Spans: what one process did for one message, in the trace that the message belongs to.

Unless somebody asked for them none are made, and everything here does nothing. There is no ambient context: a span's
`traceparent` goes along with the work as a message's own does, so what is done for many messages at once is never mixed
up. Spans say ids, outcomes and codes; never what a message holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from ringfence.kernel.tracing.traceparent import well_formed


class Span:
    """One that is not made: it only hands on the `traceparent` that it would have been under."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str | None = None) -> None:
        self.traceparent = traceparent
        """What comes of this work goes on from here."""

    def note(self, **facts: object) -> None:
        """Say more: `agent_id` is the attribute `ringfence.agent.id`. What is None is left out."""

    def refused(self, *codes: str) -> None:
        """The work ended in a no, and why: codes alone, as messages may hold what somebody else wrote."""

    def end(self, error: BaseException | None = None) -> None:
        """The work is over, and perhaps failed. A span ends once, whoever says it first."""

    def end_when(self, acknowledged: asyncio.Future[Any], index: int = 0) -> None:
        """End once Kafka has the record, the `index`th of those that were sent together."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.end(error)


NO_SPAN = Span()


class TraceableRecord(Protocol):
    """A record as it arrived from Kafka, as far as its span needs it."""

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
    @property
    def span(self) -> Span: ...

    def with_span(self, span: Span) -> Self:
        """The same record with the span that is about it."""
        ...


Record = TypeVar("Record", bound=TraceableRecord)


class Work(NamedTuple):
    """What a span may be made of."""

    traceparent: str | None
    """What it is done for; without it no service makes a span."""
    facts: Mapping[str, object]
    """See `Span.note`."""
    because_of: str | None = None
    """The `traceparent` of what set it off: where that is of another trace, it is linked."""
    took_ns: int = 0
    """How long it has been going on already."""


class Tracing:
    """Makes the spans of one service, or of the application that an agent's SDK is in. This one makes none."""

    def received(self, batch: Sequence[Record], group: str) -> AbstractContextManager[Sequence[Record]]:
        """While a batch is handled: the batch to hand over, each record with the span that is about it."""
        return contextlib.nullcontext(batch)

    def sending(self, topic: str, id: str, key: str, traceparent: str | None) -> Span:
        """A record on its way to Kafka; the `traceparent` of what is returned, if it has one, goes into its headers."""
        return Span(well_formed(traceparent))

    def step(self, name: str, work: Work) -> Span:
        """Something that is done on the way; use it as a context manager. `name` is one of few: what differs from case
        to case are facts.
        """
        return Span(work.traceparent)

    @contextlib.contextmanager
    def steps(self, name: str, work: Iterable[Work]) -> Iterator[Sequence[Span]]:
        """`step` for many that are done together. Yields a span for each, or nothing where none are made."""
        yield ()

    async def close(self) -> None:
        """Send what is left, within a bound. Nothing can be made after."""


NOT_TRACING = Tracing()


def is_installed(module: str) -> bool:
    """Whether a module can be imported: what makes spans is an extra."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
