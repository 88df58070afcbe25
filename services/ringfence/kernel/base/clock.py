"""Clocks, the detection of clock skew, and the conversion of moments to UTC dates and text.

Rules do not read a clock: callers pass the time in, in UTC. `SkewCheck` compares this machine's clock with those of
the broker and of Redis.

`utc_datetime` and `utc_text` accept any number, as records and tokens of others may hold any. Nothing else converts a
moment to a date (`tests/contract/test_times.py`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Protocol

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


LAST_MOMENT_S: Final = 253_402_300_799
"""The last second of the year 9999, in seconds since 1970: the last that `datetime` knows."""
END_OF_TIME: Final = "the end of time"
TO_THE_SECOND: Final = "%Y-%m-%d %H:%M:%SZ"


def utc_datetime(seconds: float) -> datetime:
    """A moment in seconds since 1970 as a date.

    A moment beyond the year 9999 is its last second. One before the year 1, and no number, is 1970.
    """
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(LAST_MOMENT_S if seconds > 0 else 0, UTC)


def utc_text(seconds: float, form: str = TO_THE_SECOND) -> str:
    """A moment in seconds since 1970 as text; `END_OF_TIME` for one beyond the year 9999. `form`: as of `strftime`."""
    return END_OF_TIME if seconds > LAST_MOMENT_S else utc_datetime(seconds).strftime(form)


class Clock(Protocol):
    """A source of the current time."""

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC."""
        ...


class SystemClock:
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
