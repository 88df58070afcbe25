"""Time is UTC and handed in, never read inside a rule."""

from __future__ import annotations

import time
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
