"""Publication of a decision: first the decision itself, then the messages to everybody concerned."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import orjson

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jwe import seal
from ringfence.kernel.crypto.jws import MAX_JWS_BYTES, Signed, is_by_passkey, sign, sign_payload
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Outbound
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.tracing.api import Span, Tracing, Work
from ringfence.messages.approval import Approval, ApprovalRequest, Grant
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialDecision, Delivery, Outcome, Reason, ReplyContent
from ringfence.messages.topics import APPROVAL_REQUEST, CREDENTIAL_DECISION, CREDENTIAL_REPLY
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import DeniedError, load_context
from ringfence.policy.decision_log import Approvers, DecisionLog, RecordPosition, RequestState
from ringfence.policy.decisions.one_person import OnePersonDetector
from ringfence.policy.domain import ApprovalRequired, Case, Evaluation, RequestRefused, people_to_ask
from ringfence.policy.notifications.notices import Notices

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class DecisionPublisher:
    """Publishes decisions, approval requests and replies to agents.

    All ids are derived: a repetition is the same message.
    """

    runtime: Runtime
    directory: Directory
    decisions: DecisionLog
    approvers: Approvers
    notices: Notices
    one_person: OnePersonDetector

    async def decide(
        self,
        case: Case,
        evaluation: Evaluation,
        *,
        approvals: Sequence[Signed[Approval]] = (),
        approvals_at_ms: Mapping[str, int] = MappingProxyType({}),
        expires_at: int | None = None,
    ) -> RequestState:
        """Publish the decision for an evaluation.

        When it returns, Kafka has acknowledged the decision and the log has it.

        Args:
            approvals: those that the decision rests on; for a denial by a person, that person's.
            approvals_at_ms: their append times by the digest of each, at least of those that passkeys signed.
            expires_at: until when approvals are awaited (seconds since 1970), if the outcome requires approval.
        """
        runtime, ruling = self.runtime, evaluation.ruling
        at_ms = {**approvals_at_ms, **evaluation.grants_at_ms}
        decision = CredentialDecision(
            iss=runtime.key.id,
            aud=runtime.settings.trust_domain,
            iat=runtime.clock.now_ms() // 1000,
            jti=_decision_id(case, evaluation, approvals),
            request_id=case.request_id,
            request=case.request.compact,
            source=case.source,
            outcome=ruling.outcome,
            reasons=ruling.reasons,
            ttl_s=None if isinstance(ruling, RequestRefused) else ruling.ttl_s,
            delivery=_delivery(case, evaluation),
            required=ruling.required,
            approvals=tuple(approval.compact for approval in approvals),
            grants=tuple(grant.compact for grant in evaluation.grants) or None,
            answers_at_ms=_times_of_passkeys(approvals, evaluation.grants, at_ms),
            revisions=evaluation.revisions,
            input=evaluation.input,
            input_digest=evaluation.input_digest,
            expires_at=expires_at,
            retry_after_s=ruling.retry_after_s if isinstance(ruling, RequestRefused) else None,
        )
        jws = _signed(decision, evaluation.input_json, runtime.key)
        if len(jws) > MAX_JWS_BYTES:
            decision = _too_large(decision)
            jws = sign(decision, runtime.key)
        with step_of(case, "decide", runtime.tracing) as span:
            say(span, decision.outcome, decision.reasons)
            acknowledged = await runtime.publisher.send(
                CREDENTIAL_DECISION,
                decision.typ,
                Outbound(case.agent_id, jws, id=decision.jti, traceparent=span.traceparent),
            )
            at = await acknowledged
        metrics.DECISIONS.labels(decision.outcome).inc()
        if case.request.claims.break_glass:
            metrics.BREAK_GLASS.labels(decision.outcome).inc()
        await self.one_person.observe(case, evaluation, approvals)
        place = RecordPosition(at.partition, at.offset)
        return self.decisions.keep(decision, jws, place, at.timestamp, case.traceparent)

    async def notify(self, state: RequestState, case: Case) -> None:
        """Publish what follows a decision: requests to approvers, and to the agent a denial or a notice that it must
        wait.

        The issuer answers an `allowed` decision, with the credential.
        """
        if state.pending is not None:
            decision, people = state.pending, self._people(state.pending, case)
            await gather_all([*(self._ask(decision, id, case) for id in people), self._reply(state, case)])
        elif state.outcome == "denied":
            await self._reply(state, case)

    def _people(self, decision: CredentialDecision, case: Case) -> tuple[str, ...]:
        try:
            facts = load_context(self.directory, case.request)
        except DeniedError:
            return ()  # its subject is gone: nobody can approve it any more
        only_sponsor = decision.required == ("sponsor",)
        candidates = (facts.agent.state.sponsor,) if only_sponsor else self.approvers.ids()
        return people_to_ask(self.directory, facts, decision.required, candidates)

    async def _ask(self, decision: CredentialDecision, user_id: str, case: Case) -> None:
        message = question_for(decision, user_id, self.runtime.key.id)
        await self.runtime.publisher.publish_signed(
            APPROVAL_REQUEST, user_id, message, self.runtime.key, traceparent=case.traceparent
        )
        self.notices.notify(message, case.request)

    async def _reply(self, state: RequestState, case: Case) -> None:
        if state.jws is None:
            return
        content = ReplyContent(request_id=state.request_id, decision=state.jws)
        try:
            sealed = seal(
                content.model_dump_json(exclude_none=True).encode(),
                case.request.claims.reply_key,
                kid=state.request_id,
            )
        except InvalidMessageError as error:
            log.warning("nobody can be told of decision %s: %s", state.decision_id, error)
            return
        acknowledged = await self.runtime.publisher.send(
            CREDENTIAL_REPLY,
            CREDENTIAL_REPLY.what,
            Outbound(
                state.agent_id,
                sealed,
                id=derived_id("reply", state.decision_id or ""),
                traceparent=case.traceparent,
            ),
        )
        await acknowledged


def question_for(decision: CredentialDecision, user_id: str, iss: str) -> ApprovalRequest:
    """The question to a person about a pending decision. It says the same each time."""
    assert decision.ttl_s is not None
    assert decision.revisions is not None
    assert decision.expires_at is not None
    return ApprovalRequest(
        iss=iss,
        aud=decision.aud,
        iat=decision.iat,
        jti=derived_id(ApprovalRequest.typ, decision.jti, user_id),
        request_id=decision.request_id,
        request=decision.request,
        source=decision.source,
        approver=user_id,
        required=decision.required,
        ttl_s=decision.ttl_s,
        delivery=decision.delivery,
        revisions=decision.revisions,
        reasons=decision.reasons,
        expires_at=decision.expires_at,
    )


def _signed(decision: CredentialDecision, input_json: bytes | None, key: SigningKey) -> str:
    """Return the decision as a compact JWS. The input, half of it, is inserted as the JSON that was evaluated."""
    if input_json is None:
        return sign(decision, key)
    claims = decision.model_dump(mode="json", exclude={"input"}, exclude_none=True)
    payload = orjson.dumps({**claims, "input": orjson.Fragment(input_json)})
    return sign_payload(CredentialDecision, payload, key)


def _decision_id(case: Case, evaluation: Evaluation, approvals: Sequence[Signed[Approval]]) -> str:
    """Return the decision's id: one for the final answer, whatever it rests on; one for each set of answers while
    waiting.
    """
    ruling = evaluation.ruling
    collected = sorted(a.digest for a in approvals) if isinstance(ruling, ApprovalRequired) else []
    return derived_id("decision", case.request_id, ruling.outcome, *collected)


def _times_of_passkeys(
    approvals: Iterable[Signed[Approval]], grants: Iterable[Signed[Grant]], at_ms: Mapping[str, int]
) -> dict[str, int] | None:
    """Return the known append times (ms) of answers that passkeys signed, by the digest of each; None without any."""
    answers = [
        *((one.digest, one.compact) for one in approvals),
        *((one.digest, one.compact) for one in grants),
    ]
    times = {
        digest: at_ms[digest] for digest, compact in answers if digest in at_ms and is_by_passkey(compact)
    }
    return times or None


def _delivery(case: Case, evaluation: Evaluation) -> Delivery:
    """Return the delivery of a request. Of one that is denied because its records are missing, what it names."""
    if evaluation.facts is not None:
        return evaluation.facts.delivery
    return case.request.claims.delivery or "gateway"


def _too_large(decision: CredentialDecision) -> CredentialDecision:
    """Return the denial to publish instead if the request and its records together exceed what a reader accepts."""
    reason = Reason(
        code=Code.DECISION_TOO_LARGE,
        message="the request and the records that it is held against are too large to be signed together: "
        "ask for less, or have task, ceiling or entitlements written with fewer, wider permissions",
    )
    return decision.model_copy(
        update={
            "jti": derived_id("decision", decision.request_id, "denied"),
            "outcome": "denied",
            "reasons": (reason,),
            "ttl_s": None,
            "approvals": (),
            "grants": None,
            "answers_at_ms": None,
            "input": None,
            "input_digest": None,
            "expires_at": None,
        }
    )


# Policy's outcome in the trace of a request.


def step_of(case: Case, name: str, tracing: Tracing) -> Span:
    facts = {
        "request_id": case.request_id,
        "agent_id": case.agent_id,
        "task_id": case.request.claims.task_id,
    }
    return tracing.step(name, Work(case.traceparent, facts))


def say(span: Span, outcome: Outcome, reasons: Sequence[Reason]) -> None:
    """Add the outcome to a span; for a denial also the reasons."""
    span.note(outcome=outcome)
    if outcome == "denied":
        span.refused(*(reason.code for reason in reasons))
