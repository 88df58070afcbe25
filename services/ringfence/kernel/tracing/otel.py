"""Spans of OpenTelemetry, with the attributes of its messaging conventions (semantic conventions 1.45)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.tracing.api import (
    NO_SPAN,
    NOT_TRACING,
    Span,
    TraceableRecord,
    Tracing,
    Work,
    new_traceparent,
    trace_id,
    well_formed,
    written,
)
from ringfence.messages.codes import Code

SCOPE = "ringfence"
VERSION = version("ringfence")
LONGEST = 256
"""The longest text of an attribute. Whoever writes a record chooses keys and ids, of any length."""


class TracedSpan(Span):
    __slots__ = ("_span",)

    def __init__(self, span: trace.Span) -> None:
        super().__init__(_traceparent(span.get_span_context()))
        self._span = span

    def note(self, **facts: object) -> None:
        self._span.set_attributes(_attributes(facts))

    def refused(self, *codes: str) -> None:
        self._span.set_attribute("ringfence.reasons", [code[:LONGEST] for code in codes])
        self._fail(codes[0] if codes else Code.REFUSED)

    def end(self, error: BaseException | None = None) -> None:
        """End the span. Of an error it records the code or the type, not the message."""
        if not self._span.is_recording():
            return
        if error is not None:
            self._fail(error.code if isinstance(error, RingfenceError) else type(error).__name__)
        self._span.end()

    def end_when(self, acknowledged: asyncio.Future[Any], index: int = 0) -> None:
        if self._span.is_recording():
            acknowledged.add_done_callback(lambda done: self._acknowledged(done, index))

    def _acknowledged(self, done: asyncio.Future[Any], index: int) -> None:
        if done.cancelled():
            self.end(asyncio.CancelledError())
            return
        error = done.exception()
        if error is None and (at := done.result()) is not None:
            self._span.set_attribute("messaging.destination.partition.id", str(at.partition))
            self._span.set_attribute("messaging.kafka.offset", at.offset + index)
        self.end(error)

    def _fail(self, code: str) -> None:
        self._span.set_attribute("error.type", code[:LONGEST])
        self._span.set_status(Status(StatusCode.ERROR, code[:LONGEST]))


class SpanTracing(Tracing):
    """Records spans with an OpenTelemetry tracer."""

    def __init__(self, tracer: trace.Tracer, *, in_application: bool = False) -> None:
        """`in_application`: work without a `traceparent` continues the application's current span, or starts a trace.

        In a service, only a message continues or starts one: routine traffic between services belongs to no trace.
        """
        self._tracer = tracer
        self._in_application = in_application

    @contextlib.contextmanager
    def received(self, batch: Sequence[TraceableRecord], group: str) -> Iterator[Sequence[Span]]:
        spans = [self._received(record, group) for record in batch]
        with _ending(spans):
            yield spans

    def _received(self, record: TraceableRecord, group: str) -> Span:
        attributes = {
            **_messaging("process", record.topic_name, record.headers.get("ce_id"), record.key),
            "messaging.consumer.group.name": group,
            "messaging.destination.partition.id": str(record.partition),
            "messaging.kafka.offset": record.offset,
            "messaging.message.body.size": len(record.value),
        }
        if not record.value:
            attributes["messaging.kafka.message.tombstone"] = True
        return self._start(f"process {record.topic_name}", SpanKind.CONSUMER, record.traceparent, attributes)

    def sending(self, topic: str, id: str, key: str, traceparent: str | None) -> Span:
        if well_formed(traceparent) is None and not self._in_application:
            return Span(new_traceparent(sampled=False))
        attributes = _messaging("send", topic, id, key)
        return self._start(f"send {topic}", SpanKind.PRODUCER, traceparent, attributes)

    def step(self, name: str, work: Work) -> Span:
        traceparent, facts, because_of, took_ns = work
        if well_formed(traceparent) is None and not self._in_application:
            return NO_SPAN
        cause = _context(because_of if trace_id(because_of) != trace_id(traceparent) else None)
        return self._start(
            name,
            SpanKind.INTERNAL,
            traceparent,
            _attributes(facts),
            links=[Link(cause)] if cause is not None else (),
            began_ns=time.time_ns() - took_ns if took_ns else None,
        )

    @contextlib.contextmanager
    def steps(self, name: str, work: Iterable[Work]) -> Iterator[Sequence[Span]]:
        spans = [self.step(name, one) for one in work]
        with _ending(spans):
            yield spans

    def _start(
        self,
        name: str,
        kind: SpanKind,
        traceparent: str | None,
        attributes: Mapping[str, AttributeValue],
        *,
        links: Sequence[Link] = (),
        began_ns: int | None = None,
    ) -> Span:
        parent = _context(traceparent)
        if parent is not None:
            context: Context | None = trace.set_span_in_context(NonRecordingSpan(parent), Context())
        else:
            context = None if self._in_application else Context()
        span = self._tracer.start_span(name, context, kind, attributes, links, began_ns)
        if not span.get_span_context().is_valid:  # the application's tracer records none
            return Span(traceparent if parent is not None else new_traceparent())
        return TracedSpan(span)


def in_application() -> Tracing:
    """Return tracing with the application's own tracer, or one that records nothing if it has set up none."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):
        return NOT_TRACING
    return SpanTracing(provider.get_tracer(SCOPE, VERSION), in_application=True)


@contextlib.contextmanager
def _ending(spans: Sequence[Span]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        for span in spans:
            span.end(error)
        raise
    for span in spans:
        span.end()


def _messaging(operation: str, topic: str, id: str | None, key: str | None) -> dict[str, AttributeValue]:
    """Return the attributes of every span about a message. They name the message and hold nothing of its content."""
    attributes: dict[str, AttributeValue] = {
        "messaging.system": "kafka",
        "messaging.operation.type": operation,
        "messaging.operation.name": operation,
        "messaging.destination.name": topic,
    }
    if id is not None:
        attributes["messaging.message.id"] = id[:LONGEST]
    if key is not None:
        attributes["messaging.kafka.message.key"] = key[:LONGEST]
    return attributes


@lru_cache(maxsize=256)
def _name(fact: str) -> str:
    return f"{SCOPE}.{fact.removesuffix('_id')}.id" if fact.endswith("_id") else f"{SCOPE}.{fact}"


def _attributes(facts: Mapping[str, object]) -> dict[str, AttributeValue]:
    """Return facts as attributes: numbers and booleans as they are, everything else as text."""
    return {
        _name(fact): value if isinstance(value, bool | int | float) else str(value)[:LONGEST]
        for fact, value in facts.items()
        if value is not None
    }


def _context(traceparent: str | None) -> SpanContext | None:
    if not traceparent or well_formed(traceparent) is None:
        return None
    _, trace_id, span_id, flags = traceparent.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)))


def _traceparent(context: SpanContext) -> str:
    return written(
        trace.format_trace_id(context.trace_id),
        trace.format_span_id(context.span_id),
        sampled=context.trace_flags.sampled,
    )
