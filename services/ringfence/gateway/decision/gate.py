"""The decision core: runs the steps of a decision in order, and records the result.

The steps: freshness of the view, authentication of the sender, the data plane's rate limits, the target, what the
request does there (request map), authorization by a lease, the bundle, approval by a person, the credential. The first
step that refuses ends the decision.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from ringfence.backends.target_settings import TargetSettingsError
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
from ringfence.gateway.decision.approval_questions import Question, headers_to_approve
from ringfence.gateway.decision.approvals import ActionToApprove, Approvals
from ringfence.gateway.decision.context import ActionIds, DecisionContext, ObserveMode
from ringfence.gateway.decision.decision_events import DecisionEvents
from ringfence.gateway.decision.evaluator import Evaluator
from ringfence.gateway.decision.fast_path import DecisionFastPath
from ringfence.gateway.decision.git import git_actions
from ringfence.gateway.decision.injection import Injector
from ringfence.gateway.decision.mcp import McpRequests, rpc_error_reply
from ringfence.gateway.decision.model_budget import ModelMeters
from ringfence.gateway.decision.sender import SenderAuthenticator
from ringfence.gateway.decision.targets import CompiledTarget, Targets
from ringfence.gateway.domain import (
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
from ringfence.gateway.events.recorder import Recorder, RefusalCounts
from ringfence.gateway.events.spool import SpoolFullError
from ringfence.gateway.events.task_history import TaskHistory
from ringfence.gateway.state.view import View
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.git.endpoints import GitEndpoint
from ringfence.model.http_targets import MAX_BODY_BYTES, Action
from ringfence.model.mcp.headers import is_known
from ringfence.model.target_settings import STDIO_URL
from ringfence.model.verdict import ALLOWED, Allowed, Refused

log = logging.getLogger(__name__)

_MAX_REASONS: Final = 20
_RATE_RETRY_S: Final = 5
_RETRY_HOLD_S: Final = 25.0
"""The time for which an MCP client's retry is held while a person is asked. The official SDKs give a retry 30 s or
more, and try ten times.
"""


_FOR_OPERATORS: Final = frozenset({Code.TARGET_NOWHERE, Code.ACCESS_MISSING})
"""Refusals that no retry resolves: an operator configures target or gateway."""


@dataclass(frozen=True, slots=True)
class DecisionSteps:
    """The parts of a gate that carry out the steps of a decision."""

    authenticator: SenderAuthenticator
    targets: Targets
    evaluator: Evaluator
    approvals: Approvals
    injector: Injector
    meters: ModelMeters


@dataclass(frozen=True, slots=True)
class DecisionLog:
    """The parts of a gate that record decisions."""

    gateway: str
    """The SPIFFE ID of this gateway, for events."""
    recorder: Recorder
    refusal_counts: RefusalCounts


@dataclass(frozen=True, slots=True)
class DecisionSettings:
    entitlements_max_age_s: int
    observe: Collection[str] = ()
    """The ids of the targets that are only observed."""
    fast_path: bool = True
    """Whether decisions are cached for repeated requests; without, each is decided step by step."""


class DecisionGate:
    """The `Gate` of this gateway. See the protocol for the contract of each method."""

    def __init__(
        self,
        view: View,
        steps: DecisionSteps,
        decision_log: DecisionLog,
        settings: DecisionSettings,
        *,
        clock: Clock,
        key: Callable[[], SigningKey],
    ) -> None:
        """`key`: the current key of this gateway; that which seals request states of MCP is derived from it."""
        recorder, gateway = decision_log.recorder, decision_log.gateway
        self._view = view
        self._targets = targets = steps.targets
        self._authenticator = steps.authenticator
        self._evaluator = steps.evaluator
        self._injector = steps.injector
        self._meters = steps.meters
        self._refusal_counts = decision_log.refusal_counts
        self._approvals = steps.approvals
        self._clock = clock
        self._entitlements_max_age_s = settings.entitlements_max_age_s
        self._ids = ActionIds()
        self._task_history = TaskHistory()
        self._fast_path: DecisionFastPath | None = None
        self._authorize = self._authorize_uncached
        if settings.fast_path:
            self._fast_path = DecisionFastPath(
                view, targets, steps.authenticator, steps.evaluator, steps.injector, recorder, self._task_history,
                self._ids, clock,
                gateway=gateway, entitlements_max_age_s=settings.entitlements_max_age_s,
                authorize=self._authorize_uncached,
            )  # fmt: skip
            self._authorize = self._fast_path.authorize
        self._events = DecisionEvents(
            view, targets, recorder, self._task_history, clock, gateway=gateway, fast_path=self._fast_path
        )
        self._observe_mode = ObserveMode(targets, settings.observe)
        self._mcp = McpRequests(view.table, clock, key)

    @property
    def events(self) -> DecisionEvents:
        return self._events

    # --- interface of data planes ---

    def reads_body(self, attempt: Attempt) -> bool:
        target = self._targets.find(attempt)
        return isinstance(target, CompiledTarget) and target.map.reads_body(attempt.method, attempt.target)

    def git_endpoint(self, attempt: Attempt) -> GitEndpoint | None:
        target = self._targets.find(attempt)
        return (
            target.map.git_endpoint(attempt.method, attempt.target)
            if isinstance(target, CompiledTarget)
            else None
        )

    async def decide(
        self,
        presented: PresentedIdentity,
        attempt: Attempt,
        rate_check: RateCheck | None = None,
        holdable: HoldableRequest | None = None,
    ) -> Verdict:
        context = DecisionContext(self._ids.new(), attempt, holdable)
        try:
            result = await self._decide(context, presented, attempt, rate_check)
        except Exception:  # fail closed
            log.exception("a request could not be decided")
            result = refuse(Code.UNDECIDED, "the gateway could not decide this")
        if isinstance(result, Refusal) and context.unexamined and not context.observed:
            return self._record_counted(context, presented, attempt, result)
        verdict = self._verdict(context, presented, attempt, result)
        try:
            self._events.record(context, presented, verdict)
            for action in context.more_actions if verdict.allowed else ():
                one = replace(context, id=self._ids.new(), action=action)
                self._events.record(one, presented, verdict)
        except SpoolFullError as error:
            if context.meter is not None:
                context.meter.finish()
            log.error("nothing is let pass: %s", error)
            reason = Reason(
                code=error.code, message="what is decided cannot be recorded now; ask again later"
            )
            return Verdict(context.id, allowed=False, status=UNAVAILABLE, reasons=(reason,))
        return verdict

    def _record_counted(
        self, context: DecisionContext, presented: PresentedIdentity, attempt: Attempt, refusal: Refusal
    ) -> Verdict:
        """The verdict on a request that was not examined. These refusals are counted: they cost the sender nothing."""
        if refusal.reasons[0].code == Code.USE_DPOP_NONCE:
            return self._verdict(context, presented, attempt, refusal)
        kind = self._events.kind(context, presented, attempt, refusal)
        counted_by = self._refusal_counts.count(kind, refusal.reasons[0])
        if counted_by is None:
            verdict = self._verdict(context, presented, attempt, refusal)
            try:
                self._events.record(context, presented, verdict, kind.target_id)
                return verdict
            except SpoolFullError as error:
                log.error("what is refused is counted, and not recorded yet: %s", error)
                context.id = self._refusal_counts.count_unrecorded(kind)
                return self._verdict(context, presented, attempt, refusal)
        context.id = counted_by
        verdict = self._verdict(context, presented, attempt, refusal)
        self._events.count(context, verdict)
        return verdict

    def cached_allowance(self, presented: PresentedIdentity, attempt: Attempt) -> CachedAllowance | None:
        return self._fast_path.cached_decision(presented, attempt) if self._fast_path is not None else None

    async def headers_to_inject(self, verdict: Verdict) -> Mapping[str, str]:
        if not verdict.allowed or verdict.lease is None or verdict.injected is None:
            raise UnavailableError("this request was not allowed: nothing is injected")
        if isinstance(freshness := self._view.check_freshness(), Refused):
            raise UnavailableError(freshness.reason.message, code=ReceivedCode(freshness.reason.code))
        if isinstance(live := self._view.table.check_live(verdict.lease), Refused):
            raise UnavailableError(live.reason.message, code=ReceivedCode(live.reason.code))
        return verdict.injected

    def upstream(self, target: TargetState) -> str:
        url = self._targets.url_of(target)
        if url is None:
            raise UnavailableError(_no_url_message(target))
        return url

    def problem(self, target: TargetState) -> str | None:
        """Return why this gateway cannot send requests to a target with a credential, for operators; None if it can."""
        try:
            return self._injector.problem(target) if self._targets.url_of(target) else _no_url_message(target)
        except TargetSettingsError as error:
            return str(error)

    def on_lease_end(self, lease_id: str, on_ended: Callable[[], None]) -> Callable[[], None]:
        if self._view.stale() is not None:
            on_ended()
            return lambda: None
        return self._view.table.watch(lease_id, on_ended)

    def watch(self, lease_id: str, on_ended: Callable[[], None]) -> None:
        self._view.table.watch_live(lease_id, on_ended)

    def unwatch(self, lease_id: str, on_ended: Callable[[], None]) -> None:
        self._view.table.unwatch(lease_id, on_ended)

    def check_view(self) -> Allowed | Refused:
        return self._view.check_view()

    def view_expired(self) -> bool:
        return self._view.view_expired()

    # --- the steps, in their order ---

    async def _decide(
        self,
        context: DecisionContext,
        presented: PresentedIdentity,
        attempt: Attempt,
        rate_check: RateCheck | None,
    ) -> Allowed | Refusal:
        """Decide on a request:

        1. The checks up to a person's approval (`_check`).
        2. The target can be reached (`_check_url`).
        3. The credential is available, and the lease still live (`_fetch_credential`).
        4. The approval, if one was required, can be used (`Approvals.use_approval`).
        5. A request to a language model is within the limits of its task (`ModelMeters.open`).
        """
        began_ns = time.perf_counter_ns()
        try:
            result = await self._check(context, presented, attempt, rate_check)
        finally:
            context.took_ns = time.perf_counter_ns() - began_ns - context.waited_ns
        if isinstance(result, Allowed) and context.target is not None:
            result = _check_url(context.target, attempt)
        if isinstance(result, Allowed) and context.chosen is not None and context.target is not None:
            result = await self._fetch_credential(context, context.chosen.lease, context.target.state)
        if isinstance(result, Allowed) and context.question is not None:
            result = self._approvals.use_approval(context.question)
        if isinstance(result, Allowed):
            result = await self._open_meter(context)
        if isinstance(result, Refusal):
            self._apply_observe_mode(context, result, presented, attempt)
        return result

    async def _check(
        self,
        context: DecisionContext,
        presented: PresentedIdentity,
        attempt: Attempt,
        rate_check: RateCheck | None,
    ) -> Allowed | Refusal:
        """Run the checks up to a person's approval:

        1. The view is fresh.
        2. The sender is authenticated.
        3. The data plane's rate limits allow one more request of its agent.
        4. Target, request map, lease and bundle allow the action (`_authorize_action`).
        5. If the bundle requires an approval: a person may be asked (`_check_askable`), and gives it.
        """
        context.unexamined = True
        if isinstance(freshness := self._check_freshness(), Refusal):
            return freshness
        sender = await self._authenticator.authenticate(presented, attempt)
        if isinstance(sender, Refusal):
            context.sender = sender.sender
            return sender
        context.sender = sender
        if rate_check is not None and isinstance(rate := rate_check(sender.agent_id), Refused):
            return Refusal(TOO_MANY_REQUESTS, (rate.reason,))
        context.unexamined = False
        result = await self._authorize_action(context, sender)
        if not isinstance(result, ApprovalRequired):
            return result
        if isinstance(askable := self._check_askable(context, presented), Refusal):
            return askable
        return await self._wait_for_approval(context, sender, result)

    async def _authorize_action(
        self, context: DecisionContext, sender: Sender
    ) -> Allowed | Refusal | ApprovalRequired:
        """Authorize what a request does:

        1. The request has a target.
        2. For a target inside of a run: it came through that run's socket (`_check_run_socket`).
        3. For an MCP message: all of its actions are allowed (`_authorize_mcp`).
           At a Git server: all of the request's actions are allowed (`_authorize_git`). Otherwise:
        4. The target's request map says what the request does.
        5. A lease allows that (`domain.authorize`).
        6. The bundle allows it (`Evaluator.answer`).
        """
        attempt = context.attempt
        target = self._targets.find(attempt)
        if isinstance(target, Refusal):
            return target
        context.target = target
        if target.url == STDIO_URL:
            run_socket = _check_run_socket(target, attempt, sender)
            if isinstance(run_socket, Refusal):
                return run_socket
        if target.map.git_endpoint(attempt.method, attempt.target) is not None:
            return await self._authorize_git(context, target, sender)
        if target.map.speaks_mcp(attempt.target):
            return await self._authorize_mcp(context, target, sender)
        action = target.map.action(attempt.method, attempt.target, attempt.body if attempt.json else None)
        if action is None:
            return self._unmapped_refusal(target, attempt)
        context.action = action
        chosen = self._authorize(sender, target.state, action)
        if isinstance(chosen, Refusal):
            return chosen
        context.chosen = chosen
        return await self._ask_bundle(context, chosen, action)

    async def _authorize_mcp(
        self, context: DecisionContext, target: CompiledTarget, sender: Sender
    ) -> Allowed | Refusal | ApprovalRequired:
        """Authorize all actions of one MCP message, by one lease. The first action stands for the message in events.

        1. The message can be read, and belongs to the sender (`McpRequests.read`).
        2. The target's request map has a rule for each of its actions.
        3. All actions are allowed (`_authorize_all`).
        4. At most one action requires a person's approval.
        """
        mcp_request = self._mcp.read(context.attempt, target, sender)
        if isinstance(mcp_request, Refusal):
            return mcp_request
        context.mcp_request, context.sender = mcp_request, mcp_request.sender
        sender = mcp_request.sender
        actions = mcp_request.actions(target, context.attempt)
        if actions is None:
            message = mcp_request.message
            if message is not None and not is_known(message.method):
                text = f"no revision of MCP has {message.method[:64]}, and no rule of the target names it"
                return refuse(Code.MCP_METHOD, text)
            return self._unmapped_refusal(target, context.attempt)
        required = await self._authorize_all(context, target, sender, actions)
        if isinstance(required, Refusal):
            return required
        if len(required) > 1:
            text = "several things in this message need a person's approval each: send them one at a time"
            return refuse(Code.MCP_SEVERAL_APPROVALS, text)
        if required:
            context.action, context.chosen, approval = required[0]
            return approval
        context.action = actions[0]
        return ALLOWED

    async def _authorize_git(
        self, context: DecisionContext, target: CompiledTarget, sender: Sender
    ) -> Allowed | Refusal | ApprovalRequired:
        """Authorize all actions of one request to a Git server, by one lease.

        1. The data plane reads such requests (`git_needs_plane`).
        2. The target's request map has a rule for each of its actions.
        3. All actions are allowed (`_authorize_all`).
        4. No action of a push requires a person's approval: the pack cannot be shown (`body_unseen`).
        """
        request = context.attempt.git
        if request is None:
            message = f"{target.state.target_id} is a Git server: go through the gateway's own data plane"
            return refuse(Code.GIT_NEEDS_PLANE, message)
        actions = git_actions(request, target, sender, self._view.table)
        if actions is None:
            return self._unmapped_refusal(target, context.attempt)
        required = await self._authorize_all(context, target, sender, actions)
        if isinstance(required, Refusal):
            return required
        if required and request.endpoint.service == "git-receive-pack":
            message = (
                "a person cannot approve a single push, as its pack cannot be shown: set a floor for the verb"
            )
            return refuse(Code.BODY_UNSEEN, message)
        if required:
            context.action, context.chosen, approval = required[0]
            return approval
        context.action, *more = actions
        context.more_actions = tuple(more)
        return ALLOWED

    async def _authorize_all(
        self, context: DecisionContext, target: CompiledTarget, sender: Sender, actions: Sequence[Action]
    ) -> Refusal | list[tuple[Action, ChosenLease, ApprovalRequired]]:
        """Authorize several actions by one lease. Returns those that require a person's approval.

        1. For each action: a lease allows it (`domain.authorize`), which is the one of the actions before.
        2. For each action: the bundle allows it (`Evaluator.answer`).
        """
        required: list[tuple[Action, ChosenLease, ApprovalRequired]] = []
        for action in actions:
            context.action = action
            chosen = self._authorize(sender, target.state, action)
            if isinstance(chosen, Refusal):
                return chosen
            context.chosen = chosen
            result = await self._ask_bundle(context, chosen, action)
            if isinstance(result, Refusal):
                return result
            if not isinstance(result, Allowed):
                required.append((action, chosen, result))
            sender = replace(sender, lease_id=chosen.lease.lease_id, task_id=chosen.lease.task_id)
        return required

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

    async def _ask_bundle(
        self, context: DecisionContext, chosen: ChosenLease, action: Action
    ) -> Allowed | Refusal | ApprovalRequired:
        now_ms = self._clock.now_ms()
        return await self._evaluator.answer(
            chosen,
            action,
            id=context.id,
            reads=_reads(context.attempt),
            task_history=lambda: self._task_history.of(chosen.lease.task_id, now_ms),
            now_ms=now_ms,
        )

    async def _fetch_credential(
        self, context: DecisionContext, lease: Lease, target: TargetState
    ) -> Allowed | Refusal:
        """Fetch the credential of an allowed request, and check the lease and the view once more after that await.

        1. The lease is still live: it may have been cut meanwhile, and this gateway may have acknowledged that.
        2. The view is still fresh.
        3. There is a credential.
        """
        fetched: Allowed | Refusal = ALLOWED
        try:
            context.injected = await self._injector.headers(lease, target)
        except UnavailableError as error:
            fetched = refuse(error.code, error.message[:1000], status=UNAVAILABLE)
        if isinstance(live := self._view.table.check_live(lease), Refused):
            return refuse_for(live.reason)
        if isinstance(freshness := self._check_freshness(), Refusal):
            return freshness
        return fetched

    async def _open_meter(self, context: DecisionContext) -> Allowed | Refusal:
        opened = await self._meters.open(context, partial(self._events.record_usage, context))
        if isinstance(opened, Refusal):
            return opened
        if opened is not None:
            context.meter, context.metered_body = opened, opened.body
        return ALLOWED

    def _check_freshness(self) -> Allowed | Refusal:
        """Check that the view is fresh; if it is not, nothing can be decided (503)."""
        freshness = self._view.check_freshness()
        return Refusal(UNAVAILABLE, (freshness.reason,)) if isinstance(freshness, Refused) else ALLOWED

    # --- approval by a person, if the bundle requires it ---

    def _check_askable(self, context: DecisionContext, presented: PresentedIdentity) -> Allowed | Refusal:
        """Check whether a person should be asked: not if the request is forwarded anyway, in observe mode."""
        refusal = refuse(Code.APPROVAL_REQUIRED, "a person would be asked about this action")
        observed = self._observe_mode.forward_target(refusal, context.target, presented, context.attempt)
        return refusal if observed is not None else ALLOWED

    async def _wait_for_approval(
        self, context: DecisionContext, sender: Sender, approval: ApprovalRequired
    ) -> Allowed | Refusal:
        """Wait for an approval, then check everything again. The approval is used only if no other check refuses.

        1. The data plane shows all headers that it forwards (`headers_unseen`).
        2. The whole body was read (`body_unseen`).
        3. All of the action can be shown to a person (`action_unshowable`).
        4. A person approves it in time (`Approvals.wait_for_answer`).
        5. The action is still allowed, and is what was approved (`_check_again`).
        """
        if context.target is None or headers_to_approve(context.attempt, context.target.state) is None:
            message = (
                "a person is asked about this, with its headers, and this data plane does not show all that it "
                "forwards: go through the gateway's own data plane"
            )
            return refuse(Code.HEADERS_UNSEEN, message)
        if isinstance(body := await self._read_whole_body(context), Refusal):
            return body
        waiting = _pending_action(context, approval)
        if waiting is None:
            text = "the target does not say where it is, or a number in the message is too large to be told exactly"
            return refuse(Code.ACTION_UNSHOWABLE, f"nobody can be asked: {text}")
        began_ns = time.perf_counter_ns()
        try:
            context.question, answer = await self._approvals.wait_for_answer(
                waiting, context.holdable, wait_s=_hold_s(context)
            )
        finally:
            context.waited_ns = time.perf_counter_ns() - began_ns
        if isinstance(answer, Refusal):
            if answer.reasons[0].code == Code.APPROVAL_PENDING:
                self._offer_retry(context)
            if answer.status == UNAVAILABLE:
                freshness = self._check_freshness()  # its refusal names what is stale
                return freshness if isinstance(freshness, Refusal) else answer
            return answer
        if context.question is None:
            return refuse(Code.UNDECIDED, "nobody could be asked")
        return await self._check_again(context, sender, context.question)

    def _offer_retry(self, context: DecisionContext) -> None:
        """Make the sealed state with which an MCP client retries while a person is asked."""
        mcp_request, lease = context.mcp_request, context.lease
        if mcp_request is not None and lease is not None and mcp_request.learns_of_approval:
            context.request_state = self._mcp.approval_state(mcp_request, lease)

    async def _read_whole_body(self, context: DecisionContext) -> Allowed | Refusal:
        """Read the rest of the request's body into the context. Refused if the data plane does not have all of it."""
        if context.attempt.body is None and context.holdable is not None:
            context.attempt = replace(context.attempt, body=await context.holdable.read_body())
        if context.attempt.body is None:
            message = "a person is asked about this, with its body, and that was not seen whole"
            return refuse(Code.BODY_UNSEEN, message)
        return ALLOWED

    async def _check_again(
        self, context: DecisionContext, sender: Sender, question: Question
    ) -> Allowed | Refusal:
        """Repeat the decision after waiting:

        1. The view is fresh.
        2. Target, request map, lease and bundle allow the action (`_authorize_action`).
        3. If an approval is still required: the request is the one that was approved (`approval_stale`).
        """
        if isinstance(freshness := self._check_freshness(), Refusal):
            return freshness
        result = await self._authorize_action(context, sender)
        if not isinstance(result, ApprovalRequired):
            return result
        repeated = _pending_action(context, result)
        if repeated is None or self._approvals.approval_key(repeated) != question.approval_key:
            return refuse(
                Code.APPROVAL_STALE, "what was approved is another thing by now; send it again to ask anew"
            )
        return ALLOWED

    def _unmapped_refusal(self, target: CompiledTarget, attempt: Attempt) -> Refusal:
        """The refusal of a request for which the target's map has no action, by the first of these causes:

        1. The map has a rule that this gateway does not understand (`rule_not_understood`).
        2. A rule reads the body, and that was not seen whole (`body_unseen`).
        3. A rule reads the body, and that is not JSON for certain (`body_not_json`).
        4. It is a request to a model that is ambiguous (`model_request_invalid`).
        5. No rule fits (`request_unmapped`).
        """
        id = target.state.target_id
        body = attempt.body
        shown = body if attempt.json or target.map.speaks_mcp(attempt.target) else None
        if (unread := target.map.not_understood(attempt.method, attempt.target, shown)) is not None:
            return refuse(Code.RULE_NOT_UNDERSTOOD, f"at target {id}, {unread}")
        if target.map.reads_body(attempt.method, attempt.target) and (
            body is None or len(body) > MAX_BODY_BYTES
        ):
            message = f"what this request does at {id} stands in its body, which was not seen whole"
            return refuse(Code.BODY_UNSEEN, message)
        if body and not attempt.json and target.map.reads_body(attempt.method, attempt.target):
            message = (
                f"what this request does at {id} stands in its body: send that with Content-Type: application/json, in "
                "UTF-8 and without Content-Encoding, so that it cannot be read as something else"
            )
            return refuse(Code.BODY_NOT_JSON, message)
        if (problem := target.map.model_request_problem(attempt.method, attempt.target, shown)) is not None:
            return refuse(
                Code.MODEL_REQUEST_INVALID,
                f"which model of {id} this request is for is not certain: {problem}",
            )
        return refuse(Code.REQUEST_UNMAPPED, f"the map of target {id} does not say what this request does")

    # --- the verdict ---

    def _apply_observe_mode(
        self, context: DecisionContext, refusal: Refusal, presented: PresentedIdentity, attempt: Attempt
    ) -> None:
        target = self._observe_mode.forward_target(refusal, context.target, presented, attempt)
        if target is not None:
            context.target, context.observed = target, True

    def _verdict(
        self,
        context: DecisionContext,
        presented: PresentedIdentity,
        attempt: Attempt,
        result: Allowed | Refusal,
    ) -> Verdict:
        by_proof = presented.task_id is None and presented.certificate is None
        allowed = isinstance(result, Allowed)
        refusal = result if isinstance(result, Refusal) else None
        status = 200 if refusal is None else refusal.status
        return Verdict(
            context.id,
            allowed=allowed,
            status=status,
            reasons=() if refusal is None else refusal.reasons[:_MAX_REASONS],
            lease=context.lease,
            target=context.target.state if context.target is not None else None,
            action=context.action,
            nonce=self._authenticator.nonce() if by_proof else None,
            retry_after_s=None if refusal is None else _retry_after_s(refusal),
            task_id=context.task_id,
            observed=context.observed,
            mcp=self._mcp_exchange(context, attempt) if allowed else None,
            meter=context.meter if allowed else None,
            rpc=self._rpc_error_reply(context, attempt) if not allowed else None,
            git=attempt.git if not allowed else None,
            body=_forwarded_body(context) if allowed or context.observed else None,
            headers=_approved_headers(context) if allowed else None,
            injected=context.injected if allowed else None,
        )

    def _mcp_exchange(self, context: DecisionContext, attempt: Attempt) -> McpExchange | None:
        if context.mcp_request is None or context.target is None or context.lease is None:
            return None
        return self._mcp.exchange(
            context.mcp_request,
            attempt,
            context.target,
            context.lease,
            lambda outcome: self._events.record_mcp_outcome(context, outcome),
        )

    def _rpc_error_reply(self, context: DecisionContext, attempt: Attempt) -> RpcErrorReply | None:
        """The reply that carries the refusal of a posted MCP message; None for other requests."""
        target = context.target if context.target is not None else self._targets.find(attempt)
        speaks = isinstance(target, CompiledTarget) and target.map.speaks_mcp(attempt.target)
        if not speaks or attempt.method != "POST":
            return None
        reply = rpc_error_reply(attempt)
        return replace(reply, request_state=context.request_state) if reply.id is not None else reply


