"""Handler of agents' credential requests: publishes decisions, approval requests and replies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import MAX_WAITING_BYTES, CredentialRequest, Reason
from ringfence.policy.agents.shared_keys import SharedKeyDetector
from ringfence.policy.decision_log import Decisions, RecordPosition
from ringfence.policy.decisions.evaluator import RequestEvaluator
from ringfence.policy.decisions.responder import DecisionPublisher
from ringfence.policy.domain import Case, Evaluation, denied
from ringfence.policy.incoming.admission import AdmissionControl, PendingApprovalLimit
from ringfence.policy.incoming.load_shedding import ShedRequests
from ringfence.policy.incoming.verification import MessageVerifier


class RequestHandler:
    """Decides requests. Those of one batch may run concurrently: each is claimed before anything is awaited."""

    def __init__(
        self,
        runtime: Runtime,
        verifier: MessageVerifier,
        admission: AdmissionControl,
        evaluator: RequestEvaluator,
        decisions: Decisions,
        publisher: DecisionPublisher,
        doorkeeper: PendingApprovalLimit,
        recall: Callable[[], Awaitable[None]],
        shared: SharedKeyDetector,
        shed: ShedRequests,
        *,
        approval_timeout_s: int,
    ) -> None:
        """`recall` returns when every decision on Kafka is known. Raises UnavailableError."""
        self._runtime = runtime
        self._verifier = verifier
        self._admission = admission
        self._evaluator = evaluator
        self._decisions = decisions
        self._publisher = publisher
        self._doorkeeper = doorkeeper
        self._recall = recall
        self._shared = shared
        self._shed = shed
        self._approval_timeout_s = approval_timeout_s

    async def handle(self, record: Received) -> None:
        """Decide one request. Raises InvalidMessageError if it is malformed, or if no agent signed it."""
        if self._admission.should_shed(record, self._runtime.clock.now_ms()) and not self._shed.is_known(
            record
        ):
            self._shed.count(record)
            return
        case, late = await self._verifier.request(record)
        place = RecordPosition(record.partition, record.offset)
        state = self._decisions.claim(
            case.request_id, case.agent_id, place, at_ms=record.appended_at_ms, exp=case.request.claims.exp
        )
        if state.at == place and state.outcome is None and state.tried:
            # It failed before: perhaps only the acknowledgement of its decision was lost.
            await self._recall()
        if state.at != place:
            await self._replayed(case)
        elif state.outcome is None:
            refused = self._refused(case, late, first=not state.tried)
            if late is None and not state.tried:
                await self._shared.observe(case)
            state.tried = True
            await self._decide(case, refused)
        else:  # it is delivered again, after a crash or a failure: the missing messages are published
            await self._publisher.notify(state, case)

    def _refused(self, case: Case, late: ExpiredError | None, *, first: bool) -> Evaluation | None:
        """Return the denial of a request that is not evaluated, or None."""
        if late is not None:
            return denied(late.code, str(late))
        return self._admission.refusal(case, self._runtime.clock.now_ms()) if first else None

    async def _decide(self, case: Case, refused: Evaluation | None) -> None:
        at_ms, expires_at = case.source.appended_at_ms, None
        evaluation = refused or await self._evaluator.evaluate(case, at_ms)
        if evaluation.ruling.outcome == "approval_required" and evaluation.facts is not None:
            facts = evaluation.facts
            expires_at = min(at_ms // 1000 + self._approval_timeout_s, facts.task.state.not_after)
            not_asked = _unfit_for_people(case) or self._doorkeeper.refusal(case, facts.agent.state.sponsor)
            if not_asked is not None:
                evaluation, expires_at = replace(evaluation, ruling=not_asked.ruling), None
        state = await self._publisher.decide(case, evaluation, expires_at=expires_at)
        await self._publisher.notify(state, case)

    async def _replayed(self, case: Case) -> None:
        claims, source = case.request.claims, case.source
        message = f"request {case.request_id} was taken in before, elsewhere; a repeat changes nothing"
        await self._runtime.event(
            "replayed",
            CredentialRequest.typ,
            about=(source.topic, source.partition, source.offset),
            actor=claims.iss,
            ref=claims.jti,
            reasons=(Reason(code="replayed", message=message),),
            source=source,
            traceparent=case.traceparent,
            agent_id=case.agent_id,
            request_id=case.request_id,
            task_id=claims.task_id,
        )


def _unfit_for_people(case: Case) -> Evaluation | None:
    """Return the denial of a request that no person can be asked about, or None: it is too long to be read, or readers
    could read it differently.
    """
    if (size := len(case.request.compact)) > MAX_WAITING_BYTES:
        message = f"a request of {size} bytes; one that needs approval has at most {MAX_WAITING_BYTES}: ask for less"
        return denied("too_large", message)
    try:
        parse(case.request.compact).check_one_reading()
    except InvalidMessageError as error:
        return denied(error.code, f"nobody can be asked about this: {error}; sign it anew")
    return None
