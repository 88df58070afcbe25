"""Turns each audited record into one OCSF event and hands it to the hash chain.

No record stops the stream: one that fails verification, or cannot even be parsed, becomes an event as well.

A record can arrive before the local tables, or the index, know its signer, agent or task. Its event is then *pending*:
the batch waits for the tables until the record is `settle_ms` old, and tries again after each change.

How to add a topic: a method of a mapper (`ringfence.audit.mappers`), and an entry in its `by_topic`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ringfence.audit.events import services
from ringfence.audit.events.ocsf import MAX_EVENT_BYTES, OcsfEvent, shortened
from ringfence.audit.events.trust import BundleHistory
from ringfence.audit.mappers.credentials import ApprovalMapper, CredentialMapper, LeaseMapper
from ringfence.audit.mappers.mapper import PENDING_CODES, Mapper, RecordMapper, ReplayError
from ringfence.audit.mappers.services import RegistryMapper, RunMapper, ServiceMapper
from ringfence.audit.trail.handover import Intake, PendingEvent
from ringfence.audit.verification import OutdatedError, RecordVerifier, require_trust
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic
from ringfence.messages.codes import Code
from ringfence.messages.topics import (
    ACTION,
    APPROVAL_REQUEST,
    CREDENTIAL_REPLY,
    LEASE,
    REVOCATION_ACK,
    RUN_ORDER,
    SERVICE_EVENT,
    TRUST,
)
from ringfence.model.audit_log.chain import linkable
from ringfence.model.leases.epochs import Epochs
from ringfence.model.records.command_chain import ChainError

log = logging.getLogger(__name__)

DEAD_LETTERED_HERE = frozenset(
    {TRUST, APPROVAL_REQUEST, LEASE, CREDENTIAL_REPLY, REVOCATION_ACK, SERVICE_EVENT, ACTION, RUN_ORDER}
)
"""Topics that other services only follow, by default, and do not consume: audit dead-letters invalid records there.

