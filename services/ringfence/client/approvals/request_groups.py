"""Requests that would come to the same credential, shown once: who is asked the same ten times stops reading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ringfence.client.approvals.pending_approval import PendingApproval
from ringfence.messages.permission import Scope

GroupKey = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """Requests that wait and would come to the same, at least one. Each is answered by a signature of its own."""

    requests: tuple[PendingApproval, ...]

    @property
    def first(self) -> PendingApproval:
        """The one that is asked about, or waits the longest; what it says of the credential holds for all."""
        return self.requests[0]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the agent wants them, in its own words, each once."""
        return tuple(dict.fromkeys(request.reason for request in self.requests))

    @property
    def expires_at(self) -> int:
        """When the first of them is denied; seconds since 1970."""
        return min(request.expires_at for request in self.requests)


def group_equivalent(requests: Iterable[PendingApproval]) -> list[RequestGroup]:
    """Put requests together that would come to the same, in the order of the first of each."""
    groups: dict[GroupKey, list[PendingApproval]] = {}
    for request in requests:
        groups.setdefault(group_key(request), []).append(request)
    return [RequestGroup(tuple(group)) for group in groups.values()]


def group_key(request: PendingApproval) -> GroupKey:
    """Everything that a credential, and the approval of it, depend on; not what the agent says, nor when."""
    return (
        request.agent,
        request.task_id,
        _normal(request.scope),
        request.ttl_s,
        request.delivery,
        request.required,
        request.mine,
        request.revisions.model_dump_json(),
        request.request_id if request.break_glass else None,  # each of these is looked at by itself
    )


def _normal(scope: Scope) -> tuple[object, ...]:
    """A scope whatever the order in which it was written."""
    parts = {
        (p.target, tuple(sorted(set(p.verbs))), tuple(sorted(set(p.resources))), repr(p.model_extra))
        for p in scope
    }
    return tuple(sorted(parts))
