"""The clock of an in-memory Ringfence: the machine's, which a test can move forward."""

from __future__ import annotations

from ringfence.kernel.base.clock import SystemClock


class MovableClock:
    """Goes on by itself, and by `advance`. Never goes back."""

    def __init__(self) -> None:
        self._system = SystemClock()
        self._ahead_ms = 0
        self._last_ms = 0

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC."""
        self._last_ms = max(self._last_ms, self._system.now_ms() + self._ahead_ms)
        return self._last_ms

    def tick_ms(self) -> int:
        """A moment that is later than all moments before, as rules compare the order of records by their times."""
        before = self._last_ms
        self._last_ms = max(self.now_ms(), before + 1)
        return self._last_ms

    def advance(self, seconds: float) -> None:
        """Move the clock forward. Raises ValueError if `seconds` is negative."""
        if seconds < 0:
            raise ValueError("time only goes forward")
        self._ahead_ms += round(seconds * 1000)
