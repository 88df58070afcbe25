"""Handles agents' credential requests and their withdrawal: publishes decisions, approval requests and replies.

An agent that has given up a request ends it by a withdrawal, if the request is not decided yet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import orjson

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import Signed, parse
from ringfence.kernel.kafka.batch_handlers import BatchHandler, Handler, concurrent, sequential
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import MAX_WAITING_BYTES, CredentialRequest, Reason, RequestWithdraw
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import check_enrolment, enrolment_of
from ringfence.model.verdict import ALLOWED, Allowed, Refused, Verdict, refused
from ringfence.policy.agents.inventory import SharedKeyDetector
from ringfence.policy.decision_log import DecisionLog, RecordPosition
from ringfence.policy.decisions.evaluator import RequestEvaluator
from ringfence.policy.decisions.responder import DecisionPublisher
from ringfence.policy.domain import ApprovalRequired, Case, Evaluation, RequestRefused, refuse
from ringfence.policy.incoming.admission import (
    AdmissionControl,
    MessageVerifier,
    PendingApprovalLimit,
    is_request_withdrawal,
)
from ringfence.policy.incoming.approvals import ApprovalHandler
from ringfence.policy.incoming.load_shedding import ShedRequests


@dataclass(slots=True, eq=False)
class WithdrawalHandler:
    """Processes withdrawals one at a time. One that changes nothing is refused by a `service.event`."""

    runtime: Runtime
    directory: Directory
    verifier: MessageVerifier
    admission: AdmissionControl
    shed: ShedRequests
    decisions: DecisionLog
    approvals: ApprovalHandler

    async def handle(self, record: Received) -> Awaitable[object] | None:
        """Process one withdrawal. Raises InvalidMessageError if it is malformed, or if no agent signed it.

        Await the result, if any, for the broker's acknowledgement of the event about it.
        """
        overloaded = self.admission.should_shed(record, self.runtime.clock.now_ms())
        if overloaded and not self._names_pending(record):
            self.shed.count(record)
            return None
        withdrawal, late = await self.verifier.request_withdrawal(record)
        agent_id = subject_of(withdrawal.claims.aud, withdrawal.claims.iss, "agent") or ""
        verdict = await self._check_signer(withdrawal, agent_id, late, record.appended_at_ms)
        if isinstance(verdict, Allowed):
            verdict = await self.approvals.withdraw(withdrawal, agent_id, record)
        if isinstance(verdict, Allowed):
            return None
        self.admission.count_refusal(agent_id)
        return await self._report(withdrawal.claims, agent_id, verdict.reason, record)

    def _names_pending(self, record: Received) -> bool:
        """Return whether a record names a request that waits: of those there are few, so they are never shed."""
        try:
            # Unverified: it only says that an id is worth looking up.
            id = str(orjson.loads(parse(record.value).payload)["request_id"])
        except (InvalidMessageError, ValueError, TypeError, KeyError):
            return False
        state = self.decisions.get(id)
        return state is not None and state.pending is not None

    async def _check_signer(
        self, withdrawal: Signed[RequestWithdraw], agent_id: str, late: ExpiredError | None, at_ms: int
    ) -> Verdict:
        """Check that a withdrawal came in time, and that the agent's record admits the instance that signed it."""
        if late is not None:
            return refused(late.code, str(late))
        if isinstance(self._check_instance(withdrawal, agent_id), Refused):
            # Nobody is refused for a record that has not arrived here yet.
            await self.approvals.records.wait_until_known(at_ms)
        return self._check_instance(withdrawal, agent_id)

    def _check_instance(self, withdrawal: Signed[RequestWithdraw], agent_id: str) -> Verdict:
        """Check that the agent's record admits the running instance that signed, if it was one."""
        enrolment = enrolment_of(withdrawal.claims)
        if enrolment is None:
            return ALLOWED
        try:
            agent = self.directory.agent(agent_id)
        except ChainError as error:
            return Refused(Reason(code=error.code, message=str(error)))
        if agent is None:
            return refused(Code.AGENT_UNKNOWN, f"there is no agent {agent_id}")
        return check_enrolment(enrolment, agent.state)

    async def _report(
        self, claims: RequestWithdraw, agent_id: str, why: Reason, record: Received
    ) -> Awaitable[object]:
        return await self.runtime.event_soon(
            "replayed" if why.code == Code.REPLAYED else "refused",
            RequestWithdraw.typ,
            about=(record.topic_name, record.partition, record.offset),
            actor=claims.iss,
            ref=claims.jti,
            reasons=(why,),
            source=record.coordinates,
            traceparent=record.traceparent,
            agent_id=agent_id,
            request_id=claims.request_id,
        )


