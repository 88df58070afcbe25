"""What an examination of `ringfence doctor` comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ringfence.kernel.base.clock_skew import SkewCheck

Verdict = Literal["good", "bad", "unknown"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One examination: what was looked at, what came of it, and what to do where that is not good."""

    what: str
    verdict: Verdict
    says: str


def clock(whose: str, skew: SkewCheck) -> CheckResult:
    """How far somebody's clock is from ours."""
    if reason := skew.unready():
        return CheckResult(f"clock, {whose}", "bad", reason)
    return CheckResult(f"clock, {whose}", "good", f"at most {abs(skew.ahead_ms() or 0)} ms apart")
