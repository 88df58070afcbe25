"""What waits for people: how much, and since when. An alert goes by it, as nobody else notices what nobody answers."""

from __future__ import annotations

from ringfence.kernel import metrics
from ringfence.kernel.clock import Clock
from ringfence.policy.store import Decisions


class Queue:
    """The requests that wait for approvals, as Prometheus sees them. All replicas know of all of them."""

    def __init__(self, decisions: Decisions, clock: Clock) -> None:
        self._decisions = decisions
        self._clock = clock
        metrics.APPROVALS_WAITING.set_function(self.waiting)
        metrics.APPROVALS_OLDEST.set_function(self.oldest_s)

    def waiting(self) -> float:
        """How many wait."""
        return len(list(self._decisions.pending()))

    def oldest_s(self) -> float:
        """How long the oldest of them has waited, by the time at which the broker appended it; 0 where none does."""
        appended = [one.pending.source.appended_at_ms for one in self._decisions.pending() if one.pending]
        if not appended:
            return 0
        return max(0, self._clock.now_ms() - min(appended)) / 1000