def _reads(attempt: Attempt) -> bool:
    """Tell if a request only reads."""
    return attempt.git.reads if attempt.git is not None else attempt.method in SAFE_METHODS


def _hold_s(context: DecisionContext) -> float | None:
    """The time for which a request is held while a person is asked; None for as long as others."""
    if context.mcp_request is None or not context.mcp_request.learns_of_approval:
        return None
    return _RETRY_HOLD_S if context.mcp_request.waits_for_approval else 0.0


def _forwarded_body(context: DecisionContext) -> bytes | None:
    """The body to forward, if that is not the one that was sent."""
    if context.metered_body is not None:
        return context.metered_body
    if context.mcp_request is None:
        return None
    return context.mcp_request.forwarded_body(approved=context.question is not None and not context.observed)


def _approved_headers(context: DecisionContext) -> Headers | None:
    """The headers that a person approved; None if no person was asked."""
    if context.question is None or context.target is None:
        return None
    return headers_to_approve(context.attempt, context.target.state)


def _check_url(target: CompiledTarget, attempt: Attempt) -> Allowed | Refusal:
    """Check that the target has a URL: whatever is recorded as allowed can be sent."""
    if target.can_be_sent(attempt):
        return ALLOWED
    return refuse(Code.TARGET_NOWHERE, _no_url_message(target.state))


