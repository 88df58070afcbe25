"""Removes credentials at their targets, in the background, for ever. A target that fails does not delay another.

Its leases are cut already, or were closed before they became active. A lease is reported as over only when its
credential is removed. Retries use exponential backoff: the delay equals the time for which the lease has failed so far,
up to a limit. So the delay needs no state, and any revoker that finds the lease continues.

While a target's circuit breaker is open, one lease is tried as a probe when the breaker may close. When a credential
was removed at the target, all its postponed leases are tried at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from ringfence.backends import Backend, CircuitBreaker, CircuitOpenError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.tracing.api import Tracing
from ringfence.messages.lease import Lease
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.tracing import step_of
from ringfence.revoker.lease_end.expiry import Overdue
from ringfence.revoker.lease_end.lease_ender import EndRequest

log = logging.getLogger(__name__)

EndRemoved = Callable[[Sequence[EndRequest]], Awaitable[object]]
"""Writes the terminal records of leases whose credentials are removed."""

MAX_QUEUED = 20_000
"""The most leases that wait for one target. The others stay in Redis, and are claimed again later."""
_BATCH_SIZE = 500
_FIRST_DELAY_MS = 200


class NoBackendError(LookupError):
    """This process knows no backend of the kind that made a credential: it was started with other code."""


@dataclass(slots=True)
class _TargetQueue:
    """The leases that wait for one target."""

    waiting: deque[EndRequest] = field(default_factory=deque)
    workers: int = 0
    postponed: set[str] = field(default_factory=set)
    """Leases that are tried later because the target's circuit breaker is open."""
    probe_at: float = 0.0
    """The time of the first of those tries, by the event loop's clock."""


@dataclass(slots=True)
class _Results:
    """Results of tries that are not written to Redis and Kafka yet."""

    removed: list[EndRequest] = field(default_factory=list)
    failed: list[tuple[Lease, int]] = field(default_factory=list)
    """With the least time, in ms, for which the target's breaker stays open."""
    probes: dict[str, int] = field(default_factory=dict)
    """Failed leases that are tried when that time is over, with that time in ms."""


