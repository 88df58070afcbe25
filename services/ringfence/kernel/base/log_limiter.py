"""Whoever may write to a topic may write garbage, hundreds of records a second, and each would be a line in the log of
each service that reads it. Of each kind the first few are, and then one line now and then says how many there were.

Nothing else is held back: metrics and dead letters count each.
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
"""A kind of which none came for so long is new again."""
_MOST_KINDS = 1000
"""Topics and codes are our own words, and few. What is beyond that is of one kind."""
_CHECK_EVERY_S = 1.0
_KIND = "flood_kind"

_Kind = tuple[object, ...]


def rate_limited(*kind: str) -> dict[str, Any]:
    """The `extra` of a log line of which there may be a flood: the same words from the same place, and these, are one
    kind. Give the topic and the reason's code; nothing that a stranger chooses.
    """
    return {_KIND: kind}


class LogLimiter(logging.Filter):
    """Holds back what comes too often. `watch` tells how many there were."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now_s = now_s
        self._lock = threading.Lock()
        self._counters: dict[_Kind, tuple[RepeatCounter, str, int]] = {}
        """With each the name and the level that the last of its lines had."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be written."""
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
        """Tell how many there were, now and then, for ever."""
        await run_periodically(_CHECK_EVERY_S, self._report_due, "not told how many lines were left out", log)

    async def _report_due(self) -> None:
        self.report()

    def report(self, *, all: bool = False) -> None:
        """Tell what was left out of each kind: where it is time, or of all."""
        now_s = self._now_s()
        lines: list[tuple[str, int, int, float, str]] = []
        with self._lock:
            for kind, (counter, name, level) in list(self._counters.items()):
                if counter.left_out and (all or counter.due(now_s)):
                    since_s = now_s - counter.reported_s
                    lines.append((name, level, counter.take_left_out(now_s), since_s, counter.last))
                elif not counter.left_out and now_s - counter.latest_s >= QUIET_S:
                    del self._counters[kind]
        for name, level, count, since_s, last in lines:
            logging.getLogger(name).log(
                level, "left out %d like these in the last %.0f s, the last: %s", count, since_s, last
            )


# What happens again and again is told the first few times, and then how often it did, now and then.

_MOST_CHARS = 500
"""Of a message that is quoted: strangers may make it long."""


class RepeatCounter:
    """Counts what is left out of what is told. The time is handed in, in seconds of a clock that never jumps."""

    def __init__(self, now_s: float, *, first: int, every_s: float) -> None:
        """Args:
            first: so many are told each.
            every_s: so often it is time to tell how many were not.
        """  # fmt: skip
        self._first = first
        self._every_s = every_s
        self.reported_s = self.latest_s = now_s
        """When anything was told last, and when the last of them came."""
        self.left_out = 0
        """Since then."""
        self.last = ""
        """What the last that was left out said."""

    def should_log(self, message: str, now_s: float) -> bool:
        """Take down one more. Whether it is to be told; else it is left out."""
        if self._first <= 0:
            self.leave_out(message, now_s)
            return False
        self._first -= 1
        self.reported_s = self.latest_s = now_s
        return True

    def leave_out(self, message: str, now_s: float) -> None:
        """Take down one more that is not told, even if it is one of the first."""
        self.latest_s = now_s
        self.left_out += 1
        self.last = message[:_MOST_CHARS]

    def due(self, now_s: float) -> bool:
        """Whether it is time to tell how many were left out, if any were."""
        return now_s - self.reported_s >= self._every_s

    def take_left_out(self, now_s: float) -> int:
        """How many were left out: told now, and counted anew."""
        count, self.left_out, self.reported_s = self.left_out, 0, now_s
        return count
