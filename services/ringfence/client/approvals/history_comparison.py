"""Pending credential requests: groups equivalent ones, and compares one with what people approved before.

Requests that would produce the same credential form one group, so that an approver sees each question once: somebody
who is asked the same thing ten times stops reading. The comparison covers answers to the agent's requests in the last
30 days.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.text import span
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.base import Jws, Scope, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.credential import (
    CredentialRequest,
    Delivery,
    Reason,
    RequiredClass,
    Revisions,
)
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import keys_of_agents
from ringfence.model.scope.scope import missing


@dataclass(frozen=True, slots=True)
class PendingApproval:
    """A credential request that waits for approval.

    What describes it comes from the request as the agent signed it and from verified records. The message that asks for
    the approval, signed by policy, adds only its terms, which the approval repeats, and the reasons for asking.
    """

    request_id: str
    digest: str
    """SHA-256 (hex) of the request's compact JWS. The approval signs this digest."""
    agent: str
    agent_description: str
    sponsor: str
    task_id: str
    purpose: str
    """The purpose of the task."""
    on_behalf_of: str
    target: str
    target_description: str
    scope: Scope
    reason: str
    """The agent's reason, in its own words: untrusted text."""
    requested_ttl_s: int
    requested_at: int
    """`iat` of the request, seconds since 1970."""
    ttl_s: int
    """The life of the credential, in seconds, if approved."""
    delivery: Delivery
    required: tuple[RequiredClass, ...]
    mine: tuple[RequiredClass, ...]
    """The classes of `required` that the current person may give. Empty: somebody else has to answer."""
    expires_at: int
    """Seconds since 1970. Without an answer the request is denied then."""
    revisions: Revisions
    why_asked: tuple[Reason, ...]
    """Why policy requires an approval, and what a break-glass approval would override."""
    request: Jws
    break_glass: bool = False
    """Two operators are asked to allow, once, what policy denies."""
    delegators: tuple[str, ...] = ()
    """The agents that delegated the task, the most recent first."""


GroupKey = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """One or more pending requests that are equivalent. Each is answered by a signature of its own."""

    requests: tuple[PendingApproval, ...]

    @property
    def first(self) -> PendingApproval:
        """The request to show. What it says about the credential holds for the whole group."""
        return self.requests[0]

    @property
    def reasons(self) -> tuple[str, ...]:
        """The agent's reasons, in its own words, without duplicates."""
        return tuple(dict.fromkeys(request.reason for request in self.requests))

    @property
    def expires_at(self) -> int:
        """When the first of them expires and is denied; seconds since 1970."""
        return min(request.expires_at for request in self.requests)


def group_equivalent(requests: Iterable[PendingApproval]) -> list[RequestGroup]:
    groups: dict[GroupKey, list[PendingApproval]] = {}
    for request in requests:
        groups.setdefault(group_key(request), []).append(request)
    return [RequestGroup(tuple(group)) for group in groups.values()]


def group_key(request: PendingApproval) -> GroupKey:
    """All that a credential and its approval depend on: not the agent's reason, nor the time of the request."""
    return (
        request.agent,
        request.task_id,
        _normal(request.scope),
        request.ttl_s,
        request.delivery,
        request.required,
        request.mine,
        request.revisions.model_dump_json(),
        request.request_id if request.break_glass else None,  # each of these is shown by itself
    )


def _normal(scope: Scope) -> tuple[object, ...]:
    """A scope independent of the order in which it was written."""
    parts = {
        (p.target, tuple(sorted(set(p.verbs))), tuple(sorted(set(p.resources))), repr(p.model_extra))
        for p in scope
    }
    return tuple(sorted(parts))


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

    code: Literal[Code.FIRST, Code.TARGET, Code.VERBS, Code.RESOURCES, Code.TTL, Code.DELIVERY, Code.DENIED]
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
        deviations.append(
            Deviation(Code.TTL, f"for {span(ttl_s)}, and at most {span(longest)} was approved before")
        )
    if approved and delivery not in {one.delivery for one in approved}:
        deviations.append(Deviation(Code.DELIVERY, f"delivered to the {delivery}, and never was before"))
    # Of the denied parts, those that overlap as a whole: the same again, or a part of it.
    denied_before = sum(not missing(scope, one.scope) for one in denied)
    if denied_before:
        deviations.append(Deviation(Code.DENIED, f"this was denied before, {times(denied_before)}"))
    return Comparison(len(approved), len(denied), tuple(deviations))


def _deviations(scope: Scope, approved: Sequence[PastAnswer]) -> list[Deviation]:
    if not approved:
        return [Deviation(Code.FIRST, f"nothing was approved for this agent in {DAYS} days", scope)]
    before = tuple(permission for one in approved for permission in one.scope)
    deviations: list[Deviation] = []
    for excess in missing(scope, before):
        at_target = [permission for permission in before if permission.target == excess.target]
        if not at_target:
            deviations.append(
                Deviation(Code.TARGET, f"never approved before: anything at {excess.target}", (excess,))
            )
            continue
        verbs = {verb for permission in at_target for verb in permission.verbs}
        new = tuple(verb for verb in excess.verbs if verb not in verbs)
        if new:
            part = excess.model_copy(update={"verbs": new})
            deviations.append(
                Deviation(Code.VERBS, f"never approved before: {', '.join(new)} at {excess.target}", (part,))
            )
        if old := tuple(verb for verb in excess.verbs if verb in verbs):
            part = excess.model_copy(update={"verbs": old})
            deviations.append(Deviation(Code.RESOURCES, "wider than what was approved before", (part,)))
    return deviations


def times(count: int) -> str:
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
