"""Maps approval requests and the answers of people: approvals, grants, reviews of break glass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ringfence.audit.events import approvals, break_glass, credentials
from ringfence.audit.events.break_glass import check_review
from ringfence.audit.mappers.mapper import PENDING_CODES, MappedEvent, Mapper, RecordMapper, lacks_names
from ringfence.audit.verification import RecordVerifier
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
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
from ringfence.messages.base import Topic, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.topics import APPROVAL_REQUEST, APPROVAL_RESPONSE
from ringfence.model.identity.spiffe_ids import subject_of
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
