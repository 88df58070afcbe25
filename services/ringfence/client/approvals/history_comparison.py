"""How a request differs from what people approved for its agent in the last 30 days."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ringfence.client.approvals.pending_approval import PendingApproval
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.base import typ_header
from ringfence.messages.credential import CredentialRequest, Delivery
from ringfence.messages.permission import Scope
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import keys_of_agents
from ringfence.model.scope.scope import missing

log = logging.getLogger(__name__)

DAYS = 30
_MAX_ANSWERS_PER_AGENT = 500
_APPROVERS = {"sponsor", "operator"}


@dataclass(frozen=True, slots=True)
class PastAnswer:
    """One answer of a person to an agent's request, or one approval given ahead."""

    verdict: Literal["approved", "denied"]
    request_id: str | None
    scope: Scope
    ttl_s: int
    delivery: Delivery


@dataclass(frozen=True, slots=True)
class Deviation:
    """One way in which a request is not as usual."""

    code: Literal["first", "target", "verbs", "resources", "ttl", "delivery", "denied"]
    message: str
    scope: Scope = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a request differs from what people answered before."""

    approved: int
    """How often somebody approved something for the agent in the last 30 days."""
    denied: int
    differences: tuple[Deviation, ...]
    """Empty where the request is as usual."""


def compare(scope: Scope, ttl_s: int, delivery: Delivery, past: Iterable[PastAnswer]) -> Comparison:
    """Compare a request with past answers: which parts of it are new, wider, longer, or were denied before.

    `ttl_s` is in seconds. The result has no differences where everything was approved before.
    """
    answers = list(past)
    approved = [one for one in answers if one.verdict == "approved"]
    denied = [one for one in answers if one.verdict == "denied"]
    deviations = _deviations(scope, approved)
    if approved and ttl_s > (longest := max(one.ttl_s for one in approved)):
        deviations.append(Deviation("ttl", f"for {ttl_s} s, and at most {longest} s was approved before"))
    if approved and delivery not in {one.delivery for one in approved}:
        deviations.append(Deviation("delivery", f"delivered to the {delivery}, and never was before"))
    # Of the denied parts, those that overlap as a whole: the same again, or a part of it.
    denied_before = sum(not missing(scope, one.scope) for one in denied)
    if denied_before:
        deviations.append(Deviation("denied", f"this was denied before, {_times(denied_before)}"))
    return Comparison(len(approved), len(denied), tuple(deviations))


def _deviations(scope: Scope, approved: Sequence[PastAnswer]) -> list[Deviation]:
    if not approved:
        return [Deviation("first", f"nothing was approved for this agent in {DAYS} days", scope)]
    before = tuple(permission for one in approved for permission in one.scope)
    deviations: list[Deviation] = []
    for excess in missing(scope, before):
        at_target = [permission for permission in before if permission.target == excess.target]
        if not at_target:
            deviations.append(
                Deviation("target", f"never approved before: anything at {excess.target}", (excess,))
            )
            continue
        verbs = {verb for permission in at_target for verb in permission.verbs}
        new = tuple(verb for verb in excess.verbs if verb not in verbs)
        if new:
            part = excess.model_copy(update={"verbs": new})
            deviations.append(
                Deviation("verbs", f"never approved before: {', '.join(new)} at {excess.target}", (part,))
            )
        if old := tuple(verb for verb in excess.verbs if verb in verbs):
            part = excess.model_copy(update={"verbs": old})
            deviations.append(Deviation("resources", "wider than what was approved before", (part,)))
    return deviations


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


class ApprovalHistory:
    """Recent answers of people, by agent, from `approval.response`.

    An answer counts if its signature verifies and its signer may approve. Signatures are verified on first use.
    """

    def __init__(self, directory: Directory, trust_domain: str) -> None:
        self._directory = directory
        self._trust_domain = trust_domain
        self._unread: dict[str, deque[Received]] = {}
        self._past: dict[str, deque[PastAnswer]] = {}

    def on_records(self, records: Sequence[Received]) -> None:
        """Add records. They are verified when the history of their agent is first read."""
        for record in records:
            if record.key is not None:
                self._unread.setdefault(record.key, deque(maxlen=_MAX_ANSWERS_PER_AGENT)).append(record)

    def compared(self, pending: PendingApproval, *, besides: Iterable[str] = ()) -> Comparison:
        """Compare a request with past answers. `besides`: ids of other requests that do not count."""
        left_out = {pending.request_id, *besides}
        past = [one for one in self._of(pending.agent) if one.request_id not in left_out]
        return compare(pending.scope, pending.ttl_s, pending.delivery, past)

    def _of(self, agent: str) -> Iterable[PastAnswer]:
        past = self._past.setdefault(agent, deque(maxlen=_MAX_ANSWERS_PER_AGENT))
        for record in self._unread.pop(agent, ()):
            try:
                one = self._verify_answer(record, agent)
            except (InvalidMessageError, ChainError) as error:
                log.info("ignored an answer at %s@%d: %s", record.topic_name, record.offset, error)
                continue
            if one is not None:
                past.append(one)
        return past

    def _verify_answer(self, record: Received, agent: str) -> PastAnswer | None:
        at_ms = record.appended_at_ms
        audience = self._trust_domain

        def person(iss: str, kid: str) -> VerificationKey | None:
            return self._directory.chains.user_key(iss, kid, at_ms)

        jws = parse(record.value)
        if jws.header.typ == typ_header(Grant):
            grant = verify(jws, Grant, person, audience=audience).claims
            if not self._is_approver(grant.iss) or grant.agent_id != agent:
                return None
            return PastAnswer("approved", None, grant.scope, grant.ttl_s, grant.delivery)
        if jws.header.typ != typ_header(Approval):
            return None
        approval = verify(jws, Approval, person, audience=audience).claims
        request_jws = parse(approval.request)
        request = verify(
            request_jws,
            CredentialRequest,
            keys_of_agents(self._directory, request_jws, CredentialRequest, at_ms / 1000),
            audience=audience,
        ).claims
        if subject_of(audience, request.iss, "agent") != agent or not self._is_approver(approval.iss):
            return None
        return PastAnswer(
            approval.verdict, approval.request_id, request.scope, approval.ttl_s, approval.delivery
        )

    def _is_approver(self, iss: str) -> bool:
        user_id = subject_of(self._trust_domain, iss, "user")
        entry = self._directory.user(user_id) if user_id else None
        return entry is not None and not _APPROVERS.isdisjoint(entry.state.roles)
