"""The result of one check of `ringfence doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ringfence.kernel.base.clock import SkewCheck

Verdict = Literal["good", "bad", "unknown"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check: what was checked, what came out, and what to do if that is not good."""

    what: str
    verdict: Verdict
    says: str


def clock(whose: str, skew: SkewCheck) -> CheckResult:
    """Return the result for the difference between another clock and ours."""
    if reason := skew.unready():
        return CheckResult(f"clock, {whose}", "bad", reason)
    return CheckResult(f"clock, {whose}", "good", f"at most {abs(skew.ahead_ms() or 0)} ms apart")
