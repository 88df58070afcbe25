"""Ends leases, record by record: `ending` (the cut), then a terminal one. Redis takes each first, then Kafka.

From the cut on the credential is refused. If something of it may be at its target, the lease is handed over between the
two records, and `end_removed` writes the terminal one once the credential is removed there.

Cache of the records that this process has published: read back from Kafka, they need no parsing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Outbound
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.lease import TERMINAL, EndCause, Lease, LeaseStatus
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import (
    CLOSING_TOKEN,
    LeaseStore,
    OutboxRecord,
    SignedLease,
    Step,
    StepResult,
    StoredLease,
    unpack,
)
from ringfence.model.leases.lifecycle import follow, is_over, matches, restated
from ringfence.model.leases.tracing import work_on
from ringfence.model.leases.unverified_records import LeaseSummary, summarise, summary_of, verify_lease
from ringfence.revoker.domain import next_status

MAX_RECORDS = 10_000
"""The most cached records, about 1.5 kB each: more than are on their way to Kafka and back."""


class OwnRecordCache:
    """The latest records that this process has published, byte for byte, with their summaries."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        """`max_records`: evicts the oldest records beyond it; 0 switches the cache off."""
        self._summaries: BoundedDict[bytes, LeaseSummary] = BoundedDict(max_records)

    def add(self, record: bytes, summary: LeaseSummary) -> None:
        """Add a record that this process publishes, with its summary."""
        self._summaries[record] = summary

    def has(self, record: bytes) -> bool:
        """Whether the cache has exactly these bytes."""
        return record in self._summaries

    def summarise(self, record: bytes) -> LeaseSummary | None:
        """The summary of any lease record, cached or not, as `unverified_records.summarise` returns it."""
        return self._summaries.get(record) or summarise(record)


log = logging.getLogger(__name__)

BATCH_SIZE = 250
"""The most leases that go through their end together."""
CONCURRENT_BATCHES = 3
"""The batches in progress at a time: while Redis and Kafka take some, others are read and signed."""
_PAUSE_EVERY = 25
_YIELD_S = 1.0
_ROUNDS = 8
"""More than the records that a lease's end has, as other revokers may end the same lease at the same time."""

_REPAIR = "it is not ended by that: ringfence rebuild"


@dataclass(frozen=True, slots=True)
class EndRequest:
    """A lease that is to end, and the cause. A lease whose end has begun keeps its cause."""

    lease: Lease
    cause: EndCause
    traceparent: str | None = None
    """The trace of the revocation that ends it, if one does."""


Traces = Mapping[str, str | None]
"""By lease: the `traceparent` that its records continue, if that is not the lease's own."""


