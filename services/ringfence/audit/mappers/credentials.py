"""Maps credential requests, decisions, and sealed replies."""

from __future__ import annotations

from typing import Any

from ringfence.audit.events import credentials
from ringfence.audit.events.ocsf import OcsfEvent
from ringfence.audit.mappers.mapper import MappedEvent, Mapper, RecordMapper, lacks_names
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jwe import recipients_of, unverified_about, unverified_kid
from ringfence.kernel.crypto.jws import kid_of, parse
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import UUID, Topic, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.credential import DecidedTerms, RequestWithdraw
from ringfence.messages.topics import CREDENTIAL_DECISION, CREDENTIAL_REPLY, CREDENTIAL_REQUEST


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
