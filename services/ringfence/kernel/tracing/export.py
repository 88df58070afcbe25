"""Export of a service's spans over OTLP/HTTP to a collector, Jaeger or Tempo, in the background.

A missing, slow or hanging receiver changes nothing for the service. The queue is bounded; spans beyond the bound are
dropped and counted. At shutdown the remaining spans get a fixed time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Self

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from ringfence.kernel.base import metrics
from ringfence.kernel.tracing.otel import SCOPE, VERSION, SpanTracing

MOST_WAITING = 8192
"""The most spans in the queue; each takes about 3 KB."""
CLOSE_S = 2.0
"""How long a stopping service waits for the remaining spans."""


class _FirstFailureFilter(logging.Filter):
    """Logs the first failure of an export, and nothing more until an export succeeds."""

    failing = False

    def filter(self, record: logging.LogRecord) -> bool:
        was_failing, self.failing = self.failing, True
        return not was_failing


_first_failure = _FirstFailureFilter()
logging.getLogger(OTLPSpanExporter.__module__).addFilter(_first_failure)


class Exporting(SpanTracing):
    """Records the spans of one service, and exports them."""

    def __init__(self, role: str, instance: str, exporter: SpanExporter) -> None:
        """`instance`: a name that no other process has."""
        resource = {
            "service.name": f"{SCOPE}-{role}",
            "service.instance.id": instance,
            "service.version": VERSION,
        }
        self._provider = TracerProvider(
            resource=Resource.create(resource),
            shutdown_on_exit=False,  # it would wait for as long as it takes
        )
        self._queue = _Queue(exporter)
        self._provider.add_span_processor(self._queue)
        super().__init__(self._provider.get_tracer(SCOPE, VERSION))

    @classmethod
    def to(cls, url: str, role: str, instance: str) -> Self:
        """Export to this URL.

        Headers, certificates and the like come from `OTEL_EXPORTER_OTLP_*` in the environment.
        """
        return cls(role, instance, OTLPSpanExporter(endpoint=url))

    async def close(self) -> None:
        # In a daemon thread: it may hang in a connection.
        closing = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        loop = asyncio.get_running_loop()
        until = loop.time() + CLOSE_S
        while closing.is_alive() and loop.time() < until:  # noqa: ASYNC110 - a thread sets no event of a loop
            await asyncio.sleep(0.01)
        self._queue.give_up()


class _Queue(BatchSpanProcessor):
    """Bounded queue of spans for export. A span beyond the bound is dropped and counted when it arrives."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._lock = threading.Lock()
        self._waiting = 0
        self._over = False
        super().__init__(_CountingExporter(exporter, self._count_exported), max_queue_size=MOST_WAITING)

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return
        with self._lock:
            admitted = not self._over and self._waiting < MOST_WAITING
            self._waiting += admitted
        if admitted:
            super().on_end(span)
        else:
            metrics.SPANS.labels("dropped").inc()

    def give_up(self) -> None:
        """Count everything not exported yet as dropped, whatever becomes of it."""
        with self._lock:
            self._over = True
        metrics.SPANS.labels("dropped").inc(self._waiting)

    def _count_exported(self, count: int, outcome: str) -> None:
        with self._lock:
            if self._over:
                return
            self._waiting -= count
        metrics.SPANS.labels(outcome).inc(count)


class _CountingExporter(SpanExporter):
    """Exporter that reports the result of another exporter."""

    def __init__(self, exporter: SpanExporter, settled: Callable[[int, str], None]) -> None:
        self._exporter = exporter
        self._count_exported = settled

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            arrived = result is SpanExportResult.SUCCESS
            self._count_exported(len(spans), "sent" if arrived else "failed")
            if arrived:
                _first_failure.failing = False
        return result

    def shutdown(self) -> None:
        """Give up exports under way."""
        self._exporter.shutdown()
