"""Turns each audited record into one OCSF event and hands it to the hash chain.

No record stops the stream: one that fails verification, or cannot even be parsed, becomes an event as well.

A record can arrive before the local tables, or the index, know its signer, agent or task. Its event is then *pending*:
the batch waits for the tables until the record is `settle_ms` old, and tries again after each change.

How to add a topic: a method that returns `(event, pending)`, and an entry in `_by_topic`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ringfence.audit.events import (
    actions,
    approvals,
    break_glass,
    credentials,
    registry,
    services,
    subjects,
    trust,
)
from ringfence.audit.events.break_glass import review_problem
from ringfence.audit.events.ocsf import MAX_EVENT_BYTES, OcsfEvent, shortened
from ringfence.audit.events.trust import BundleHistory
from ringfence.audit.memory import RequestFacts
from ringfence.audit.trail.handover import Intake, PendingEvent
from ringfence.audit.verification import OutdatedError, RecordVerifier, VerifiedMessage, require_trust
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jwe import unverified_kid
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.multi_recipient_jwe import recipients_of, unverified_about
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import (
    ActionApproval,
    ActionRequest,
    Approval,
    ApprovalRequest,
    BreakGlassReview,
    Grant,
    GrantWithdraw,
)
from ringfence.messages.base import ExpiringClaims, Topic, typ_header
from ringfence.messages.credential import CredentialRequest, DecidedTerms
from ringfence.messages.lease import Lease, LeaseEpoch, RevocationAck, RevocationRequest
from ringfence.messages.operations import ActionAnswered, ActionDecided, DeadLetter, ServiceEvent
from ringfence.messages.registry import (
    AgentRecord,
    AgentTransfer,
    AgentTransferConsent,
    AnyRecord,
    TargetRecord,
    TaskAssign,
    TaskRecord,
    UserRecord,
)
from ringfence.messages.topics import (
    ACTION,
    AGENT,
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    LEASE,
    REGISTRY_COMMAND,
    REVOCATION_ACK,
    REVOCATION_REQUEST,
    SERVICE_EVENT,
    TARGET,
    TASK,
    TRUST,
    USER,
)
from ringfence.model.audit_log.chain import linkable
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.leases.epochs import Epochs
from ringfence.model.records.command_chain import ChainError
from ringfence.model.requests.grants import kind_of

log = logging.getLogger(__name__)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PENDING_CODES = frozenset({"key_unknown", "chain_broken", "not_reviewer", "break_glass_unknown"})
"""Errors that may only mean that the local tables, or the index, are behind."""
DEAD_LETTERED_HERE = frozenset(
    {TRUST, APPROVAL_REQUEST, LEASE, CREDENTIAL_REPLY, REVOCATION_ACK, SERVICE_EVENT, ACTION}
)
"""Topics that other services only follow, by default, and do not consume: audit dead-letters invalid records there.

