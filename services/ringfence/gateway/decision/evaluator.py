"""Asks the Rego bundle about an action, and caches what it allows for as long as it says, at most 5 s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ringfence.gateway.domain import (
    TOO_MANY_REQUESTS,
    UNAVAILABLE,
    ApprovalRequired,
    ChosenLease,
    Refusal,
    refuse,
)
from ringfence.kernel.base import metrics
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.kafka.producer import to_json
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.registry import ActionClass, TargetState
from ringfence.model.http_targets import Action
from ringfence.model.requests.policy_view import WrittenRecords, revisions_of
from ringfence.model.verdict import ALLOWED, Allowed
from ringfence.rego.engine import Answer, PolicyEngine, PolicyFailedError, PolicyResult

MAX_CACHE_MS: Final = 5000
"""No answer is cached for longer, whatever the bundle says."""
MAX_CACHED_ANSWERS: Final = 20_000
_MAX_REASONS: Final = 50

CacheKey = tuple[object, ...]
"""The key of cached answers, which also hold the revision of the bundle."""
_ACTION_CLASSES: Final[tuple[ActionClass, ...]] = ("sponsor", "second_person", "operator")


class CachedAnswer:
    """An answer of the bundle that allowed an action without approval."""

    __slots__ = ("revision", "until_ms")

    def __init__(self, revision: str, until_ms: int) -> None:
        self.revision = revision
        self.until_ms = until_ms
        """The time in ms until which the answer is valid."""


NO_ANSWER: Final = CachedAnswer("", 0)


class Evaluator:
    """Asks the policy engine unless a valid answer is cached for the same lease, action and revisions of records."""

    def __init__(
        self, engine: PolicyEngine, capabilities_of: Callable[[TargetState], Mapping[str, str]]
    ) -> None:
        """`capabilities_of`: what the kind of credential of a target declares about itself."""
        self._capabilities_of = capabilities_of
        self._engine = engine
        self._records = WrittenRecords()
        self._answers: BoundedDict[CacheKey, CachedAnswer] = BoundedDict(MAX_CACHED_ANSWERS)

    def cached_answer(self, key: CacheKey) -> CachedAnswer:
        """The last answer that allowed it, valid or not. `key`: see `cache_key`."""
        return self._answers.get(key, NO_ANSWER)

    def is_valid(self, answer: CachedAnswer, now_ms: int) -> bool:
        """Whether a cached answer may still be used at this moment."""
        return answer.until_ms > now_ms and answer.revision == self._engine.revision

    async def answer(
        self,
        chosen: ChosenLease,
        action: Action,
        *,
        id: str,
        reads: bool,
        task_history: Callable[[], Mapping[str, Any]],
        now_ms: int,
    ) -> Allowed | Refusal | ApprovalRequired:
        """Evaluate the bundle.

        1. A valid answer is cached: allowed. Only answers that allow without approval are cached.
        2. The engine gives an answer; if it fails, nothing is allowed (503).
        3. The answer allows the action (`_check_result`).
        4. Neither the answer nor the target's record requires an approval.

        Args:
            chosen: the lease and the verified records.
            action: what the request does; `id`: its own id; `reads`: whether its method only reads.
            task_history: returns what the task did before (`TaskHistory.of`); called only if the bundle is asked.
        """
        key = cache_key(chosen, action, reads=reads)
        if self.is_valid(self.cached_answer(key), now_ms):
            return ALLOWED
        document = self._input(chosen, action, id=id, reads=reads, task_history=task_history(), now_ms=now_ms)
        try:
            answer = await self._engine.evaluate(to_json(document))
        except PolicyFailedError as error:
            metrics.POLICY_FAILURES.labels(error.code).inc()
            return Refusal(UNAVAILABLE, (Reason(code=error.code, message=str(error)[:1000]),))
        if isinstance(denied := _check_result(answer.result), Refusal):
            return denied
        if required := _required_approvals(answer, chosen, action):
            return _approval_required(required, answer.revision)
        for_ms = min(answer.result.max_ttl_s * 1000, MAX_CACHE_MS)
        if for_ms > 0 and answer.revision == self._engine.revision:
            self._answers[key] = CachedAnswer(answer.revision, now_ms + for_ms)
        return ALLOWED

    def _input(
        self,
        chosen: ChosenLease,
        action: Action,
        *,
        id: str,
        reads: bool,
        task_history: Mapping[str, Any],
        now_ms: int,
    ) -> dict[str, Any]:
        lease, ground = chosen.lease, chosen.ground
        document: dict[str, Any] = {
            "now_s": now_ms // 1000,
            "action": {
                "id": id,
                "target_id": ground.target.state.target_id,
                "verb": action.verb,
                "resource": action.resource,
                "reads": reads,
            },
            "lease": {
                "lease_id": lease.lease_id,
                "agent_id": lease.agent_id,
                "task_id": lease.task_id,
                "status": lease.status,
                "deadline": lease.deadline,
            },
            "agent": self._records.of(ground.agent, ground.agent.state.agent_id),
            "task": self._records.of(ground.task, ground.task.state.task_id),
            "user": self._records.of(ground.user, ground.user.state.user_id),
            "target": {
                **self._records.of(ground.target, ground.target.state.target_id),
                **self._capabilities_of(ground.target.state),
            },
            # The invariant was checked before, in code: the bundle is asked only if nothing exceeds a limit.
            "lacking": [],
            "earlier": dict(task_history),
        }
        if ground.sponsor is not None:
            document["sponsor"] = self._records.of_sponsor(ground.sponsor)
        if ground.delegations:
            document["delegations"] = self._records.of_delegations(ground.delegations)
        return document


def cache_key(chosen: ChosenLease, action: Action, *, reads: bool) -> CacheKey:
    """The lease, the action, and the revisions of all records that the bundle sees."""
    ground, sponsor = chosen.ground, chosen.ground.sponsor
    return (
        chosen.lease.lease_id, chosen.lease.seq, action.verb, action.resource, reads,
        ground.agent.revision, ground.task.revision, ground.user.revision, ground.target.revision,
        (sponsor.state.user_id, sponsor.revision) if sponsor is not None else None,
        tuple(map(revisions_of, ground.delegations)),
    )  # fmt: skip


def _check_result(result: PolicyResult) -> Allowed | Refusal:
    """Check what the bundle decided, besides approvals: it allows the action, and gives no reason to deny it."""
    reasons = result.deny[:_MAX_REASONS]
    if result.allow and not reasons:
        return ALLOWED
    if not reasons:
        message = "policy does not allow it and gave no reason"
        reasons = (Reason(code=Code.POLICY_DENIED, message=message),)
    status = TOO_MANY_REQUESTS if any(reason.code == Code.RATE_EXCEEDED for reason in reasons) else 403
    return Refusal(status, reasons)


def _required_approvals(answer: Answer, chosen: ChosenLease, action: Action) -> set[str]:
    """The required approvals: those of the bundle, and those that the target's record requires in any case."""
    asked_by_verb = (verb.ask for verb in chosen.ground.target.state.verbs if verb.verb == action.verb)
    return {*answer.result.approvals, *filter(None, asked_by_verb)} - {"none"}


def _approval_required(required: set[str], revision: str) -> Refusal | ApprovalRequired:
    """The approval to ask for; a refusal if several are required, as a connection is not held for two people."""
    for action_class in _ACTION_CLASSES:
        if required == {action_class}:
            return ApprovalRequired(action_class, revision)
    names = " and ".join(sorted(required))
    message = (
        f"the word of {names} is wanted, and one person is asked about an action: ask for another credential"
    )
    return refuse(Code.APPROVAL_REQUIRED, message)
