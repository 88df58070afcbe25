"""Event fields that name the subject of an event: agent, task, user, sponsor; from a lease, a request or a task."""

from __future__ import annotations

from typing import Any

from ringfence.audit.memory import LeaseFacts, RequestFacts
from ringfence.messages.lease import Delegator
from ringfence.messages.registry import TaskState
from ringfence.model.lifecycle import agents_of


def credential_fields(lease: LeaseFacts | None, facts: RequestFacts | None) -> dict[str, Any]:
    """Fields of a lease and its request, as far as they are known; empty if neither is."""
    source = lease or facts
    if source is None:
        return {}
    fields = {
        "agent": source.agent,
        "act": list(source.act),
        "delegators": delegators_of(lease.delegators) if lease is not None else None,
        "task": source.task,
        "sponsor": source.sponsor,
        "on_behalf_of": source.on_behalf_of,
        "request": source.request_id,
        "request_digest": facts.digest if facts is not None else None,
        "policy_revision": facts.policy_revision if facts is not None else None,
        "target": source.target,
    }
    return {name: value for name, value in fields.items() if value is not None}


def task_fields(task: TaskState) -> dict[str, Any]:
    """Fields of a task, by its record."""
    return {
        "agent": task.agent_id,
        "act": list(agents_of(task)),
        "task": task.task_id,
        "on_behalf_of": task.on_behalf_of,
    }


def delegators_of(delegators: tuple[Delegator, ...] | None) -> list[dict[str, str]] | None:
    """The agents that delegated a task, with their own tasks and sponsors; None if there are none."""
    return [one.model_dump() for one in delegators or ()] or None
