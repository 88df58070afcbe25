"""Poll delivery (RFC 8936): the events of one stream that wait for their receiver. Further events wait on Kafka."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from ringfence.kernel.base.clock import Clock
from ringfence.signals.events import UnsignedSet

WINDOW_SIZE = 500
"""Records taken from Kafka at a time, and the number of waiting events at which no more are taken."""
MAX_SETS_PER_POLL = WINDOW_SIZE // 2
"""The most SETs in one answer. Less than a full window, so that `moreAvailable` is true when it is full."""


class Window:
    """The events that a poll can return now. Bounded, which puts backpressure on Kafka."""

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
        """Whether so many events wait that no more may be added."""
        return len(self._waiting) >= WINDOW_SIZE

    def add(self, events: Iterable[UnsignedSet]) -> None:
        """Add waiting events."""
        self._waiting |= {event.jti: event for event in events}
        if self._waiting and self.waiting_since_ms is None:
            self.waiting_since_ms = self._clock.now_ms()
        self._notify()

    def discard(self, jtis: Iterable[str]) -> None:
        """Remove events without settling them: another replica delivers them."""
        for jti in jtis:
            self._waiting.pop(jti, None)
        if not self._waiting:
            self.waiting_since_ms = None
        self._notify()

    @property
    def changed(self) -> asyncio.Event:
        """Set when the next event is added or settled."""
        return self._changed

    def settle(self, jti: str) -> UnsignedSet | None:
        """Remove an event that the receiver acknowledged or refused. None if it did not wait."""
        event = self._waiting.pop(jti, None)
        if event is not None:
            self.waiting_since_ms = self._clock.now_ms() if self._waiting else None
            self._notify()
        return event

    async def next_batch(self, limit: int, wait_s: float) -> tuple[list[UnsignedSet], bool]:
        """The oldest waiting events, and whether there are more. Waits up to `wait_s` seconds for the first one.

        `limit` is the receiver's own; no answer has more than `MAX_SETS_PER_POLL`.
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
