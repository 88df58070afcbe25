"""The audit events of decisions, on the topic `action`, and of requests that a data plane blocked before a decision.

Decisions also have metrics. Events of blocked requests are rate limited by `RefusalCounts`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Final

from ringfence.gateway.contract import Attempt, BlockedRequest, McpOutcome, PresentedIdentity, Verdict
from ringfence.gateway.decision.context import DecisionContext
from ringfence.gateway.decision.fast_path import DecisionFastPath
from ringfence.gateway.decision.targets import CompiledTarget, Targets
from ringfence.gateway.domain import Access, Refusal, access_of, run_id_of_lease
from ringfence.gateway.events.recorder import (
    Recorder,
    RefusalCounts,
    RefusalKind,
    access_if_known,
    act_of,
    decision_counter,
    digest_of,
    label_of,
    method_of,
)
from ringfence.gateway.events.spool import SpoolFullError, destination_of, printable_method
from ringfence.gateway.events.task_history import TaskHistory
from ringfence.gateway.state.view import View
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.operations import (
    ActionAnswered,
    ActionAsked,
    ActionDecided,
    AnswerKind,
    Destination,
    ModelUsage,
    RelayEnded,
)
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.mcp.messages import CALL
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory

_FLUSH_EVERY_S: Final = 1.0
_REPLACED_MESSAGES: Final[Mapping[str, str]] = {
    Code.MALFORMED_HTTP: "the message cannot be understood for certain",
    Code.HOST_INVALID: "it names a host that not all would read alike",
}
"""The original messages quote what the sender wrote."""


@dataclass(slots=True, eq=False)
class BlockedRequests:
    """Attributes blocked requests to senders and targets, and records each kind at most once a second."""

    refusal_counts: RefusalCounts
    directory: Directory
    targets: Targets
    _: KW_ONLY
    trust_domain: str

    def add(self, blocked: BlockedRequest) -> None:
        """Record or count one blocked request (the `ReportBlocked` of data planes)."""
        message = _REPLACED_MESSAGES.get(blocked.code, blocked.message[:1000])
        self.refusal_counts.add(self._kind(blocked), Reason(code=blocked.code, message=message))

    def flush(self) -> None:
        """Record the requests that were counted since the last event of their kind."""
        self.refusal_counts.flush()

    async def run(self) -> None:
        """Flush once a second, forever."""
        while True:
            await asyncio.sleep(_FLUSH_EVERY_S)
            self.flush()

    async def close(self) -> None:
        self.flush()

    def _kind(self, blocked: BlockedRequest) -> RefusalKind:
        agent_id, task_id = self._sender_of(blocked.presented)
        agent_id = agent_id or blocked.agent_id
        target, attempt, destination = self._target_of(blocked.attempt), blocked.attempt, blocked.destination
        if attempt is not None:
            url = target.url if target is not None else None
            destination = destination_of(attempt, url, blocked.presented.handle)
        return RefusalKind(
            agent_id,
            task_id,
            target.state.target_id if target is not None else None,
            printable_method(blocked.method) if blocked.method is not None else None,
            blocked.code,
            destination=destination,
            access=None if blocked.unparsed else access_if_known(blocked.method),
            run_id=blocked.presented.run_id,
        )

    def _sender_of(self, presented: PresentedIdentity) -> tuple[str | None, str | None]:
        """Agent and task, as far as the connection alone shows them."""
        if presented.task_id is not None:
            try:
                task = self.directory.task(presented.task_id)
            except ChainError:
                return None, None
            return (task.state.agent_id, presented.task_id) if task is not None else (None, None)
        if presented.certificate is not None:
            return subject_of(self.trust_domain, presented.certificate, "agent"), None
        return None, None

    def _target_of(self, attempt: Attempt | None) -> CompiledTarget | None:
        target = self.targets.find(attempt) if attempt is not None else None
        return target if isinstance(target, CompiledTarget) else None


log = logging.getLogger(__name__)

_READ_VERB: Final = "read"
"""The verb by which a target's map marks an MCP tool call that changes nothing."""


