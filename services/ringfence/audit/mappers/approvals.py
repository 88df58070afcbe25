"""Maps approval requests and the answers of people: approvals, grants, reviews of break glass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ringfence.audit.events import approvals, break_glass, credentials
from ringfence.audit.events.break_glass import review_problem
from ringfence.audit.mappers.mapper import PENDING_CODES, MappedEvent, Mapper, RecordMapper, lacks_names
from ringfence.audit.verification import RecordVerifier, VerifiedMessage
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
from ringfence.messages.topics import APPROVAL_REQUEST, APPROVAL_RESPONSE
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.requests.grants import kind_of


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
            raise InvalidMessageError("the embedded request does not hold", code="key_unknown")
        replay = self._replay(record, signed, lambda: {"agent": facts.agent, "request": claims.request_id})
        if replay is not None:
            return MappedEvent(replay)
        verified = signed.verified("credential.request")
        return MappedEvent(
            credentials.approval_requested(record, claims, facts, verified), self._incomplete(facts)
        )

    def _action_request(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_service(record, ActionRequest, "gateway")
        claims = signed.claims
        replay = self._replay(record, signed, lambda: {"agent": claims.agent_id, "task": claims.task_id})
        if replay is not None:
            return MappedEvent(replay)
        fields = self._lease_fields(claims.lease_id, claims.agent_id, claims.task_id)
        event = approvals.requested(record, claims, fields, signed.verified())
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
        replay = self._replay(record, signed, lambda: fields)
        if replay is not None:
            return MappedEvent(replay)
        event = approvals.given(record, claims, fields, self._verified(signed))
        return MappedEvent(event, lacks_names(event))

    def _withdrawal(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_user(record, GrantWithdraw)
        fields = self._verifier.grant(signed.claims.grant_id)
        replay = self._replay(record, signed, lambda: fields)
        if replay is not None:
            return MappedEvent(replay)
        return MappedEvent(approvals.withdrawn(record, signed.claims, fields, signed.verified()))

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
        replay = self._replay(record, signed, lambda: {**fields, "request": claims.request_id})
        if replay is not None:
            return MappedEvent(replay)
        self._verifier.remember_approval(signed.compact, claims)
        embedded = ("credential.request",) if facts is not None else ()
        event = credentials.approval_given(record, claims, facts, self._verified(signed, *embedded))
        return MappedEvent(event, facts is None or self._incomplete(facts))

    def _action_approval(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_user(record, ActionApproval)
        claims = signed.claims
        replay = self._replay(record, signed, lambda: {"agent": claims.agent_id})
        if replay is not None:
            return MappedEvent(replay)
        request = self._verifier.embedded_action_request(claims, record.appended_at_ms)
        embedded = ("action.request",) if request is not None else ()
        if request is not None:
            fields = self._lease_fields(request.lease_id, request.agent_id, request.task_id)
        else:
            fields = self._agent_fields(claims.agent_id)
        event = approvals.answered(record, claims, request, fields, self._verified(signed, *embedded))
        return MappedEvent(event, lacks_names(event))

    def _review(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_user(record, BreakGlassReview)
        claims = signed.claims
        replay = self._replay(
            record, signed, lambda: {"agent": claims.agent_id, "request": claims.request_id}
        )
        if replay is not None:
            return MappedEvent(replay)
        reviewer = subject_of(claims.aud, claims.iss, "user") or ""
        use = self._use_of(claims.request_id)
        rejection = review_problem(claims, reviewer, self._verifier.roles_of(reviewer), use)
        if rejection is None and use is not None:
            rejection = self._verifier.review_key_problem(signed, use, record.appended_at_ms)
        event = break_glass.reviewed(record, claims, use, rejection, self._verified(signed))
        return MappedEvent(event, rejection is not None and rejection.code in PENDING_CODES)

    def _verified(self, signed: VerifiedMessage[Any], *embedded: str) -> dict[str, Any]:
        """The field `unmapped.verified`, with the vouchers of the key if somebody else added it."""
        return {**signed.verified(*embedded), **self._verifier.key_fields(signed)}