class LeaseEnder:
    """Ends leases. Idempotent: safe to call for the same lease any number of times, from any number of processes."""

    def __init__(
        self,
        runtime: Runtime,
        store: LeaseStore,
        stateless: Collection[str],
        hand_over: Callable[[Sequence[EndRequest]], None],
        on_publish: Callable[[bytes, LeaseSummary], None],
        *,
        visibility_ms: int,
    ) -> None:
        """Args:
            stateless: the kinds of backends that leave nothing at a target.
            hand_over: takes leases whose credentials are to be removed at their targets, and returns at once.
            on_publish: called with every record and its summary, just before it is published.
            visibility_ms: the time for which other revokers leave a lease alone that this one has cut.
        """  # fmt: skip
        self._runtime = runtime
        self._store = store
        self._stateless = frozenset(stateless)
        self._hand_over = hand_over
        self._on_publish = on_publish
        self._visibility_ms = visibility_ms
        self._revoking = 0
        self._no_revocation = asyncio.Event()
        self._no_revocation.set()

    # --- priority ---

    @contextlib.contextmanager
    def revoking(self) -> Iterator[None]:
        """Expiry claims nothing meanwhile: its leases are refused already, those of a revocation may be in use."""
        self._revoking += 1
        self._no_revocation.clear()
        try:
            yield
        finally:
            self._revoking -= 1
            if not self._revoking:
                self._no_revocation.set()

    async def yield_to_revocations(self) -> None:
        """Return when no revocation is carried out, or after `_YIELD_S`: expiry never stops altogether."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_YIELD_S):
                await self._no_revocation.wait()

    # --- reading ---

    async def read(self, stored: Mapping[str, StoredLease | None]) -> dict[str, Lease]:
        """The claims of stored records whose signatures hold. Others are reported as findings, and left unchanged."""
        leases: dict[str, Lease] = {}
        for number, (lease_id, stored_lease) in enumerate(stored.items(), start=1):
            if number % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)  # let other tasks run
            try:
                lease = self.verify(stored_lease.record) if stored_lease else None
            except InvalidMessageError as error:
                await self._report(lease_id, f"the record in Redis does not hold: {error}; {_REPAIR}")
                continue
            if lease is None or lease.lease_id != lease_id:
                await self._report(lease_id, f"Redis holds the lease and not its record; {_REPAIR}")
            else:
                leases[lease_id] = lease
        return leases

    def verify(self, record: bytes) -> Lease:
        """The claims of a record in Redis's form, signed by an issuer or a revoker. Raises InvalidMessageError."""
        return verify_lease(unpack(record), self._runtime.trust, self._runtime.clock)

    async def find(
        self,
        selector_key: str,
        statuses: Collection[LeaseStatus] | None = None,
        *,
        agent_id: str | None = None,
        holders: Collection[str] | None = (),
    ) -> AsyncIterator[dict[str, Lease]]:
        """Leases that match a selector key and have not ended, in batches: a caller can end one before all are read.

        Args:
            statuses: only leases with these statuses in Redis.
            agent_id: see `LeaseStore.find`.
            holders: see `LeaseStore.find`.
        """  # fmt: skip
        ids = await self._store.find(selector_key, agent_id=agent_id, holders=holders)
        for start in range(0, len(ids), BATCH_SIZE):
            yield await self._read_matching(selector_key, ids[start : start + BATCH_SIZE], statuses)

    async def _read_matching(
        self, selector_key: str, ids: Sequence[str], statuses: Collection[LeaseStatus] | None = None
    ) -> dict[str, Lease]:
        """The leases, of these, that match a selector key. A record that cannot match is not even verified."""
        stored = {
            id: record
            for id, record in (await self._store.get(ids)).items()
            if (statuses is None or record.status in statuses) and record.may_match(selector_key)
        }
        return {id: lease for id, lease in (await self.read(stored)).items() if matches(lease, selector_key)}

    # --- ending ---

    async def end_matching(
        self,
        selector_key: str,
        request_for: Callable[[Lease], EndRequest | None],
        *,
        agent_id: str | None = None,
        holders: Collection[str] | None = (),
    ) -> list[Lease]:
        """End the leases that match a selector key and for which `request_for` returns a request.

        Returns each as it is then, as `end` does. `agent_id`, `holders`: see `LeaseStore.find`.
        """
        ids = await self._store.find(selector_key, agent_id=agent_id, holders=holders)
        slots = asyncio.Semaphore(CONCURRENT_BATCHES)

        async def end_batch(batch_ids: Sequence[str]) -> list[Lease]:
            async with slots:
                leases = await self._read_matching(selector_key, batch_ids)
                requests = [
                    request for lease in leases.values() if (request := request_for(lease)) is not None
                ]
                return list((await self.end(requests)).values())

        batches = await gather_all(
            end_batch(ids[start : start + BATCH_SIZE]) for start in range(0, len(ids), BATCH_SIZE)
        )
        return [lease for batch in batches for lease in batch]

    async def end(self, requests: Sequence[EndRequest]) -> dict[str, Lease]:
        """End leases. Returns each as it is then: over, or cut while its credential is being removed at its target.

        If a lease is requested more than once, the first cause counts. Raises what Redis or Kafka raise. Some
        ends are in progress then, and another call continues them.
        """
        leases = {request.lease.lease_id: request.lease for request in requests}
        causes = {request.lease.lease_id: request.cause for request in reversed(requests)}
        ids = list(leases)
        with self._traced(requests, leases) as traces:
            for start in range(0, len(ids), BATCH_SIZE):
                await self._end_batch(ids[start : start + BATCH_SIZE], leases, causes, traces, removed=False)
        return leases

    async def end_removed(self, requests: Sequence[EndRequest]) -> None:
        """Write the terminal records of leases whose credentials are removed at their targets."""
        leases = {request.lease.lease_id: request.lease for request in requests}
        causes = {request.lease.lease_id: request.cause for request in requests}
        with self._traced(requests, leases) as traces:
            await self._end_batch(list(leases), leases, causes, traces, removed=True)

    @contextlib.contextmanager
    def _traced(self, requests: Sequence[EndRequest], leases: Mapping[str, Lease]) -> Iterator[Traces]:
        unfinished = [request for request in requests if not is_over(request.lease)]
        work = (work_on(request.lease, request.traceparent) for request in unfinished)
        with self._runtime.tracing.steps("end lease", work) as spans:
            traced = [
                (request.lease.lease_id, span) for request, span in zip(unfinished, spans, strict=False)
            ]
            yield {id: span.traceparent for id, span in reversed(traced)}
            for id, span in traced:
                lease = leases[id]
                span.note(status=lease.status, cause=lease.cause.kind if lease.cause is not None else None)

    async def _end_batch(
        self,
        ids: Sequence[str],
        leases: dict[str, Lease],
        causes: Mapping[str, EndCause],
        traces: Traces,
        *,
        removed: bool,
    ) -> None:
        """End these leases; `leases` is updated to what each became."""
        unfinished = [id for id in ids if not is_over(leases[id])]
        for round in range(_ROUNDS):
            # A removal covers the lease only as it was at first. If it changed since, it is examined again.
            if not (removed and round == 0):
                unfinished = await self._lock_out_issuer(unfinished, leases, causes)
                to_remove = [id for id in unfinished if self._needs_removal(leases[id])]
                self._hand_over([EndRequest(leases[id], causes[id]) for id in to_remove])
                unfinished = [id for id in unfinished if not self._needs_removal(leases[id])]
            if not unfinished:
                return
            steps = await self._steps([(leases[id], causes[id]) for id in unfinished])
            results = await self._store.step(steps, visibility_ms=self._visibility_ms)
            done = [
                step.lease for step, result in zip(steps, results, strict=True) if result.outcome == "done"
            ]
            await self.publish(
                [
                    (summary_of(lease.claims), outbound(lease, traces.get(lease.claims.lease_id)))
                    for lease in done
                ]
            )
            leases |= {lease.claims.lease_id: lease.claims for lease in done}
            unknown = set()
            if len(done) < len(steps):
                unknown = await self._read_moved(steps, results, leases)
            unfinished = [id for id in unfinished if not is_over(leases[id]) and id not in unknown]
        if unfinished:
            log.warning("%d leases did not end in %d rounds; they come again", len(unfinished), _ROUNDS)

    async def _lock_out_issuer(
        self, ids: Sequence[str], leases: dict[str, Lease], causes: Mapping[str, EndCause]
    ) -> list[str]:
        """Keep issuers from activating leases that are still minting, before anything is removed.

        Returns the leases that are still to end. If the issuer was faster, the lease is active, and only a revocation
        still ends it here: a fence or the lease's own deadline keeps the issuer out as well.
        """
        minting = [id for id in ids if leases[id].status == "minting"]
        if not minting:
            return list(ids)
        stored = await self._store.get(minting)
        still_minting = [id for id in minting if id in stored and stored[id].status == "minting"]
        answers = await self._store.prepare(
            [SignedLease(leases[id], stored[id].jws.decode("ascii")) for id in still_minting],
            token=CLOSING_TOKEN,
            mint_ms=self._visibility_ms,
        )
        moved_records: dict[str, StoredLease | None] = {
            id: stored[id] for id in stored if id not in still_minting
        }
        moved_records |= {
            id: result.stored
            for id, result in zip(still_minting, answers, strict=True)
            if result.outcome == "known"
        }
        moved = await self.read(moved_records)
        leases |= moved
        left_alone = {id for id in moved if causes[id].kind == "mint_failed" or is_over(moved[id])}
        left_alone |= moved_records.keys() - moved.keys()  # `read` has reported these
        left_alone |= set(minting) - stored.keys()
        return [id for id in ids if id not in left_alone]

    def _needs_removal(self, lease: Lease) -> bool:
        """Whether its target may have a credential of it, so that the terminal record has to wait for the removal."""
        return lease.status in ("minting", "ending") and lease.backend not in self._stateless

    async def _steps(self, ends: Sequence[tuple[Lease, EndCause]]) -> list[Step]:
        """The next steps of leases. Those of one lease are consecutive, up to its end or to the removal."""
        steps: list[Step] = []
        for number, (lease, cause) in enumerate(ends, start=1):
            if number % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)  # let other tasks run
            while True:
                steps.append(Step(self._signed(self._following(lease, cause)), lease))
                lease = steps[-1].lease.claims
                if is_over(lease) or self._needs_removal(lease):
                    break
        return steps

    def _signed(self, claims: Lease) -> SignedLease:
        return SignedLease(claims, sign(claims, self._runtime.key))

    def _following(self, lease: Lease, cause: EndCause) -> Lease:
        status = next_status(lease, cause, self._stateless)
        assert status is not None  # callers pass only leases that are not over
        return follow(
            lease,
            status,
            by=self._runtime.key.id,
            cause=(lease.cause if lease.status == "ending" else None) or cause,
            epoch=self._store.epoch,
        )

    async def _read_moved(
        self, steps: Sequence[Step], results: Sequence[StepResult], leases: dict[str, Lease]
    ) -> set[str]:
        """Update the leases that another process changed first. Returns those of which Redis has no record."""
        tried = {step.lease.claims.lease_id: result for step, result in zip(steps, results, strict=True)}
        unknown = {id for id, result in tried.items() if result.outcome == "unknown"}
        for id in unknown:
            await self._report(id, "Redis lost the record of a lease while it was ending")
        leases |= await self.read({id: result.stored for id, result in tried.items() if result.stored})
        return unknown

    # --- publishing ---

    async def publish(self, records: Sequence[tuple[LeaseSummary, Outbound]]) -> None:
        """Publish records that Redis has taken, and count the ends among them. Raises what Kafka raises."""
        for summary, record in records:
            self._on_publish(record.payload, summary)
        await self._send([record for _, record in records])
        self._store.published((summary.lease_id, summary.seq) for summary, _ in records)
        self._count(summary for summary, _ in records)

    async def republish(self, records: Sequence[OutboxRecord]) -> None:
        """Publish records that another process wrote to Redis and did not publish: the same bytes, if they still count.

        A record of an earlier epoch is signed again for the present one, so that it has a place in Kafka's order.
        """
        sent = []
        for record in records:
            try:
                lease = self._current(record.jws)
            except InvalidMessageError as error:
                await self._report(record.lease_id, f"the outbox holds something else than a record: {error}")
                continue
            sent.append((record, outbound(lease)))
        await self._send([record for _, record in sent])
        self._store.published((record.lease_id, record.seq) for record, _ in sent)

    def _current(self, jws: bytes) -> SignedLease:
        """A record as it counts in the present epoch. Raises InvalidMessageError."""
        parsed = parse(jws)
        claims = parsed.unverified_claims(Lease)  # readers verify it
        if claims.epoch is None or claims.epoch == self._store.epoch:
            return SignedLease(claims, parsed.compact)
        lease = verify_lease(jws, self._runtime.trust, self._runtime.clock)
        return self._signed(restated(lease, by=self._runtime.key.id, epoch=self._store.epoch))

    async def _send(self, records: Sequence[Outbound]) -> None:
        await gather_all(await self._runtime.publisher.send_many(LEASE, Lease.typ, records))

    def _count(self, records: Iterable[LeaseSummary]) -> None:
        """Count ends by status, and measure the lag of expiries."""
        counts, now_s = Counter[str](), self._runtime.clock.now_ms() / 1000
        for summary in records:
            if summary.status in TERMINAL:
                counts[summary.status] += 1
            if summary.status == "expired":
                metrics.EXPIRY_LAG.observe(max(0.0, now_s - summary.deadline))
        for status, count in counts.items():
            metrics.LEASES_ENDED.labels(status).inc(count)

    async def _report(self, lease_id: str, message: str) -> None:
        log.error("lease %s: %s", lease_id, message)
        await self._runtime.event(
            "finding",
            Lease.typ,
            about=("record", lease_id, message),
            reasons=(Reason(code=Code.LEASE_RECORD_BROKEN, message=message[:2048]),),
            lease_id=lease_id,
        )


def outbound(lease: SignedLease, traceparent: str | None = None) -> Outbound:
    """The Kafka message of a lease record; `traceparent`: the trace that it continues, if that is not its own."""
    claims = lease.claims
    return Outbound(claims.lease_id, lease.jws.encode("ascii"), claims.jti, traceparent or claims.traceparent)
