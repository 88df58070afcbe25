"""Groups requests that would produce the same credential, so that an approver sees each question once.

Somebody who is asked the same thing ten times stops reading.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ringfence.client.approvals.pending_approval import PendingApproval
from ringfence.messages.permission import Scope

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
