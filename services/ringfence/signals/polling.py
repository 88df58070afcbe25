"""Poll (RFC 8936): the events of one stream that wait for their receiver. What is not here yet waits on Kafka."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping

from ringfence.kernel.clock import Clock
from ringfence.signals.domain import Event

_LOOK_S = 2.0


class Window:
    """What a receiver can be given now: bounded by what is taken from Kafka at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[str, Event] = {}
        self._moved = asyncio.Event()
        self.waiting_since_ms: int | None = None
        """Since when nothing was taken, though something is there."""

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, events: Iterable[Event]) -> None:
        """These wait from now on."""
        self._waiting |= {event.jti: event for event in events}
        if self._waiting and self.waiting_since_ms is None:
            self.waiting_since_ms = self._clock.now_ms()
        self._move()

    async def hand_over(self, events: Mapping[str, Event], mine: Callable[[], bool]) -> None:
        """Return once the receiver has taken all of these, or somebody else hands them over (`mine`)."""
        self.put(events.values())
        while not self._waiting.keys().isdisjoint(events):
            moved = self._moved
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(moved.wait(), _LOOK_S)
            if not mine():
                self._waiting = {jti: one for jti, one in self._waiting.items() if jti not in events}
                return

    def take(self, jti: str) -> Event | None:
        """The receiver has this one, or will not have it. None where it did not wait."""
        event = self._waiting.pop(jti, None)
        if event is not None:
            self.waiting_since_ms = self._clock.now_ms() if self._waiting else None
            self._move()
        return event

    async def some(self, most: int, wait_s: float) -> tuple[list[Event], bool]:
        """The oldest that wait, and whether there are more; waits for the first one, and no longer than that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not self._waiting and most:
                    await self._moved.wait()
        events = list(self._waiting.values())
        return events[:most], len(events) > most

    def _move(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
