"""Which containment rings each pattern of inherited credentials breaks, and why.

The four rings are those of a contained agent: its inputs (what it gets), its environment (where that works), its
outputs (what it causes, and who answers for it) and its promotion (how it comes to production). A state that a scan
cannot see is `unknown`, never good.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ringfence.scan.findings import Pattern, RingState, RingVerdict

RING_NAMES: Final[Mapping[int, str]] = {1: "inputs", 2: "environment", 3: "outputs", 4: "promotion"}
_OUTPUTS_UNKNOWN: Final[tuple[RingState, str]] = (
    "unknown",
    "intact only if outputs are validated, which a scan cannot see",
)
_PROMOTION_UNKNOWN: Final[tuple[RingState, str]] = (
    "unknown",
    "intact only if promotion is gated, which a scan cannot see",
)
_UNKNOWN: Final[tuple[RingState, str]] = ("unknown", "what it opens cannot be known offline")

_MATRIX: Final[Mapping[Pattern, tuple[tuple[RingState, str], ...]]] = {
    Pattern.STATIC_KEY: (
        ("violated", "it gives access beyond the task"),
        ("violated", "it works from anywhere"),
        _OUTPUTS_UNKNOWN,
        _PROMOTION_UNKNOWN,
    ),
    Pattern.USER_TOKEN: (
        ("violated", "it gives the user's whole rights"),
        ("partly", "it is tied to the user's environment, which the agent shares"),
        _OUTPUTS_UNKNOWN,
        _PROMOTION_UNKNOWN,
    ),
    Pattern.SERVICE_ACCOUNT: (
        ("violated", "it has no scope for each agent"),
        ("violated", "any agent can use it"),
        ("compromised", "there is nobody to attribute actions to"),
        ("compromised", "there is no sponsor to trace to"),
    ),
    Pattern.PASSWORD: (
        ("violated", "it gives the whole account"),
        ("violated", "it is portable"),
        _OUTPUTS_UNKNOWN,
        _PROMOTION_UNKNOWN,
    ),
    Pattern.OTHER: (
        ("violated", "the agent can use it beyond the task"),
        _UNKNOWN,
        _UNKNOWN,
        _UNKNOWN,
    ),
}


def verdicts(pattern: Pattern) -> tuple[RingVerdict, ...]:
    return tuple(RingVerdict(ring, state, why) for ring, (state, why) in enumerate(_MATRIX[pattern], start=1))
