"""Clocks. Rules do not read a clock: callers pass the time in, in UTC."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """A source of the current time."""

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC."""
        ...


class SystemClock:
    """The clock of this machine."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000


def suspend_aware_ms() -> int:
    """A monotonic clock in milliseconds, which also runs while the machine sleeps (CLOCK_BOOTTIME). For ages, not
    dates.
    """
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class RemoteClock:
    """A monotonic estimate of another machine's clock, from timestamps of that machine.

    Between timestamps the estimate advances with the local monotonic clock, so that setting the local clock back makes
    nothing look fresh. The true remote time is never earlier than the estimate, because every timestamp was under way
    for a while. The estimate is based on the last 60 timestamps.
    """

    _REMEMBERED = 60

    def __init__(self, never_jumps_ms: Callable[[], int] = suspend_aware_ms) -> None:
        self._never_jumps_ms = never_jumps_ms
        self._ahead_ms: deque[int] = deque(maxlen=self._REMEMBERED)
        self._most_ahead_ms = 0

    def observe(self, stamped_ms: int) -> None:
        """Record that a timestamp of the remote machine (ms since 1970) arrived now. The one with the shortest delay
        counts.
        """
        self._ahead_ms.append(stamped_ms - self._never_jumps_ms())
        self._most_ahead_ms = max(self._ahead_ms)

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC on the remote machine; 0 before the first timestamp."""
        return self._never_jumps_ms() + self._most_ahead_ms if self._ahead_ms else 0
