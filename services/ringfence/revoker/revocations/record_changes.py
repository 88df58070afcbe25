"""Derives revocations from changed records: an agent suspended, a task ended, a ceiling narrowed, a sponsor lost."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import Topic
from ringfence.messages.codes import Code
from ringfence.messages.lease import Selector
from ringfence.messages.registry import (
    AgentRecord,
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
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory, VerifiedRecord
from ringfence.model.verdict import Allowed
from ringfence.revoker.domain import (
    EndReason,
    Narrowing,
    SelectorEnd,
    StaleBasis,
    check_sponsor,
    consequences,
    derived_revocation,
    was_sponsor,
)
from ringfence.revoker.lease_end.lease_ender import LeaseEnder
from ringfence.revoker.revocations.verification import RevocationVerifier

log = logging.getLogger(__name__)


RECORD_AGE_MS = 25 * 3600 * 1000
"""Older records are ignored: the leases that they could end have reached their deadlines, after 24 h at most."""
_RECORDS: dict[Topic[Any], type[AnyRecord]] = {
    AGENT: AgentRecord,
    TASK: TaskRecord,
    USER: UserRecord,
    TARGET: TargetRecord,
}
_PAUSE_EVERY = 100
RECORD_TOPICS = tuple(_RECORDS)


class RecordHandler:
    """The handler of `user`, `agent`, `target` and `task`: it sends revocations of the leases that changes end."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        verifier: RevocationVerifier,
        store: LeaseStore,
        ender: LeaseEnder,
        *,
        patience_s: float,
    ) -> None:
        self._runtime = runtime
        self._directory = directory
        self._verifier = verifier
        self._store = store
        self._ender = ender
        self._patience_s = patience_s
        self._td = runtime.settings.trust_domain

    async def __call__(self, received: Received) -> None:
        """Revoke the leases that one record ends.

        Raises InvalidMessageError if the record does not count, UnavailableError if that is not known yet.
        """
        now_ms = self._runtime.clock.now_ms()
        if not received.value or received.appended_at_ms < now_ms - RECORD_AGE_MS:
            return
        model = _RECORDS[received.topic]
        record = verify(
            parse(received.value),
            model,
            self._runtime.trust.finder(*model.signed_by, at_s=received.appended_at_ms / 1000),
            audience=self._td,
        ).claims
        # The local table verifies the chain of commands.
        entry = await self._entry(cast(SubjectKind, received.topic.what), record)
        superseded = entry.revision > record.revision
        if superseded and not self._was_in_force(record, now_ms):
            return
        for consequence in consequences(
            record.state,
            record.revision,
            now_ms / 1000,
            self._runtime.settings.entitlements_max_age_s,
            ever_sponsor=was_sponsor(record),
        ):
            if isinstance(consequence, SelectorEnd):
                # An agent that was suspended loses its leases even if it was resumed since.
                await self._revoke_all(consequence, record, received.traceparent)
            elif not superseded:  # otherwise the later record decides
                await self._fence(consequence, record, received)
                await self._revoke_unfit(consequence, record.sub, entry, received.traceparent)
        if not superseded and isinstance(record, UserRecord) and was_sponsor(record):
            await self._revoke_orphans(record, received.traceparent)

    async def _revoke_orphans(self, record: UserRecord, traceparent: str | None) -> None:
        """Revoke the leases of agents that have become orphans.

        By agent, not by sponsor: a lease may have been issued under another sponsor.
        """
        orphaned = check_sponsor(record.state)
        if isinstance(orphaned, Allowed):
            return
        for number, agent in enumerate(self._directory.agents_of(record.state.user_id), start=1):
            if number % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)  # let other tasks run
            end = SelectorEnd(orphaned.kind, Selector(agent_id=agent.state.agent_id), orphaned.reason)
            await self._revoke_all(end, record, traceparent)

    def _was_in_force(self, record: AnyRecord, now_ms: int) -> bool:
        """Whether a superseded record was in force lately. If not, an old record was replayed on the topic."""
        if record.commands[-1].appended_at_ms < now_ms - RECORD_AGE_MS:
            return False
        try:
            self._directory.chains.verify(record)
        except ChainError as error:
            log.error("an earlier record of %s counts for nothing: %s", record.sub, error)
            return False
        return True

    async def _entry(self, kind: SubjectKind, record: AnyRecord) -> VerifiedRecord[AnyState]:
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
            f"the record of {record.sub} counts for nothing: {reason}", code=Code.RECORD_UNTRUSTED
        )

    async def _revoke_all(self, end: SelectorEnd, record: AnyRecord, traceparent: str | None) -> None:
        revocation = derived_revocation(
            StaleBasis(end.kind, end.reason, (record.sub, record.revision)),
            by=self._runtime.key.id,
            trust_domain=self._td,
            at_ms=self._runtime.clock.now_ms(),
            selector=end.selector,
        )
        selector = end.selector
        agent_id = record.state.agent_id if isinstance(record.state, TaskState) else selector.agent_id
        key = agent_id or selector.user_id or selector.sponsor or selector.target_id or ""
        await self._runtime.publisher.publish_signed(
            REVOCATION_REQUEST, key, revocation, self._runtime.key, traceparent=traceparent
        )

    async def _fence(self, narrowing: Narrowing, record: AnyRecord, received: Received) -> None:
        """Fence off leases that are being issued on the former record; agents request them again.

        The registry may repeat a record to replace a forged one. A repeated record covers what it covered first.
        """
        id = derived_id("record", record.sub, record.revision)
        first = await self._store.first_seen({id: received.coordinates}, keep_ms=RECORD_AGE_MS)
        await self._store.fence({narrowing.selector_key: first[id].appended_at_ms})

    async def _revoke_unfit(
        self, narrowing: Narrowing, sub: str, entry: VerifiedRecord[AnyState], traceparent: str | None
    ) -> None:
        acknowledged = []
        holders = await self._verifier.holders(narrowing.selector_key)
        unfit = [
            (lease, reason)
            async for leases in self._ender.find(narrowing.selector_key, holders=holders)
            for lease in leases.values()
            if isinstance(reason := narrowing.check_lease(lease), EndReason)
        ]
        for lease, reason in unfit:
            revocation = derived_revocation(
                StaleBasis(reason.kind, reason.reason, (sub, entry.revision)),
                by=self._runtime.key.id,
                trust_domain=self._td,
                at_ms=self._runtime.clock.now_ms(),
                lease_id=lease.lease_id,
            )
            _, ack = await self._runtime.publisher.send_signed(
                REVOCATION_REQUEST, lease.agent_id, revocation, self._runtime.key, traceparent=traceparent
            )
            acknowledged.append(ack)
        await gather_all(acknowledged)
