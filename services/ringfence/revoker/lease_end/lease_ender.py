"""Ends leases, record by record: cut, then, where nothing is left at the target, terminal; first in Redis, then Kafka.

What is left at a target is handed over between the two, and comes back when it is undone.
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
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.partitioning import key_number
from ringfence.kernel.kafka.record import Outbound
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.tracing.api import Span
from ringfence.messages.credential import Reason
from ringfence.messages.lease import TERMINAL, EndCause, Lease, LeaseStatus
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import (
    CLOSING_TOKEN,
    LeaseStore,
    Outgoing,
    SignedLease,
    Step,
    Stepped,
    StoredLease,
    expanded,
    prepare_step,
)
from ringfence.model.leases.lifecycle import follow, is_over, matches, restated
from ringfence.model.leases.tracing import work_on
from ringfence.model.leases.verification import verify_lease
from ringfence.revoker.domain import deadline_cause, next_status
from ringfence.revoker.lease_records import LeaseSummary
from ringfence.revoker.mass_expiry.own_record_cache import OwnRecordCache, glance_of
from ringfence.revoker.mass_expiry.precomputed import PrecomputedEnd, PrecomputedEnds, digest_of

log = logging.getLogger(__name__)

AT_A_TIME = 250
"""So many leases go through their end together."""
TOGETHER = 3
"""So many such parts are on their way at a time: while Redis and Kafka take some, others are read and signed."""
_PAUSE_EVERY = 25
_ROUNDS = 8
"""More records than a lease's end has: enough to meet others that end the same lease on the way."""

_MEND = "it is not ended by that: ringfence rebuild"


@dataclass(frozen=True, slots=True)
class EndRequest:
    """A lease that is to end, and why. A lease whose end has begun keeps the cause that it has."""

    lease: Lease
    cause: EndCause
    traceparent: str | None = None
    """Of the order that ends it, where one does."""


Traces = Mapping[str, str | None]
"""By lease: the `traceparent` that its records go on from, where that is not its own."""


