"""W3C Trace Context: one request is one trace, across all hops."""

from __future__ import annotations

import random
import re
import secrets

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_ZERO = "0" * 32


def new_traceparent() -> str:
    """A `traceparent` that starts a trace."""
    return in_trace(secrets.token_hex(16))


def trace_id(traceparent: str | None) -> str | None:
    """The trace id of a `traceparent`, or None where it is none."""
    match = _TRACEPARENT.fullmatch(traceparent or "")
    return match.group(1) if match and match.group(1) != _ZERO else None


def in_trace(trace: str) -> str:
    """A `traceparent` with a new span in the trace of this id."""
    # A span is told from others, not kept from anybody, and one is made for every record.
    return f"00-{trace}-{random.getrandbits(63) + 1:016x}-01"


def child_of(traceparent: str | None) -> str:
    """A `traceparent` for the next hop: the same trace, a new span. A malformed one starts a new trace."""
    trace = trace_id(traceparent)
    return in_trace(trace) if trace else new_traceparent()
