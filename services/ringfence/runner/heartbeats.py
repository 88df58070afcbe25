"""Heartbeats of a runner, and the guard that stops its sandboxes while Kafka acknowledges none of them.

A runner that is cut off learns of no end: no stop, no revocation, no new trust bundle. So it freezes its sandboxes at
half of the grace and destroys them at its end (a dead man's switch). Revokers count the same silence from the append
time of the last heartbeat, which is never earlier than the time at which it was sent: they act after the runner.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import NoReturn, Protocol

from aiokafka.errors import KafkaError

from ringfence.kernel.base.clock import Clock, suspend_aware_ms
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.messages.operations import Heartbeat, RunnerPool

log = logging.getLogger(__name__)

EVERY_S = 1.0
_MAX_UNACKNOWLEDGED = 30
"""No more heartbeats are on their way at once: Kafka's client keeps what it cannot send."""
_LOOK_EVERY_S = 0.25


class Heartbeats:
    """Sends a heartbeat every second, and measures for how long none has been acknowledged."""

    def __init__(
        self,
        send: Callable[[Heartbeat], Awaitable[object]],
        runner: str,
        trust_domain: str,
        clock: Clock,
        runs: Callable[[], Iterable[str]],
        *,
        pool: Callable[[], RunnerPool] | None = None,
        never_jumps_ms: Callable[[], int] = suspend_aware_ms,
    ) -> None:
        """Args:
            send: signs and publishes a heartbeat, and returns once Kafka has acknowledged it.
            runner: the runner's SPIFFE ID.
            runs: the ids of the running runs of this process. Each heartbeat names them, because several processes
                may be one runner.
            pool: of a runner that takes orders: its pool as it is now.
            never_jumps_ms: a monotonic clock in ms, which also runs while the machine sleeps.
        """  # fmt: skip
        self._send = send
        self._runner = runner
        self._trust_domain = trust_domain
        self._clock = clock
        self._runs = runs
        self._pool = pool
        self._never_jumps_ms = never_jumps_ms
        self._sending: set[asyncio.Task[None]] = set()
        self._acknowledged_ms = never_jumps_ms()
        self._first = asyncio.Event()

    @property
    def silence_s(self) -> float:
        """Seconds since the last acknowledged heartbeat was sent; before the first one, since the start."""
        return (self._never_jumps_ms() - self._acknowledged_ms) / 1000

    async def acknowledged(self) -> None:
        """Wait until a heartbeat was acknowledged. The runner claims nothing before."""
        await self._first.wait()

    async def run(self) -> NoReturn:
        """Send heartbeats until cancelled. One that Kafka does not acknowledge is skipped."""
        try:
            while True:
                if len(self._sending) < _MAX_UNACKNOWLEDGED:
                    beat = asyncio.create_task(self.beat(), name="heartbeat")
                    self._sending.add(beat)
                    beat.add_done_callback(self._sending.discard)
                await asyncio.sleep(EVERY_S)
        finally:
            for task in self._sending:
                task.cancel()

    async def beat(self) -> None:
        """Send one heartbeat, and wait for its acknowledgement. An error is logged."""
        now_ms, sent_ms = self._clock.now_ms(), self._never_jumps_ms()
        heartbeat = Heartbeat(
            iss=self._runner,
            aud=self._trust_domain,
            iat=now_ms // 1000,
            jti=derived_id("heartbeat", self._runner, now_ms),
            at_ms=now_ms,
            runs=tuple(sorted(self._runs())),
            pool=self._pool() if self._pool is not None else None,
        )
        try:
            await self._send(heartbeat)
        except (RingfenceError, KafkaError, OSError) as error:
            why = str(error) or type(error).__name__
            log.warning("a heartbeat is left out: %s", why, extra=rate_limited("heartbeat", why[:40]))
            return
        self._acknowledged_ms = max(self._acknowledged_ms, sent_ms)
        self._first.set()


class Freezable(Protocol):
    """The runs of this process, which a runner that is cut off stops."""

    async def freeze(self) -> None:
        """Stop all processes of all sandboxes. It may be called again. Raises RingfenceError if some were not
        stopped.
        """
        ...

    async def thaw(self) -> None:
        """Thaw all sandboxes. Raises RingfenceError."""
        ...

    async def destroy(self, reason: str) -> None:
        """End all runs, and destroy their sandboxes. Raises RingfenceError if something could not be destroyed."""
        ...


@dataclass(slots=True, eq=False)
class SilenceGuard:
    """Freezes all runs at half of the grace, destroys them at its end, and thaws them if Kafka answers in between."""

    heartbeats: Heartbeats
    runs: Freezable
    _: KW_ONLY
    grace_s: float
    _frozen: bool = field(default=False, init=False)

    @property
    def frozen(self) -> bool:
        return self._frozen

    def silent(self) -> str | None:
        """The reason why nothing new may start now, or None."""
        silence_s = self.heartbeats.silence_s
        if silence_s < self.grace_s / 2:
            return None
        return f"Kafka has acknowledged no heartbeat of this runner for {silence_s:.0f} s"

    async def run(self) -> NoReturn:
        while True:
            await self.look()
            await asyncio.sleep(min(_LOOK_EVERY_S, self.grace_s / 20))

    async def look(self) -> None:
        """Freeze, destroy or thaw the runs, by the length of the silence. A failed step is retried at the next call."""
        silence_s = self.heartbeats.silence_s
        try:
            if silence_s >= self.grace_s:
                await self.runs.destroy(
                    f"Kafka acknowledged no heartbeat of the runner for {self.grace_s:g} s"
                )
            elif silence_s >= self.grace_s / 2:
                # Again at each look: a run may have started since.
                await self.runs.freeze()
                if not self._frozen:
                    log.warning("all runs are frozen: %s", self.silent())
                self._frozen = True
            elif self._frozen:
                await self.runs.thaw()
                self._frozen = False
                log.warning("all runs go on: Kafka acknowledges heartbeats again")
        except (RingfenceError, OSError) as error:
            log.error("a silent runner could not stop its runs, again soon: %s", error)
