"""Circuit breaker, bulkhead and deadline for calls to targets: a target that is down or hangs delays no other
target.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ringfence.backends.target_settings import CircuitOpenError, TargetError, TargetRefusedError

T = TypeVar("T")

FAILURES_TO_OPEN = 5
FIRST_OPEN_S = 0.5
_MOST_DOUBLINGS = 16


@dataclass(slots=True)
class _Target:
    slots: asyncio.Semaphore
    failures: int = 0
    open_until: float = 0.0
    probing: bool = field(default=False)
    """In a half-open circuit, one call at a time probes whether the target is back."""


class CircuitBreaker:
    """The calls of one process to all targets, with a circuit for each target."""

    def __init__(
        self,
        *,
        concurrency: int,
        deadline_s: float,
        longest_shut_s: float,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
            concurrency: the most calls to one target at a time (bulkhead).
            deadline_s: how long one call may take, without its wait for a free slot.
            longest_shut_s: the longest time that a circuit stays open.
            seconds: a monotonic clock.
        """  # fmt: skip
        self._seconds = seconds
        self.concurrency = concurrency
        self._deadline_s = deadline_s
        self._max_open_s = longest_shut_s
        self._targets: dict[str, _Target] = {}

    async def call(self, target_id: str, work: Callable[[], Awaitable[T]]) -> T:
        """Call a target, and return the result of `work`.

        Raises CircuitOpenError at once while the circuit is open, TargetError after the deadline, and what `work`
        raises.
        """
        target = self._of(target_id)
        self._check_open(target, target_id)
        async with target.slots:
            probe = self._check_open(target, target_id)  # other calls may have failed while this one waited
            target.probing = target.probing or probe
            try:
                async with asyncio.timeout(self._deadline_s):
                    answer = await work()
            except TargetRefusedError:
                target.failures = 0
                raise
            except TimeoutError:
                self._failed(target)
                raise TargetError(
                    f"target {target_id} did not answer within {self._deadline_s:g} s"
                ) from None
            except Exception:
                self._failed(target)
                raise
            finally:
                if probe:
                    target.probing = False
            target.failures = 0
            return answer

    def open_for_ms(self, target_id: str) -> int:
        """How long the circuit of a target stays open, in ms; 0 if it is not open."""
        target = self._of(target_id)
        return max(0, int((target.open_until - self._seconds()) * 1000))

    shut_ms = open_for_ms  # its name in 0.1, which backends of others call

    def _of(self, target_id: str) -> _Target:
        if target_id not in self._targets:
            self._targets[target_id] = _Target(asyncio.Semaphore(self.concurrency))
        return self._targets[target_id]

    def _check_open(self, target: _Target, target_id: str) -> bool:
        """Raises CircuitOpenError if the circuit is open. True if this call is the probe of a half-open circuit."""
        if target.failures < FAILURES_TO_OPEN:
            return False
        left_s = target.open_until - self._seconds()
        if left_s > 0 or target.probing:
            retry_ms = int(max(left_s, FIRST_OPEN_S) * 1000)
            raise CircuitOpenError(f"target {target_id} failed {target.failures} times in a row", retry_ms)
        return True

    def _failed(self, target: _Target) -> None:
        target.failures += 1
        doublings = target.failures - FAILURES_TO_OPEN
        if doublings >= 0:
            open_s = min(self._max_open_s, FIRST_OPEN_S * 2 ** min(doublings, _MOST_DOUBLINGS))
            target.open_until = self._seconds() + open_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
