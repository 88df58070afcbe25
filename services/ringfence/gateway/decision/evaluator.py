"""What the Rego bundle says of an action: asked once, and gone by for as long as it says, 5 s at most."""

from __future__ import annotations

from collections import OrderedDict
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
from ringfence.kernel.kafka.producer import to_json
from ringfence.messages.credential import Reason
from ringfence.messages.registry import ActionClass, TargetState
from ringfence.model.http_targets.request_map import Action
from ringfence.model.requests.policy_view import WrittenRecords, revisions_of
from ringfence.rego.engine import Answer, PolicyEngine, PolicyFailedError, PolicyResult

LONGEST_MS: Final = 5000
"""No answer is gone by for longer, whatever the bundle says."""
MAX_REMEMBERED: Final = 20_000
_RATE: Final = "rate_exceeded"
_MAX_REASONS: Final = 50

Kind = tuple[object, ...]
"""What answers are told apart by, besides the revision of the bundle."""
_CLASSES: Final[tuple[ActionClass, ...]] = ("sponsor", "second_person", "operator")


class Allowed:
    """An answer that allowed something as it was."""

    __slots__ = ("revision", "until_ms")

    def __init__(self, revision: str, until_ms: int) -> None:
        self.revision = revision
        """Of the bundle."""
        self.until_ms = until_ms
        """So long it is gone by."""


NO_ANSWER: Final = Allowed("", 0)


class Evaluator:
    """Asks the engine, where no answer that still holds is at hand for this lease, action and these revisions."""

    def __init__(self, engine: PolicyEngine, declared: Callable[[TargetState], Mapping[str, str]]) -> None:
        """`declared`: what the kind of credential that a target takes says of itself."""
        self._declared = declared
        self._engine = engine
        self._records = WrittenRecords()
        self._remembered: OrderedDict[Kind, Allowed] = OrderedDict()

    def remembered(self, kind: Kind) -> Allowed:
        """The last answer that allowed it, whether that holds or not. `kind`: see `kind_of`."""
        return self._remembered.get(kind, NO_ANSWER)

    def holds(self, answer: Allowed, now_ms: int) -> bool:
        """Whether an answer is gone by at this moment."""
        return answer.until_ms > now_ms and answer.revision == self._engine.revision

    async def answer(
        self,
        chosen: ChosenLease,
        action: Action,
        *,
        id: str,
        reads: bool,
        earlier: Callable[[], Mapping[str, Any]],
        now_ms: int,
    ) -> Refusal | ApprovalRequired | None:
        """Why the bundle denies it, whose word it wants, or None. An engine that gives no answer denies.

        Only what is allowed as it is, is remembered.

        Args:
            chosen: the lease and the verified records.
            action: what the request does; `id`: its own id; `reads`: whether its method only reads.
            earlier: tells what the task did before (`Earlier.of`), where the bundle is asked.
        """
        kind = kind_of(chosen, action, reads=reads)
        if self.holds(self.remembered(kind), now_ms):
            return None
        document = self._input(chosen, action, id=id, reads=reads, earlier=earlier(), now_ms=now_ms)
        try:
            answer = await self._engine.evaluate(to_json(document))
        except PolicyFailedError as error:
            metrics.POLICY_FAILURES.labels(error.code).inc()
            return Refusal(UNAVAILABLE, (Reason(code=error.code, message=str(error)[:1000]),))
        if (denied := _denied(answer.result)) is not None:
            return denied
        if wanted := _wanted(answer, chosen, action):
            return _ask(wanted, answer.revision)
        for_ms = min(answer.result.max_ttl_s * 1000, LONGEST_MS)
        if for_ms > 0 and answer.revision == self._engine.revision:
            self._remember(kind, Allowed(answer.revision, now_ms + for_ms))
        return None

    def _remember(self, kind: Kind, answer: Allowed) -> None:
        self._remembered[kind] = answer
        self._remembered.move_to_end(kind)
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def _input(
        self,
        chosen: ChosenLease,
        action: Action,
        *,
        id: str,
        reads: bool,
        earlier: Mapping[str, Any],
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
                **self._declared(ground.target.state),
            },
            # Code has checked it, and found nothing: else the bundle would not have been asked.
            "lacking": [],
            "earlier": dict(earlier),
        }
        if ground.sponsor is not None:
            document["sponsor"] = self._records.of_sponsor(ground.sponsor)
        if ground.delegations:
            document["delegations"] = self._records.of_delegations(ground.delegations)
        return document


def kind_of(chosen: ChosenLease, action: Action, *, reads: bool) -> Kind:
    """The lease, what is done by it, and the revisions of the records."""
    ground, sponsor = chosen.ground, chosen.ground.sponsor
    return (
        chosen.lease.lease_id, chosen.lease.seq, action.verb, action.resource, reads,
        ground.agent.revision, ground.task.revision, ground.user.revision, ground.target.revision,
        (sponsor.state.user_id, sponsor.revision) if sponsor is not None else None,
        tuple(map(revisions_of, ground.delegations)),
    )  # fmt: skip


def _denied(result: PolicyResult) -> Refusal | None:
    reasons = result.deny[:_MAX_REASONS]
    if result.allow and not reasons:
        return None
    if not reasons:
        message = "policy does not allow it and gave no reason"
        reasons = (Reason(code="policy_denied", message=message),)
    status = TOO_MANY_REQUESTS if any(reason.code == _RATE for reason in reasons) else 403
    return Refusal(status, reasons)


def _wanted(answer: Answer, chosen: ChosenLease, action: Action) -> set[str]:
    """Whose word is wanted: what the target's record asks for stands, whatever the bundle says."""
    asked = (verb.ask for verb in chosen.ground.target.state.verbs if verb.verb == action.verb)
    return {*answer.result.approvals, *filter(None, asked)} - {"none"}


def _ask(wanted: set[str], revision: str) -> Refusal | ApprovalRequired:
    """That of several is not asked for: nobody waits in a connection for two people."""
    for one in _CLASSES:
        if wanted == {one}:
            return ApprovalRequired(one, revision)
    names = " and ".join(sorted(wanted))
    message = (
        f"the word of {names} is wanted, and one person is asked about an action: ask for another credential"
    )
    return refuse("approval_required", message)
