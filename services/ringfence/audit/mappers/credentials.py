"""Maps credential requests, decisions and sealed replies; leases, revocations and their acknowledgements.

Maps approval requests and the answers of people: approvals, grants, reviews of break glass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ringfence.audit.events import approvals, break_glass, credentials, services
from ringfence.audit.events.break_glass import check_review
from ringfence.audit.events.ocsf import OcsfEvent, credential_fields
from ringfence.audit.mappers.mapper import PENDING_CODES, MappedEvent, Mapper, RecordMapper, lacks_names
from ringfence.audit.verification import RecordVerifier
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jwe import recipients_of, unverified_about, unverified_kid
from ringfence.kernel.crypto.jws import kid_of, parse
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
from ringfence.messages.base import UUID, Topic, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.credential import DecidedTerms, RequestWithdraw
from ringfence.messages.lease import Lease, LeaseEpoch, RevocationAck, RevocationRequest
from ringfence.messages.topics import (
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    LEASE,
    REVOCATION_ACK,
    REVOCATION_REQUEST,
)
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.leases.epochs import Epochs
from ringfence.model.requests.grants import kind_of
from ringfence.model.verdict import Allowed, Refused


class ApprovalMapper(RecordMapper):
    """Maps `approval.request` and `approval.response`."""

    def __init__(
        self,
        verifier: RecordVerifier,
        trust_domain: str,
        use_of: Callable[[str], Mapping[str, Any] | None],
    ) -> None:
        """`use_of`: finds the `unmapped` fields of a use of break glass by its request's id, if it is indexed."""
        super().__init__(verifier, trust_domain)
        self._use_of = use_of

    def by_topic(self) -> dict[Topic[Any], Mapper]:
        return {
            APPROVAL_REQUEST: self._approval_request,
            APPROVAL_RESPONSE: self._response,
        }

    def _approval_request(self, record: Received) -> MappedEvent:
        if parse(record.value).header.typ == typ_header(ActionRequest):
            return self._action_request(record)
        signed = self._verifier.by_service(record, ApprovalRequest, "policy")
        claims = signed.claims
        facts = self._verifier.embedded_request(
            claims.request, claims.request_id, claims.source.appended_at_ms
        )
        if facts is None:
            raise InvalidMessageError("the embedded request does not hold", code=Code.KEY_UNKNOWN)
        self._first(signed, lambda: {"agent": facts.agent, "request": claims.request_id})
        signed = signed._replace(embedded=("credential.request",))
        return MappedEvent(credentials.approval_requested(signed, facts), self._incomplete(facts))

    def _action_request(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_service(record, ActionRequest, "gateway")
        claims = signed.claims
        self._first(signed, lambda: {"agent": claims.agent_id, "task": claims.task_id})
        fields = self._lease_fields(claims.lease_id, claims.agent_id, claims.task_id)
        event = approvals.requested(signed, fields)
        return MappedEvent(event, lacks_names(event))

    def _response(self, record: Received) -> MappedEvent:
        """An approval, a grant, or the withdrawal of a grant."""
        match kind_of(record):
            case Grant.typ:
                return self._grant(record)
            case GrantWithdraw.typ:
                return self._withdrawal(record)
            case _:
                return self._approval(record)

    def _grant(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_user(record, Grant)
        claims = signed.claims
        fields = self._verifier.remember_grant(claims)
        self._first(signed, lambda: fields)
        event = approvals.given(self._verifier.with_key_fields(signed), fields)
        return MappedEvent(event, lacks_names(event))

    def _withdrawal(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_user(record, GrantWithdraw)
        fields = self._verifier.grant(signed.claims.grant_id)
        self._first(signed, lambda: fields)
        return MappedEvent(approvals.withdrawn(signed, fields))

    def _approval(self, record: Received) -> MappedEvent:
        typ = parse(record.value).header.typ
        if typ == typ_header(BreakGlassReview):
            return self._review(record)
        if typ == typ_header(ActionApproval):
            return self._action_approval(record)
        signed = self._verifier.by_user(record, Approval)
        claims = signed.claims
        facts = self._verifier.embedded_request(claims.request, claims.request_id, record.appended_at_ms)
        fields = {"agent": facts.agent} if facts is not None else {}
        self._first(signed, lambda: {**fields, "request": claims.request_id})
        self._verifier.remember_approval(signed.compact, claims)
        embedded = ("credential.request",) if facts is not None else ()
        event = credentials.approval_given(self._verifier.with_key_fields(signed, *embedded), facts)
        return MappedEvent(event, facts is None or self._incomplete(facts))

    def _action_approval(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_user(record, ActionApproval)
        claims = signed.claims
        self._first(signed, lambda: {"agent": claims.agent_id})
        request = self._verifier.embedded_action_request(claims, record.appended_at_ms)
        embedded = ("action.request",) if request is not None else ()
        if request is not None:
            fields = self._lease_fields(request.lease_id, request.agent_id, request.task_id)
        else:
            fields = self._agent_fields(claims.agent_id)
        event = approvals.answered(self._verifier.with_key_fields(signed, *embedded), request, fields)
        return MappedEvent(event, lacks_names(event))

    def _review(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_user(record, BreakGlassReview)
        claims = signed.claims
        self._first(signed, lambda: {"agent": claims.agent_id, "request": claims.request_id})
        reviewer = subject_of(claims.aud, claims.iss, "user") or ""
        use = self._use_of(claims.request_id)
        verdict = check_review(claims, reviewer, self._verifier.roles_of(reviewer), use)
        if isinstance(verdict, Allowed) and use is not None:
            verdict = self._verifier.check_review_key(signed, use)
        rejection = verdict.reason if isinstance(verdict, Refused) else None
        event = break_glass.reviewed(self._verifier.with_key_fields(signed), use, rejection)
        return MappedEvent(event, rejection is not None and rejection.code in PENDING_CODES)


class LeaseMapper(RecordMapper):
    """Maps `lease`, `revocation.request` and `revocation.ack`."""

    def __init__(self, verifier: RecordVerifier, trust_domain: str, epochs: Epochs) -> None:
        """`epochs`: the epochs of the revokers, as read so far."""
        super().__init__(verifier, trust_domain)
        self._epochs = epochs

    def by_topic(self) -> dict[Topic[Any], Mapper]:
        return {
            LEASE: self._lease,
            REVOCATION_REQUEST: self._revocation,
            REVOCATION_ACK: self._ack,
        }

    def _lease(self, record: Received) -> MappedEvent:
        if not record.value:
            lease_id = record.key if record.key and UUID.fullmatch(record.key) else "unknown"
            return MappedEvent(credentials.lease_forgotten(record, lease_id, self._lease_fields(lease_id)))
        if self._epochs.took(record):
            marker = self._verifier.by_service(record, LeaseEpoch, "revoker")
            return MappedEvent(services.epoch_began(marker))
        signed = self._verifier.by_service(record, Lease, "issuer", "revoker")
        claims = signed.claims
        if self._epochs.is_void(record, claims.epoch):
            void = self._verifier.remember_lease(claims)
            fields = credential_fields(void, self._verifier.facts(claims.request_id))
            return MappedEvent(credentials.lease_void(signed, void, fields))
        if claims.epoch is not None:
            # The marker of the epoch may be older than the first offset of this reader.
            self._epochs.begin(record, claims.epoch)
        lease = self._verifier.remember_lease(claims)
        facts = self._verifier.facts(claims.request_id)
        self._first(signed, lambda: {**credential_fields(lease, facts), "lease": claims.lease_id})
        return MappedEvent(credentials.leased(signed, lease, facts))

    def _revocation(self, record: Received) -> MappedEvent:
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
        self._first(signed, lambda: fields)
        event = credentials.revocation_requested(signed, lease, fields)
        self._verifier.remember_revocation(claims, event.body["unmapped"])
        return MappedEvent(event, lacks_names(event))

    def _ack(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_service(record, RevocationAck, "gateway")
        revocation = self._verifier.revocation(signed.claims.revocation_id)
        self._first(signed, lambda: revocation)
        return MappedEvent(credentials.cut_confirmed(signed, revocation))


class CredentialMapper(RecordMapper):
    """Maps `credential.request`, `credential.decision` and `credential.reply`."""

    def by_topic(self) -> dict[Topic[Any], Mapper]:
        return {
            CREDENTIAL_REQUEST: self._request,
            CREDENTIAL_DECISION: self._decision,
            CREDENTIAL_REPLY: self._reply,
        }

    def _request(self, record: Received) -> MappedEvent:
        """A request, or the withdrawal of one."""
        if parse(record.value).header.typ == typ_header(RequestWithdraw):
            return self._withdrawal(record)
        signed = self._verifier.request(record)
        self._first(signed, lambda: self._subject_fields(signed))
        facts = self._verifier.remember_request(signed.compact, signed.claims, record.own_traceparent)
        return MappedEvent(credentials.requested(signed, facts), self._incomplete(facts))

    def _withdrawal(self, record: Received) -> MappedEvent:
        signed = self._verifier.request_withdrawal(record)
        fields = self._withdrawal_fields(signed.claims)
        self._first(signed, lambda: fields)
        facts = self._verifier.facts(signed.claims.request_id)
        event = credentials.withdrawal_requested(signed, facts, fields)
        return MappedEvent(event, lacks_names(event))

    def _decision(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_service(record, DecidedTerms, "policy")
        claims = signed.claims
        facts = self._verifier.embedded_request(
            claims.request, claims.request_id, claims.source.appended_at_ms
        )
        fields = {"agent": facts.agent} if facts is not None else {}
        self._first(signed, lambda: {**fields, "request": claims.request_id})
        approvers = [self._verifier.approver(one, claims, record) for one in claims.approvals]
        grantors = [self._verifier.grantor(one, claims, record) for one in claims.grants or ()]
        embedded = ["approval"] * sum(one is not None for one in approvers)
        embedded += ["grant"] * sum(one is not None for one in grantors)
        if facts is not None:
            embedded.append("credential.request")
            facts.decision = claims.jti
            facts.policy_revision = claims.revisions.policy if claims.revisions is not None else None
            signed_by = zip([*claims.approvals, *(claims.grants or ())], [*approvers, *grantors], strict=True)
            known = [(user, kid_of(compact)) for compact, user in signed_by if user is not None]
            facts.approvers = tuple(user for user, _ in known)
            facts.approver_keys = tuple(known)
        event = credentials.decided(signed._replace(embedded=tuple(embedded)), digest(signed.compact), facts)
        return MappedEvent(event, facts is None or self._incomplete(facts))

    def _reply(self, record: Received) -> MappedEvent:
        if record.value.startswith(b"{"):
            return MappedEvent(self._delivery(record))
        request_id = unverified_kid(record.value) if record.value.count(b".") == 4 else None
        if request_id is None or not UUID.fullmatch(request_id):
            raise InvalidMessageError("not a sealed reply", code=Code.NOT_A_JWE)
        return MappedEvent(credentials.replied(record, request_id, self._verifier.facts(request_id)))

    def _delivery(self, record: Received) -> OcsfEvent:
        request_id = unverified_about(record.value)
        if request_id is None or not UUID.fullmatch(request_id):
            raise InvalidMessageError("not an envelope for gateways", code=Code.NOT_AN_ENVELOPE)
        to = recipients_of(record.value)
        return credentials.delivered(record, request_id, to, self._verifier.facts(request_id))
