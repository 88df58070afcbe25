"""Records in, OCSF events out. Nothing stops it: what cannot be believed, or not even read, is an event as well."""

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
)
from ringfence.audit.events import (
    approvals as grant_events,
)
from ringfence.audit.events import (
    services as sharing_events,
)
from ringfence.audit.events import (
    trust as trust_events,
)
from ringfence.audit.events.break_glass import review_problem
from ringfence.audit.events.ocsf import MAX_EVENT_BYTES, OcsfEvent, shortened
from ringfence.audit.events.trust import Bundles
from ringfence.audit.memory import RequestFacts
from ringfence.audit.trail.handover import Intake, PendingEvent
from ringfence.audit.verification import MessageVerifier, OutdatedError, VerifiedMessage, require_trust
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jwe import unverified_kid
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.multi_recipient_jwe import recipients_of, unverified_about
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import BatchHandler, gather_all
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
    AUDITED,
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
_UNSETTLED = frozenset({"key_unknown", "chain_broken", "not_reviewer", "break_glass_unknown"})
"""What may only mean that the local tables, or the index, are a moment behind."""
BURIED_HERE = frozenset(
    {TRUST, APPROVAL_REQUEST, LEASE, CREDENTIAL_REPLY, REVOCATION_ACK, SERVICE_EVENT, ACTION}
)
"""Topics that the other services follow and, as they run by default, do not consume: what is invalid there audit sends
to the dead letters. Not what is invalid among those themselves: two versions that cannot read each other's would go on
for ever.
"""
Bury = Callable[[Received, InvalidMessageError], Awaitable[None]]


class _Ready(NamedTuple):
    """An event as it goes out. `unsettled`: a little later the local tables may know more."""

    key: str
    uid: str
    body: bytes
    event: dict[str, Any]
    unsettled: bool
    unbelieved: InvalidMessageError | None = None
    """Why it says that nobody is believed to have written the record."""


