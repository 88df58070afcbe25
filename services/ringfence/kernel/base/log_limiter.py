"""Rate limiting of repeated log lines.

Anybody with Write on a topic can write hundreds of invalid records a second. Each would be a log line in every service
that reads the topic. Of each kind of line, the first `FIRST` are logged. After that, one line every `EVERY_S` seconds
says how many were left out. Metrics and dead letters still count every record.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ringfence.kernel.base.retry import run_periodically

log = logging.getLogger(__name__)

FIRST = 5
EVERY_S = 60.0
QUIET_S = 600.0
"""After so many seconds without a line of a kind, its first lines are logged again."""
_MOST_KINDS = 1000
"""Kinds are topics and codes of our own, so there are few. Beyond this number, all further kinds are treated as one."""
_CHECK_EVERY_S = 1.0
_MOST_CHARS = 500
"""The longest quotation of a message, which a stranger may make long."""
_KIND = "flood_kind"

_Kind = tuple[object, ...]


def rate_limited(*kind: str) -> dict[str, Any]:
    """The `extra` of a log call that may be repeated very often.

    Lines with the same logger, the same message template and the same `kind` count together. `kind` is the topic and
    the code of the reason: nothing that a stranger can choose.
    """
    return {_KIND: kind}


class LogLimiter(logging.Filter):
    """A logging filter that drops lines of a kind once there were too many. `watch` reports how many were dropped."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now_s = now_s
        self._lock = threading.Lock()
        self._counters: dict[_Kind, tuple[RepeatCounter, str, int]] = {}
        """For each kind: its counter, and the logger name and level of its last line."""

    def filter(self, record: logging.LogRecord) -> bool:
        own = record.__dict__.pop(_KIND, None)  # else it would be written as well
        if own is None:
            return True
        kind, now_s = (record.name, record.msg, *own), self._now_s()
        with self._lock:
            if kind not in self._counters and len(self._counters) >= _MOST_KINDS:
                kind = ()
            counter, *_ = self._counters.get(kind) or (RepeatCounter(now_s, first=FIRST, every_s=EVERY_S),)
            self._counters[kind] = counter, record.name, record.levelno
            return counter.should_log(record.getMessage(), now_s)

    async def watch(self) -> None:
        """Report dropped lines once a second, for those kinds that are due. Runs for ever."""
        await run_periodically(_CHECK_EVERY_S, self._report_due, "not told how many lines were left out", log)

    async def _report_due(self) -> None:
        self.report()

    def report(self, *, all: bool = False) -> None:
        """Log how many lines were dropped, for each kind that is due, or for `all`."""
        now_s = self._now_s()
        lines: list[tuple[str, int, int, float, str]] = []
        with self._lock:
            for kind, (counter, name, level) in list(self._counters.items()):
                if counter.left_out and (all or counter.due(now_s)):
                    since_s = now_s - counter.reported_s
                    lines.append((name, level, counter.take_suppressed(now_s), since_s, counter.last))
                elif not counter.left_out and now_s - counter.latest_s >= QUIET_S:
                    del self._counters[kind]
        for name, level, count, since_s, last in lines:
            logging.getLogger(name).log(
                level, "left out %d like these in the last %.0f s, the last: %s", count, since_s, last
            )


class RepeatCounter:
    """Counts repetitions of an event, and says which to log. Callers pass the time, in seconds of a monotonic clock."""

    def __init__(self, now_s: float, *, first: int, every_s: float) -> None:
        """Args:
            first: so many events are logged each.
            every_s: how often to report the number of those left out.
        """  # fmt: skip
        self._first = first
        self._every_s = every_s
        self.reported_s = self.latest_s = now_s
        """Times of the last log line and of the last event."""
        self.left_out = 0
        self.last = ""
        """The message of the last event that was left out, cut to 500 characters."""

    def should_log(self, message: str, now_s: float) -> bool:
        """Count one more event. True if it is one of the first, which are logged; otherwise it counts as left out."""
        if self._first <= 0:
            self.suppress(message, now_s)
            return False
        self._first -= 1
        self.reported_s = self.latest_s = now_s
        return True

    def suppress(self, message: str, now_s: float) -> None:
        """Count one more event that is not logged, even if it is one of the first."""
        self.latest_s = now_s
        self.left_out += 1
        self.last = message[:_MOST_CHARS]

    def due(self, now_s: float) -> bool:
        """Whether it is time to report how many were left out."""
        return now_s - self.reported_s >= self._every_s

    def take_suppressed(self, now_s: float) -> int:
        """The number of events left out since the last report. Resets the counter: the caller reports it now."""
        count, self.left_out, self.reported_s = self.left_out, 0, now_s
        return count
