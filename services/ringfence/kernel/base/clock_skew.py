"""Whether this process's clock can be trusted: held against those of the broker and of Redis, once a second."""

from __future__ import annotations

from collections import deque

MAX_SKEW_MS = 1000
"""A clock that is further off than this says so. Deadlines are Redis's time, expiry is judged by the broker's: being
off delays and denies, and never lets anything live longer. Who goes by this clock alone denies while it is `behind`."""
_REMEMBERED = 10


class SkewCheck:
    """Compares moments that another clock stamped with ours when they arrived."""

    def __init__(self, whose: str) -> None:
        """`whose` is the other clock, for people: `the broker`."""
        self._whose = whose
        self._ahead_ms: deque[int] = deque(maxlen=_REMEMBERED)

    def observe(self, stamped_ms: int, now_ms: int) -> None:
        """Something that the other clock stamped arrived now. However long it was under way, the least of several
        differences is close to that of the clocks.
        """
        self._ahead_ms.append(now_ms - stamped_ms)

    def ahead_ms(self) -> int | None:
        """How far our clock is ahead (below 0: behind), at most; None before anything was heard."""
        return min(self._ahead_ms, default=None)

    def past_ms(self, now_ms: int) -> int | None:
        """A moment of the other clock's that is over, however far ours is ahead; None before anything was heard."""
        ahead_ms = self.ahead_ms()
        return None if ahead_ms is None else now_ms - max(ahead_ms, 0) - MAX_SKEW_MS

    def behind(self) -> str | None:
        """Why what this clock says is over may be over for longer, or None."""
        ahead_ms = self.ahead_ms()
        return self.unready() if ahead_ms is not None and ahead_ms < 0 else None

    def unready(self) -> str | None:
        """Why the clock cannot be trusted, or None."""
        ahead_ms = self.ahead_ms()
        if ahead_ms is None or abs(ahead_ms) <= MAX_SKEW_MS:
            return None
        way = "ahead of" if ahead_ms > 0 else "behind"
        return f"the clock is {abs(ahead_ms) / 1000:.1f} s {way} that of {self._whose}; set both by NTP"