class LeaseEnder:
    """Ends leases. Safe to call for the same lease any number of times, from any number of processes."""

    def __init__(
        self,
        runtime: Runtime,
        store: LeaseStore,
        stateless: Collection[str],
        hand_over: Callable[[Sequence[EndRequest]], None],
        said: OwnRecordCache,
        *,
        visibility_ms: int,
    ) -> None:
        """Args:
            stateless: the backends of which nothing is left at a target.
            hand_over: takes leases that are to be undone, and does not wait for that.
            said: is told of every record that is published.
            visibility_ms: how long others leave a lease alone that this revoker has cut.
        """  # fmt: skip
        self._runtime = runtime
        self._store = store
        self._stateless = frozenset(stateless)
        self._hand_over = hand_over
        self._said = said
        self._visibility_ms = visibility_ms
        self.foresight = PrecomputedEnds(lambda: (runtime.trust.version, runtime.key.kid), store.shard_of)

    async def read(self, stored: Mapping[str, StoredLease | None]) -> dict[str, Lease]:
        """The claims of stored records whose signatures hold. Others are reported, and left as they are."""
        found: dict[str, Lease] = {}
        for number, (lease_id, one) in enumerate(stored.items(), start=1):
            if number % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)  # others get their turn
            try:
                lease = self._opened(one.record) if one else None
            except InvalidMessageError as error:
                await self._report(lease_id, f"the record in Redis does not hold: {error}; {_MEND}")
                continue
            if lease is None or lease.lease_id != lease_id:
                await self._report(lease_id, f"Redis holds the lease and not its record; {_MEND}")
            else:
                found[lease_id] = lease
        return found

    def _opened(self, record: bytes) -> Lease:
        """The claims of a record, as Redis holds it, that an issuer or a revoker signed. Raises InvalidMessageError."""
        return verify_lease(expanded(record), self._runtime.trust, self._runtime.clock)

    async def bearing(
        self,
        mark: str,
        statuses: Collection[LeaseStatus] | None = None,
        *,
        agent_id: str | None = None,
        also: Collection[str] | None = (),
    ) -> AsyncIterator[dict[str, Lease]]:
        """The leases that bear a mark and have not ended, some at a time: the first can end before the last is read.

        `statuses`: only these, as far as Redis says. `agent_id`, `also`: whose leases can bear it (`LeaseStore.find`).
        """
        ids = await self._store.find(mark, agent_id=agent_id, also=also)
        for start in range(0, len(ids), AT_A_TIME):
            yield await self._read_bearing(mark, ids[start : start + AT_A_TIME], statuses)

    async def _read_bearing(
        self, mark: str, ids: Sequence[str], statuses: Collection[LeaseStatus] | None = None
    ) -> dict[str, Lease]:
        """Those of these leases that bear a mark. What bears another, as it says itself, is not even verified."""
        stored = {
            id: one
            for id, one in (await self._store.get(ids)).items()
            if (statuses is None or one.status in statuses) and one.may_bear(mark)
        }
        return {id: lease for id, lease in (await self.read(stored)).items() if matches(lease, mark)}

    async def end_bearing(
        self,
        mark: str,
        wish: Callable[[Lease], EndRequest | None],
        *,
        agent_id: str | None = None,
        also: Collection[str] | None = (),
    ) -> list[Lease]:
        """End those of the leases that bear a mark for which there is a wish. Returns each as it is then, as `end`.

        `agent_id`, `also`: whose leases can bear it (`LeaseStore.find`).
        """
        ids = await self._store.find(mark, agent_id=agent_id, also=also)
        turns = asyncio.Semaphore(TOGETHER)

        async def part(some: Sequence[str]) -> list[Lease]:
            async with turns:
                leases = await self._read_bearing(mark, some)
                wishes = [wished for lease in leases.values() if (wished := wish(lease)) is not None]
                return list((await self.end(wishes)).values())

        parts = await gather_all(
            part(ids[start : start + AT_A_TIME]) for start in range(0, len(ids), AT_A_TIME)
        )
        return [lease for part in parts for lease in part]

    async def end(self, wishes: Sequence[EndRequest]) -> dict[str, Lease]:
        """End leases. Returns each as it is then: over, or cut, and its target's side on its way.

        Raises what Redis or Kafka raise: then some are on their way, and calling again goes on with them.
        """
        known = {wish.lease.lease_id: wish.lease for wish in wishes}
        causes = {wish.lease.lease_id: wish.cause for wish in reversed(wishes)}  # the first of several counts
        ids = list(known)
        with self._traced(wishes, known) as traces:
            for start in range(0, len(ids), AT_A_TIME):
                await self._end_some(ids[start : start + AT_A_TIME], known, causes, traces, undone=False)
        return known

    def precompute(self, record: bytes) -> PrecomputedEnd | None:
        """The end of an active lease at its deadline, by its record as Redis holds it.

        None where the record does not hold, which is found out when the lease is due, or where more comes before the
        end than one record.
        """
        try:
            lease = self._opened(record)
        except InvalidMessageError:
            return None
        cause = deadline_cause(lease, 0)
        if next_status(lease, cause, self._stateless) not in TERMINAL:
            return None
        step = self._step(lease, cause)
        sent = _outbound(step.lease)._replace(key_number=key_number(lease.lease_id.encode()))
        return PrecomputedEnd(
            digest_of(record), glance_of(step.lease.claims), lease.agent_id, prepare_step(step), sent
        )

    async def end_foreseen(self, due: Mapping[str, StoredLease | None]) -> dict[str, StoredLease | None]:
        """End those of these leases whose ends were foreseen. Returns the others, as Redis has them then.

        Raises as `end`.
        """
        left, ends = dict(due), dict[str, PrecomputedEnd]()
        for id, one in due.items():
            end = self.foresight.take(id, one.record) if one else None
            if end is not None and end.step.epoch == self._store.epoch:
                ends[id] = end
        for id, result in (await self._end_as_foreseen(list(ends.values()))).items():
            left[id] = result.stored
            if result.outcome == "done":
                del left[id]
        return left

    def take_foreseen(self, shard: int, by_ms: int, most: int) -> list[PrecomputedEnd]:
        """Foreseen ends of leases of a shard that are due by then, for `end_due`."""
        epoch = self._store.epoch
        return [end for end in self.foresight.take_due(shard, by_ms, most) if end.step.epoch == epoch]

    async def end_due(self, ends: Sequence[PrecomputedEnd]) -> int:
        """End leases as was foreseen that nobody has claimed and that are due. Returns how many.

        The others are left to whoever claims them. Raises as `end`.
        """
        results = await self._end_as_foreseen(ends, only_due=True)
        return sum(result.outcome == "done" for result in results.values())

    async def _end_as_foreseen(
        self, ends: Sequence[PrecomputedEnd], *, only_due: bool = False
    ) -> dict[str, Stepped]:
        """End these leases; `only_due`: see `LeaseStore.write`. Returns what came of each."""
        if not ends:
            return {}
        work = (work_on(parse(end.record.value).unverified_claims(Lease)) for end in ends)  # its own record
        with self._runtime.tracing.steps("end lease", work) as spans:
            results = await self._store.write(
                [end.step for end in ends], visibility_ms=self._visibility_ms, only_due=only_due
            )
            done = [end for end, result in zip(ends, results, strict=True) if result.outcome == "done"]
            traced = {end.step.lease_id: span for end, span in zip(ends, spans, strict=False)}
            await self._publish(
                [(end.glance, _traced(end.record, traced.get(end.step.lease_id))) for end in done]
            )
            for end in done:
                if end.step.lease_id in traced:
                    traced[end.step.lease_id].note(status="expired", cause="deadline")
        self._count(end.glance for end in done)
        return {end.step.lease_id: result for end, result in zip(ends, results, strict=True)}

    async def end_undone(self, wishes: Sequence[EndRequest]) -> None:
        """Write the last records of leases that are undone at their targets."""
        known = {wish.lease.lease_id: wish.lease for wish in wishes}
        causes = {wish.lease.lease_id: wish.cause for wish in wishes}
        with self._traced(wishes, known) as traces:
            await self._end_some(list(known), known, causes, traces, undone=True)

    @contextlib.contextmanager
    def _traced(self, wishes: Sequence[EndRequest], known: Mapping[str, Lease]) -> Iterator[Traces]:
        these = [wish for wish in wishes if not is_over(wish.lease)]
        work = (work_on(wish.lease, wish.traceparent) for wish in these)
        with self._runtime.tracing.steps("end lease", work) as spans:
            traced = [(wish.lease.lease_id, span) for wish, span in zip(these, spans, strict=False)]
            yield {id: span.traceparent for id, span in reversed(traced)}
            for id, span in traced:
                lease = known[id]
                span.note(status=lease.status, cause=lease.cause.kind if lease.cause is not None else None)

    async def _end_some(
        self,
        ids: Sequence[str],
        known: dict[str, Lease],
        causes: Mapping[str, EndCause],
        traces: Traces,
        *,
        undone: bool,
    ) -> None:
        ending = [id for id in ids if not is_over(known[id])]
        for round in range(_ROUNDS):
            # What is undone is so as it was known at first: whatever it became since is looked at by itself.
            if not (undone and round == 0):
                ending = await self._close(ending, known, causes)
                left = [id for id in ending if self._is_left_at_target(known[id])]
                self._hand_over([EndRequest(known[id], causes[id]) for id in left])
                ending = [id for id in ending if not self._is_left_at_target(known[id])]
            if not ending:
                return
            steps = await self._steps([(known[id], causes[id]) for id in ending])
            results = await self._store.step(steps, visibility_ms=self._visibility_ms)
            done = [
                step.lease for step, result in zip(steps, results, strict=True) if result.outcome == "done"
            ]
            glances = [glance_of(one.claims) for one in done]
            records = [_outbound(one, traces.get(one.claims.lease_id)) for one in done]
            await self._publish(list(zip(glances, records, strict=True)))
            self._count(glances)
            known |= {lease.claims.lease_id: lease.claims for lease in done}
            gone = set()
            if len(done) < len(steps):
                gone = await self._look_again(steps, results, known)
            ending = [id for id in ending if not is_over(known[id]) and id not in gone]
        if ending:
            log.warning("%d leases did not end in %d rounds; they come again", len(ending), _ROUNDS)

    async def _close(
        self, ids: Sequence[str], known: dict[str, Lease], causes: Mapping[str, EndCause]
    ) -> list[str]:
        """Shut the issuer out of leases that are still minting, before anything is taken away. Returns what is to end.

        Where the issuer was faster, the lease is active: then only an order still ends it. A fence, or the lease's own
        deadline, shuts the issuer out as well.
        """
        minting = [id for id in ids if known[id].status == "minting"]
        if not minting:
            return list(ids)
        stored = await self._store.get(minting)
        there = [id for id in minting if id in stored and stored[id].status == "minting"]
        answers = await self._store.prepare(
            [SignedLease(known[id], stored[id].jws.decode("ascii")) for id in there],
            token=CLOSING_TOKEN,
            mint_ms=self._visibility_ms,
        )
        now: dict[str, StoredLease | None] = {id: stored[id] for id in stored if id not in there}
        now |= {id: one.stored for id, one in zip(there, answers, strict=True) if one.outcome == "known"}
        moved = await self.read(now)
        known |= moved
        left_alone = {id for id in moved if causes[id].kind == "mint_failed" or is_over(moved[id])}
        left_alone |= now.keys() - moved.keys()  # and reported
        left_alone |= set(minting) - stored.keys()
        return [id for id in ids if id not in left_alone]

    def _is_left_at_target(self, lease: Lease) -> bool:
        """Whether something of it may be at its target, and nothing is between that and its end."""
        return lease.status in ("minting", "ending") and lease.backend not in self._stateless

    async def _steps(self, wishes: Sequence[tuple[Lease, EndCause]]) -> list[Step]:
        """The next steps of leases, those of each one after the other, up to its end or to its undoing."""
        steps: list[Step] = []
        for number, (lease, cause) in enumerate(wishes, start=1):
            if number % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)  # others get their turn
            while True:
                steps.append(self._step(lease, cause))
                lease = steps[-1].lease.claims
                if is_over(lease) or self._is_left_at_target(lease):
                    break
        return steps

    def _step(self, lease: Lease, cause: EndCause) -> Step:
        return Step(self._signed(self._following(lease, cause)), lease)

    def _signed(self, claims: Lease) -> SignedLease:
        return SignedLease(claims, sign(claims, self._runtime.key))

    def _following(self, lease: Lease, cause: EndCause) -> Lease:
        status = next_status(lease, cause, self._stateless)
        assert status is not None  # only what is not over comes here
        return follow(
            lease,
            status,
            by=self._runtime.key.id,
            cause=(lease.cause if lease.status == "ending" else None) or cause,
            epoch=self._store.epoch,
        )

    async def _look_again(
        self, steps: Sequence[Step], results: Sequence[Stepped], known: dict[str, Lease]
    ) -> set[str]:
        """What leases have come to of which another record came first. Returns those of which Redis has none."""
        tried = {step.lease.claims.lease_id: result for step, result in zip(steps, results, strict=True)}
        gone = {id for id, result in tried.items() if result.outcome == "unknown"}
        for id in gone:
            await self._report(id, "Redis lost the record of a lease while it was ending")
        known |= await self.read({id: one.stored for id, one in tried.items() if one.stored})
        return gone

    async def _publish(self, records: Sequence[tuple[LeaseSummary, Outbound]]) -> None:
        for glance, record in records:
            self._said.add(record.value, glance)
        await self._send([record for _, record in records])
        self._store.published((glance.lease_id, glance.seq) for glance, _ in records)

    async def republish(self, records: Sequence[Outgoing]) -> None:
        """Publish what somebody wrote to Redis and did not live to publish: the same bytes, where they still count.

        What was written in another epoch is said once more in this one: so it has a place in Kafka's order.
        """
        sent = []
        for one in records:
            try:
                lease = self._current(one.jws)
            except InvalidMessageError as error:
                await self._report(one.lease_id, f"the outbox holds something else than a record: {error}")
                continue
            sent.append((one, _outbound(lease)))
        await self._send([record for _, record in sent])
        self._store.published((one.lease_id, one.seq) for one, _ in sent)

    def _current(self, jws: bytes) -> SignedLease:
        """A record as it counts now. Raises InvalidMessageError."""
        parsed = parse(jws)
        claims = parsed.unverified_claims(Lease)  # readers verify it
        if claims.epoch is None or claims.epoch == self._store.epoch:
            return SignedLease(claims, parsed.compact)
        lease = verify_lease(jws, self._runtime.trust, self._runtime.clock)
        return self._signed(restated(lease, by=self._runtime.key.id, epoch=self._store.epoch))

    async def _send(self, records: Sequence[Outbound]) -> None:
        await gather_all(await self._runtime.publisher.send_many(LEASE, Lease.typ, records))

    def _count(self, records: Iterable[LeaseSummary]) -> None:
        """Count those that are ends, by their statuses, and measure how late they are that end at deadlines."""
        counts, now_s = Counter[str](), self._runtime.clock.now_ms() / 1000
        for one in records:
            if one.status in TERMINAL:
                counts[one.status] += 1
            if one.status == "expired":
                metrics.EXPIRY_LAG.observe(max(0.0, now_s - one.deadline))
        for status, count in counts.items():
            metrics.LEASES_ENDED.labels(status).inc(count)

    async def _report(self, lease_id: str, message: str) -> None:
        log.error("lease %s: %s", lease_id, message)
        await self._runtime.event(
            "finding",
            Lease.typ,
            about=("record", lease_id, message),
            reasons=(Reason(code="lease_record_broken", message=message[:2048]),),
            lease_id=lease_id,
        )


def _outbound(lease: SignedLease, traceparent: str | None = None) -> Outbound:
    claims = lease.claims
    return Outbound(claims.lease_id, lease.jws.encode("ascii"), claims.jti, traceparent or claims.traceparent)


def _traced(record: Outbound, span: Span | None) -> Outbound:
    return record if span is None else record._replace(traceparent=span.traceparent)
