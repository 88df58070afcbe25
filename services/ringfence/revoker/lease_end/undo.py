"""Takes credentials back at their targets, beside everything else, for ever, each target as if it were the only one.

What is here has been cut already, or was closed before it became active. A lease is reported as over only when its
target's side is undone. Of what fails, the next try comes after as long again as it has failed so far, up to a limit:
nothing has to be remembered for that, and whoever finds the lease then goes on with it.

While a target is left alone, the first lease that comes is tried when that is over, and when one is undone, all others
that were put off come at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ringfence.backends import Backend, CircuitBreaker, CircuitOpenError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.tracing.api import Tracing
from ringfence.messages.lease import Lease
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.tracing import step_of
from ringfence.revoker.lease_end.lease_ender import EndRequest
from ringfence.revoker.lease_end.overdue import Overdue

log = logging.getLogger(__name__)

Finish = Callable[[Sequence[EndRequest]], Awaitable[object]]
"""Writes the terminal records of leases that are undone."""

MOST_WAITING = 20_000
"""So many leases wait for one target at most. The others stay in Redis, and come again."""
_SETTLED_AT_A_TIME = 500
_FIRST_DELAY_MS = 200


class NoBackendError(LookupError):
    """This process knows no backend of the kind that made a credential: it was started with other code."""


@dataclass(slots=True)
class _Line:
    """What waits for one target."""

    waiting: deque[EndRequest] = field(default_factory=deque)
    workers: int = 0
    put_off: set[str] = field(default_factory=set)
    """Leases that come again later because the target is left alone."""
    probe_at: float = 0.0
    """When the first of them does."""


@dataclass(slots=True)
class _Settled:
    """What came of tries, until it is written down."""

    undone: list[EndRequest] = field(default_factory=list)
    failed: list[tuple[Lease, int]] = field(default_factory=list)
    """With the time, in ms, that its target is left alone at least."""
    probes: dict[str, int] = field(default_factory=dict)
    """Those of them that come when that time is over."""


class CredentialRemover:
    """Has at most one try of a lease under way, and a bounded number for each target."""

    def __init__(
        self,
        store: LeaseStore,
        backends: Mapping[str, Backend],
        caller: CircuitBreaker,
        overdue: Overdue,
        clock: Clock,
        tracing: Tracing,
        *,
        longest_delay_ms: int,
    ) -> None:
        self._store = store
        self._backends = backends
        self._caller = caller
        self._overdue = overdue
        self._clock = clock
        self._tracing = tracing
        self._longest_delay_ms = longest_delay_ms
        self._lines: dict[str, _Line] = {}
        self._held: set[str] = set()
        self._workers: set[asyncio.Task[None]] = set()
        self._settled = _Settled()
        self._news = asyncio.Event()

    def take(self, wishes: Iterable[EndRequest]) -> None:
        """Undo leases that are cut, or were never active. Returns at once; what is under way is not repeated."""
        for wish in wishes:
            lease = wish.lease
            line = self._lines.setdefault(lease.target_id, _Line())
            if lease.lease_id in self._held or len(line.waiting) >= MOST_WAITING:
                continue
            self._held.add(lease.lease_id)
            line.waiting.append(wish)
            if line.workers < self._caller.concurrency:
                line.workers += 1
                worker = asyncio.create_task(self._work(line), name=f"undoing at {lease.target_id}")
                self._workers.add(worker)
                worker.add_done_callback(self._workers.discard)

    async def run(self, finish: Finish) -> None:
        """Write down what comes of the tries, many at a time, for ever: `finish` ends what is undone."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                settled, self._settled = self._settled, _Settled()
                await self._write_down(settled, finish)
        finally:
            for worker in self._workers:
                worker.cancel()
            await asyncio.gather(*self._workers, return_exceptions=True)

    # --- trying ---

    async def _work(self, line: _Line) -> None:
        try:
            while line.waiting:
                wish = line.waiting.popleft()
                shut_ms = self._caller.open_for_ms(wish.lease.target_id)
                if shut_ms:
                    self._leave_alone(line, [wish, *line.waiting], shut_ms)
                    line.waiting.clear()
                else:
                    await self._try(wish)
        finally:
            line.workers -= 1

    def _leave_alone(self, line: _Line, wishes: Sequence[EndRequest], shut_ms: int) -> None:
        now = asyncio.get_running_loop().time()
        if line.probe_at <= now:
            line.probe_at = now + shut_ms / 1000
            self._settled.probes[wishes[0].lease.lease_id] = shut_ms
        self._settled.failed += [(wish.lease, shut_ms) for wish in wishes]
        self._news.set()

    async def _try(self, wish: EndRequest) -> None:
        lease = wish.lease
        try:
            await self._undo(lease)
            self._settled.undone.append(wish)
        except CircuitOpenError as error:
            self._settled.failed.append((lease, error.retry_ms))
        except Exception as error:  # noqa: BLE001 - whatever a target does, it is tried again
            log.error(
                "lease %s is not undone at %s yet: %s",
                lease.lease_id,
                lease.target_id,
                _error_text(error),
                extra=rate_limited(lease.target_id, type(error).__name__),
            )
            self._settled.failed.append((lease, 0))
        self._news.set()

    async def _undo(self, lease: Lease) -> None:
        backend = self._backends.get(lease.backend)
        if backend is None:
            raise NoBackendError(f"no backend {lease.backend}")
        with step_of(lease, "undo", self._tracing):
            await self._caller.call(
                lease.target_id, lambda: backend.undo(lease.lease_id, target_id=lease.target_id)
            )

    # --- what came of it ---

    async def _write_down(self, settled: _Settled, finish: Finish) -> None:
        for start in range(0, len(settled.undone), _SETTLED_AT_A_TIME):
            part = settled.undone[start : start + _SETTLED_AT_A_TIME]
            await self._written(finish(part), [wish.lease.lease_id for wish in part])
            self._overdue.done(wish.lease.lease_id for wish in part)
        for start in range(0, len(settled.failed), _SETTLED_AT_A_TIME):
            await self._put_off(settled.failed[start : start + _SETTLED_AT_A_TIME], settled.probes)
        await self._call_back({wish.lease.target_id for wish in settled.undone})

    async def _put_off(self, failed: Sequence[tuple[Lease, int]], probes: Mapping[str, int]) -> None:
        now_ms = self._clock.now_ms()
        delays = {lease.lease_id: self._delay_ms(lease, now_ms, shut_ms) for lease, shut_ms in failed}
        delays |= {id: shut_ms for id, shut_ms in probes.items() if id in delays}
        for lease, shut_ms in failed:
            put_off = self._lines[lease.target_id].put_off
            if (shut_ms or self._caller.open_for_ms(lease.target_id)) and len(put_off) < MOST_WAITING:
                put_off.add(lease.lease_id)
        await self._written(self._store.postpone(delays), delays)
        await self._overdue.failed([lease for lease, _ in failed], now_ms)

    async def _call_back(self, target_ids: Iterable[str]) -> None:
        """These targets take credentials back again: what was put off because they did not comes now."""
        for target_id in target_ids:
            line = self._lines[target_id]
            ids, line.put_off = list(line.put_off - self._held), set()
            for start in range(0, len(ids), _SETTLED_AT_A_TIME):
                part = ids[start : start + _SETTLED_AT_A_TIME]
                await self._written(self._store.postpone(dict.fromkeys(part, 0)), ())

    async def _written(self, work: Awaitable[object], ids: Iterable[str]) -> None:
        try:
            await work
        except Exception as error:  # what is not written down comes again by itself
            known = isinstance(error, UnavailableError)
            log.error(
                "what came of undoing is not written down yet: %s", error, exc_info=None if known else error
            )
        finally:
            self._held.difference_update(ids)

    def _delay_ms(self, lease: Lease, now_ms: int, shut_ms: int) -> int:
        """As long again as it has failed so far."""
        so_far_ms = now_ms - lease.iat * 1000
        delay_ms = min(self._longest_delay_ms, max(_FIRST_DELAY_MS, so_far_ms, shut_ms))
        return int(delay_ms * random.uniform(0.5, 1.0)) + 1  # noqa: S311 - jitter, not a secret


def _error_text(error: Exception) -> str:
    return str(error) or type(error).__name__
