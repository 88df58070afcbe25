"""W3C Trace Context: one request is one trace, across all hops."""

from __future__ import annotations

import random
import re
import secrets
from typing import NamedTuple

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = 1


class Parent(NamedTuple):
    """What a `traceparent` says."""

    trace: str
    span: str
    sampled: bool
    """Whether whoever wrote it asked for the trace to be kept."""


def parsed(traceparent: str | None) -> Parent | None:
    """What a `traceparent` says, or None where it is none: of another version, malformed, or all zeros."""
    match = _TRACEPARENT.fullmatch(traceparent or "")
    if match is None:
        return None
    trace, span, flags = match.groups()
    return Parent(trace, span, bool(int(flags, 16) & _SAMPLED))


def written(trace: str, span: str, *, sampled: bool) -> str:
    """The `traceparent` that says this."""
    return f"00-{trace}-{span}-{_SAMPLED if sampled else 0:02x}"


def new_traceparent(*, sampled: bool = True) -> str:
    """A `traceparent` that starts a trace."""
    # A span is told from others, not kept from anybody.
    return written(secrets.token_hex(16), f"{random.getrandbits(63) + 1:016x}", sampled=sampled)


def traceparent_of(id: str) -> str:
    """The `traceparent` that follows from a UUID, of which no half is zero: its variant stands in the second."""
    digits = id.replace("-", "")
    return written(digits, digits[16:], sampled=True)


def well_formed(traceparent: str | None) -> str | None:
    """The `traceparent`, or None where it is none."""
    return traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None


def trace_id(traceparent: str | None) -> str | None:
    """The trace id of a `traceparent`, or None where it is none."""
    match = _TRACEPARENT.fullmatch(traceparent or "")
    return match.group(1) if match else None


def nearest(later: str | None, first: str | None) -> str | None:
    """What to go on from, of two: `later`, as long as that is the same trace, else `first`.

    So whoever sends something about a request cannot move it into a trace of their own.
    """
    if first is None or trace_id(later) == trace_id(first):
        return later
    return first
