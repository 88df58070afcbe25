"""What waits for people: how much, and since when. An alert goes by it, as nobody else notices what nobody answers."""

from __future__ import annotations

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.policy.decision_log import Decisions


def count_what_waits(decisions: Decisions, clock: Clock) -> None:
    """Have Prometheus see the requests that wait for approvals, when it asks. All replicas know all of them."""
    metrics.APPROVALS_WAITING.set_function(lambda: len(list(decisions.pending())))
    metrics.APPROVALS_OLDEST.set_function(lambda: _oldest_s(decisions, clock.now_ms()))


def _oldest_s(decisions: Decisions, now_ms: int) -> float:
    """How long the oldest of them has waited, by the time at which the broker appended it; 0 where none does."""
    appended = [one.pending.source.appended_at_ms for one in decisions.pending() if one.pending]
    return max(0, now_ms - min(appended)) / 1000 if appended else 0
