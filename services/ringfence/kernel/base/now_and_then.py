"""What happens again and again is told the first few times, and then how often it did, now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

log = logging.getLogger(__name__)

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
        self.told_s = self.latest_s = now_s
        """When anything was told last, and when the last of them came."""
        self.left_out = 0
        """Since then."""
        self.last = ""
        """What the last that was left out said."""

    def tells(self, message: str, now_s: float) -> bool:
        """Take down one more. Whether it is to be told; else it is left out."""
        if self._first <= 0:
            self.leave_out(message, now_s)
            return False
        self._first -= 1
        self.told_s = self.latest_s = now_s
        return True

    def leave_out(self, message: str, now_s: float) -> None:
        """Take down one more that is not told, even if it is one of the first."""
        self.latest_s = now_s
        self.left_out += 1
        self.last = message[:_MOST_CHARS]

    def due(self, now_s: float) -> bool:
        """Whether it is time to tell how many were left out, if any were."""
        return now_s - self.told_s >= self._every_s

    def told(self, now_s: float) -> int:
        """How many were left out: told now, and counted anew."""
        count, self.left_out, self.told_s = self.left_out, 0, now_s
        return count


async def now_and_then(every_s: float, tell: Callable[[], Awaitable[None]], failed: str) -> NoReturn:
    """Tell for ever, every so many seconds. Where that raises, `failed` is logged, and it is tried again."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await tell()
        except Exception:
            log.exception("%s", failed)
