"""Poll (RFC 8936): the events of one stream that wait for their receiver. What is not here yet waits on Kafka."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from ringfence.kernel.base.clock import Clock
from ringfence.signals.events import UnsignedSet

WINDOW_SIZE = 500
"""So many records are taken from Kafka at a time. While so many events wait, no more are taken."""
MAX_SETS_PER_POLL = WINDOW_SIZE // 2
"""So many SETs are in one answer at most. Fewer than a full window: where it is full, `moreAvailable` is true."""


class Window:
    """What a receiver can be given now: bounded by what is taken from Kafka at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[str, UnsignedSet] = {}
        self._changed = asyncio.Event()
        self.waiting_since_ms: int | None = None
        """Since when nothing was taken, though something is there."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, jti: str) -> bool:
        return jti in self._waiting

    @property
    def full(self) -> bool:
        """Whether so many wait that no more are to be put here."""
        return len(self._waiting) >= WINDOW_SIZE

    def add(self, events: Iterable[UnsignedSet]) -> None:
        """These wait from now on."""
        self._waiting |= {event.jti: event for event in events}
        if self._waiting and self.waiting_since_ms is None:
            self.waiting_since_ms = self._clock.now_ms()
        self._notify()

    def discard(self, jtis: Iterable[str]) -> None:
        """These wait no longer: somebody else hands them over."""
        for jti in jtis:
            self._waiting.pop(jti, None)
        if not self._waiting:
            self.waiting_since_ms = None
        self._notify()

    @property
    def changed(self) -> asyncio.Event:
        """Set when the next event comes or is taken."""
        return self._changed

    def settle(self, jti: str) -> UnsignedSet | None:
        """The receiver has this one, or will not have it. None where it did not wait."""
        event = self._waiting.pop(jti, None)
        if event is not None:
            self.waiting_since_ms = self._clock.now_ms() if self._waiting else None
            self._notify()
        return event

    async def next_batch(self, limit: int, wait_s: float) -> tuple[list[UnsignedSet], bool]:
        """The oldest that wait, and whether there are more; waits for the first one, and no longer than that.

        `limit` is the receiver's own limit; no answer has more than `MAX_SETS_PER_POLL`.
        """
        limit = min(limit, MAX_SETS_PER_POLL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not self._waiting and limit:
                    await self._changed.wait()
        events = list(self._waiting.values())
        return events[:limit], len(events) > limit

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
