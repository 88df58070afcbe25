"""Evaluation of one request: records, invariant, Rego bundle, approvals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from ringfence.backends.capabilities import BackendCapabilities
from ringfence.kernel.base import metrics
from ringfence.kernel.base.ids import digest
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import Signed
from ringfence.kernel.kafka.producer import to_json
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.run import Run
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.approvals import check_approver_keys
from ringfence.model.requests.facts import DeniedError, load_context, violations
from ringfence.model.verdict import Allowed
from ringfence.policy.agents.holdings import MAX_HELD, Holdings
from ringfence.policy.decisions.responder import say, step_of
from ringfence.policy.domain import (
    ApprovalRequired,
    Case,
    Evaluation,
    InputBuilder,
    RequestAllowed,
    RequestRefused,
    approver,
    refuse,
    rule,
    signer,
)
from ringfence.policy.grants import GrantBook
from ringfence.rego.engine import PolicyEngine, PolicyFailedError, PolicyResult

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.05
_WEIGHINGS = 3
"""The most evaluations of one request. Even if records change all the time, those that the request is about have
arrived by then.
"""


_TOO_MUCH = Reason(
    code=Code.HOLDS_TOO_MUCH,
    message=f"the agent holds more than {MAX_HELD} different things at once; give back what is not needed",
)


class RequestEvaluator:
    """Evaluates requests with the records as known now, at the time of the message being handled."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        engine: PolicyEngine,
        holdings: Holdings,
        feeds: Sequence[Follower],
        grants: GrantBook,
        declared: BackendCapabilities,
    ) -> None:
        """`feeds`: the followers from which the holdings learn that something is no longer held."""
        self._runtime = runtime
        self._holdings = holdings
        self._feeds = feeds
        self._grants = grants
        self._directory = directory
        self._engine = engine
        self._declared = declared
        self._inputs = InputBuilder(declared)
        self._changes = 0
        directory.on_change(self._on_change)
        directory.runs.on_change(self._on_run)

    @property
    def policy_revision(self) -> str:
        """Return the revision of the bundle in force."""
        return self._engine.revision

    async def evaluate(
        self, case: Case, at_ms: int, approvals: Sequence[Signed[Approval]] = (), *, binding: bool = True
    ) -> Evaluation:
        """Evaluate a request as of the append time `at_ms`, with the valid approvals.

        If they are not enough, a grant may replace the missing ones, and is used up by that. The agent holds what is
        allowed from then on, so its next request is evaluated with it. That does not apply to a question without
        consequences (`binding` false). A record that has not arrived *yet* causes no denial: before a denial, the
        records are read up to their end. A view that stays stale for the grace denies.
        """
        with step_of(case, "judge", self._runtime.tracing) as span:
            evaluation = await self._evaluated(case, at_ms, approvals, binding=binding)
            say(span, evaluation.ruling.outcome, evaluation.ruling.reasons)
            return evaluation

    async def _evaluated(
        self, case: Case, at_ms: int, approvals: Sequence[Signed[Approval]], *, binding: bool
    ) -> Evaluation:
        if stale := await self.stale():
            return Evaluation(refuse(Code.STALE_VIEW, stale))
        tries_left = _WEIGHINGS
        while True:
            tries_left -= 1
            # What arrives while the bundle is evaluated counts as well.
            before = self._changes, self._holdings.version(case.agent_id)
            evaluation = await self._query_with_all_held(case, at_ms, approvals)
            if binding:
                evaluation = await self._granted(case, at_ms, approvals, evaluation)
                self._holdings.record_evaluation(case, evaluation)
            if not isinstance(evaluation.ruling, RequestRefused):
                return evaluation
            await self.caught_up()
            if evaluation.input and evaluation.input["held"]:  # some of it may have ended
                grace_s = self._runtime.settings.grace_s
                await asyncio.gather(*(feed.caught_up(grace_s) for feed in self._feeds))
            if (self._changes, self._holdings.version(case.agent_id)) == before or not tries_left:
                return evaluation

    async def _granted(
        self, case: Case, at_ms: int, approvals: Sequence[Signed[Approval]], evaluation: Evaluation
    ) -> Evaluation:
        """Return a new evaluation with grants in place of the missing approvals, else the given one."""
        waiting = evaluation.ruling
        if not isinstance(waiting, ApprovalRequired):
            return evaluation
        while chosen := self._grants.fitting(case, evaluation, approvals, at_ms):
            with_grants = await self._query_with_all_held(case, at_ms, [*approvals, *chosen])
            ruling = with_grants.ruling
            if not isinstance(ruling, RequestAllowed):
                break
            if (with_grants.revisions, ruling.ttl_s) != (evaluation.revisions, waiting.ttl_s):
                break
            if self._grants.use(chosen, case.request_id):
                times = self._grants.append_times(chosen)
                return replace(with_grants, grants=chosen, grants_at_ms=times)
        return evaluation

    async def stale(self) -> str | None:
        """Return the reason why the records cannot be relied on, or None.

        Waits for the registry as long as the grace allows.
        """
        reason = self._directory.stale()
        for _ in range(ceil(self._runtime.settings.grace_s / _LOOK_AGAIN_S)):
            if reason is None:
                return None
            await asyncio.sleep(_LOOK_AGAIN_S)
            reason = self._directory.stale()
        return reason and f"{reason}; ask again when the registry is back"

    async def caught_up(self) -> bool:
        """Read the records up to their present end, as far as the grace allows. Returns whether the end was reached."""
        return await self._runtime.tables_caught_up(self._runtime.settings.grace_s)

    async def _query_with_all_held(
        self, case: Case, at_ms: int, approvals: Sequence[Signed[Approval] | Signed[Grant]]
    ) -> Evaluation:
        """Evaluate a request with everything that its agent holds at the end of the evaluation.

        Nothing is awaited after the last check of the holdings. Requests of one agent are mostly alike, and are
        evaluated concurrently. If the agent meanwhile received another kind of right, an "allowed" is evaluated again;
        then one request at a time.
        """
        agent_id = case.agent_id
        kinds = self._holdings.kinds(agent_id)
        evaluation = await self._query_engine(case, at_ms, approvals)
        if isinstance(evaluation.ruling, RequestAllowed) and self._holdings.kinds(agent_id) != kinds:
            async with self._holdings.turn(agent_id):
                while self._holdings.kinds(agent_id) != kinds:
                    kinds = self._holdings.kinds(agent_id)
                    evaluation = await self._query_engine(case, at_ms, approvals)
        return evaluation

    async def _query_engine(
        self, case: Case, at_ms: int, approvals: Sequence[Signed[Approval] | Signed[Grant]]
    ) -> Evaluation:
        try:
            facts = load_context(self._directory, case.request, case.request_id)
        except DeniedError as error:
            return Evaluation(RequestRefused((error.reason,)))
        verdicts = check_approver_keys(approvals, self._directory, facts, at_ms=at_ms)
        approvals = [
            one for one, verdict in zip(approvals, verdicts, strict=True) if isinstance(verdict, Allowed)
        ]
        max_age_s = self._runtime.settings.entitlements_max_age_s
        against = violations(facts, at_ms / 1000, max_age_s)
        against += self._declared.delivery_refusals(facts.target.state, facts.delivery)
        agent, now_s = facts.agent.state, at_ms // 1000
        held = self._holdings.held(agent.agent_id, now_s, but_for=case.request_id)
        if len(held) > MAX_HELD:
            against, held = (*against, _TOO_MUCH), held[:MAX_HELD]
        history = self._holdings.history(agent, facts.target.state.target_id, now_s)
        document = self._inputs.build(
            facts, against, self._approvers(approvals), held, history,
            requested_at_s=case.source.appended_at_ms // 1000, now_s=now_s,
        )  # fmt: skip
        input_json = to_json(document)
        try:
            answer = await self._engine.evaluate(input_json)
            result, revision = answer.result, answer.revision
        except PolicyFailedError as error:
            log.error("request %s is denied: %s", case.request_id, error, extra=rate_limited(error.code))
            metrics.POLICY_FAILURES.labels(error.code).inc()
            result = PolicyResult(False, (Reason(code=error.code, message=str(error)),), (), 0)
            revision = self._engine.revision
        ruling = rule(facts, against, result, approvals, self._directory, at_ms)
        return Evaluation(ruling, facts, facts.revisions(revision), document, digest(input_json), input_json)

    def _approvers(self, approvals: Sequence[Signed[Approval] | Signed[Grant]]) -> list[dict[str, object]]:
        approvers = []
        for user_id in sorted(set(filter(None, map(signer, approvals)))):
            try:
                entry = self._directory.user(user_id)
            except ChainError:
                entry = None
            if entry is not None:
                approvers.append(approver(entry.state))
        return approvers

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        self._changes += 1

    def _on_run(self, run: Run) -> None:
        self._changes += 1
