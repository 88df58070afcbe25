"""Handler of people's approvals: evaluates pending requests again, and closes those that nobody approved in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from weakref import WeakValueDictionary

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import Signed, parse
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.tracing.api import nearest
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialDecision, CredentialRequest, Reason, RequestWithdraw
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import enrolment_of, is_same_requester
from ringfence.model.requests.approvals import check_approval, check_approver_keys
from ringfence.model.requests.approver_keys import check_approver_key, check_not_voucher
from ringfence.model.requests.facts import DeniedError, load_context, violations
from ringfence.model.verdict import ALLOWED, Refused, Verdict, refused
from ringfence.policy.decision_log import DecisionLog, RecordPosition, RequestState
from ringfence.policy.decisions.evaluator import RequestEvaluator
from ringfence.policy.decisions.responder import DecisionPublisher
from ringfence.policy.domain import (
    MAX_REASONS,
    ApprovalRequired,
    Case,
    Evaluation,
    RequestAllowed,
    RequestRefused,
    may_approve_any,
    signer,
)
from ringfence.policy.incoming.admission import MessageVerifier, is_for_others

log = logging.getLogger(__name__)

OVERDUE_MS = 2_000
"""How long after their end pending requests are closed: answers appended in time should have been read by then."""
_CLOSE_EVERY_S = 0.5
_PAUSE_EVERY = 20


class ReadBarrier:
    """Read barrier: waits until this process knows everything that was on Kafka at a moment.

    Reading the end offset may take a tenth of a second. So one read serves all messages that were appended before it.
    Otherwise a person who signs ten answers a second would delay everybody.
    """

    def __init__(self, runtime: Runtime, ask: Callable[[], Awaitable[bool | None]]) -> None:
        """`ask` reads up to the present end of the topics; it returns False if that is uncertain."""
        self._runtime = runtime
        self._ask = ask
        self._asking = asyncio.Lock()
        self._known_to_ms = -1
        self._here_to_ms = -1
        self._came = self._invalidated = 0
        self._past_ms = -1
        """A time that had passed on every broker's clock when Kafka was last asked."""

    def received(self, to_ms: int) -> None:
        """Note that the next records are here, and were appended by `to_ms` on the brokers' clocks."""
        # Earlier records being here proves nothing about these: another broker's clock may be slower.
        self._known_to_ms = self._past_ms
        self._here_to_ms = to_ms
        self._came += 1

    def invalidate(self) -> None:
        """Note that what was known may no longer be true; a read that runs now proves nothing either."""
        self._known_to_ms = self._past_ms = -1
        self._invalidated += 1

    async def wait_until_known(self, at_ms: int | None) -> None:
        """Return once everything is known that was on Kafka at `at_ms` (the broker's clock), or now.

        Messages of one batch wait for one read together.
        """
        if self._is_known(at_ms):
            return
        async with self._asking:
            if self._is_known(at_ms):
                return
            batches, invalidated, past_ms = self._came, self._invalidated, self._runtime.broker_past_ms()
            if await self._ask() is not False and invalidated == self._invalidated:
                self._past_ms = -1 if past_ms is None else past_ms
                here_to_ms = self._here_to_ms if batches == self._came else -1
                self._known_to_ms = max(here_to_ms, self._past_ms)

    def _is_known(self, at_ms: int | None) -> bool:
        return at_ms is not None and at_ms <= self._known_to_ms


