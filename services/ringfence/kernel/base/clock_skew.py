"""Detection of clock skew: compares this machine's clock with those of the broker and of Redis."""

from __future__ import annotations

from collections import deque

MAX_SKEW_MS = 1000
"""A clock that is further off makes the service not ready. Deadlines follow the clock of Redis, and expiry that of the
broker: skew of this clock delays or denies, but never lets anything live longer. Code that relies on this clock alone
has to deny while it is `behind`.
"""
_REMEMBERED = 10


class SkewCheck:
    """Estimates how far this clock differs from another, by comparing timestamps of the other with their arrival."""

    def __init__(self, whose: str) -> None:
        """`whose` names the other clock in messages, for example `the broker`."""
        self._whose = whose
        self._ahead_ms: deque[int] = deque(maxlen=_REMEMBERED)

    def observe(self, stamped_ms: int, now_ms: int) -> None:
        """Record that a timestamp `stamped_ms` of the other clock arrived at `now_ms` of this one, both in ms.

        A timestamp is under way for an unknown time. The smallest of the last ten differences is close to the true
        skew.
        """
        self._ahead_ms.append(now_ms - stamped_ms)

    def ahead_ms(self) -> int | None:
        """How many ms this clock is ahead, at most; negative if it is behind; None before the first timestamp."""
        return min(self._ahead_ms, default=None)

    def past_ms(self, now_ms: int) -> int | None:
        """A time in ms that has passed on the other clock, whatever the skew; None before the first timestamp."""
        ahead_ms = self.ahead_ms()
        return None if ahead_ms is None else now_ms - max(ahead_ms, 0) - MAX_SKEW_MS

    def behind(self) -> str | None:
        """The reason if this clock is behind by more than the allowed skew, else None."""
        ahead_ms = self.ahead_ms()
        return self.unready() if ahead_ms is not None and ahead_ms < 0 else None

    def unready(self) -> str | None:
        """The reason if the skew is larger than `MAX_SKEW_MS` in either direction, else None."""
        ahead_ms = self.ahead_ms()
        if ahead_ms is None or abs(ahead_ms) <= MAX_SKEW_MS:
            return None
        way = "ahead of" if ahead_ms > 0 else "behind"
        return f"the clock is {abs(ahead_ms) / 1000:.1f} s {way} that of {self._whose}; set both by NTP"
