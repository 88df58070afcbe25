"""W3C Trace Context (`traceparent`): one request is one trace across all hops."""

from __future__ import annotations

import random
import re
import secrets

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def written(trace: str, span: str, *, sampled: bool) -> str:
    """Format a `traceparent`."""
    return f"00-{trace}-{span}-{sampled:02x}"


def new_traceparent(*, sampled: bool = True) -> str:
    """Return a `traceparent` that starts a trace."""
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
    """Return the trace id of a `traceparent`, or None if it is invalid."""
    match = _TRACEPARENT.fullmatch(traceparent or "")
    return match.group(1) if match else None


def nearest(later: str | None, first: str | None) -> str | None:
    """Return `later` if it belongs to the same trace as `first`, else `first`.

    So nobody who sends something about a request can move it into a trace of their own.
    """
    if first is None or trace_id(later) == trace_id(first):
        return later
    return first