class ApprovalHandler:
    """Ends waiting requests by people's answers, withdrawals or time: for each request one at a time."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        verifier: MessageVerifier,
        evaluator: RequestEvaluator,
        decisions: DecisionLog,
        publisher: DecisionPublisher,
        recall: Callable[[], Awaitable[None]],
    ) -> None:
        """`recall` returns when every decision on Kafka is known. Raises UnavailableError."""
        self._runtime = runtime
        self._directory = directory
        self._verifier = verifier
        self._evaluator = evaluator
        self._decisions = decisions
        self._publisher = publisher
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._decided = ReadBarrier(runtime, recall)
        self.records = ReadBarrier(runtime, evaluator.caught_up)
        """For users, agents, tasks and targets: a person who answers may have seen newer records than this process."""
        self._checked_versions: dict[str, tuple[int, int | None]] = {}

    def received(self, batch: Sequence[Received]) -> None:
        """Note the batch whose records come to `handle` next.

        All are on Kafka, so one read barrier serves the batch.
        """
        for one in (self._decided, self.records):
            one.received(max(record.appended_at_ms for record in batch))

    async def handle(self, record: Received) -> Awaitable[object] | None:
        """Process one answer. Raises InvalidMessageError if it is malformed, or if nobody known signed it.

        A signed answer that does not count is refused by a `service.event`, and the request keeps waiting. Await the
        result, if any, for the broker's acknowledgement of that event.
        """
        if is_for_others(record):
            return None
        approval, late = await self._verifier.approval(record)
        async with self._locked(approval.claims.request_id, record.appended_at_ms):
            verdict = await self._apply(approval, late, record)
        return await self._refuse(approval, verdict.reason, record) if isinstance(verdict, Refused) else None

    @contextlib.asynccontextmanager
    async def _locked(self, request_id: str, at_ms: int | None = None) -> AsyncIterator[None]:
        """Hold the request's lock, with every decision known that was on Kafka at `at_ms`, or now.

        A decision that was published before a failure counts, even if its acknowledgement was lost.
        """
        turn = self._turns.get(request_id)
        if turn is None:
            turn = self._turns[request_id] = asyncio.Lock()
        async with turn:
            try:
                await self._decided.wait_until_known(at_ms)
                yield
            except BaseException:
                self._decided.invalidate()
                raise

    async def _apply(
        self, approval: Signed[Approval], late: ExpiredError | None, record: Received
    ) -> Verdict:
        """Apply an answer, if it counts.

        1. The request that it names is known.
        2. The record has the agent's id as its Kafka key, and is in the agent's partition.
        3. It was not given before; redelivered after a crash, it is completed.
        4. The request still waits, and the answer came in time.
        5. The person can give what the request waits for, by the records as they are now (`_evaluate`).
        """
        claims, place = approval.claims, RecordPosition(record.partition, record.offset)
        state = self._decisions.get(claims.request_id)
        if state is None or state.outcome is None:
            return refused(Code.REQUEST_UNKNOWN, "no request with this id waits for an approval")
        if record.key != state.agent_id:
            return refused(
                Code.KEY_UNEXPECTED, f"the Kafka key of an approval is the agent's id, {state.agent_id}"
            )
        placement = await self._verifier.check_placement(record, state.agent_id)
        if isinstance(placement, Refused):
            return placement
        state.traceparent = nearest(record.traceparent, state.traceparent)
        seen = state.approvals.get(message_id(claims.iss, claims.jti))
        if seen is not None:
            if seen[0] != approval.digest or seen[1] not in (None, place):
                return refused(Code.APPROVAL_REPLAYED, "this approval was given before; each counts once")
            await self._finish(state)
            return ALLOWED
        if state.pending is None:
            return refused(Code.ALREADY_DECIDED, f"the request is {state.outcome} already, and that stands")
        if late is not None:
            return refused(late.code, str(late))
        pending = state.pending
        if record.appended_at_ms >= (pending.expires_at or 0) * 1000:
            await self._close(state, pending, (_expired_reason(pending),))
            return refused(Code.APPROVAL_EXPIRED, "the time in which approvals counted is over")
        return await self._evaluate(approval, place, record.appended_at_ms, state, pending)

    async def _evaluate(
        self,
        approval: Signed[Approval],
        place: RecordPosition,
        at_ms: int,
        state: RequestState,
        pending: CredentialDecision,
    ) -> Verdict:
        """Apply an answer to a request that waits. If the request cannot be allowed any more, it is closed instead.

        1. A user signed the answer, over this very request.
        2. The user can give one of the approvals that are required. A denial then closes the request.
        3. The approval is one of this request as it is now (`check_approval`).
        4. The approvals that were given before still count.
        5. The user has not approved it before.
        6. The key counts beside those approvals, and none of theirs rests on the user's word.
        """
        claims, case, user_id = approval.claims, _case(state, pending), signer(approval)
        if user_id is None:
            return refused(Code.NOT_A_PERSON, f"{claims.iss} is no user; only people approve")
        if (claims.request, claims.request_digest) != (case.request.compact, case.request.digest):
            return refused(Code.APPROVAL_OTHER_REQUEST, "the approval is a signature over another request")
        if stale := await self._evaluator.stale():
            return refused(Code.STALE_VIEW, f"{stale}; then approve again")
        await self.records.wait_until_known(at_ms)
        try:
            facts = load_context(self._directory, case.request)
        except DeniedError as error:
            await self._close(state, pending, (error.reason,))
            return ALLOWED
        if not may_approve_any(self._directory, user_id, pending.required, facts):
            required = ", ".join(pending.required)
            return refused(Code.NOT_APPROVER, f"{user_id} cannot give what is asked for here: {required}")
        if claims.verdict == "denied":
            comment = (claims.comment or "no comment")[:500]
            no = _reason(Code.APPROVAL_DENIED, f"{user_id} denied it: {comment}")
            await self._close(state, pending, (no,), approval, place, at_ms)
            return ALLOWED
        present = facts.revisions(self._evaluator.policy_revision)
        if present != pending.revisions:
            await self._close(state, pending, (_stale(),))
            return ALLOWED
        verdict = check_approval(
            approval, facts,
            at_ms=at_ms, ttl_s=pending.ttl_s or 0, delivery=pending.delivery, revisions=present,
        )  # fmt: skip
        if isinstance(verdict, Refused):
            return verdict
        collected = [_collected(jws) for jws in pending.approvals]
        if not _all_valid(collected, at_ms):
            await self._close(state, pending, (_expired_reason(pending),))
            return refused(Code.APPROVAL_EXPIRED, "the time of an approval that was given before is over")
        keys = check_approver_keys(collected, self._directory, facts, at_ms=at_ms)
        void = [key for key in keys if isinstance(key, Refused)]
        if void:  # a key was ended as compromised since, or given anew
            await self._close(state, pending, tuple(key.reason for key in void))
            return void[0]
        if user_id in map(signer, collected):
            return refused(Code.APPROVED_ALREADY, f"{user_id} approved this before; nobody counts twice")
        beside = [one for one in map(signer, collected) if one]
        by_key = check_approver_key(approval, self._directory, facts, facts.verbs, at_ms=at_ms, beside=beside)
        if isinstance(by_key, Refused):
            return by_key
        no_voucher = check_not_voucher(user_id, collected, self._directory)
        if isinstance(no_voucher, Refused):
            return no_voucher
        await self._count_approval(state, pending, case, collected, approval, place, at_ms)
        return ALLOWED

    async def _count_approval(
        self,
        state: RequestState,
        pending: CredentialDecision,
        case: Case,
        collected: list[Signed[Approval]],
        approval: Signed[Approval],
        place: RecordPosition,
        at_ms: int,
    ) -> None:
        """Evaluate again with one more approval: allowed, denied after all, or still waiting for somebody else."""
        approvals = [*collected, approval]
        evaluation = await self._evaluator.evaluate(case, at_ms, approvals)
        ruling = evaluation.ruling
        if not isinstance(ruling, RequestRefused) and ruling.ttl_s != pending.ttl_s:
            await self._close(state, pending, (_stale(),), approval, place, at_ms)
            return
        waiting = isinstance(ruling, ApprovalRequired)
        state = await self._publisher.decide(
            case,
            evaluation,
            approvals=approvals,
            approvals_at_ms=_append_times(pending, approval, at_ms),
            expires_at=pending.expires_at if waiting else None,
        )
        state.saw(approval, place)
        if not waiting or ruling.required != pending.required:
            await self._publisher.notify(state, case)

    async def _close(
        self,
        state: RequestState,
        pending: CredentialDecision,
        why: tuple[Reason, ...],
        approval: Signed[Approval] | None = None,
        place: RecordPosition | None = None,
        at_ms: int = 0,
    ) -> None:
        """Deny a waiting request, on the evaluation that it waited with, and by a person's answer if that is the
        reason. `at_ms` is the append time of that answer.
        """
        case = _case(state, pending)
        evaluation = Evaluation(
            RequestRefused(why, pending.required),
            revisions=pending.revisions,
            input=pending.input,
            input_digest=pending.input_digest,
        )
        approvals = [_collected(jws) for jws in pending.approvals]
        state = await self._publisher.decide(
            case,
            evaluation,
            approvals=[*approvals, approval] if approval else approvals,
            approvals_at_ms=_append_times(pending, approval, at_ms),
        )
        if approval is not None and place is not None:
            state.saw(approval, place)
        await self._publisher.notify(state, case)

    async def _finish(self, state: RequestState) -> None:
        """Complete an answer that is redelivered after a crash: the reply may not have been sent."""
        if state.outcome == "denied" and state.jws is not None:
            decision = parse(state.jws).unverified_claims(CredentialDecision)
            await self._publisher.notify(state, _case(state, decision))

    async def _refuse(self, approval: Signed[Approval], why: Reason, record: Received) -> Awaitable[object]:
        state = self._decisions.get(approval.claims.request_id)
        return await self._runtime.event_soon(
            "refused",
            Approval.typ,
            about=(record.topic_name, record.partition, record.offset),
            actor=approval.claims.iss,
            ref=approval.claims.jti,
            reasons=(why,),
            source=record.coordinates,
            traceparent=record.traceparent,
            agent_id=state.agent_id if state else None,
            request_id=approval.claims.request_id,
        )

    # --- requests that their agents withdraw ---

    async def withdraw(self, withdrawal: Signed[RequestWithdraw], agent_id: str, record: Received) -> Verdict:
        """End a waiting request of an agent, because the requester withdrew it: the agent, or the run or instance.

        The lock separates the withdrawal from approvals and from the end of the time: one of them decides.

        Returns:
            `Refused` if it changes nothing. The repeat of an effective withdrawal at another position has the code
            `replayed`.
        """
        async with self._locked(withdrawal.claims.request_id, record.appended_at_ms):
            state = self._decisions.get(withdrawal.claims.request_id)
            if state is None or state.outcome is None:
                return refused(Code.REQUEST_UNKNOWN, "no request with this id is known here")
            if state.agent_id != agent_id:
                return refused(Code.NOT_REQUESTER, "another agent signed this request")
            if state.pending is not None and not _is_requester(state.pending, withdrawal.claims):
                message = "another instance of the agent asked for this: the run or instance that asked withdraws it"
                return refused(Code.NOT_REQUESTER, message)
            if record.key != agent_id:
                return refused(
                    Code.KEY_UNEXPECTED, f"the Kafka key of a withdrawal is the agent's id, {agent_id}"
                )
            placement = await self._verifier.check_placement(record, agent_id)
            if isinstance(placement, Refused):
                return placement
            at = RecordPosition(record.partition, record.offset)
            if state.pending is None:
                return await self._withdrawn_before(state, withdrawal, at)
            message = f"agent {agent_id} withdrew the request: nobody waits for it any more"
            await self._close(state, state.pending, (_reason(Code.WITHDRAWN, message),))
            state.withdrawal = (withdrawal.digest, at)
            return ALLOWED

    async def _withdrawn_before(
        self, state: RequestState, withdrawal: Signed[RequestWithdraw], at: RecordPosition
    ) -> Verdict:
        """Refuse a withdrawal of a finally decided request, because it changes nothing.

        A withdrawal that is redelivered after a crash is completed instead: the reply may not have been sent.
        """
        seen = state.withdrawal
        if seen is None and _is_withdrawn(state):
            seen = state.withdrawal = (withdrawal.digest, at)  # from before this process
        if seen == (withdrawal.digest, at):
            await self._finish(state)
            return ALLOWED
        if seen is not None and seen[0] == withdrawal.digest:
            return refused(
                Code.REPLAYED, "this withdrawal was taken in before, elsewhere; a repeat changes nothing"
            )
        return refused(Code.ALREADY_DECIDED, f"the request is {state.outcome} already, and that stands")

    # --- requests that a new grant answers ---

    async def reconsider(self, grant: Grant, at_ms: int) -> None:
        """Evaluate again the waiting requests in the task of a grant that was appended at `at_ms`."""
        for known in list(self._decisions.pending()):
            if known.agent_id != grant.agent_id:
                continue
            async with self._locked(known.request_id, at_ms):
                pending = known.pending
                if pending is None or at_ms >= (pending.expires_at or 0) * 1000:
                    continue
                case, collected = _case(known, pending), [_collected(jws) for jws in pending.approvals]
                if case.request.claims.task_id != grant.task_id or not _all_valid(collected, at_ms):
                    continue
                evaluation = await self._evaluator.evaluate(case, at_ms, collected)
                ruling = evaluation.ruling
                if not isinstance(ruling, RequestAllowed):
                    continue
                if (evaluation.revisions, ruling.ttl_s) == (pending.revisions, pending.ttl_s):
                    await self._publisher.decide(
                        case,
                        evaluation,
                        approvals=collected,
                        approvals_at_ms=pending.answers_at_ms or {},
                    )

    # --- expired and forbidden requests ---

    async def close_overdue(self, owns: Callable[[str, int], bool]) -> None:
        """Deny, for ever, requests that nobody approved in time, and those that the invariant forbids by now.

        An approval for a suspended agent, or for an ended task, would have no effect. So approvers need not find that
        out, and the agent need not wait.

        Args:
            owns: returns whether this replica processes the requests of a partition (topic name, number). Only that
                replica
                closes them, so that its lock separates a late approval from the end of the time. If two replicas both
                believe
                to own it for a moment, the first final decision on Kafka counts for every reader.
        """
        while True:
            await asyncio.sleep(_CLOSE_EVERY_S)
            try:
                await self.close_overdue_once(owns)
            except Exception:
                log.exception("what nobody approved could not be closed yet; it is tried again")

    async def close_overdue_once(self, owns: Callable[[str, int], bool]) -> None:
        """Run one round of `close_overdue`."""
        now, still_waiting = self._directory.versions, dict[str, tuple[int, int | None]]()
        for number, known in enumerate(self._decisions.pending(), start=1):
            if number % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)  # let other tasks run: many may wait
            if not self._is_own(known, owns):
                continue
            if self._is_overdue(known) or (
                self._checked_versions.get(known.request_id) != now and self._violations(known)
            ):
                await self._close_one(known, owns)
            still_waiting[known.request_id] = now
        self._checked_versions = still_waiting

    async def _close_one(self, state: RequestState, owns: Callable[[str, int], bool]) -> None:
        async with self._locked(state.request_id):
            if state.pending is None or not self._is_own(state, owns):
                return
            if self._is_overdue(state):
                await self._close(state, state.pending, (_expired_reason(state.pending),))
            elif reasons := self._violations(state):
                await self._close(state, state.pending, reasons)

    def _is_own(self, state: RequestState, owns: Callable[[str, int], bool]) -> bool:
        pending = state.pending
        return pending is not None and owns(pending.source.topic, pending.source.partition)

    def _is_overdue(self, state: RequestState) -> bool:
        end_s = state.pending.expires_at if state.pending else None
        return self._runtime.clock.now_ms() >= (end_s or 0) * 1000 + OVERDUE_MS

    def _violations(self, state: RequestState) -> tuple[Reason, ...]:
        """Return how a waiting request violates the invariant with the present records."""
        if state.pending is None:
            return ()
        try:
            facts = load_context(self._directory, _case(state, state.pending).request)
        except DeniedError:
            return ()  # a record may be on its way; an answer is evaluated once it is here
        now_s = self._runtime.clock.now_ms() / 1000
        return violations(facts, now_s, self._runtime.settings.entitlements_max_age_s)[:MAX_REASONS]


def _case(state: RequestState, decision: CredentialDecision) -> Case:
    """Return the case that a decision of this service is about. Its content was verified before it was signed."""
    request = Signed(parse(decision.request).unverified_claims(CredentialRequest), decision.request)
    return Case(request, state.request_id, state.agent_id, decision.source, state.traceparent)


def _is_requester(pending: CredentialDecision, withdrawal: RequestWithdraw) -> bool:
    """Return whether whoever withdraws a request asked for it. Both messages were verified."""
    request = parse(pending.request).unverified_claims(CredentialRequest)
    return is_same_requester(enrolment_of(request), enrolment_of(withdrawal))


def _is_withdrawn(state: RequestState) -> bool:
    """Return whether a request was denied because its agent withdrew it, as far as the denial's text is kept."""
    if state.jws is None:
        return False
    decision = parse(state.jws).unverified_claims(CredentialDecision)  # this service signed it
    return state.outcome == "denied" and any(reason.code == Code.WITHDRAWN for reason in decision.reasons)


