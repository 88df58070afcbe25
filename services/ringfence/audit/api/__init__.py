"""The HTTP API of audit."""
