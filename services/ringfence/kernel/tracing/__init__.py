"""Spans and their export to OpenTelemetry, and W3C `traceparent`."""
