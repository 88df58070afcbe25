"""Carries out revocations: reads `revocation.request`, fences selectors, ends the leases they cover, and answers.

Selectors take effect in Redis as soon as they arrive, however many leases are being ended at that moment.
`FenceHandler` has a consumer group of its own, because `RevocationHandler` takes as long as there are leases to end.
Both write the fence, and neither waits for the other: `fence` is idempotent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.kernel.base import metrics
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import Coordinates, Reason
from ringfence.messages.lease import TERMINAL, Lease, RevocationRequest, Selector
from ringfence.messages.operations import EventKind
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lease_store import SELECTOR_KEEP_MS, LeaseStore
from ringfence.model.leases.lifecycle import is_covered, selector_key_of
from ringfence.model.leases.revocations import Revocation
from ringfence.model.leases.unverified_records import may_have_selector
from ringfence.model.verdict import Allowed, Refused, Verdict
from ringfence.revoker.lease_end.lease_ender import EndRequest, LeaseEnder
from ringfence.revoker.revocations.cut_confirmation import CutTracker
from ringfence.revoker.revocations.verification import RevocationVerifier


async def fence(store: LeaseStore, revocations: Sequence[Revocation]) -> tuple[list[Coordinates], int]:
    """Fence off and cut the leases that the selectors of these revocations cover.

    A repeated revocation, whoever repeats it, covers what it covered the first time.

    Returns:
        The coordinates at which each revocation was seen first, and the time from which all shards of Redis refuse, in
        ms by Redis's clock.
    """
    positions = {
        revocation.id: revocation.at for revocation in reversed(revocations)
    }  # of repeats, the first counts
    first_positions = await store.first_seen(positions, keep_ms=SELECTOR_KEEP_MS)
    first = [first_positions[revocation.id] for revocation in revocations]
    fences: dict[str, int] = {}
    for revocation, at in zip(revocations, first, strict=True):
        assert revocation.claims.selector is not None
        key = selector_key_of(revocation.claims.selector)
        fences[key] = max(fences.get(key, 0), at.appended_at_ms)
    return first, await store.fence(fences, cut=True)


@dataclass(slots=True, eq=False)
class FenceHandler:
    """Batch handler of `revocation.request` that only fences. `RevocationHandler` answers those that are refused."""

    verifier: RevocationVerifier
    store: LeaseStore
    cuts: CutTracker

    async def __call__(self, batch: Sequence[Received]) -> None:
        """Fence off the leases that the selectors of the batch cover."""
        verified, _ = await self.verifier.verify(list(filter(may_have_selector, batch)))
        selecting = [revocation for revocation in verified if revocation.claims.selector is not None]
        if not selecting:
            return
        verdicts = await self.verifier.check(selecting, {})
        followed = [
            revocation
            for revocation, verdict in zip(selecting, verdicts, strict=True)
            if isinstance(verdict, Allowed)
        ]
        first_positions, at_ms = await fence(self.store, followed)
        for revocation, first in zip(followed, first_positions, strict=True):
            if revocation.at == first:
                self.cuts.refused(revocation, at_ms)


log = logging.getLogger(__name__)


_CUT = TERMINAL | {"ending"}


@dataclass(slots=True)
class _Case:
    """One revocation of a batch, and its result."""

    revocation: Revocation
    verdict: Verdict
    """Whether it is followed."""
    replayed: bool = False
    ended: int = 0
    """The number of leases that it ended: their credentials are refused from now on."""


class RevocationHandler:
    """The batch handler of `revocation.request`."""

    def __init__(
        self,
        runtime: Runtime,
        verifier: RevocationVerifier,
        store: LeaseStore,
        ender: LeaseEnder,
        cuts: CutTracker,
    ) -> None:
        self._runtime = runtime
        self._verifier = verifier
        self._store = store
        self._ender = ender
        self._cuts = cuts
        self._td = runtime.settings.trust_domain

    async def __call__(self, batch: Sequence[Received]) -> None:
        """End the leases that the batch revokes, and answer.

        Raises what Redis or Kafka raise: the batch is redelivered.
        """
        with self._ender.revoking():
            await self._carry_out(batch)

    async def _carry_out(self, batch: Sequence[Received]) -> None:
        epoch = self._store.epoch
        revocations = await self._verify(batch)
        named = await self._named_leases(revocations)
        verdicts = await self._verifier.check(revocations, named)
        cases = [_Case(*judged) for judged in zip(revocations, verdicts, strict=True)]
        followed = [case for case in cases if isinstance(case.verdict, Allowed)]
        await self._end_named([case for case in followed if case.revocation.claims.selector is None], named)
        for case in followed:
            if case.revocation.claims.selector is not None:
                await self._end_selected(case, case.revocation.claims.selector)
        # Records that reached Kafka only after a rebuild of Redis are void: then nothing was ended by this batch.
        await self._store.confirm(epoch)
        await gather_all(self._answer(case) for case in cases)
        metrics.RECORDS.labels("revocation.request", "done").inc(len(cases))

    # --- verification ---

    async def _verify(self, batch: Sequence[Received]) -> list[Revocation]:
        """The revocations that a known signer signed. Dead-letters the others."""
        verified, failed = await self._verifier.verify(batch)
        await gather_all(self._runtime.dead_letters.send(record, problem) for record, problem in failed)
        return verified

    async def _named_leases(self, revocations: Sequence[Revocation]) -> dict[str, Lease]:
        """The leases that revocations name by their ids."""
        ids = [id for one in revocations if (id := one.claims.lease_id) is not None]
        return await self._ender.read(await self._store.get(ids)) if ids else {}

    # --- ending leases ---

    async def _end_named(self, cases: Sequence[_Case], leases: dict[str, Lease]) -> None:
        ended = await self._ender.end(
            [_end_request(leases[case.revocation.claims.lease_id or ""], case.revocation) for case in cases]
        )
        now_ms = self._runtime.clock.now_ms()
        for case in cases:
            case.ended = _count([ended[case.revocation.claims.lease_id or ""]], case.revocation)
            self._cuts.refused(case.revocation, now_ms)

    async def _end_selected(self, case: _Case, selector: Selector) -> None:
        """Fence first, then find leases: any lease activated after the fence was requested after the revocation."""
        revocation = case.revocation
        (first,), _ = await fence(self._store, [revocation])
        case.replayed = first != revocation.at

        def request_for(lease: Lease) -> EndRequest | None:
            return _end_request(lease, revocation) if is_covered(lease, first.appended_at_ms) else None

        selector_key = selector_key_of(selector)
        holders = await self._verifier.holders(selector_key)
        ended = await self._ender.end_matching(
            selector_key, request_for, agent_id=self._verifier.agent_of(selector), holders=holders
        )
        case.ended = _count(ended, revocation)
        if not case.ended and holders is not None and subject_of(self._td, revocation.claims.iss, "user"):
            # The fence stays. But a person who mistyped a name must not think that they stopped an agent.
            case.verdict = self._verifier.check_subject(selector)

    def _is_own(self, revocation: Revocation) -> bool:
        return revocation.claims.iss == self._runtime.key.id

    # --- the answer ---

    async def _answer(self, case: _Case) -> None:
        if isinstance(case.verdict, Refused):
            await self._event("refused", case, (case.verdict.reason,))
        elif not case.replayed:
            await self._event("accepted", case, (), result=str(case.ended))
        elif not self._is_own(case.revocation):
            message = "this selector was seen before at another place; what it covered then is what it covers"
            await self._event("replayed", case, (Reason(code=Code.REPLAYED, message=message),))

    async def _event(self, kind: EventKind, case: _Case, reasons: Sequence[Reason], **fields: Any) -> None:
        revocation = case.revocation
        claims = revocation.claims
        selector = claims.selector
        await self._runtime.event(
            kind,
            RevocationRequest.typ,
            about=(revocation.at.topic, revocation.at.partition, revocation.at.offset),
            reasons=reasons,
            source=revocation.at,
            traceparent=revocation.traceparent,
            actor=claims.iss,
            ref=claims.jti,
            lease_id=claims.lease_id,
            agent_id=subject_of(self._td, claims.iss, "agent") or (selector.agent_id if selector else None),
            task_id=selector.task_id if selector else None,
            **fields,
        )


def _end_request(lease: Lease, revocation: Revocation) -> EndRequest:
    return EndRequest(lease, revocation.cause(), revocation.traceparent)


def _count(leases: Iterable[Lease], revocation: Revocation) -> int:
    """The number of leases that a revocation has cut or ended, or keeps from ever becoming active."""
    ref = revocation.claims.jti
    return sum(
        lease.status == "minting"
        or (lease.status in _CUT and lease.cause is not None and lease.cause.ref == ref)
        for lease in leases
    )