class DecisionEvents:
    """Records each decision once."""

    def __init__(
        self,
        view: View,
        targets: Targets,
        recorder: Recorder,
        task_history: TaskHistory,
        clock: Clock,
        *,
        gateway: str,
        fast_path: DecisionFastPath | None = None,
    ) -> None:
        """`gateway`: the SPIFFE ID of this one, for events; `fast_path` formats the events of allowed actions."""
        self._table = view.table
        self._targets = targets
        self._recorder = recorder
        self._task_history = task_history
        self._clock = clock
        self._gateway = gateway
        self._fast_path = fast_path

    def count(self, context: DecisionContext, verdict: Verdict) -> tuple[Access | None, str | None, int]:
        """Update metrics and the task's history. Returns access, the target's id, and the time in ms."""
        access = _access(context)
        outcome = "allowed" if verdict.allowed else "observed" if verdict.observed else "denied"
        decision_counter(outcome, access).tally()
        metrics.DECISION_TIME.tally(context.took_ns / 1e9)
        now_ms = self._clock.now_ms()
        target_id = verdict.target.target_id if verdict.target is not None else None
        if verdict.task_id is not None:
            verb = context.action.verb if context.action is not None else None
            self._task_history.add(verdict.task_id, target_id, verb, allowed=verdict.allowed, now_ms=now_ms)
        return access, target_id, now_ms

    def kind(
        self, context: DecisionContext, presented: PresentedIdentity, attempt: Attempt, refusal: Refusal
    ) -> RefusalKind:
        """The kind of a refusal, as far as sender and target are known. Refusals of one kind are counted together."""
        target = self._targets.find(attempt)
        return RefusalKind(
            context.sender.agent_id if context.sender is not None else None,
            context.task_id,
            target.state.target_id if isinstance(target, CompiledTarget) else None,
            printable_method(attempt.method),
            refusal.reasons[0].code,
            self._lease_of(context, presented),
            label_of(attempt),
            destination_of(
                attempt, target.url if isinstance(target, CompiledTarget) else None, presented.handle
            ),
            access_if_known(attempt.method),
            self._run_of(context),
        )

    def record(
        self,
        context: DecisionContext,
        presented: PresentedIdentity,
        verdict: Verdict,
        intended_target_id: str | None = None,
    ) -> None:
        """Record a decision. Raises SpoolFullError.

        `intended_target_id`: the target of a request that was refused before its target was looked at.
        """
        access, target_id, now_ms = self.count(context, verdict)
        fast_path = self._fast_path
        if (
            fast_path is not None
            and verdict.allowed
            and context.question is None
            and context.action is not None
        ):
            self._record_allowed(fast_path, context, access, now_ms)
            return
        attempt, sender = context.attempt, context.sender
        self._recorder.record(
            ActionDecided(
                action_id=context.id,
                gateway=self._gateway,
                agent_id=sender.agent_id if sender is not None else None,
                act=_act_of(context),
                task_id=verdict.task_id,
                run_id=self._run_of(context),
                lease_id=self._lease_of(context, presented),
                target_id=target_id or intended_target_id,
                verb=context.action.verb if context.action is not None else None,
                resource=context.action.resource if context.action is not None else None,
                allowed=verdict.allowed,
                reasons=verdict.reasons,
                access=access,
                method=method_of(attempt) if verdict.allowed else printable_method(attempt.method),
                destination=None if verdict.allowed else self._destination_of(context, presented),
                request_digest=digest_of(attempt),
                latency_us=context.took_ns // 1000,
                label=label_of(attempt),
                observed=True if verdict.observed else None,
                asked=_approval_of(context),
                at_ms=now_ms,
                traceparent=context.lease.traceparent if context.lease is not None else None,
            )
        )

    def _destination_of(self, context: DecisionContext, presented: PresentedIdentity) -> Destination:
        target = context.target if context.target is not None else self._targets.find(context.attempt)
        url = target.url if isinstance(target, CompiledTarget) else None
        return destination_of(context.attempt, url, presented.handle)

    def _record_allowed(
        self, fast_path: DecisionFastPath, context: DecisionContext, access: Access | None, now_ms: int
    ) -> None:
        """The same event, formatted from a template instead of a model: most actions are allowed without a question."""
        sender, lease, action = context.sender, context.lease, context.action
        assert sender is not None, "it was allowed"
        assert lease is not None, "it was allowed"
        assert action is not None, "it was allowed"
        took_us = context.took_ns // 1000
        self._recorder.append(
            fast_path.allowed_entry(
                context.id,
                sender.agent_id,
                lease,
                action,
                access,
                context.attempt,
                took_us=took_us,
                at_ms=now_ms,
            )
        )

    def record_mcp_outcome(self, context: DecisionContext, outcome: McpOutcome) -> None:
        """Record the outcome of an MCP request."""
        metrics.MCP_ANSWERS.labels(outcome.kind).inc()
        self._record_answer(context, outcome)

    def record_usage(
        self, context: DecisionContext, kind: AnswerKind, status: int | None, usage: ModelUsage
    ) -> None:
        """Record what came of a request to a language model, and what it used."""
        metrics.MODEL_TOKENS.labels(usage.counted).inc(usage.tokens)
        self._record_answer(context, McpOutcome(kind, status), usage)

    def _record_answer(
        self, context: DecisionContext, outcome: McpOutcome, usage: ModelUsage | None = None
    ) -> None:
        """Record an answer. A full spool is only logged: it is too late to deny the request."""
        assert context.lease is not None, "it was allowed"
        assert context.action is not None, "it was allowed"
        event = ActionAnswered(
            action_id=context.id,
            gateway=self._gateway,
            agent_id=context.lease.agent_id,
            act=_act_of(context),
            task_id=context.lease.task_id,
            run_id=run_id_of_lease(context.lease),
            lease_id=context.lease.lease_id,
            target_id=context.lease.target_id,
            verb=context.action.verb,
            resource=context.action.resource,
            answer=outcome.kind,
            http_status=outcome.status,
            rpc_code=outcome.code,
            usage=usage,
            at_ms=self._clock.now_ms(),
            traceparent=context.lease.traceparent,
        )
        try:
            self._recorder.record(event)
        except SpoolFullError as error:
            log.error("what came of an action is not recorded: %s", error)

    def record_relay_end(
        self,
        context: DecisionContext,
        address: tuple[str, int],
        *,
        sent_bytes: int,
        received_bytes: int,
        duration_ms: int,
        reason: Reason | None,
    ) -> None:
        """Record the end of an allowed relay. A full spool is only logged: the bytes have passed."""
        assert context.lease is not None, "it was allowed"
        lease, run_id = context.lease, self._run_of(context)
        assert run_id is not None, "only runs have relays"
        event = RelayEnded(
            action_id=context.id,
            gateway=self._gateway,
            agent_id=lease.agent_id,
            task_id=lease.task_id,
            run_id=run_id,
            lease_id=lease.lease_id,
            target_id=lease.target_id,
            destination=Destination(host=address[0], port=address[1]),
            sent_bytes=sent_bytes,
            received_bytes=received_bytes,
            duration_ms=duration_ms,
            reason=reason,
            at_ms=self._clock.now_ms(),
            traceparent=lease.traceparent,
        )
        try:
            self._recorder.record(event)
        except SpoolFullError as error:
            log.error("the end of a relay is not recorded: %s", error)

    def _run_of(self, context: DecisionContext) -> str | None:
        """The run that sent the request, as far as that was shown: by its socket, its lease, or a proof by its key."""
        sender = context.sender
        if sender is None:
            return None
        if sender.run_id is not None:
            return sender.run_id
        lease = context.lease
        if lease is None and sender.key_proved and sender.lease_id is not None:
            lease = self._table.get(sender.lease_id)
        return run_id_of_lease(lease) if lease is not None else None

    def _lease_of(self, context: DecisionContext, presented: PresentedIdentity) -> str | None:
        """The lease that decided; otherwise the lease of the shown handle, even if it is another sender's."""
        if context.lease is not None:
            return context.lease.lease_id
        if context.sender is not None and context.sender.lease_id is not None:
            return context.sender.lease_id
        handle = presented.handle
        return handle if handle is not None and self._table.get(handle) is not None else None


def _access(context: DecisionContext) -> Access | None:
    """Read or write. All MCP messages are posted: there the method of the message decides, and for a tool call its
    verb. Fetches from Git servers are posted, too.
    """
    message = context.mcp_request.message if context.mcp_request is not None else None
    if context.attempt.git is not None:
        return "read" if context.attempt.git.reads else "write"
    if message is None:
        return access_of(context.attempt.method)
    reads = context.action is not None and context.action.verb == _READ_VERB
    return "read" if message.only_asks or (message.method == CALL and reads) else "write"


def _act_of(context: DecisionContext) -> tuple[str, ...] | None:
    """The delegation chain of the lease; None if it was not delegated."""
    lease, sender = context.lease, context.sender
    return act_of(lease, sender.agent_id if sender is not None else None) if lease is not None else None


def _approval_of(context: DecisionContext) -> ActionAsked | None:
    question = context.question
    if question is None:
        return None
    return ActionAsked(
        request_id=question.id,
        request_digest=question.signed.digest,
        by=question.answered_by,
        waited_ms=context.waited_ns // 1_000_000,
    )
