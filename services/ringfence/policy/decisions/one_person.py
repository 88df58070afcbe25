"""Detection of leases that rest on one person: user, sponsor and approvers have their rights by one person's word."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import Signed
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialRequest, Reason
from ringfence.model.records.directory import Directory
from ringfence.model.records.seconders import sole_givers
from ringfence.policy.domain import Case, Evaluation, RequestAllowed, signer

_DAY_MS: Final = 86_400_000
_REMEMBERED: Final = 10_000


class OnePersonDetector:
    """Publishes a finding at the first allowed request of a day for the same user, sponsor and approvers.

    Each replica remembers its own findings.
    """

    def __init__(self, runtime: Runtime, directory: Directory) -> None:
        self._runtime = runtime
        self._directory = directory
        self._reported: BoundedDict[tuple[object, ...], bool] = BoundedDict(_REMEMBERED)

    async def observe(
        self, case: Case, evaluation: Evaluation, approvals: Iterable[Signed[Approval] | Signed[Grant]]
    ) -> None:
        """Examine a decision. Without an approver nobody vouched for the lease, so there is nothing to find."""
        facts = evaluation.facts
        approvers = sorted(filter(None, {signer(one) for one in (*approvals, *evaluation.grants)}))
        if facts is None or not approvers or not isinstance(evaluation.ruling, RequestAllowed):
            return
        now_ms = self._runtime.clock.now_ms()
        user, sponsor = facts.user.state.user_id, facts.agent.state.sponsor
        people = (user, sponsor, *approvers)
        if (now_ms // _DAY_MS, *people) in self._reported:
            return
        givers = sole_givers(self._directory, people, now_ms)
        if not givers:
            return
        message = (
            f"one person is behind a lease for agent {case.agent_id}: user {user}, sponsor {sponsor} and approver "
            f"{', '.join(approvers)} all have their rights by the word of {', '.join(sorted(givers))} alone; have "
            "somebody independent approve, or two people give their rights"
        )
        await self._runtime.event(
            "finding",
            CredentialRequest.typ,
            about=(Code.ONE_PERSON, case.request_id, *people),
            reasons=(Reason(code=Code.ONE_PERSON, message=message[:2048]),),
            source=case.source,
            traceparent=case.traceparent,
            agent_id=case.agent_id,
            request_id=case.request_id,
            task_id=case.request.claims.task_id,
        )
        self._reported[now_ms // _DAY_MS, *people] = True
