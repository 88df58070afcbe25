"""What is left of a fetch is handled before the next one is made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ringfence.kernel.kafka.consumer import Consumer, ConsumerOptions
from ringfence.kernel.kafka.fetch_control import FetchControl


class Kept:
    """Hands out what is here of a fetch, and notes whether the next one was held back meanwhile."""

    def __init__(self, fetches: FetchControl, *kept: dict[Any, list[Any]]) -> None:
        self._fetches, self._kept = fetches, list(kept)
        self.asked: list[tuple[bool, bool]] = []

    async def next(self, consumer: Any, *, timeout_ms: int, max_records: int) -> dict[Any, list[Any]]:
        self.asked.append((self._fetches.held, timeout_ms > 0))
        return self._kept.pop(0) if self._kept else {}


async def test_buffered_records_are_handled_before_the_next_fetch() -> None:
    subscription = SimpleNamespace(fetch_context=None)
    fetches = FetchControl(SimpleNamespace(_client=SimpleNamespace(send=None), _subscription=subscription))
    consumer = Consumer.__new__(Consumer)
    consumer._options, consumer._gathering_s = ConsumerOptions("g"), 0.0
    consumer._reader = kept = Kept(fetches, {"here": [1]})  # type: ignore[assignment]
    commits: Any = SimpleNamespace(waiting=False, due=False)
    fetches.pause()
    assert await consumer._next(None, fetches, commits) == {"here": [1]}
    assert kept.asked == [(True, False)], "it is taken without waiting, and the next fetch stays held"
    assert await consumer._next(None, fetches, commits) == {}
    assert kept.asked[1:] == [(True, False), (False, True)], "only then is more asked for, and waited for"
