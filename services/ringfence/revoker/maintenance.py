"""Periodic work: sends heartbeats, removes orphaned credentials at targets, writes tombstones for old leases.

Heartbeats sign the digests of `lease` and `revocation.request` once a second, for readers to compare
(`stream_digests`), and name halted consumer groups (`revoker_halts`). They continue after a halt.
An orphan is a credential without a lease: a lease is announced before its credential is made, so an issuer that died
or was delayed made it after the lease's end. It is removed once it has been seen for a while.
`lease` is a compacted topic: the last record of a key stays until a tombstone follows. One revoker reads it from
where it stopped, up to the first record that is not old enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from aiokafka.errors import KafkaError

from ringfence.backends import Backend, CircuitBreaker, existing_of
from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.operations import Heartbeat
from ringfence.messages.registry import TargetState
from ringfence.messages.topics import HEARTBEAT, LEASE
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.lifecycle import is_over
from ringfence.model.leases.stream_digests import CONFIRMED, StreamDigests
from ringfence.model.leases.unverified_records import verify_lease
from ringfence.model.records.directory import Directory
from ringfence.revoker.settings import RevokerSettings

log = logging.getLogger(__name__)

_EVERY_S = 1.0


@dataclass(slots=True, eq=False)
class HeartbeatSender:
    """Sends heartbeats over what `follower` has read into `streams`."""

    runtime: Runtime
    streams: StreamDigests
    follower: Follower

    async def run(self) -> None:
        await run_periodically(
            _EVERY_S, self.send, "a heartbeat is left out", log,
            expected=(RingfenceError, KafkaError, OSError), at_once=True,
        )  # fmt: skip

    async def send(self) -> None:
        """Sign the digests of what was read so far, and the halted consumer groups."""
        positions = await self.follower.positions(CONFIRMED)
        key, now_ms, halted = self.runtime.key, self.runtime.clock.now_ms(), self.runtime.halted()
        heartbeat = Heartbeat(
            iss=key.id,
            aud=self.runtime.settings.trust_domain,
            iat=now_ms // 1000,
            jti=derived_id("heartbeat", key.id, now_ms),
            # A halt must count even if our clock is wrong. By the broker's clock it is not taken for an old heartbeat.
            at_ms=self.runtime.broker_now_ms() if halted else now_ms,
            streams=self.streams.digests(positions),
            halted=halted,
        )
        await self.runtime.publisher.publish_signed(HEARTBEAT, self.runtime.role, heartbeat, key)


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
        own: RevokerSettings,
    ) -> None:
        """`is_leader`: whether this revoker, of several, does it now."""
        self._runtime = runtime
        self._store = store
        self._directory = directory
        self._backends = {kind: backend for kind, backend in backends.items() if not backend.stateless}
        self._breaker = breaker
        self._is_leader = is_leader
        self._every_s = own.sweep_every_s
        self._min_age_s = own.stranger_age_s
        self._seen_at: dict[tuple[str, str], dict[str, float]] = {}
        """By backend and target: orphans, and when each was first seen."""

    async def run(self) -> None:
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
            reasons=(Reason(code=Code.ORPHAN_UNDONE, message=message),),
            lease_id=lease_id,
        )


_BATCH_SIZE = 500


class LeaseTombstoner:
    """Writes tombstones for leases that ended long ago."""

    def __init__(
        self, runtime: Runtime, is_leader: Callable[[], bool], *, after_s: int, every_s: float
    ) -> None:
        """Args:
            is_leader: whether this revoker, of several, does it now.
            after_s: the age of its last record, by append time, at which a lease is deleted.
            every_s: the interval at which the topic is read for such leases.
        """  # fmt: skip
        self._runtime = runtime
        self._is_leader = is_leader
        self._after_ms = after_s * 1000
        self._every_s = every_s
        self._epochs = Epochs(runtime.trust)
        self._read_to: dict[int, int] = {}
        """By partition: the offset to continue at. A restart reads the whole topic once more."""

    async def run(self) -> None:
        await run_periodically(
            self._every_s, self._delete_if_leader, "old leases are deleted later", log,
            expected=(KafkaError, RingfenceError, OSError), at_once=True,
        )  # fmt: skip

    async def _delete_if_leader(self) -> None:
        if self._is_leader():
            await self.delete_old()

    async def delete_old(self) -> int:
        """Delete leases that are old enough; returns their number. Raises KafkaError, UnavailableError."""
        before_ms = self._runtime.clock.now_ms() - self._after_ms
        async with Stretches(self._runtime.settings) as reader:
            partitions = await reader.partitions(LEASE)
            return sum([await self._delete_in(reader, partition, before_ms) for partition in partitions])

    async def _delete_in(self, reader: Stretches, partition: int, before_ms: int) -> int:
        start, end = await reader.bounds(LEASE, partition)
        start = max(start, self._read_to.get(partition, start))
        deleted, old = 0, list[Received]()
        async with contextlib.aclosing(reader.records(LEASE, partition, start, end)) as records:
            async for record in records:
                if record.appended_at_ms >= before_ms:
                    break
                old.append(record)
                if len(old) >= _BATCH_SIZE:
                    deleted += await self._delete(old)
                    old = []
        return deleted + await self._delete(old)

    async def _delete(self, old: list[Received]) -> int:
        """Write tombstones for leases that end in these records of one partition; the next read starts after them."""
        if not old:
            return 0
        sent = [
            await self._runtime.publisher.send(
                LEASE, Lease.typ, Outbound(lease.lease_id, b"", id=f"{lease.jti}.deleted")
            )
            for lease in _ended(old, self._verify)
        ]
        await gather_all(sent)
        metrics.TOMBSTONES.inc(len(sent))
        self._read_to[old[-1].partition] = old[-1].offset + 1
        return len(sent)

    def _verify(self, record: Received) -> Lease | None:
        """The lease of a record; None if it does not verify, or was void when it was appended."""
        if self._epochs.took(record):
            return None
        try:
            lease = verify_lease(
                record.value, self._runtime.trust, self._runtime.clock, appended_at_ms=record.appended_at_ms
            )
        except InvalidMessageError:
            return None
        return None if self._epochs.is_void(record, lease.epoch) else lease


def _ended(records: Iterable[Received], verify: Callable[[Received], Lease | None]) -> list[Lease]:
    """The leases whose end is among these records, each under its own key, and that were not deleted after it."""
    ended: dict[str, Lease] = {}
    for record in records:
        key = record.key or ""
        if not record.value:
            ended.pop(key, None)
            continue
        lease = verify(record)
        if lease is not None and lease.lease_id == key and is_over(lease):
            ended[key] = lease
    return list(ended.values())
