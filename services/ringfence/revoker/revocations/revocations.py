"""Revocations in; ended leases and answers out. Changed records in; the revocations that follow from them out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.kernel.base import metrics
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Reason
from ringfence.messages.lease import TERMINAL, Lease, RevocationRequest, Selector
from ringfence.messages.operations import EventKind
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.lifecycle import is_covered, selector_key_of
from ringfence.model.leases.revocations import Revocation
from ringfence.revoker.lease_end.lease_ender import EndRequest, LeaseEnder
from ringfence.revoker.revocations.cut_confirmation import CutTracker
from ringfence.revoker.revocations.fencing import fence
from ringfence.revoker.revocations.verification import RevocationVerifier

log = logging.getLogger(__name__)


_CUT = TERMINAL | {"ending"}


@dataclass(slots=True)
class _Case:
    """One order on its way."""

    order: Revocation
    objection: Reason | None = None
    replayed: bool = False
    ended: int = 0
    """How many leases it ended: their credentials are refused from now on."""


class RevocationHandler:
    """The batch handler of `revocation.request`."""

    def __init__(
        self,
        runtime: Runtime,
        orders: RevocationVerifier,
        store: LeaseStore,
        ender: LeaseEnder,
        cuts: CutTracker,
    ) -> None:
        self._runtime = runtime
        self._orders = orders
        self._store = store
        self._ender = ender
        self._cuts = cuts
        self._td = runtime.settings.trust_domain

    async def __call__(self, batch: Sequence[Received]) -> None:
        """End what the batch says, and answer."""
        epoch = self._store.epoch
        cases = [_Case(order) for order in await self._open(batch)]
        named = await self._named_leases(cases)
        await self._judge(cases, named)
        followed = [case for case in cases if case.objection is None]
        await self._end_named([case for case in followed if case.order.claims.selector is None], named)
        for case in followed:
            if case.order.claims.selector is not None:
                await self._end_selected(case, case.order.claims.selector)
        # What was held up on its way to Kafka while Redis was rebuilt is void there: nothing was followed by it.
        await self._store.confirm(epoch)
        await gather_all(self._answer(case) for case in cases)
        metrics.RECORDS.labels("revocation.request", "done").inc(len(cases))

    # --- whose word it is ---

    async def _open(self, batch: Sequence[Received]) -> list[Revocation]:
        """Those with a valid signature of somebody who may have a say; the rest goes to the dead letters."""
        opened, failed = await self._orders.open(batch)
        await gather_all(self._runtime.dead_letters.send(record, problem) for record, problem in failed)
        return opened

    async def _named_leases(self, cases: Sequence[_Case]) -> dict[str, Lease]:
        """The leases that are named one by one, by their ids."""
        ids = [id for case in cases if (id := case.order.claims.lease_id) is not None]
        return await self._ender.read(await self._store.get(ids)) if ids else {}

    async def _judge(self, cases: Sequence[_Case], leases: dict[str, Lease]) -> None:
        found = await self._orders.objections([case.order for case in cases], leases)
        for case, objection in zip(cases, found, strict=True):
            case.objection = objection

    # --- what it ends ---

    async def _end_named(self, cases: Sequence[_Case], leases: dict[str, Lease]) -> None:
        ended = await self._ender.end(
            [_wish(leases[case.order.claims.lease_id or ""], case.order) for case in cases]
        )
        now_ms = self._runtime.clock.now_ms()
        for case in cases:
            case.ended = _count([ended[case.order.claims.lease_id or ""]], case.order)
            self._cuts.refused(case.order, now_ms)

    async def _end_selected(self, case: _Case, selector: Selector) -> None:
        """Fence first, then look: whatever is activated later was asked for after the order."""
        order = case.order
        (first,), _ = await fence(self._store, [order])
        case.replayed = first != order.at

        def covered(lease: Lease) -> EndRequest | None:
            return _wish(lease, order) if is_covered(lease, first.appended_at_ms) else None

        selector_key = selector_key_of(selector)
        holders = await self._orders.holders(selector_key)
        ended = await self._ender.end_matching(
            selector_key, covered, agent_id=self._orders.agent_of(selector), holders=holders
        )
        case.ended = _count(ended, order)
        if not case.ended and holders is not None and subject_of(self._td, order.claims.iss, "user"):
            # It stands all the same; but who mistyped a name must not think that they stopped somebody.
            case.objection = self._orders.unknown(selector)

    def _is_own(self, order: Revocation) -> bool:
        return order.claims.iss == self._runtime.key.id

    # --- the answer ---

    async def _answer(self, case: _Case) -> None:
        if case.objection is not None:
            await self._event("refused", case, (case.objection,))
        elif not case.replayed:
            await self._event("accepted", case, (), result=str(case.ended))
        elif not self._is_own(case.order):
            message = "this selector was seen before at another place; what it covered then is what it covers"
            await self._event("replayed", case, (Reason(code="replayed", message=message),))

    async def _event(self, kind: EventKind, case: _Case, reasons: Sequence[Reason], **fields: Any) -> None:
        order = case.order
        claims = order.claims
        selector = claims.selector
        await self._runtime.event(
            kind,
            RevocationRequest.typ,
            about=(order.at.topic, order.at.partition, order.at.offset),
            reasons=reasons,
            source=order.at,
            traceparent=order.traceparent,
            actor=claims.iss,
            ref=claims.jti,
            lease_id=claims.lease_id,
            agent_id=subject_of(self._td, claims.iss, "agent") or (selector.agent_id if selector else None),
            task_id=selector.task_id if selector else None,
            **fields,
        )


def _wish(lease: Lease, order: Revocation) -> EndRequest:
    return EndRequest(lease, order.cause(), order.traceparent)


def _count(leases: Iterable[Lease], order: Revocation) -> int:
    """How many of these leases are cut or over because of an order, or will never be active."""
    ref = order.claims.jti
    return sum(
        lease.status == "minting"
        or (lease.status in _CUT and lease.cause is not None and lease.cause.ref == ref)
        for lease in leases
    )
