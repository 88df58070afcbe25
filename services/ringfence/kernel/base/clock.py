"""Time is UTC and handed in, never read inside a rule."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Where the present comes from."""

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000


def suspend_aware_ms() -> int:
    """Milliseconds on a clock that never jumps and goes on while the machine sleeps: for ages, never for dates."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class RemoteClock:
    """The time of another machine, by what it stamped, carried on by a clock that never jumps.

    It is at least as late there: what was stamped was on its way for a while. Ours may be set back meanwhile, or stand
    anywhere: what is old by this time is old.
    """

    _REMEMBERED = 60

    def __init__(self, never_jumps_ms: Callable[[], int] = suspend_aware_ms) -> None:
        self._never_jumps_ms = never_jumps_ms
        self._ahead_ms: deque[int] = deque(maxlen=self._REMEMBERED)
        self._most_ahead_ms = 0

    def observe(self, stamped_ms: int) -> None:
        """Something that was stamped there arrived now. Of several, the one that was under way for the least counts."""
        self._ahead_ms.append(stamped_ms - self._never_jumps_ms())
        self._most_ahead_ms = max(self._ahead_ms)

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC, there; 0 before anything was heard."""
        return self._never_jumps_ms() + self._most_ahead_ms if self._ahead_ms else 0
