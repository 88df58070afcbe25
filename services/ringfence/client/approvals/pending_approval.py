"""A credential request that waits for approval, as it is shown to a person.

Groups requests that would produce the same credential, so that an approver sees each question once.

Somebody who is asked the same thing ten times stops reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from ringfence.messages.base import Jws
from ringfence.messages.credential import (
    Delivery,
    Reason,
    RequiredClass,
    Revisions,
)
from ringfence.messages.permission import Scope
from collections.abc import Iterable


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
    """Group equivalent requests. Groups, and requests in a group, keep the order of the input."""
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
