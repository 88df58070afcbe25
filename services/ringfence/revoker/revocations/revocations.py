"""Revocations in; ended leases and answers out. Changed records in; the revocations that follow from them out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import open_signed, parse
from ringfence.kernel.kafka.consumer import gather_all
from ringfence.kernel.kafka.producer import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import Topic
from ringfence.messages.credential import Reason
from ringfence.messages.lease import TERMINAL, Lease, RevocationRequest, Selector
from ringfence.messages.operations import EventKind
from ringfence.messages.registry import (
    AgentRecord,
    AgentState,
    AnyRecord,
    AnyState,
    TargetRecord,
    TaskRecord,
    TaskState,
    UserRecord,
)
from ringfence.messages.topics import AGENT, REVOCATION_REQUEST, TARGET, TASK, USER
from ringfence.model.identity.spiffe_ids import SubjectKind, subject_of
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.lifecycle import is_covered, mark_of
from ringfence.model.leases.revocations import Order
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory, Entry
from ringfence.revoker.domain import (
    Ending,
    Narrowing,
    consequences,
    derived_order,
    orphaning,
    was_sponsor,
)
from ringfence.revoker.ending.lease_ender import Ender, Wish
from ringfence.revoker.revocations.cut_confirmation import Cuts
from ringfence.revoker.revocations.fencing import fence
from ringfence.revoker.revocations.verification import Orders

log = logging.getLogger(__name__)

RECORD_AGE_MS = 25 * 3600 * 1000
"""Older records end nothing more: the leases that they could be about have had their deadlines (24 h at most)."""

_RECORDS: dict[Topic[Any], type[AnyRecord]] = {
    AGENT: AgentRecord,
    TASK: TaskRecord,
    USER: UserRecord,
    TARGET: TargetRecord,
}
RECORD_TOPICS = tuple(_RECORDS)
_CUT = TERMINAL | {"ending"}
_PAUSE_EVERY = 100


@dataclass(slots=True)
class _Case:
    """One order on its way."""

    order: Order
    objection: Reason | None = None
    replayed: bool = False
    ended: int = 0
    """How many leases it ended: their credentials are refused from now on."""


class RevocationHandler:
    """The batch handler of `revocation.request`."""

    def __init__(
        self,
        runtime: Runtime,
        orders: Orders,
        store: LeaseStore,
        ender: Ender,
        cuts: Cuts,
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
        named = await self._named(cases)
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

    async def _open(self, batch: Sequence[Received]) -> list[Order]:
        """Those with a valid signature of somebody who may have a say; the rest goes to the dead letters."""
        opened, failed = await self._orders.open(batch)
        await gather_all(self._runtime.letters.bury(record, problem) for record, problem in failed)
        return opened

    async def _named(self, cases: Sequence[_Case]) -> dict[str, Lease]:
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

        def covered(lease: Lease) -> Wish | None:
            return _wish(lease, order) if is_covered(lease, first.appended_at_ms) else None

        mark = mark_of(selector)
        also = await self._orders.holders(mark)
        ended = await self._ender.end_bearing(
            mark, covered, agent_id=self._orders.agent_of(selector), also=also
        )
        case.ended = _count(ended, order)
        if not case.ended and also is not None and subject_of(self._td, order.claims.iss, "user"):
            # It stands all the same; but who mistyped a name must not think that they stopped somebody.
            case.objection = self._orders.unknown(selector)

    def _is_own(self, order: Order) -> bool:
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


def _wish(lease: Lease, order: Order) -> Wish:
    return Wish(lease, order.cause(), order.traceparent)


def _count(leases: Iterable[Lease], order: Order) -> int:
    """How many of these leases are cut or over because of an order, or will never be active."""
    ref = order.claims.jti
    return sum(
        lease.status == "minting"
        or (lease.status in _CUT and lease.cause is not None and lease.cause.ref == ref)
        for lease in leases
    )


class RecordHandler:
    """The handler of users, agents, targets and tasks: what their change ends is ordered on `revocation.request`."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        orders: Orders,
        store: LeaseStore,
        ender: Ender,
        *,
        patience_s: float,
    ) -> None:
        self._runtime = runtime
        self._directory = directory
        self._orders = orders
        self._store = store
        self._ender = ender
        self._patience_s = patience_s
        self._td = runtime.settings.trust_domain

    async def __call__(self, received: Received) -> None:
        """Order what one record ends. Raises InvalidMessageError where it is no record that counts."""
        now_ms = self._runtime.clock.now_ms()
        if not received.value or received.appended_at_ms < now_ms - RECORD_AGE_MS:
            return
        model = _RECORDS[received.topic]
        record = open_signed(
            parse(received.value),
            model,
            self._runtime.trust.finder(*model.signed_by, at_s=received.appended_at_ms / 1000),
            audience=self._td,
        ).claims
        # From the table, which verifies the chain of commands.
        entry = await self._entry(cast(SubjectKind, received.topic.what), record)
        overtaken = entry.revision > record.revision
        if overtaken and not self._was_in_force(record, now_ms):
            return
        for consequence in consequences(
            record.state,
            record.revision,
            now_ms / 1000,
            self._runtime.settings.entitlements_max_age_s,
            ever_sponsor=was_sponsor(record),
        ):
            if isinstance(consequence, Ending):
                # What was suspended and is active again was to lose its leases all the same.
                await self._order_all(consequence, record, received.traceparent)
            elif not overtaken:  # else the later record says what still fits
                await self._fence(consequence, record, received)
                await self._order_unfit(consequence, record.sub, entry, received.traceparent)
        if not overtaken and isinstance(record, UserRecord) and was_sponsor(record):
            await self._order_orphans(record, received.traceparent)

    async def _order_orphans(self, record: UserRecord, traceparent: str | None) -> None:
        """Order the end of what agents hold that are without a sponsor now: it may have been issued under another."""
        orphaned = orphaning(record.state)
        if orphaned is None:
            return
        kind, reason = orphaned
        for number, agent in enumerate(self._directory.entries("agent"), start=1):
            if number % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)  # others get their turn
            state = agent.state
            if isinstance(state, AgentState) and state.sponsor == record.state.user_id:
                ending = Ending(kind, Selector(agent_id=state.agent_id), reason)
                await self._order_all(ending, record, traceparent)

    def _was_in_force(self, record: AnyRecord, now_ms: int) -> bool:
        """Whether a record that a later one has overtaken counted, and lately: it is no old one, put there again."""
        if record.commands[-1].appended_at_ms < now_ms - RECORD_AGE_MS:
            return False
        try:
            self._directory.chains.verify(record)
        except ChainError as error:
            log.error("an earlier record of %s counts for nothing: %s", record.sub, error)
            return False
        return True

    async def _entry(self, kind: SubjectKind, record: AnyRecord) -> Entry[AnyState]:
        id = subject_of(self._td, record.sub, kind) or ""
        reason = "the local table refused it"
        for caught_up in (False, True):
            try:
                entry = self._directory.entry(kind, id)
            except ChainError as error:
                entry, reason = None, str(error)
            if entry is not None and entry.revision >= record.revision:
                return entry
            if not caught_up and not await self._runtime.tables_caught_up(self._patience_s):
                raise UnavailableError(f"{record.sub} at revision {record.revision} has not arrived here yet")
        raise InvalidMessageError(
            f"the record of {record.sub} counts for nothing: {reason}", code="record_untrusted"
        )

    async def _order_all(self, ending: Ending, record: AnyRecord, traceparent: str | None) -> None:
        order = derived_order(
            ending.kind,
            ending.reason,
            by=self._runtime.key.id,
            trust_domain=self._td,
            at_ms=self._runtime.clock.now_ms(),
            record=(record.sub, record.revision),
            selector=ending.selector,
        )
        selector = ending.selector
        agent_id = record.state.agent_id if isinstance(record.state, TaskState) else selector.agent_id
        key = agent_id or selector.user_id or selector.sponsor or selector.target_id or ""
        await self._runtime.publisher.publish_signed(
            REVOCATION_REQUEST, key, order, self._runtime.key, traceparent=traceparent
        )

    async def _fence(self, narrowing: Narrowing, record: AnyRecord, received: Received) -> None:
        """What is being issued at this moment may rest on the former record: it is fenced off, and asked for anew.

        Where the record stands on its topic once more, as one does that the registry writes over a forged one, it
        covers what it covered the first time.
        """
        id = derived_id("record", record.sub, record.revision)
        first = await self._store.first_seen({id: received.coordinates}, keep_ms=RECORD_AGE_MS)
        await self._store.fence({narrowing.mark: first[id].appended_at_ms})

    async def _order_unfit(
        self, narrowing: Narrowing, sub: str, entry: Entry[AnyState], traceparent: str | None
    ) -> None:
        acknowledged = []
        also = await self._orders.holders(narrowing.mark)
        unfit = [
            (lease, why)
            async for leases in self._ender.bearing(narrowing.mark, also=also)
            for lease in leases.values()
            if (why := narrowing.unfit(lease))
        ]
        for lease, why in unfit:
            order = derived_order(
                why.kind,
                why.reason,
                by=self._runtime.key.id,
                trust_domain=self._td,
                at_ms=self._runtime.clock.now_ms(),
                record=(sub, entry.revision),
                lease_id=lease.lease_id,
            )
            _, ack = await self._runtime.publisher.send_signed(
                REVOCATION_REQUEST, lease.agent_id, order, self._runtime.key, traceparent=traceparent
            )
            acknowledged.append(ack)
        await gather_all(acknowledged)