def _collected(jws: str) -> Signed[Approval]:
    """Return an approval in a decision of this service, which verified it before it signed."""
    return Signed(parse(jws).unverified_claims(Approval), jws)


def _append_times(
    pending: CredentialDecision, approval: Signed[Approval] | None, at_ms: int
) -> dict[str, int]:
    """Return the known append times (ms) of the approvals in a decision, and of one more, by the digest of each."""
    known = pending.answers_at_ms or {}
    return {**known, approval.digest: at_ms} if approval else known


def _all_valid(approvals: Iterable[Signed[Approval]], at_ms: int) -> bool:
    """Return whether none of these has expired at the append time `at_ms`. The issuer would refuse an expired one."""
    return all(at_ms < approval.claims.exp * 1000 for approval in approvals)


def _reason(code: Code, message: str) -> Reason:
    return Reason(code=code, message=message)


def _expired_reason(pending: CredentialDecision) -> Reason:
    required = ", ".join(pending.required)
    return _reason(Code.APPROVAL_EXPIRED, f"nobody gave the approval in time ({required}); ask anew")


def _stale() -> Reason:
    return _reason(
        Code.APPROVAL_STALE,
        "agent, user, task, target or policy changed since the approval was asked for; ask anew",
    )


# Gauges of pending approvals: how many, and since when. An alert uses them, as nobody else notices unanswered ones.


def register_pending_gauges(decisions: DecisionLog, clock: Clock) -> None:
    """Register the Prometheus gauges of pending approvals, read on scrape. All replicas know all of them."""
    metrics.APPROVALS_WAITING.set_function(lambda: len(list(decisions.pending())))
    metrics.APPROVALS_OLDEST.set_function(lambda: _oldest_s(decisions, clock.now_ms()))


def _oldest_s(decisions: DecisionLog, now_ms: int) -> float:
    """Return the longest wait in seconds since the broker's append time; 0 if nothing waits."""
    appended = [one.pending.source.appended_at_ms for one in decisions.pending() if one.pending]
    return max(0, now_ms - min(appended)) / 1000 if appended else 0