The dead-letter topic itself is not among them. Two versions that cannot read each other's letters would go on for ever.
"""
SendDeadLetter = Callable[[Received, InvalidMessageError], Awaitable[None]]


class _PreparedEvent(NamedTuple):
    """An event ready for the intake. `pending`: as of `MappedEvent`."""

    key: str
    uid: str
    body: bytes
    event: dict[str, Any]
    pending: bool
    rejection: InvalidMessageError | None = None
    """Why verification of the record failed, if it did."""


class AuditHandlers:
    """The batch handler of all audited topics: one event for each record, handed to the intake of the hash chain."""

    def __init__(
        self,
        intake: Intake,
        verifier: RecordVerifier,
        clock: Clock,
        trust_store: TrustStore,
        use_of: Callable[[str], Mapping[str, Any] | None],
        *,
        send_dead_letter: SendDeadLetter,
        settle_ms: int,
    ) -> None:
        """Args:
            use_of: finds the `unmapped` fields of a use of break glass by its request's id, if it is indexed.
            send_dead_letter: sends an invalid record to the dead letters, on topics that no other service dead-letters.
            settle_ms: the age up to which a record waits for its signer, agent or task in the local tables.
        """  # fmt: skip
        self._send_dead_letter = send_dead_letter
        self._intake = intake
        self._clock = clock
        self._trust_store = trust_store
        self._settle_ms = settle_ms
        self._tables_changed = asyncio.Event()
        self.bundles = BundleHistory(trust_store.anew())
        trust_domain = trust_store.trust_domain
        self._mapper = RecordMapper(verifier, trust_domain)
        self._by_topic: dict[Topic[Any], Mapper] = {
            **RegistryMapper(verifier, trust_domain, self.bundles).by_topic(),
            **CredentialMapper(verifier, trust_domain).by_topic(),
            **ApprovalMapper(verifier, trust_domain, use_of).by_topic(),
            **LeaseMapper(verifier, trust_domain, Epochs(trust_store)).by_topic(),
            **ServiceMapper(verifier, trust_domain).by_topic(),
            **RunMapper(verifier, trust_domain).by_topic(),
        }

    def on_change(self, kind: str, id: str) -> None:
        """Callback of the local tables: pending events are tried again."""
        self.retry_pending()

    def retry_pending(self) -> None:
        """Try pending events again: a local table has read on, whether or not that changed it."""
        self._tables_changed.set()

    async def handle_batch(self, batch: Sequence[Received]) -> None:
        """Handle the records of one topic after those of the topic before it. Raises UnavailableError without trust."""
        require_trust(self._trust_store, batch, self._clock.now_ms())
        ready: list[_PreparedEvent] = []
        for topic, records in itertools.groupby(batch, lambda record: record.topic):
            ready += await self._prepare_all(self._by_topic[topic], list(records))
        await self._publish(batch, ready)

    async def _prepare_all(self, map_record: Mapper, records: Sequence[Received]) -> Sequence[_PreparedEvent]:
        ready = [self._attempt(map_record, record) for record in records]
        if any(prepared.pending for prepared in ready):
            await self._settle(map_record, records, ready)
        return ready

    async def _settle(
        self,
        map_record: Mapper,
        batch: Sequence[Received],
        ready: list[_PreparedEvent],
    ) -> None:
        """Wait for the local tables while pending records are younger than `settle_ms`; replace their events.

        Older records are taken as they are. So a record that can never be verified delays its successors only while
        audit is less than `settle_ms` behind.
        """
        waited_from_ms = self._clock.now_ms()
        while True:
            now_ms = self._clock.now_ms()
            pending = [i for i, prepared in enumerate(ready) if prepared.pending]
            youngest_ms = max((batch[i].appended_at_ms for i in pending), default=0)
            left_ms = min(youngest_ms, waited_from_ms) + self._settle_ms - now_ms
            if not pending or left_ms <= 0:
                return
            self._tables_changed.clear()
            try:
                await asyncio.wait_for(self._tables_changed.wait(), left_ms / 1000)
            except TimeoutError:
                return
            for i in pending:
                ready[i] = self._attempt(map_record, batch[i])

    def _attempt(self, map_record: Mapper, record: Received) -> _PreparedEvent:
        pending = False
        try:
            event, pending = map_record(record)
            return _prepare(event, pending)
        except ReplayError as replay:
            return _prepare(replay.event, False)
        except OutdatedError as error:
            return _prepare(self._mapper.outdated(error), False)
        except (InvalidMessageError, ChainError) as error:
            rejection, pending = InvalidMessageError(str(error), code=error.code), error.code in PENDING_CODES
        except Exception:
            # One record that audit cannot describe must not block those that follow it.
            where = (record.topic_name, record.partition, record.offset)
            log.exception("no event could be made of %s/%d@%d", *where, extra=rate_limited(record.topic_name))
            rejection = InvalidMessageError("audit could not read it", code=Code.UNREADABLE)
        return _prepare(services.not_believed(record, rejection.code), pending, rejection)

    async def _publish(self, batch: Sequence[Received], ready: Sequence[_PreparedEvent]) -> None:
        await self._intake.hand_over(
            PendingEvent(prepared.key, prepared.uid, prepared.body, record.traceparent, prepared.event)
            for record, prepared in zip(batch, ready, strict=True)
        )
        await gather_all(
            self._send_dead_letter(record, prepared.rejection)
            for record, prepared in zip(batch, ready, strict=True)
            if prepared.rejection is not None and record.topic in DEAD_LETTERED_HERE
        )
        for class_uid, count in Counter(prepared.event["class_uid"] for prepared in ready).items():
            metrics.AUDIT_EVENTS.labels(str(class_uid)).inc(count)
        for what, count in Counter(record.topic.what for record in batch).items():
            metrics.RECORDS.labels(what, "done").inc(count)


def _prepare(event: OcsfEvent, pending: bool, rejection: InvalidMessageError | None = None) -> _PreparedEvent:
    body = linkable(event.body)
    if len(body) > MAX_EVENT_BYTES:
        event = shortened(event)
        body = linkable(event.body)
    return _PreparedEvent(event.key, event.uid, body, event.body, pending, rejection)
