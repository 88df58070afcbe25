"""Who and what an event is about, in the words of events, from what is known of a lease, its request and its task."""

from __future__ import annotations

from typing import Any

from ringfence.audit.memory import LeaseFacts, RequestFacts
from ringfence.messages.lease import Delegator
from ringfence.messages.registry import TaskState
from ringfence.model.lifecycle import agents_of


def credential_fields(lease: LeaseFacts | None, facts: RequestFacts | None) -> dict[str, Any]:
    """Of a lease and the request that it came of, as far as they are known; nothing where neither is."""
    known = lease or facts
    if known is None:
        return {}
    fields = {
        "agent": known.agent,
        "act": list(known.act),
        "delegators": delegators_of(lease.delegators) if lease is not None else None,
        "task": known.task,
        "sponsor": known.sponsor,
        "on_behalf_of": known.on_behalf_of,
        "request": known.request_id,
        "request_digest": facts.digest if facts is not None else None,
        "policy_revision": facts.policy_revision if facts is not None else None,
        "target": known.target,
    }
    return {name: value for name, value in fields.items() if value is not None}


def task_fields(task: TaskState) -> dict[str, Any]:
    """Of a task, by its record."""
    return {
        "agent": task.agent_id,
        "act": list(agents_of(task)),
        "task": task.task_id,
        "on_behalf_of": task.on_behalf_of,
    }


def delegators_of(delegators: tuple[Delegator, ...] | None) -> list[dict[str, str]] | None:
    """The agents that handed a task on, with their own tasks and who answers for them; None where there are none."""
    return [one.model_dump() for one in delegators or ()] or None
