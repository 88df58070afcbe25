"""Ends due leases by their precomputed ends: claimed ones at once, and in full shards without a claim (ADR 0038)."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.partitioning import key_number
from ringfence.kernel.kafka.record import Outbound
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.tracing.api import Span
from ringfence.messages.lease import Lease
from ringfence.model.lease_store import LeaseStore, StepResult, StoredLease, prepare_step
from ringfence.model.leases.tracing import work_on
from ringfence.model.leases.unverified_records import summary_of
from ringfence.revoker.domain import deadline_cause
from ringfence.revoker.lease_end.expiry import ExpiryFastPath
from ringfence.revoker.lease_end.lease_ender import LeaseEnder, outbound
from ringfence.revoker.mass_expiry.precomputed_ends import PrecomputedEnd, PrecomputedEnds, digest_of
from ringfence.revoker.mass_expiry.scanner import ExpiryScanner

_BATCH_SIZE = 1500
"""The precomputed ends in a batch: little is left to do for each. Those of one partition fill one producer batch, up to
512 KiB; three batches would cost the broker and all readers more."""


class MassExpiry(ExpiryFastPath):
    """Precomputes ends of leases that are due soon, and ends those leases when their deadlines come.

    An end holds only for the very record that was verified, in the same epoch of Redis, under the same trust bundle and
    key of the revoker. Otherwise the lease ends on the ordinary path.
    """

    def __init__(self, runtime: Runtime, store: LeaseStore, ender: LeaseEnder, *, visibility_ms: int) -> None:
        self._runtime = runtime
        self._store = store
        self._ender = ender
        self._visibility_ms = visibility_ms
        self.ends = PrecomputedEnds(lambda: (runtime.trust.version, runtime.key.kid), store.shard_of)
        self._more_due_ms = [0] * len(store.shards)
        """By shard: the time, by Redis's clock, at which a claim was full; 0 if claims take all due leases."""
        self._shard_order = random.sample(store.shards, len(store.shards))
        """Full shards are processed one after the other. Each of several revokers begins at another one."""

    async def run(self, is_busy: Callable[[], bool]) -> None:
        """Precompute ends, for ever. `is_busy`: whether leases are being ended now; then this waits."""
        await ExpiryScanner(self._store, self.ends, self.precompute, is_busy, self._runtime.clock).run()

    def precompute(self, record: bytes) -> PrecomputedEnd | None:
        """The end of an active lease at its deadline, given its record as Redis holds it.

        None if the record does not verify (reported when the lease is due), or if its end takes several records.
        """
        try:
            lease = self._ender.verify(record)
        except InvalidMessageError:
            return None
        cause = deadline_cause(lease, 0)
        if not self._ender.ends_in_one_step(lease, cause):
            return None
        step = self._ender.next_step(lease, cause)
        sent = outbound(step.lease)._replace(key_number=key_number(lease.lease_id.encode()))
        return PrecomputedEnd(
            digest_of(record), summary_of(step.lease.claims), lease.agent_id, prepare_step(step), sent
        )

    # --- hooks of expiry ---

    def next_batch(self, shards: Sequence[int]) -> Callable[[], Awaitable[None]] | None:
        for shard in sorted(shards, key=self._shard_order.__getitem__):
            if self._more_due_ms[shard]:
                if ends := self._take_due(shard, self._more_due_ms[shard]):
                    return partial(self._end_batch, shard, ends)
                self._more_due_ms[shard] = 0
        return None

    def to_claim(self, shards: Sequence[int]) -> list[int]:
        return [shard for shard in shards if not self._more_due_ms[shard]]

    def on_full_claim(self, shard: int, now_ms: int) -> None:
        self._more_due_ms[shard] = now_ms

    def on_failure(self) -> None:
        self._more_due_ms = [0] * len(self._more_due_ms)

    async def end_claimed(self, due: Mapping[str, StoredLease | None]) -> dict[str, StoredLease | None]:
        """Raises as `LeaseEnder.end`."""
        remaining, ends = dict(due), list[PrecomputedEnd]()
        for id, stored in due.items():
            end = self.ends.take(id, stored.record) if stored else None
            if end is not None and end.step.epoch == self._store.epoch:
                ends.append(end)
        for id, result in (await self._write(ends)).items():
            remaining[id] = result.stored
            if result.outcome == "done":
                del remaining[id]
        return remaining

    # --- ends without a claim ---

    def _take_due(self, shard: int, by_ms: int) -> list[PrecomputedEnd]:
        epoch = self._store.epoch
        return [end for end in self.ends.take_due(shard, by_ms, _BATCH_SIZE) if end.step.epoch == epoch]

    async def _end_batch(self, shard: int, ends: Sequence[PrecomputedEnd]) -> None:
        if await self.end_due(ends) < len(ends) / 2:
            self._more_due_ms[shard] = 0  # another revoker works on this shard: claims show what is left

    async def end_due(self, ends: Sequence[PrecomputedEnd]) -> int:
        """End the leases that are due and not claimed; returns their number. Raises as `LeaseEnder.end`.

        Claimed leases are left to the revoker that claimed them.
        """
        results = await self._write(ends, only_due=True)
        return sum(result.outcome == "done" for result in results.values())

    async def _write(
        self, ends: Sequence[PrecomputedEnd], *, only_due: bool = False
    ) -> dict[str, StepResult]:
        """Write and publish these ends; `only_due`: see `LeaseStore.write`. Returns the result of each."""
        if not ends:
            return {}
        work = (work_on(parse(end.record.value).unverified_claims(Lease)) for end in ends)  # our own records
        with self._runtime.tracing.steps("end lease", work) as spans:
            results = await self._store.write(
                [end.step for end in ends], visibility_ms=self._visibility_ms, only_due=only_due
            )
            done = [end for end, result in zip(ends, results, strict=True) if result.outcome == "done"]
            span_of = {end.step.lease_id: span for end, span in zip(ends, spans, strict=False)}
            await self._ender.publish(
                [(end.summary, _with_trace(end.record, span_of.get(end.step.lease_id))) for end in done]
            )
            for end in done:
                if end.step.lease_id in span_of:
                    span_of[end.step.lease_id].note(status="expired", cause="deadline")
        return {end.step.lease_id: result for end, result in zip(ends, results, strict=True)}


def _with_trace(record: Outbound, span: Span | None) -> Outbound:
    return record if span is None else record._replace(traceparent=span.traceparent)