class AuditHandlers:
    """Turns each record of each topic into one event, and hands it over to be chained."""

    def __init__(
        self,
        intake: Intake,
        verifier: MessageVerifier,
        clock: Clock,
        trust: TrustStore,
        use_of: Callable[[str], Mapping[str, Any] | None],
        *,
        bury: Bury,
        settle_ms: int,
    ) -> None:
        """Args:
            use_of: the words of the event about a use of break glass, by the id of its request, if it is indexed.
            bury: sends what is invalid to the dead letters; of the topics where nobody else does that.
            settle_ms: how old a record may get while its signer, agent or task is not in the local tables yet.
        """  # fmt: skip
        self._use_of = use_of
        self._bury = bury
        self._intake = intake
        self._verifier = verifier
        self._clock = clock
        self._trust_domain = trust.trust_domain
        self._trust_store = trust
        self._settle_ms = settle_ms
        self._tables_changed = asyncio.Event()
        self._epochs = Epochs(trust)
        self.bundles = Bundles(trust.anew())
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

    def batches(self) -> dict[Topic[Any], BatchHandler]:
        """The batch handler of every topic that audit reads: one, as it costs less to hand all events over at once."""
        return dict.fromkeys(AUDITED, self._handle)

    def on_change(self, kind: str, id: str) -> None:
        """Told by the local tables: whoever was not known may be known now."""
        self._tables_changed.set()

    async def _handle(self, batch: Sequence[Received]) -> None:
        """Records of each topic after those of topics before it."""
        require_trust(self._trust_store, batch, self._clock.now_ms())
        ready: list[_Ready] = []
        for topic, records in itertools.groupby(batch, lambda record: record.topic):
            ready += await self._made(self._by_topic[topic], list(records))
        await self._publish(batch, ready)

    async def _made(
        self, read: Callable[[Received], tuple[OcsfEvent, bool]], records: Sequence[Received]
    ) -> Sequence[_Ready]:
        ready = [self._attempt(read, record) for record in records]
        if any(one.unsettled for one in ready):
            await self._settle(read, records, ready)
        return ready

    async def _settle(
        self,
        read: Callable[[Received], tuple[OcsfEvent, bool]],
        batch: Sequence[Received],
        ready: list[_Ready],
    ) -> None:
        """Wait for the local tables where a record is so young that they may be behind it.

        A record that is older is taken as it is, so what nobody ever signs delays what comes after it only while
        audit is less than `settle_ms` behind.
        """
        waited_from_ms = self._clock.now_ms()
        while True:
            now_ms = self._clock.now_ms()
            open_ones = [i for i, one in enumerate(ready) if one.unsettled]
            youngest_ms = max((batch[i].appended_at_ms for i in open_ones), default=0)
            left_ms = min(youngest_ms, waited_from_ms) + self._settle_ms - now_ms
            if not open_ones or left_ms <= 0:
                return
            self._tables_changed.clear()
            try:
                await asyncio.wait_for(self._tables_changed.wait(), left_ms / 1000)
            except TimeoutError:
                return
            for i in open_ones:
                ready[i] = self._attempt(read, batch[i])

    def _attempt(self, read: Callable[[Received], tuple[OcsfEvent, bool]], record: Received) -> _Ready:
        unsettled = False
        try:
            event, unsettled = read(record)
            return _ready(event, unsettled)
        except OutdatedError as error:
            return _ready(self._expired(record, error), False)
        except (InvalidMessageError, ChainError) as error:
            why, unsettled = InvalidMessageError(str(error), code=error.code), error.code in _UNSETTLED
        except Exception:
            # One record that audit cannot describe must not hide all those that follow it.
            where = (record.topic_name, record.partition, record.offset)
            log.exception("no event could be made of %s/%d@%d", *where, extra=rate_limited(record.topic_name))
            why = InvalidMessageError("audit could not read it", code="unreadable")
        return _ready(services.not_believed(record, why.code), unsettled, why)

    async def _publish(self, batch: Sequence[Received], ready: Sequence[_Ready]) -> None:
        await self._intake.hand_over(
            PendingEvent(one.key, one.uid, one.body, record.traceparent, one.event)
            for record, one in zip(batch, ready, strict=True)
        )
        await gather_all(
            self._bury(record, one.unbelieved)
            for record, one in zip(batch, ready, strict=True)
            if one.unbelieved is not None and record.topic in BURIED_HERE
        )
        for class_uid, count in Counter(one.event["class_uid"] for one in ready).items():
            metrics.AUDIT_EVENTS.labels(str(class_uid)).inc(count)
        for what, count in Counter(record.topic.what for record in batch).items():
            metrics.RECORDS.labels(what, "done").inc(count)

    # --- one method a topic: the event, and whether the local tables may know more a little later ---

    def _trust(self, record: Received) -> tuple[OcsfEvent, bool]:
        return trust_events.told(record, self.bundles.seen(record)), False

    def _command(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed, consent_by = self._verifier.command(record)
        kind, _, words = registry.subject_of_command(signed.claims)
        replay = self._replay(record, signed, lambda: words)
        if replay is not None:
            return replay, False
        task = self._verifier.task_of(words["task"]) if kind == "task" else None
        agent = words.get("agent") or (task.agent_id if task is not None else None)
        event = registry.commanded(
            record,
            signed.claims,
            signed.verified(*((_consent_in(signed.claims),) if consent_by else ())),
            sponsor=self._verifier.sponsor_of(agent) if agent else None,
            consent_by=consent_by,
            task=task,
            parent=self._verifier.task_of(words["parent"]) if "parent" in words else None,
        )
        return event, _lacks_people(event)

    def _record_of(self, model: type[AnyRecord]) -> Callable[[Received], tuple[OcsfEvent, bool]]:
        def read(record: Received) -> tuple[OcsfEvent, bool]:
            if not record.value:
                raise InvalidMessageError("a record is never deleted", code="tombstone")
            signed, last = self._verifier.record(record, model)
            claims = signed.claims
            agent = getattr(claims.state, "agent_id", None)
            verified = signed.verified(last.typ)
            known = self._verifier.fell_below(record, claims)
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
            return event, _lacks_people(event)

        return read

    def _request(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.request(record)
        replay = self._replay(record, signed, lambda: self._words_of(record, signed))
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
        words = {"agent": facts.agent} if facts is not None else {}
        replay = self._replay(record, signed, lambda: {**words, "request": claims.request_id})
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
        return credentials.approval_asked(record, claims, facts, verified), self._incomplete(facts)

    def _response(self, record: Received) -> tuple[OcsfEvent, bool]:
        """What a person answered, said ahead, or took back."""
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
        words = self._verifier.remember_grant(claims)
        replay = self._replay(record, signed, lambda: words)
        if replay is not None:
            return replay, False
        event = grant_events.given(record, claims, words, signed.verified())
        return event, _lacks_people(event)

    def _withdrawal(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_user(record, GrantWithdraw)
        words = self._verifier.grant(signed.claims.grant_id)
        replay = self._replay(record, signed, lambda: words)
        if replay is not None:
            return replay, False
        return grant_events.withdrawn(record, signed.claims, words, signed.verified()), False

    def _approval(self, record: Received) -> tuple[OcsfEvent, bool]:
        typ = parse(record.value).header.typ
        if typ == typ_header(BreakGlassReview):
            return self._review(record)
        if typ == typ_header(ActionApproval):
            return self._action_approval(record)
        signed = self._verifier.by_user(record, Approval)
        claims = signed.claims
        facts = self._verifier.embedded_request(claims.request, claims.request_id, record.appended_at_ms)
        words = {"agent": facts.agent} if facts is not None else {}
        replay = self._replay(record, signed, lambda: {**words, "request": claims.request_id})
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
        words = self._of_lease(claims.lease_id, claims.agent_id, claims.task_id)
        event = approvals.asked(record, claims, words, signed.verified())
        return event, _lacks_people(event)

    def _action_approval(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_user(record, ActionApproval)
        claims = signed.claims
        replay = self._replay(record, signed, lambda: {"agent": claims.agent_id})
        if replay is not None:
            return replay, False
        asked = self._verifier.embedded_question(claims, record.appended_at_ms)
        embedded = ("action.request",) if asked is not None else ()
        place = (asked.lease_id, asked.agent_id, asked.task_id) if asked else (None, claims.agent_id, None)
        words = self._of_lease(*place)
        event = approvals.answered(record, claims, asked, words, signed.verified(*embedded))
        return event, _lacks_people(event)

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
        why_not = review_problem(claims, reviewer, self._verifier.roles_of(reviewer), use)
        event = break_glass.reviewed(record, claims, use, why_not, signed.verified())
        return event, why_not is not None and why_not.code in _UNSETTLED

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
            return credentials.lease_forgotten(record, lease_id, self._of_lease(lease_id)), False
        if self._epochs.took(record):
            marker = self._verifier.by_service(record, LeaseEpoch, "revoker")
            return services.epoch_began(record, marker.claims, marker.verified()), False
        signed = self._verifier.by_service(record, Lease, "issuer", "revoker")
        claims = signed.claims
        if self._epochs.is_void(record, claims.epoch):
            void = self._verifier.remember_lease(claims)
            words = subjects.of_credential(void, self._verifier.facts(claims.request_id))
            return credentials.lease_void(record, claims, void, words, signed.verified()), False
        if claims.epoch is not None:
            self._epochs.begin(record, claims.epoch)  # its marker may stand before where this reader began
        lease = self._verifier.remember_lease(claims)
        facts = self._verifier.facts(claims.request_id)
        replay = self._replay(
            record, signed, lambda: {**subjects.of_credential(lease, facts), "lease": claims.lease_id}
        )
        if replay is not None:
            return replay, False
        return credentials.leased(record, claims, lease, facts, signed.verified()), False

    def _revocation(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_anyone(record, RevocationRequest)
        claims = signed.claims
        agent = subject_of(self._trust_domain, claims.iss, "agent")
        lease = self._verifier.lease(claims.lease_id) if claims.lease_id is not None else None
        words: dict[str, Any] = {"agent": agent} if agent else {}
        if claims.selector is not None and claims.selector.agent_id is not None:
            words["agent"] = claims.selector.agent_id
        if claims.selector is not None and claims.selector.task_id is not None:
            words |= self._of_task(claims.selector.task_id)
        words |= self._of_lease(claims.lease_id)
        if "agent" in words and "sponsor" not in words:
            words["sponsor"] = self._verifier.sponsor_of(words["agent"])
        replay = self._replay(record, signed, lambda: words)
        if replay is not None:
            return replay, False
        event = credentials.revocation_asked(record, claims, lease, words, signed.verified())
        self._verifier.remember_order(claims, event.body["unmapped"])
        return event, _lacks_people(event)

    def _ack(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_service(record, RevocationAck, "gateway")
        order = self._verifier.order(signed.claims.revocation_id)
        replay = self._replay(record, signed, lambda: dict(order))
        if replay is not None:
            return replay, False
        return credentials.cut_confirmed(record, signed.claims, order, signed.verified()), False

    def _service_event(self, record: Received) -> tuple[OcsfEvent, bool]:
        signed = self._verifier.by_service(record, ServiceEvent)
        claims = signed.claims
        lease = self._verifier.lease(claims.lease_id) if claims.lease_id is not None else None
        request_id = claims.request_id or (lease.request_id if lease is not None else None)
        facts = self._verifier.facts(request_id) if request_id is not None else None
        known = lease or facts
        words = subjects.of_credential(lease, facts) or self._of_agent(self._agent_in(claims), claims.task_id)
        replay = self._replay(record, signed, lambda: words)
        if replay is not None:
            return replay, False
        if claims.kind in ("accepted", "refused") and claims.subject in registry.command_typs():
            event = registry.answered(record, claims, words, signed.verified())
        elif sharing_events.is_one(claims):
            event = sharing_events.found(record, claims, words, signed.verified())
        else:
            trace = known.traceparent if known is not None else None
            event = services.reported(record, claims, words, signed.verified(), trace)
        return event, _lacks_people(event)

    def _action(self, record: Received) -> tuple[OcsfEvent, bool]:
        claims = self._action_of(record)
        lease = self._verifier.lease(claims.lease_id) if claims.lease_id is not None else None
        words = self._of_lease(claims.lease_id, claims.agent_id, claims.task_id)
        if isinstance(claims, ActionDecided):
            event = actions.acted(record, claims, lease, words, self._trust_domain)
        else:
            event = actions.answered(record, claims, lease, words, self._trust_domain)
        return event, _lacks_people(event)

    def _action_of(self, record: Received) -> ActionDecided | ActionAnswered:
        try:
            return self._verifier.plain(record, ActionDecided)
        except InvalidMessageError as error:
            try:
                return self._verifier.plain(record, ActionAnswered)
            except InvalidMessageError:
                raise error from None

    def _dead_letter(self, record: Received) -> tuple[OcsfEvent, bool]:
        return services.dead_lettered(record, self._verifier.plain(record, DeadLetter)), False

    # --- what several of them need ---

    def _of_lease(
        self, lease_id: str | None, agent: str | None = None, task: str | None = None
    ) -> dict[str, Any]:
        """The words of a lease that audit has seen; where it is not the agent's, or none, those of task and agent."""
        lease = self._verifier.lease(lease_id) if lease_id is not None else None
        if lease is not None and agent in (None, lease.agent):
            return subjects.of_credential(lease, self._verifier.facts(lease.request_id))
        return self._of_agent(agent, task)

    def _of_agent(self, agent: str | None, task: str | None = None) -> dict[str, Any]:
        """The words of an agent by the records, and of its task; a task of another agent says nothing of it."""
        words: dict[str, Any] = {"agent": agent} if agent is not None else {}
        if task is not None:
            of_task = self._of_task(task)
            words |= of_task if agent in (None, of_task.get("agent")) else {}
        if "agent" in words:
            words["sponsor"] = self._verifier.sponsor_of(words["agent"])
        return words

    def _of_task(self, task: str) -> dict[str, Any]:
        state = self._verifier.task_of(task)
        return subjects.of_task(state) if state is not None else {}

    def _agent_in(self, claims: ServiceEvent) -> str | None:
        """The agent that a service tells of: by its name, or by the record that it found something wrong with."""
        if claims.agent_id is not None or claims.result is None:
            return claims.agent_id
        return subject_of(self._trust_domain, claims.result, "agent")

    def _incomplete(self, facts: RequestFacts) -> bool:
        """Whether the local tables may know more a little later; that a task is another agent's is known for good."""
        return facts.sponsor is None or (
            facts.on_behalf_of is None and self._verifier.task_of(facts.task) is None
        )

    def _replay(
        self, record: Received, signed: VerifiedMessage[Any], words_of_it: Callable[[], dict[str, Any]]
    ) -> OcsfEvent | None:
        """The event of a message that was seen elsewhere before, or None; `words_of_it` tells what it is about."""
        first = self._verifier.seen_before(record, signed)
        if first is None:
            return None
        where, same = first
        words = words_of_it()
        if words.get("agent") and "sponsor" not in words:
            words = {**words, "sponsor": self._verifier.sponsor_of(words["agent"])}
        return services.replayed(
            record, signed.claims.iss, where, same=same, words=words, verified=signed.verified()
        )

    def _expired(self, record: Received, error: OutdatedError) -> OcsfEvent:
        signed = error.believed
        words = self._words_of(record, signed)
        if "agent" in words and "sponsor" not in words:
            words["sponsor"] = self._verifier.sponsor_of(words["agent"])
        return services.expired(record, signed.claims.iss, error.code, words, signed.verified())

    def _words_of(self, record: Received, signed: VerifiedMessage[Any]) -> dict[str, Any]:
        """What a message is about that counts for nothing, though its signature holds."""
        claims = signed.claims
        match claims:
            case CredentialRequest():
                agent = subject_of(self._trust_domain, claims.iss, "agent")
                words = {**self._of_agent(agent, claims.task_id), "task": claims.task_id}
                return words | {
                    "request": message_id(claims.iss, claims.jti),
                    "request_digest": digest(signed.compact),
                    "target": claims.scope[0].target,
                }
            case Approval():
                at_ms = record.appended_at_ms
                facts = self._verifier.embedded_request(claims.request, claims.request_id, at_ms)
                return subjects.of_credential(None, facts) or {"request": claims.request_id}
            case Grant() | ActionApproval() | ActionRequest():
                return self._of_agent(claims.agent_id, getattr(claims, "task_id", None))
            case ExpiringClaims() if claims.typ in registry.command_typs():
                return registry.subject_of_command(claims)[2]
            case _:
                agent = subject_of(self._trust_domain, claims.iss, "agent")
                return self._of_agent(agent)


def _ready(event: OcsfEvent, unsettled: bool, unbelieved: InvalidMessageError | None = None) -> _Ready:
    body = linkable(event.body)
    if len(body) > MAX_EVENT_BYTES:
        event = shortened(event)
        body = linkable(event.body)
    return _Ready(event.key, event.uid, body, event.body, unsettled, unbelieved)


def _lacks_people(event: OcsfEvent) -> bool:
    words = event.body["unmapped"]
    return ("agent" in words and "sponsor" not in words) or ("task" in words and "on_behalf_of" not in words)


def _consent_in(claims: ExpiringClaims) -> str:
    """By what the user consented whom a task is on behalf of, or to whom an agent is transferred."""
    if isinstance(claims, AgentTransfer):
        return AgentTransferConsent.typ
    return "id_token" if isinstance(claims, TaskAssign) and claims.id_token else "task.consent"
