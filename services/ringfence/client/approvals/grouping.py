"""Requests that would come to the same credential, shown once: who is asked the same ten times stops reading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ringfence.client.approvals.pending import PendingApproval
from ringfence.messages.permission import Scope

AlikeKey = tuple[object, ...]


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
        return tuple(dict.fromkeys(one.reason for one in self.requests))

    @property
    def expires_at(self) -> int:
        """When the first of them is denied; seconds since 1970."""
        return min(one.expires_at for one in self.requests)


def group_equivalent(requests: Iterable[PendingApproval]) -> list[RequestGroup]:
    """Put requests together that would come to the same, in the order of the first of each."""
    found: dict[AlikeKey, list[PendingApproval]] = {}
    for one in requests:
        found.setdefault(key_of(one), []).append(one)
    return [RequestGroup(tuple(group)) for group in found.values()]


def key_of(one: PendingApproval) -> AlikeKey:
    """Everything that a credential, and the approval of it, depend on; not what the agent says, nor when."""
    return (
        one.agent,
        one.task_id,
        _normal(one.scope),
        one.ttl_s,
        one.delivery,
        one.required,
        one.mine,
        one.revisions.model_dump_json(),
        one.request_id if one.break_glass else None,  # each of these is looked at by itself
    )


def _normal(scope: Scope) -> tuple[object, ...]:
    """A scope whatever the order in which it was written."""
    parts = {
        (p.target, tuple(sorted(set(p.verbs))), tuple(sorted(set(p.resources))), repr(p.model_extra))
        for p in scope
    }
    return tuple(sorted(parts))
