"""Spans and their export to OpenTelemetry, and W3C `traceparent`.

Enters: received records, records to send and steps of work, from `kernel.kafka`, services and the SDK.
Leaves: spans over OTLP/HTTP, or nothing without a tracing backend; `traceparent` headers.
Imports: `kernel.base` (and `messages`) only. Only `otel` and `export` need the extra `otel`.
Read first:
- `api.py`: `Tracing` and `Span`, which callers use; without a backend every method does nothing. It parses and
  writes the header.
- `otel.py`: the same as spans of OpenTelemetry.
"""