def _check_run_socket(target: CompiledTarget, attempt: Attempt, sender: Sender) -> Allowed | Refusal:
    """Check that a request for a server in a run is an MCP message, and came through a run's own socket."""
    if attempt.sent_by_gateway and sender.run_id is not None and target.map.speaks_mcp(attempt.target):
        return ALLOWED
    message = (
        f"target {target.state.target_id} is an MCP server inside of a run: start it with ringfence mcp wrap, and send "
        "it messages by that command's standard input alone"
    )
    return refuse(Code.STDIO_OUTSIDE_RUN, message)


def _retry_after_s(refusal: Refusal) -> int | None:
    """How soon to retry; None where only an operator can help."""
    if refusal.status not in (UNAVAILABLE, TOO_MANY_REQUESTS):
        return None
    return None if any(one.code in _FOR_OPERATORS for one in refusal.reasons) else _RATE_RETRY_S


def _no_url_message(target: TargetState) -> str:
    return (
        f"target {target.target_id} does not say where it is; an operator runs: ringfence target add "
        f"{target.target_id} ... --setting url=https://HOST"
    )


def _pending_action(context: DecisionContext, approval: ApprovalRequired) -> ActionToApprove | None:
    """The action that a person is asked to approve: exactly what would be forwarded. None if part of it is unknown."""
    chosen, target, action, attempt = context.chosen, context.target, context.action, context.attempt
    mcp_request = context.mcp_request
    posts_message = mcp_request is not None and mcp_request.message is not None
    body = mcp_request.canonical() if mcp_request is not None and posts_message else attempt.body
    if chosen is None or target is None or target.url is None or action is None or body is None:
        return None
    if (headers := headers_to_approve(attempt, target.state)) is None:
        return None
    # A server in a run is nowhere; its target is what MCP clients and rules name.
    base = f"http://{target.state.target_id}" if target.url == STDIO_URL else target.url
    url = f"{base}{attempt.target}"
    return ActionToApprove(context.id, attempt.method, url, body, headers, chosen, action, approval)
