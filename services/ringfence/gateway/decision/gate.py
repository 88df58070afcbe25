"""The decision core, put together: who, which target, what it does there, by which lease, what the bundle says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Final

from ringfence.gateway.contract import (
    Attempt,
    CachedAllowance,
    Headers,
    HoldableRequest,
    McpExchange,
    PresentedIdentity,
    RateCheck,
    RpcErrorReply,
    Verdict,
)
from ringfence.gateway.decision.action_ids import ActionIds
from ringfence.gateway.decision.approval_questions import Question
from ringfence.gateway.decision.approvals import Approvals, Waiting
from ringfence.gateway.decision.approved_headers import headers_to_approve
from ringfence.gateway.decision.context import DecisionContext
from ringfence.gateway.decision.decision_events import Telling
from ringfence.gateway.decision.evaluator import Evaluator
from ringfence.gateway.decision.fast_path.path import DecisionFastPath
from ringfence.gateway.decision.injection import Injector
from ringfence.gateway.decision.mcp import McpSessions, rpc_of
from ringfence.gateway.decision.observe_mode import Observing
from ringfence.gateway.decision.sender import NONCE_WANTED, Identifier
from ringfence.gateway.decision.targets import Compiled, Targets
from ringfence.gateway.domain import (
    CONTENT_TOO_LARGE,
    SAFE_METHODS,
    TOO_MANY_REQUESTS,
    UNAVAILABLE,
    ApprovalRequired,
    ChosenLease,
    Refusal,
    Sender,
    authorize,
    refuse,
    refuse_for,
)
from ringfence.gateway.events.recorder import Recorder
from ringfence.gateway.events.refusal_counts import Counted
from ringfence.gateway.events.spool import SpoolFullError
from ringfence.gateway.events.task_history import Earlier
from ringfence.gateway.state.view import View
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets.request_map import MAX_BODY_BYTES, Action

log = logging.getLogger(__name__)

_MAX_REASONS: Final = 20
_RATE_RETRY_S: Final = 5


class DecisionGate:
    """The `Gate` that data planes are given."""

    def __init__(
        self,
        view: View,
        targets: Targets,
        identifier: Identifier,
        evaluator: Evaluator,
        injector: Injector,
        recorder: Recorder,
        counted: Counted,
        approvals: Approvals,
        clock: Clock,
        *,
        gateway: str,
        entitlements_max_age_s: int,
        observe: Collection[str] = (),
        fast_path: bool = True,
    ) -> None:
        """Args:
            gateway: the SPIFFE ID of this one, for events.
            observe: the targets that are only observed.
            fast_path: whether decisions are cached for repeated requests; without, each is decided step by step.
        """  # fmt: skip
        self._view = view
        self._targets = targets
        self._identifier = identifier
        self._evaluator = evaluator
        self._injector = injector
        self._counted = counted
        self._approvals = approvals
        self._clock = clock
        self._entitlements_max_age_s = entitlements_max_age_s
        self._ids = ActionIds()
        self._earlier = Earlier()
        self._fast_path: DecisionFastPath | None = None
        self._authorize = self._authorize_uncached
        if fast_path:
            self._fast_path = DecisionFastPath(
                view, targets, identifier, evaluator, injector, recorder, self._earlier, self._ids, clock,
                gateway=gateway, entitlements_max_age_s=entitlements_max_age_s, authorize=self._authorize_uncached,
            )  # fmt: skip
            self._authorize = self._fast_path.authorize
        self._telling = Telling(
            view, targets, recorder, self._earlier, clock, gateway=gateway, fast_path=self._fast_path
        )
        self._observing = Observing(targets, observe)
        self._mcp = McpSessions(view.table)

    # --- what data planes ask ---

    def reads_body(self, attempt: Attempt) -> bool:
        """See `Gate`."""
        target = self._targets.find(attempt)
        return isinstance(target, Compiled) and target.map.reads_body(attempt.method, attempt.target)

    async def decide(
        self,
        presented: PresentedIdentity,
        attempt: Attempt,
        admits: RateCheck | None = None,
        patient: HoldableRequest | None = None,
    ) -> Verdict:
        """See `Gate`."""
        course = DecisionContext(self._ids.fresh(), attempt, patient)
        try:
            refusal = await self._refusal(course, presented, attempt, admits)
        except Exception:  # what cannot be decided is denied, whatever it is
            log.exception("a request could not be decided")
            refusal = refuse("undecided", "the gateway could not decide this", status=UNAVAILABLE)
        if refusal is not None and course.unheard and not course.observed:
            return self._told_with_others(course, presented, attempt, refusal)
        verdict = self._verdict(course, presented, attempt, refusal)
        try:
            self._telling.record(course, presented, verdict)
        except SpoolFullError as error:
            log.error("nothing is let pass: %s", error)
            reason = Reason(
                code=error.code, message="what is decided cannot be recorded now; ask again later"
            )
            return Verdict(course.id, allowed=False, status=UNAVAILABLE, reasons=(reason,))
        return verdict

    def _told_with_others(
        self, course: DecisionContext, presented: PresentedIdentity, attempt: Attempt, refusal: Refusal
    ) -> Verdict:
        """The verdict on what was not even looked at: such a request costs its sender nothing, and no event each."""
        if refusal.reasons[0].code == NONCE_WANTED:
            return self._verdict(course, presented, attempt, refusal)
        kind = self._telling.kind(course, presented, attempt, refusal)
        counted_by = self._counted.another(kind, refusal.reasons[0])
        if counted_by is None:
            verdict = self._verdict(course, presented, attempt, refusal)
            try:
                self._telling.record(course, presented, verdict, kind.target_id)
                return verdict
            except SpoolFullError as error:
                log.error("what is refused is counted, and not recorded yet: %s", error)
                course.id = self._counted.missed(kind)
                return self._verdict(course, presented, attempt, refusal)
        course.id = counted_by
        verdict = self._verdict(course, presented, attempt, refusal)
        self._telling.note(course, verdict)
        return verdict

    def cached_allowance(self, presented: PresentedIdentity, attempt: Attempt) -> CachedAllowance | None:
        """See `Gate`."""
        return self._fast_path.cached_decision(presented, attempt) if self._fast_path is not None else None

    async def headers_to_inject(self, verdict: Verdict) -> Mapping[str, str]:
        """See `Gate`."""
        if not verdict.allowed or verdict.lease is None or verdict.injected is None:
            raise UnavailableError("this request was not allowed: nothing is injected")
        if (denial := self._view.denial()) is not None:
            raise UnavailableError(denial.message, code=denial.code)
        if (problem := self._view.table.problem(verdict.lease)) is not None:
            raise UnavailableError(problem.message, code=problem.code)
        return verdict.injected

    def upstream(self, target: TargetState) -> str:
        """See `Gate`."""
        url = self._targets.url_of(target)
        if url is None:
            raise UnavailableError(_says_no_place(target))
        return url

    def on_lease_end(self, lease_id: str, ended: Callable[[], None]) -> Callable[[], None]:
        """See `Gate`."""
        if self._view.stale() is not None:
            ended()
            return lambda: None
        return self._view.table.watch(lease_id, ended)

    def watch(self, lease_id: str, ended: Callable[[], None]) -> None:
        """See `Gate`."""
        self._view.table.watch_living(lease_id, ended)

    def unwatch(self, lease_id: str, ended: Callable[[], None]) -> None:
        """See `Gate`."""
        self._view.table.unwatch(lease_id, ended)

    def view_problem(self) -> Reason | None:
        """See `Gate`."""
        return self._view.view_problem()

    def view_expired(self) -> bool:
        """See `Gate`."""
        return self._view.view_expired()

    # --- the steps, in their order ---

    async def _refusal(
        self,
        course: DecisionContext,
        presented: PresentedIdentity,
        attempt: Attempt,
        admits: RateCheck | None,
    ) -> Refusal | None:
        began_ns = time.perf_counter_ns()
        try:
            refusal = await self._decided(course, presented, attempt, admits)
        finally:
            course.took_ns = time.perf_counter_ns() - began_ns - course.waited_ns
        if refusal is None and course.target is not None:
            refusal = _nowhere(course.target, attempt)
        if refusal is None and course.chosen is not None and course.target is not None:
            refusal = await self._unequipped(course, course.chosen.lease, course.target.state)
        if refusal is None and course.question is not None:
            refusal = self._approvals.take(course.question)
        if refusal is not None:
            self._observe(course, refusal, presented, attempt)
        return refusal

    async def _decided(
        self,
        course: DecisionContext,
        presented: PresentedIdentity,
        attempt: Attempt,
        admits: RateCheck | None,
    ) -> Refusal | None:
        course.unheard = True
        if (stale := self._stale()) is not None:
            return stale
        sender = await self._identifier.sender(presented, attempt)
        if isinstance(sender, Refusal):
            course.sender = sender.sender
            return sender
        course.sender = sender
        if admits is not None and (reason := admits(sender.agent_id)) is not None:
            return Refusal(TOO_MANY_REQUESTS, (reason,))
        course.unheard = False
        said = await self._looked_at(course, sender)
        if not isinstance(said, ApprovalRequired):
            return said
        if (refusal := self._unasked(course, presented)) is not None:
            return refusal
        return await self._approved(course, sender, said)

    async def _looked_at(self, course: DecisionContext, sender: Sender) -> Refusal | ApprovalRequired | None:
        attempt = course.attempt
        target = self._targets.find(attempt)
        if isinstance(target, Refusal):
            return target
        course.target = target
        if target.map.speaks_mcp(attempt.target):
            spoken = self._mcp.read(attempt, target, sender)
            if isinstance(spoken, Refusal):
                return spoken
            course.spoken, course.sender = spoken, spoken.sender
            sender = spoken.sender
            action = spoken.action(target, attempt)
        else:
            action = target.map.action(attempt.method, attempt.target, attempt.body if attempt.json else None)
        if action is None:
            return self._no_action(target, attempt)
        course.action = action
        chosen = self._authorize(sender, target.state, action)
        if isinstance(chosen, Refusal):
            return chosen
        course.chosen = chosen
        return await self._evaluated(course, chosen, action)

    def _authorize_uncached(
        self, sender: Sender, target: TargetState, action: Action
    ) -> ChosenLease | Refusal:
        return authorize(
            sender,
            target,
            action,
            self._view.table,
            self._view.directory,
            now_s=self._clock.now_ms() / 1000,
            entitlements_max_age_s=self._entitlements_max_age_s,
        )

    async def _evaluated(
        self, course: DecisionContext, chosen: ChosenLease, action: Action
    ) -> Refusal | ApprovalRequired | None:
        now_ms = self._clock.now_ms()
        return await self._evaluator.answer(
            chosen,
            action,
            id=course.id,
            reads=course.attempt.method in SAFE_METHODS,
            earlier=lambda: self._earlier.of(chosen.lease.task_id, now_ms),
            now_ms=now_ms,
        )

    async def _unequipped(self, course: DecisionContext, lease: Lease, target: TargetState) -> Refusal | None:
        """Why it cannot be forwarded though it is allowed: what is recorded as allowed has its credential by then."""
        refusal = None
        try:
            course.injected = await self._injector.headers(lease, target)
        except UnavailableError as error:
            refusal = refuse(error.code, error.message[:1000], status=UNAVAILABLE)
        # It may have been cut while others were asked; this gateway may have given its word on that.
        problem = self._view.table.problem(lease)
        return refuse_for(problem) if problem is not None else self._stale() or refusal

    def _stale(self) -> Refusal | None:
        denial = self._view.denial()
        return Refusal(UNAVAILABLE, (denial,)) if denial is not None else None

    # --- a person's word, where the bundle wants it ---

    def _unasked(self, course: DecisionContext, presented: PresentedIdentity) -> Refusal | None:
        """Where it goes on all the same, in observe mode, nobody is asked."""
        refusal = refuse("approval_required", "a person would be asked about this action")
        observed = self._observing.goes_on(refusal, course.target, presented, course.attempt)
        return refusal if observed is not None else None

    async def _approved(
        self, course: DecisionContext, sender: Sender, ask: ApprovalRequired
    ) -> Refusal | None:
        """Wait for a yes to exactly this, and look at everything once more: it is used when nothing else lacks."""
        if course.target is None or headers_to_approve(course.attempt, course.target.state) is None:
            message = (
                "a person is asked about this, with its headers, and this data plane does not show all that it "
                "forwards: go through the gateway's own data plane"
            )
            return refuse("headers_unseen", message)
        if (refusal := await self._seen_whole(course)) is not None:
            return refusal
        waiting = _waiting(course, ask)
        if waiting is None:
            return refuse("action_unshowable", "the target does not say where it is, so nobody can be asked")
        began_ns = time.perf_counter_ns()
        try:
            course.question, refusal = await self._approvals.answered(waiting, course.patient)
        finally:
            course.waited_ns = time.perf_counter_ns() - began_ns
        if refusal is not None and refusal.status == UNAVAILABLE:
            refusal = self._stale() or refusal  # which of what it knows is not to go by
        if refusal is not None or course.question is None:
            return refusal or refuse("undecided", "nobody could be asked", status=UNAVAILABLE)
        return await self._once_more(course, sender, course.question)

    async def _seen_whole(self, course: DecisionContext) -> Refusal | None:
        if course.attempt.body is None and course.patient is not None:
            course.attempt = replace(course.attempt, body=await course.patient.read_body())
        if course.attempt.body is None:
            message = "a person is asked about this, with its body, and that was not seen whole"
            return refuse("body_unseen", message, status=CONTENT_TOO_LARGE)
        return None

    async def _once_more(self, course: DecisionContext, sender: Sender, question: Question) -> Refusal | None:
        """All that was decided before it waited is decided anew; what was approved has to be what goes on."""
        if (stale := self._stale()) is not None:
            return stale
        said = await self._looked_at(course, sender)
        if isinstance(said, Refusal):
            return said
        going_on = _waiting(course, said) if said is not None else None
        if said is not None and (going_on is None or self._approvals.same(going_on) != question.same):
            return refuse(
                "approval_stale", "what was approved is another thing by now; send it again to ask anew"
            )
        return None

    def _no_action(self, target: Compiled, attempt: Attempt) -> Refusal:
        id = target.state.target_id
        body = attempt.body
        shown = body if attempt.json or target.map.speaks_mcp(attempt.target) else None
        if (unread := target.map.not_understood(attempt.method, attempt.target, shown)) is not None:
            return refuse("rule_not_understood", f"at target {id}, {unread}")
        if target.map.reads_body(attempt.method, attempt.target) and (
            body is None or len(body) > MAX_BODY_BYTES
        ):
            message = f"what this request does at {id} stands in its body, which was not seen whole"
            return refuse("body_unseen", message, status=CONTENT_TOO_LARGE)
        if body and not attempt.json and target.map.reads_body(attempt.method, attempt.target):
            message = (
                f"what this request does at {id} stands in its body: send that with Content-Type: application/json, in "
                "UTF-8 and without Content-Encoding, so that it cannot be read as something else"
            )
            return refuse("body_not_json", message)
        return refuse("request_unmapped", f"the map of target {id} does not say what this request does")

    # --- the verdict ---

    def _observe(
        self, course: DecisionContext, refusal: Refusal, presented: PresentedIdentity, attempt: Attempt
    ) -> None:
        target = self._observing.goes_on(refusal, course.target, presented, attempt)
        if target is not None:
            course.target, course.observed = target, True

    def _verdict(
        self, course: DecisionContext, presented: PresentedIdentity, attempt: Attempt, refusal: Refusal | None
    ) -> Verdict:
        by_proof = presented.task_id is None and presented.certificate is None
        status = 200 if refusal is None else refusal.status
        return Verdict(
            course.id,
            allowed=refusal is None,
            status=status,
            reasons=() if refusal is None else refusal.reasons[:_MAX_REASONS],
            lease=course.lease,
            target=course.target.state if course.target is not None else None,
            action=course.action,
            nonce=self._identifier.nonce() if by_proof else None,
            retry_after_s=_RATE_RETRY_S if status in (UNAVAILABLE, TOO_MANY_REQUESTS) else None,
            task_id=course.task_id,
            observed=course.observed,
            mcp=self._exchange(course, attempt) if refusal is None else None,
            rpc=self._rpc(course, attempt) if refusal is not None else None,
            headers=_approved_headers(course) if refusal is None else None,
            injected=course.injected if refusal is None else None,
        )

    def _exchange(self, course: DecisionContext, attempt: Attempt) -> McpExchange | None:
        if course.spoken is None or course.target is None or course.lease is None:
            return None
        return self._mcp.exchange(
            course.spoken,
            attempt,
            course.target,
            course.lease,
            lambda outcome: self._telling.record_answer(course, outcome),
        )

    def _rpc(self, course: DecisionContext, attempt: Attempt) -> RpcErrorReply | None:
        """How a refusal is told to who posted a message: it may not have come to reading that."""
        target = course.target if course.target is not None else self._targets.find(attempt)
        speaks = isinstance(target, Compiled) and target.map.speaks_mcp(attempt.target)
        return rpc_of(attempt) if speaks and attempt.method == "POST" else None


def _approved_headers(course: DecisionContext) -> Headers | None:
    """The headers that a person approved; None where nobody was asked."""
    if course.question is None or course.target is None:
        return None
    return headers_to_approve(course.attempt, course.target.state)


def _nowhere(target: Compiled, attempt: Attempt) -> Refusal | None:
    """Refused, so that everything which is recorded as allowed can be sent."""
    if target.can_be_sent(attempt):
        return None
    return refuse("target_nowhere", _says_no_place(target.state), status=UNAVAILABLE)


def _says_no_place(target: TargetState) -> str:
    return f"target {target.target_id} does not say where it is: an operator adds it with --setting url=https://..."


def _waiting(course: DecisionContext, ask: ApprovalRequired) -> Waiting | None:
    """What a person is asked about: exactly what would go on. None where something of it is not known."""
    chosen, target, action, attempt = course.chosen, course.target, course.action, course.attempt
    if chosen is None or target is None or target.url is None or action is None or attempt.body is None:
        return None
    if (headers := headers_to_approve(attempt, target.state)) is None:
        return None
    url = f"{target.url}{attempt.target}"
    return Waiting(course.id, attempt.method, url, attempt.body, headers, chosen, action, ask)