The dead-letter topic itself is not among them. Two versions that cannot read each other's letters would go on for ever.
"""
SendDeadLetter = Callable[[Received, InvalidMessageError], Awaitable[None]]


class _PreparedEvent(NamedTuple):
    """An event ready for the intake. `pending`: the local tables may know more a little later."""

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
            bury: sends an invalid record to the dead letters, on topics where no other service does so.
            settle_ms: the age up to which a record waits for its signer, agent or task in the local tables.
        """  # fmt: skip
        self._use_of = use_of
        self._send_dead_letter = send_dead_letter
        self._intake = intake
        self._verifier = verifier
        self._clock = clock
        self._trust_domain = trust_store.trust_domain
        self._trust_store = trust_store
        self._settle_ms = settle_ms
        self._tables_changed = asyncio.Event()
        self._epochs = Epochs(trust_store)
        self.bundles = BundleHistory(trust_store.anew())
        self._by_topic: dict[Topic[Any], Callable[[Received], tuple[OcsfEvent, bool]]] = {
            TRUST: self._trust,
            REGISTRY_COMMAND: self._command,
            USER: self._record_of(UserRecord),
            AGENT: self._record_of(AgentRecord),
            TARGET: self._record_of(TargetRecord),
            TASK: self._record_of(TaskRecord),
            CREDENTIAL_REQUEST: self._request,
            APPROVAL_REQUEST: self._approval_request,
            APPROVAL_RESPONSE: self._response,
            CREDENTIAL_DECISION: self._decision,
            LEASE: self._lease,
            CREDENTIAL_REPLY: self._reply,
            REVOCATION_REQUEST: self._revocation,
            REVOCATION_ACK: self._ack,
            SERVICE_EVENT: self._service_event,
            ACTION: self._action,
            DEAD_LETTER: self._dead_letter,
        }

    def on_change(self, kind: str, id: str) -> None:
        """Callback of the local tables: pending events are tried again."""
        self._tables_changed.set()

    async def handle_batch(self, batch: Sequence[Received]) -> None:
        """Handle the records of one topic after those of the topic before it. Raises UnavailableError without trust."""
        require_trust(self._trust_store, batch, self._clock.now_ms())
        ready: list[_PreparedEvent] = []
        for topic, records in itertools.groupby(batch, lambda record: record.topic):
            ready += await self._prepare_all(self._by_topic[topic], list(records))
        await self._publish(batch, ready)

    async def _prepare_all(
        self, read: Callable[[Received], tuple[OcsfEvent, bool]], records: Sequence[Received]
    ) -> Sequence[_PreparedEvent]:
        ready = [self._attempt(read, record) for record in records]
        if any(prepared.pending for prepared in ready):
            await self._settle(read, records, ready)
        return ready

    async def _settle(
        self,
        read: Callable[[Received], tuple[OcsfEvent, bool]],
        batch: Sequence[Received],
        ready: list[_PreparedEvent],
    ) -> None:
        """Wait for the local tables while pending records are younger than `settle_ms`; replace their events.

        Older records are taken as they are. So a record that nobody can ever verify delays its successors only while
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
                ready[i] = self._attempt(read, batch[i])

    def _attempt(
        self, read: Callable[[Received], tuple[OcsfEvent, bool]], record: Received
    ) -> _PreparedEvent:
        pending = False
        try:
            event, pending = read(record)
            return _prepare(event, pending)
        except OutdatedError as error:
            return _prepare(self._expired(record, error), False)
        except (InvalidMessageError, ChainError) as error:
            why, pending = InvalidMessageError(str(error), code=error.code), error.code in _PENDING_CODES
        except Exception:
            # One record that audit cannot describe must not block those that follow it.
            where = (record.topic_name, record.partition, record.offset)
            log.exception("no event could be made of %s/%d@%d", *where, extra=rate_limited(record.topic_name))
            why = InvalidMessageError("audit could not read it", code="unreadable")
        return _prepare(services.not_believed(record, why.code), pending, why)

    async def _publish(self, batch: Sequence[Received], ready: Sequence[_PreparedEvent]) -> None:
        await self._intake.hand_over(
            PendingEvent(one.key, one.uid, one.body, record.traceparent, one.event)
            for record, one in zip(batch, ready, strict=True)
        )
        await gather_all(
            self._send_dead_letter(record, one.rejection)
            for record, one in zip(batch, ready, strict=True)
            if one.rejection is not None and record.topic in DEAD_LETTERED_HERE
        )
        for class_uid, count in Counter(one.event["class_uid"] for one in ready).items():
            metrics.AUDIT_EVENTS.labels(str(class_uid)).inc(count)
        for what, count in Counter(record.topic.what for record in batch).items():
            metrics.RECORDS.labels(what, "done").inc(count)

    # --- one method a topic: returns (event, pending) ---

    def _trust(self, record: Received) -> tuple[OcsfEvent, bool]:
        return trust.bundle_event(record, self.bundles.record_of(record)), False

    def _command(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed, consent_by = self._verifier.command(record)
        kind, _, fields = registry.subject_of_command(signed.claims)
        replay = self._replay(record, signed, lambda: fields)
        if replay is not None:
            return replay, False
        task = self._verifier.task_of(fields["task"]) if kind == "task" else None
        agent = fields.get("agent") or (task.agent_id if task is not None else None)
        event = registry.commanded(
            record,
            signed.claims,
            signed.verified(*((_consent_typ(signed.claims),) if consent_by else ())),
            sponsor=self._verifier.sponsor_of(agent) if agent else None,
            consent_by=consent_by,
            task=task,
            parent=self._verifier.task_of(fields["parent"]) if "parent" in fields else None,
        )
        return event, _lacks_names(event)

    def _record_of(self, model: type[AnyRecord]) -> Callable[[Received], tuple[OcsfEvent, bool]]:
        def read(record: Received) -> tuple[OcsfEvent, bool]:
            if not record.value:
                raise InvalidMessageError("a record is never deleted", code="tombstone")
            signed, last = self._verifier.record(record, model)
            claims = signed.claims
            agent = getattr(claims.state, "agent_id", None)
            verified = signed.verified(last.typ)
            known = self._verifier.newer_revision(record, claims)
            if known is not None:
                return registry.revision_fell(record, claims, known, verified), False
            replay = self._replay(record, signed, lambda: {"agent": agent} if agent else {})
            if replay is not None:
                return replay, False
            sponsor = self._verifier.sponsor_of(agent) if agent else None
            act = getattr(claims.state, "act", None) or ()
            event = registry.recorded(
                record, claims, last, verified, sponsor=sponsor, sponsors=self._verifier.sponsors_of(act)
            )
            return event, _lacks_names(event)

        return read

    def _request(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.request(record)
        replay = self._replay(record, signed, lambda: self._subject_fields(record, signed))
        if replay is not None:
            return replay, False
        facts = self._verifier.remember_request(signed, record.own_traceparent)
        return credentials.requested(record, facts, signed.verified()), self._incomplete(facts)

    def _decision(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_service(record, DecidedTerms, "policy")
        claims = signed.claims
        facts = self._verifier.embedded_request(
            claims.request, claims.request_id, claims.source.appended_at_ms
        )
        fields = {"agent": facts.agent} if facts is not None else {}
        replay = self._replay(record, signed, lambda: {**fields, "request": claims.request_id})
        if replay is not None:
            return replay, False
        approvers = [self._verifier.approver(one, record.appended_at_ms) for one in claims.approvals]
        grantors = [self._verifier.grantor(one, record.appended_at_ms) for one in claims.grants or ()]
        embedded = ["approval"] * sum(one is not None for one in approvers)
        embedded += ["grant"] * sum(one is not None for one in grantors)
        if facts is not None:
            embedded.append("credential.request")
            facts.decision = claims.jti
            facts.policy_revision = claims.revisions.policy if claims.revisions is not None else None
            facts.approvers = tuple(one for one in [*approvers, *grantors] if one is not None)
        event = credentials.decided(record, claims, digest(signed.compact), facts, signed.verified(*embedded))
        return event, facts is None or self._incomplete(facts)

    def _approval_request(self, record: Received) -> tuple[OcsfEvent, bool]:
        if parse(record.value).header.typ == typ_header(ActionRequest):
            return self._action_request(record)
        signed = self._verifier.by_service(record, ApprovalRequest, "policy")
        claims = signed.claims
        facts = self._verifier.embedded_request(
            claims.request, claims.request_id, claims.source.appended_at_ms
        )
        if facts is None:
            raise InvalidMessageError("the embedded request does not hold", code="key_unknown")
        replay = self._replay(record, signed, lambda: {"agent": facts.agent, "request": claims.request_id})
        if replay is not None:
            return replay, False
        verified = signed.verified("credential.request")
        return credentials.approval_requested(record, claims, facts, verified), self._incomplete(facts)

    def _response(self, record: Received) -> tuple[OcsfEvent, bool]:
        """An approval, a grant, or the withdrawal of a grant."""
        match kind_of(record):
            case Grant.typ:
                return self._grant(record)
            case GrantWithdraw.typ:
                return self._withdrawal(record)
            case _:
                return self._approval(record)

    def _grant(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_user(record, Grant)
        claims = signed.claims
        fields = self._verifier.remember_grant(claims)
        replay = self._replay(record, signed, lambda: fields)
        if replay is not None:
            return replay, False
        event = approvals.given(record, claims, fields, signed.verified())
        return event, _lacks_names(event)

    def _withdrawal(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_user(record, GrantWithdraw)
        fields = self._verifier.grant(signed.claims.grant_id)
        replay = self._replay(record, signed, lambda: fields)
        if replay is not None:
            return replay, False
        return approvals.withdrawn(record, signed.claims, fields, signed.verified()), False

    def _approval(self, record: Received) -> tuple[OcsfEvent, bool]:
        typ = parse(record.value).header.typ
        if typ == typ_header(BreakGlassReview):
            return self._review(record)
        if typ == typ_header(ActionApproval):
            return self._action_approval(record)
        signed = self._verifier.by_user(record, Approval)
        claims = signed.claims
        facts = self._verifier.embedded_request(claims.request, claims.request_id, record.appended_at_ms)
        fields = {"agent": facts.agent} if facts is not None else {}
        replay = self._replay(record, signed, lambda: {**fields, "request": claims.request_id})
        if replay is not None:
            return replay, False
        self._verifier.remember_approval(signed.compact, claims)
        embedded = ("credential.request",) if facts is not None else ()
        event = credentials.approval_given(record, claims, facts, signed.verified(*embedded))
        return event, facts is None or self._incomplete(facts)

    def _action_request(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_service(record, ActionRequest, "gateway")
        claims = signed.claims
        replay = self._replay(record, signed, lambda: {"agent": claims.agent_id, "task": claims.task_id})
        if replay is not None:
            return replay, False
        fields = self._lease_fields(claims.lease_id, claims.agent_id, claims.task_id)
        event = approvals.requested(record, claims, fields, signed.verified())
        return event, _lacks_names(event)

    def _action_approval(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_user(record, ActionApproval)
        claims = signed.claims
        replay = self._replay(record, signed, lambda: {"agent": claims.agent_id})
        if replay is not None:
            return replay, False
        asked = self._verifier.embedded_action_request(claims, record.appended_at_ms)
        embedded = ("action.request",) if asked is not None else ()
        place = (asked.lease_id, asked.agent_id, asked.task_id) if asked else (None, claims.agent_id, None)
        fields = self._lease_fields(*place)
        event = approvals.answered(record, claims, asked, fields, signed.verified(*embedded))
        return event, _lacks_names(event)

    def _review(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_user(record, BreakGlassReview)
        claims = signed.claims
        replay = self._replay(
            record, signed, lambda: {"agent": claims.agent_id, "request": claims.request_id}
        )
        if replay is not None:
            return replay, False
        reviewer = subject_of(claims.aud, claims.iss, "user") or ""
        use = self._use_of(claims.request_id)
        rejection = review_problem(claims, reviewer, self._verifier.roles_of(reviewer), use)
        event = break_glass.reviewed(record, claims, use, rejection, signed.verified())
        return event, rejection is not None and rejection.code in _PENDING_CODES

    def _reply(self, record: Received) -> tuple[OcsfEvent, bool]:
        if record.value.startswith(b"{"):
            return self._delivery(record), False
        request_id = unverified_kid(record.value) if record.value.count(b".") == 4 else None
        if request_id is None or not _UUID.fullmatch(request_id):
            raise InvalidMessageError("not a sealed reply", code="not_a_jwe")
        return credentials.replied(record, request_id, self._verifier.facts(request_id)), False

    def _delivery(self, record: Received) -> OcsfEvent:
        request_id = unverified_about(record.value)
        if request_id is None or not _UUID.fullmatch(request_id):
            raise InvalidMessageError("not an envelope for gateways", code="not_an_envelope")
        to = recipients_of(record.value)
        return credentials.delivered(record, request_id, to, self._verifier.facts(request_id))

    def _lease(self, record: Received) -> tuple[OcsfEvent, bool]:
        if not record.value:
            lease_id = record.key if record.key and _UUID.fullmatch(record.key) else "unknown"
            return credentials.lease_forgotten(record, lease_id, self._lease_fields(lease_id)), False
        if self._epochs.took(record):
            marker = self._verifier.by_service(record, LeaseEpoch, "revoker")
            return services.epoch_began(record, marker.claims, marker.verified()), False
        signed = self._verifier.by_service(record, Lease, "issuer", "revoker")
        claims = signed.claims
        if self._epochs.is_void(record, claims.epoch):
            void = self._verifier.remember_lease(claims)
            fields = subjects.credential_fields(void, self._verifier.facts(claims.request_id))
            return credentials.lease_void(record, claims, void, fields, signed.verified()), False
        if claims.epoch is not None:
            self._epochs.begin(
                record, claims.epoch
            )  # its marker may be older than the first offset of this reader
        lease = self._verifier.remember_lease(claims)
        facts = self._verifier.facts(claims.request_id)
        replay = self._replay(
            record, signed, lambda: {**subjects.credential_fields(lease, facts), "lease": claims.lease_id}
        )
        if replay is not None:
            return replay, False
        return credentials.leased(record, claims, lease, facts, signed.verified()), False

    def _revocation(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_anyone(record, RevocationRequest)
        claims = signed.claims
        agent = subject_of(self._trust_domain, claims.iss, "agent")
        lease = self._verifier.lease(claims.lease_id) if claims.lease_id is not None else None
        fields: dict[str, Any] = {"agent": agent} if agent else {}
        if claims.selector is not None and claims.selector.agent_id is not None:
            fields["agent"] = claims.selector.agent_id
        if claims.selector is not None and claims.selector.task_id is not None:
            fields |= self._task_fields(claims.selector.task_id)
        fields |= self._lease_fields(claims.lease_id)
        if "agent" in fields and "sponsor" not in fields:
            fields["sponsor"] = self._verifier.sponsor_of(fields["agent"])
        replay = self._replay(record, signed, lambda: fields)
        if replay is not None:
            return replay, False
        event = credentials.revocation_requested(record, claims, lease, fields, signed.verified())
        self._verifier.remember_revocation(claims, event.body["unmapped"])
        return event, _lacks_names(event)

    def _ack(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_service(record, RevocationAck, "gateway")
        revocation = self._verifier.revocation(signed.claims.revocation_id)
        replay = self._replay(record, signed, lambda: dict(revocation))
        if replay is not None:
            return replay, False
        return credentials.cut_confirmed(record, signed.claims, revocation, signed.verified()), False

    def _service_event(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_service(record, ServiceEvent)
        claims = signed.claims
        lease = self._verifier.lease(claims.lease_id) if claims.lease_id is not None else None
        request_id = claims.request_id or (lease.request_id if lease is not None else None)
        facts = self._verifier.facts(request_id) if request_id is not None else None
        known = lease or facts
        fields = subjects.credential_fields(lease, facts) or self._agent_fields(
            self._agent_in(claims), claims.task_id
        )
        replay = self._replay(record, signed, lambda: fields)
        if replay is not None:
            return replay, False
        if claims.kind in ("accepted", "refused") and claims.subject in registry.command_typs():
            event = registry.answered(record, claims, fields, signed.verified())
        elif services.is_shared_identity(claims):
            event = services.shared_identity(record, claims, fields, signed.verified())
        else:
            trace = known.traceparent if known is not None else None
            event = services.reported(record, claims, fields, signed.verified(), trace)
        return event, _lacks_names(event)

    def _action(self, record: Received) -> tuple[OcsfEvent, bool]:
        claims = self._action_of(record)
        lease = self._verifier.lease(claims.lease_id) if claims.lease_id is not None else None
        fields = self._lease_fields(claims.lease_id, claims.agent_id, claims.task_id)
        if isinstance(claims, ActionDecided):
            event = actions.acted(record, claims, lease, fields, self._trust_domain)
        else:
            event = actions.answered(record, claims, lease, fields, self._trust_domain)
        return event, _lacks_names(event)

    def _action_of(self, record: Received) -> ActionDecided | ActionAnswered:
        try:
            return self._verifier.parse_unsigned(record, ActionDecided)
        except InvalidMessageError as error:
            try:
                return self._verifier.parse_unsigned(record, ActionAnswered)
            except InvalidMessageError:
                raise error from None

    def _dead_letter(self, record: Received) -> tuple[OcsfEvent, bool]:
        return services.dead_lettered(record, self._verifier.parse_unsigned(record, DeadLetter)), False

    # --- shared by several topics ---

    def _lease_fields(
        self, lease_id: str | None, agent: str | None = None, task: str | None = None
    ) -> dict[str, Any]:
        """Fields of a lease that audit has seen. Without one, or if it is another agent's: those of agent and task."""
        lease = self._verifier.lease(lease_id) if lease_id is not None else None
        if lease is not None and agent in (None, lease.agent):
            return subjects.credential_fields(lease, self._verifier.facts(lease.request_id))
        return self._agent_fields(agent, task)

    def _agent_fields(self, agent: str | None, task: str | None = None) -> dict[str, Any]:
        """Fields of an agent and its task, by the registry's records. A task of another agent is left out."""
        fields: dict[str, Any] = {"agent": agent} if agent is not None else {}
        if task is not None:
            of_task = self._task_fields(task)
            fields |= of_task if agent in (None, of_task.get("agent")) else {}
        if "agent" in fields:
            fields["sponsor"] = self._verifier.sponsor_of(fields["agent"])
        return fields

    def _task_fields(self, task: str) -> dict[str, Any]:
        state = self._verifier.task_of(task)
        return subjects.task_fields(state) if state is not None else {}

    def _agent_in(self, claims: ServiceEvent) -> str | None:
        """The agent of a service event: as named, or the subject of the record that the service found invalid."""
        if claims.agent_id is not None or claims.result is None:
            return claims.agent_id
        return subject_of(self._trust_domain, claims.result, "agent")

    def _incomplete(self, facts: RequestFacts) -> bool:
        """Whether the local tables may know more later. That a task belongs to another agent does not change."""
        return facts.sponsor is None or (
            facts.on_behalf_of is None and self._verifier.task_of(facts.task) is None
        )

    def _replay(
        self, record: Received, signed: VerifiedMessage[Any], fields_of: Callable[[], dict[str, Any]]
    ) -> OcsfEvent | None:
        """The event of a replay, or None at the first sighting. `fields_of` gives the fields of its subject."""
        first = self._verifier.first_sighting(record, signed)
        if first is None:
            return None
        where, same = first
        fields = fields_of()
        if fields.get("agent") and "sponsor" not in fields:
            fields = {**fields, "sponsor": self._verifier.sponsor_of(fields["agent"])}
        return services.replayed(
            record, signed.claims.iss, where, same=same, fields=fields, verified=signed.verified()
        )

    def _expired(self, record: Received, error: OutdatedError) -> OcsfEvent:
        signed = error.signed
        fields = self._subject_fields(record, signed)
        if "agent" in fields and "sponsor" not in fields:
            fields["sponsor"] = self._verifier.sponsor_of(fields["agent"])
        return services.expired(record, signed.claims.iss, error.code, fields, signed.verified())

    def _subject_fields(self, record: Received, signed: VerifiedMessage[Any]) -> dict[str, Any]:
        """Fields of the subject of an expired or replayed message whose signature holds."""
        claims = signed.claims
        match claims:
            case CredentialRequest():
                agent = subject_of(self._trust_domain, claims.iss, "agent")
                fields = {**self._agent_fields(agent, claims.task_id), "task": claims.task_id}
                return fields | {
                    "request": message_id(claims.iss, claims.jti),
                    "request_digest": digest(signed.compact),
                    "target": claims.scope[0].target,
                }
            case Approval():
                at_ms = record.appended_at_ms
                facts = self._verifier.embedded_request(claims.request, claims.request_id, at_ms)
                return subjects.credential_fields(None, facts) or {"request": claims.request_id}
            case Grant() | ActionApproval() | ActionRequest():
                return self._agent_fields(claims.agent_id, getattr(claims, "task_id", None))
            case ExpiringClaims() if claims.typ in registry.command_typs():
                return registry.subject_of_command(claims)[2]
            case _:
                agent = subject_of(self._trust_domain, claims.iss, "agent")
                return self._agent_fields(agent)


def _prepare(event: OcsfEvent, pending: bool, rejection: InvalidMessageError | None = None) -> _PreparedEvent:
    body = linkable(event.body)
    if len(body) > MAX_EVENT_BYTES:
        event = shortened(event)
        body = linkable(event.body)
    return _PreparedEvent(event.key, event.uid, body, event.body, pending, rejection)


def _lacks_names(event: OcsfEvent) -> bool:
    fields = event.body["unmapped"]
    return ("agent" in fields and "sponsor" not in fields) or (
        "task" in fields and "on_behalf_of" not in fields
    )


def _consent_typ(claims: ExpiringClaims) -> str:
    """The typ of the consent that a command embeds: by the task's user, or by the new sponsor of an agent."""
    if isinstance(claims, AgentTransfer):
        return AgentTransferConsent.typ
    return "id_token" if isinstance(claims, TaskAssign) and claims.id_token else "task.consent"