def requests_then_withdrawals(
    request: Handler,
    withdraw: Handler,
    received: Callable[[Sequence[Received]], None],
    dead_letters: DeadLetters,
) -> BatchHandler:
    """Return the handler of `credential.request`: requests of a batch run concurrently, withdrawals come after them.

    So a withdrawal finds its request decided, though both came in one batch. `received` is told of the withdrawals
    before they are handled.
    """
    decide, end = concurrent(request, dead_letters), sequential(withdraw, dead_letters)

    async def handle(batch: Sequence[Received]) -> None:
        asked, withdrawals = list[Received](), list[Received]()
        for record in batch:
            (withdrawals if is_request_withdrawal(record) else asked).append(record)
        if asked:
            await decide(asked)
        if withdrawals:
            received(withdrawals)
            await end(withdrawals)

    return handle


@dataclass(frozen=True, slots=True)
class RequestChecks:
    """What a request passes besides its evaluation."""

    verifier: MessageVerifier
    admission: AdmissionControl
    pending: PendingApprovalLimit
    shared_keys: SharedKeyDetector
    shed: ShedRequests


class RequestHandler:
    """Decides requests. Those of one batch may run concurrently: each is claimed before anything is awaited."""

    def __init__(
        self,
        runtime: Runtime,
        checks: RequestChecks,
        evaluator: RequestEvaluator,
        decisions: DecisionLog,
        publisher: DecisionPublisher,
        recall: Callable[[], Awaitable[None]],
        *,
        approval_timeout_s: int,
    ) -> None:
        """`recall` returns when every decision on Kafka is known. Raises UnavailableError."""
        self._runtime = runtime
        self._checks = checks
        self._evaluator = evaluator
        self._decisions = decisions
        self._publisher = publisher
        self._recall = recall
        self._approval_timeout_s = approval_timeout_s

    async def handle(self, record: Received) -> None:
        """Decide one request. Raises InvalidMessageError if it is malformed, or if no agent signed it."""
        checks = self._checks
        overloaded = checks.admission.should_shed(record, self._runtime.clock.now_ms())
        if overloaded and not checks.shed.is_known(record):
            checks.shed.count(record)
            return
        case, late = await checks.verifier.request(record)
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
            admission = self._check_admission(case, late, first=not state.tried)
            if late is None and not state.tried:
                await checks.shared_keys.observe(case)
            state.tried = True
            await self._decide(case, admission)
        else:  # it is delivered again, after a crash or a failure: the missing messages are published
            await self._publisher.notify(state, case)

    def _check_admission(
        self, case: Case, late: InvalidMessageError | None, *, first: bool
    ) -> Allowed | RequestRefused:
        """Check that a request came in time and by a key that counts, and that it is admitted; one that was tried
        before was.
        """
        if late is not None:
            return refuse(late.code, str(late))
        return self._checks.admission.admit(case, self._runtime.clock.now_ms()) if first else ALLOWED

    async def _decide(self, case: Case, admission: Allowed | RequestRefused) -> None:
        at_ms, expires_at = case.source.appended_at_ms, None
        if isinstance(admission, RequestRefused):
            evaluation = Evaluation(admission)
        else:
            evaluation = await self._evaluator.evaluate(case, at_ms)
        if isinstance(evaluation.ruling, ApprovalRequired) and evaluation.facts is not None:
            facts = evaluation.facts
            expires_at = min(at_ms // 1000 + self._approval_timeout_s, facts.task.state.not_after)
            question = _check_readable(case)
            if isinstance(question, Allowed):
                question = self._checks.pending.admit(case, facts.agent.state.sponsor)
            if isinstance(question, RequestRefused):
                evaluation, expires_at = replace(evaluation, ruling=question), None
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
            reasons=(Reason(code=Code.REPLAYED, message=message),),
            source=source,
            traceparent=case.traceparent,
            agent_id=case.agent_id,
            request_id=case.request_id,
            task_id=claims.task_id,
        )


def _check_readable(case: Case) -> Allowed | RequestRefused:
    """Check that people can be asked about a request: it is short enough to be read, and has only one reading."""
    if (size := len(case.request.compact)) > MAX_WAITING_BYTES:
        message = f"a request of {size} bytes; one that needs approval has at most {MAX_WAITING_BYTES}: ask for less"
        return refuse(Code.TOO_LARGE, message)
    try:
        parse(case.request.compact).check_one_reading()
    except InvalidMessageError as error:
        return refuse(error.code, f"nobody can be asked about this: {error}; sign it anew")
    return ALLOWED
