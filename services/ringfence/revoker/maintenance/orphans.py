"""Orphaned credentials: reconciles the credentials at targets with the leases, and removes those without a lease.

A lease is announced before a credential is made at its target. So each credential there has a record, unless an issuer
that died or was delayed made it after the lease's end. Such an orphan is removed once it has been seen for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from ringfence.backends import Backend, CircuitBreaker, existing_of
from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Reason
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.registry import TargetState
from ringfence.model.lease_store import LeaseStore
from ringfence.model.records.directory import Directory

log = logging.getLogger(__name__)


class OrphanSweeper:
    """Sweeps all targets whose backends leave credentials there."""

    def __init__(
        self,
        runtime: Runtime,
        store: LeaseStore,
        directory: Directory,
        backends: Mapping[str, Backend],
        breaker: CircuitBreaker,
        is_leader: Callable[[], bool],
        *,
        every_s: float,
        min_age_s: float,
    ) -> None:
        """Args:
            is_leader: whether this revoker, of several, does it now.
            every_s: the interval of sweeps of each target.
            min_age_s: the time for which an orphan must have been seen before it is removed.
        """  # fmt: skip
        self._runtime = runtime
        self._store = store
        self._directory = directory
        self._backends = {kind: backend for kind, backend in backends.items() if not backend.stateless}
        self._breaker = breaker
        self._is_leader = is_leader
        self._every_s = every_s
        self._min_age_s = min_age_s
        self._seen_at: dict[tuple[str, str], dict[str, float]] = {}
        """By backend and target: orphans, and when each was first seen."""

    async def run(self) -> None:
        """Sweep, for ever."""
        while True:
            if self._is_leader():
                await gather_all(self._sweep_safely(kind, target_id) for kind, target_id in self._targets())
            await asyncio.sleep(self._every_s)

    def _targets(self) -> set[tuple[str, str]]:
        """Backends and targets, removed targets too: credentials may be left there."""
        states = (entry.state for entry in self._directory.entries("target"))
        return {
            (state.backend.kind, state.target_id)
            for state in states
            if isinstance(state, TargetState) and state.backend.kind in self._backends
        }

    async def _sweep_safely(self, kind: str, target_id: str) -> None:
        try:
            await self.sweep(kind, target_id)
        except RingfenceError as error:
            log.warning("target %s was not swept: %s", target_id, error)
        except Exception:
            log.exception("target %s was not swept", target_id)

    async def sweep(self, kind: str, target_id: str) -> list[str]:
        """Sweep one target now. Returns the leases whose orphans were removed.

        Raises what the target or Redis raise.
        """
        backend = self._backends[kind]
        existing = await self._breaker.call(target_id, lambda: existing_of(backend, target_id))
        # Redis is read after the target: each credential that existed there had a record before.
        stored = await self._store.get(sorted(existing))
        orphans = [id for id in sorted(existing) if id not in stored or stored[id].status in TERMINAL]
        now, before = time.monotonic(), self._seen_at.get((kind, target_id), {})
        seen_at = self._seen_at[kind, target_id] = {id: before.get(id, now) for id in orphans}
        old = [id for id, at in seen_at.items() if now - at >= self._min_age_s]
        for id in old:
            await self._remove(backend, id, target_id)
            del seen_at[id]
        return old

    async def _remove(self, backend: Backend, lease_id: str, target_id: str) -> None:
        await self._breaker.call(target_id, lambda: backend.undo(lease_id, target_id=target_id))
        metrics.ORPHANS_UNDONE.labels(backend.kind).inc()
        message = (
            f"something stood at target {target_id} for lease {lease_id}, which is over or unknown; "
            "it was taken back"
        )
        log.error("%s", message)
        await self._runtime.event(
            "finding",
            Lease.typ,
            about=("orphan", lease_id, target_id, self._runtime.clock.now_ms()),
            reasons=(Reason(code="orphan_undone", message=message),),
            lease_id=lease_id,
        )