@dataclass(slots=True, eq=False)
class CredentialRemover:
    """Removes credentials: at most one try of a lease at a time, and a bounded number at each target."""

    store: LeaseStore
    backends: Mapping[str, Backend]
    breaker: CircuitBreaker
    overdue: Overdue
    clock: Clock
    tracing: Tracing
    _: KW_ONLY
    longest_delay_ms: int
    _queues: dict[str, _TargetQueue] = field(default_factory=dict, init=False)
    _in_progress: set[str] = field(default_factory=set, init=False)
    """Leases that are queued, being tried, or whose result is not written yet."""
    _workers: set[asyncio.Task[None]] = field(default_factory=set, init=False)
    _results: _Results = field(default_factory=_Results, init=False)
    _has_results: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    def enqueue(self, requests: Iterable[EndRequest]) -> None:
        """Remove the credentials of leases that are cut, or were never active.

        Returns at once. Ignores leases that are in progress.
        """
        for request in requests:
            lease = request.lease
            queue = self._queues.setdefault(lease.target_id, _TargetQueue())
            if lease.lease_id in self._in_progress or len(queue.waiting) >= MAX_QUEUED:
                continue
            self._in_progress.add(lease.lease_id)
            queue.waiting.append(request)
            if queue.workers < self.breaker.concurrency:
                queue.workers += 1
                worker = asyncio.create_task(self._work(queue), name=f"removing at {lease.target_id}")
                self._workers.add(worker)
                worker.add_done_callback(self._workers.discard)

    async def run(self, end_removed: EndRemoved) -> None:
        """Write the results of tries in batches, for ever. `end_removed` ends leases whose credentials are removed."""
        try:
            while True:
                await self._has_results.wait()
                self._has_results.clear()
                results, self._results = self._results, _Results()
                await self._write_results(results, end_removed)
        finally:
            for worker in self._workers:
                worker.cancel()
            await asyncio.gather(*self._workers, return_exceptions=True)

    # --- tries ---

    async def _work(self, queue: _TargetQueue) -> None:
        try:
            while queue.waiting:
                request = queue.waiting.popleft()
                open_ms = self.breaker.open_for_ms(request.lease.target_id)
                if open_ms:
                    self._fail_all(queue, [request, *queue.waiting], open_ms)
                    queue.waiting.clear()
                else:
                    await self._try(request)
        finally:
            queue.workers -= 1

    def _fail_all(self, queue: _TargetQueue, requests: Sequence[EndRequest], open_ms: int) -> None:
        now = asyncio.get_running_loop().time()
        if queue.probe_at <= now:
            queue.probe_at = now + open_ms / 1000
            self._results.probes[requests[0].lease.lease_id] = open_ms
        self._results.failed += [(request.lease, open_ms) for request in requests]
        self._has_results.set()

    async def _try(self, request: EndRequest) -> None:
        lease = request.lease
        try:
            await self._remove(lease)
            self._results.removed.append(request)
        except CircuitOpenError as error:
            self._results.failed.append((lease, error.retry_ms))
        except Exception as error:  # noqa: BLE001 - whatever a target does, it is tried again
            log.error(
                "lease %s is not undone at %s yet: %s",
                lease.lease_id,
                lease.target_id,
                _error_text(error),
                extra=rate_limited(lease.target_id, type(error).__name__),
            )
            self._results.failed.append((lease, 0))
        self._has_results.set()

    async def _remove(self, lease: Lease) -> None:
        backend = self.backends.get(lease.backend)
        if backend is None:
            raise NoBackendError(f"no backend {lease.backend}")
        with step_of(lease, "undo", self.tracing):
            await self.breaker.call(
                lease.target_id, lambda: backend.undo(lease.lease_id, target_id=lease.target_id)
            )

    # --- results ---

    async def _write_results(self, results: _Results, end_removed: EndRemoved) -> None:
        for start in range(0, len(results.removed), _BATCH_SIZE):
            batch = results.removed[start : start + _BATCH_SIZE]
            await self._release_after(end_removed(batch), [request.lease.lease_id for request in batch])
            self.overdue.done(request.lease.lease_id for request in batch)
        for start in range(0, len(results.failed), _BATCH_SIZE):
            await self._postpone(results.failed[start : start + _BATCH_SIZE], results.probes)
        await self._retry_postponed({request.lease.target_id for request in results.removed})

    async def _postpone(self, failed: Sequence[tuple[Lease, int]], probes: Mapping[str, int]) -> None:
        now_ms = self.clock.now_ms()
        delays = {lease.lease_id: self._delay_ms(lease, now_ms, open_ms) for lease, open_ms in failed}
        delays |= {id: open_ms for id, open_ms in probes.items() if id in delays}
        for lease, open_ms in failed:
            postponed = self._queues[lease.target_id].postponed
            if (open_ms or self.breaker.open_for_ms(lease.target_id)) and len(postponed) < MAX_QUEUED:
                postponed.add(lease.lease_id)
        await self._release_after(self.store.postpone(delays), delays)
        await self.overdue.failed([lease for lease, _ in failed], now_ms)

    async def _retry_postponed(self, target_ids: Iterable[str]) -> None:
        """Try the postponed leases of these targets at once, as the targets work again."""
        for target_id in target_ids:
            queue = self._queues[target_id]
            ids, queue.postponed = list(queue.postponed - self._in_progress), set()
            for start in range(0, len(ids), _BATCH_SIZE):
                batch = ids[start : start + _BATCH_SIZE]
                await self._release_after(self.store.postpone(dict.fromkeys(batch, 0)), ())

    async def _release_after(self, work: Awaitable[object], ids: Iterable[str]) -> None:
        """Await `work`, then accept these leases again. A failure is logged; the leases are claimed again later."""
        try:
            await work
        except Exception as error:
            is_expected = isinstance(error, UnavailableError)
            log.error(
                "what came of undoing is not written down yet: %s",
                error,
                exc_info=None if is_expected else error,
            )
        finally:
            self._in_progress.difference_update(ids)

    def _delay_ms(self, lease: Lease, now_ms: int, open_ms: int) -> int:
        """Exponential backoff with jitter: as long as the lease has failed so far."""
        failed_for_ms = now_ms - lease.iat * 1000
        delay_ms = min(self.longest_delay_ms, max(_FIRST_DELAY_MS, failed_for_ms, open_ms))
        return int(delay_ms * random.uniform(0.5, 1.0)) + 1  # noqa: S311 - jitter, not a secret


def _error_text(error: Exception) -> str:
    return str(error) or type(error).__name__
